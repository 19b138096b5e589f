-- Notes that a session has ended, if it is still the device's newest. Its id is kept for a while: who names it on its return
-- is resumed, on whatever node.
-- KEYS[1]  the device's session
-- ARGV     session id, life in ms
-- A table: something else under our name, which is not this session.
if redis.pcall('HGET', KEYS[1], 'sid') ~= ARGV[1] then return 0 end
redis.call('HSET', KEYS[1], 'left', '1')
redis.call('PEXPIRE', KEYS[1], ARGV[2])
return 1
