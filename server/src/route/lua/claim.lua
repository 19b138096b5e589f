-- Makes a new session of a device the newest, whoever had it before.
-- KEYS[1]  the device's session
-- ARGV     node, incarnation, session id, session id that the device named or '', epoch by the database's clock, life in ms,
--          window of takeovers in ms, takeovers remembered at most
-- Returns  epoch; node, incarnation, session id and epoch before; 1 if that one had left; takeovers within the window;
--          1 if this is one of them
local at = redis.call('TIME')
local now = at[1] * 1000 + math.floor(at[2] / 1000)
local held = redis.pcall('HMGET', KEYS[1], 'node', 'inc', 'sid', 'epoch', 'left', 'taken')
if held.err then
  -- Something else under our name.
  redis.call('DEL', KEYS[1])
  held = {}
end
-- Numbers of 13 digits are exact in Lua and keep their digits only when formatted so.
local function digits(number) return string.format('%.0f', number) end

-- By the database's clock, which all nodes follow: a session that was made while this store was away has its place in the order too.
local before = tonumber(held[4]) or 0
local epoch = math.max(before + 1, tonumber(ARGV[5]))
local taken = {}
for time in string.gmatch(held[6] or '', '%d+') do
  if now - tonumber(time) < tonumber(ARGV[7]) then taken[#taken + 1] = time end
end
local takeover = held[3] and not held[5] and held[3] ~= ARGV[4]
if takeover then taken[#taken + 1] = digits(now) end
while #taken > tonumber(ARGV[8]) do table.remove(taken, 1) end

redis.call('HSET', KEYS[1], 'node', ARGV[1], 'inc', ARGV[2], 'sid', ARGV[3], 'epoch', digits(epoch),
  'last_active', digits(now), 'taken', table.concat(taken, ' '))
redis.call('HDEL', KEYS[1], 'left')
redis.call('PEXPIRE', KEYS[1], ARGV[6])
return {digits(epoch), held[1] or '', held[2] or '', held[3] or '', digits(before), held[5] and '1' or '0',
  tostring(#taken), takeover and '1' or '0'}
