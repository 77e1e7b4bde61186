-- begin with a flag that finish takes down: events that come while a fetch is queued or under way share it.
-- KEYS, ARGV and answer as app/ledger/lua/begin.lua.
local now, member = tonumber(ARGV[1]), ARGV[4]
local r = redis.call('HMGET', KEYS[1], 'waiting', 'lease', 'dead')
if r[3] or not r[1] then
  return {'nothing'}
end
if tonumber(r[2] or '0') > now then
  return {'held'}
end
local fence = redis.call('HINCRBY', KEYS[1], 'fence', 1)
redis.call('HSET', KEYS[1], 'lease', now + tonumber(ARGV[2]), 'holder', ARGV[3])
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[2]), member)
redis.call('SET', KEYS[5], member .. ' ' .. fence)
return {'fetch', fence, fence, 0, 0, 0, 0, '', '', '', 0}
