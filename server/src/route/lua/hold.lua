-- Says that a session is alive, and puts it back where it was lost.
-- KEYS[1]  the device's session
-- ARGV     node, incarnation, session id, epoch, life in ms
-- Returns  'held', 'restored', or 'newer' where a newer session has the device: nothing was changed
local at = redis.call('TIME')
local now = string.format('%.0f', at[1] * 1000 + math.floor(at[2] / 1000))
local held = redis.call('HMGET', KEYS[1], 'sid', 'epoch')
if held[1] ~= ARGV[3] and held[2] and tonumber(held[2]) > tonumber(ARGV[4]) then return 'newer' end
redis.call('HSET', KEYS[1], 'node', ARGV[1], 'inc', ARGV[2], 'sid', ARGV[3], 'epoch', ARGV[4], 'last_active', now)
redis.call('HDEL', KEYS[1], 'left')
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return held[1] == ARGV[3] and 'held' or 'restored'
