-- Says that a session is alive, and puts it back where it was lost.
-- KEYS[1]  the device's session
-- ARGV     node, incarnation, session id, epoch, life in ms, an incarnation that is known to be dead or ''
-- Returns  'held', 'restored', or 'newer' where a newer session that has not left has the device (nothing was changed); that
--          one's node and incarnation
local at = redis.call('TIME')
local now = string.format('%.0f', at[1] * 1000 + math.floor(at[2] / 1000))
local held = redis.pcall('HMGET', KEYS[1], 'sid', 'epoch', 'left', 'node', 'inc')
if held.err then
  -- Something else under our name: one such key must not stand in the way of all that are asked with it.
  redis.call('DEL', KEYS[1])
  held = {}
end
local other = held[1] and held[1] ~= ARGV[3] and not held[3] and held[5] ~= ARGV[6]
if other then
  local theirs, mine = tonumber(held[2]) or 0, tonumber(ARGV[4])
  -- Two of the same millisecond: one of them, and on every node the same one.
  if theirs > mine or (theirs == mine and held[1] > ARGV[3]) then
    return {'newer', held[4] or '', held[5] or ''}
  end
end
redis.call('HSET', KEYS[1], 'node', ARGV[1], 'inc', ARGV[2], 'sid', ARGV[3], 'epoch', ARGV[4], 'last_active', now)
redis.call('HDEL', KEYS[1], 'left')
redis.call('PEXPIRE', KEYS[1], ARGV[5])
return {held[1] == ARGV[3] and 'held' or 'restored', '', ''}
