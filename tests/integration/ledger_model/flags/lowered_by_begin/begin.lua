-- begin with a flag that it takes down: events from now on queue another fetch.
-- KEYS, ARGV and answer as app/ledger/lua/begin.lua.
local now, member = tonumber(ARGV[1]), ARGV[4]
local r = redis.call('HMGET', KEYS[1], 'waiting', 'lease', 'dead')
if r[3] or not (r[1] or r[2]) then
  return {'nothing'}
end
if not r[1] and tonumber(r[2]) > now then
  return {'held'}
end
redis.call('HDEL', KEYS[1], 'waiting')
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('HSET', KEYS[1], 'lease', now + tonumber(ARGV[2]), 'holder', ARGV[3])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), member)
redis.call('SET', KEYS[5], member .. ' ' .. fence)
return {'fetch', fence, fence, 0, 0, 0, 0, '', '', '', 0}
