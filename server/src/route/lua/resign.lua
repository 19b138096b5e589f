-- Gives a node's lease up, if it is still this incarnation's.
-- KEYS[1]  the node's lease
-- KEYS[2]  all nodes by the time of their last beat
-- ARGV     node, incarnation
if redis.call('HGET', KEYS[1], 'inc') ~= ARGV[2] then return 0 end
redis.call('DEL', KEYS[1])
redis.call('ZREM', KEYS[2], ARGV[1])
return 1
