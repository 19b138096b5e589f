-- Prolongs a node's lease and says which life of the store this is.
-- KEYS[1]  the node's lease
-- KEYS[2]  all nodes by the time of their last beat
-- KEYS[3]  the store's epoch
-- ARGV     node, incarnation, address, sessions, 1 if draining, life in ms, an epoch for a store that has none,
--          time in ms after which a silent node is forgotten
-- Returns  the store's epoch, and the incarnation that had the lease before or ''
local at = redis.call('TIME')
local now = at[1] * 1000 + math.floor(at[2] / 1000)
local epoch = redis.call('GET', KEYS[3])
if not epoch then
  epoch = ARGV[7]
  redis.call('SET', KEYS[3], epoch)
end
local before = redis.call('HGET', KEYS[1], 'inc')
redis.call('HSET', KEYS[1], 'inc', ARGV[2], 'address', ARGV[3], 'sessions', ARGV[4], 'draining', ARGV[5])
redis.call('PEXPIRE', KEYS[1], ARGV[6])
redis.call('ZADD', KEYS[2], string.format('%.0f', now), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', string.format('%.0f', now - tonumber(ARGV[8])))
return {epoch, before or ''}
