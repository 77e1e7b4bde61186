-- finish that takes the flag down, and with it what came meanwhile. KEYS, ARGV and answer as app/ledger/lua/finish.lua.
local member, fence = ARGV[2], tonumber(ARGV[3])
redis.call('DEL', KEYS[5])
if tonumber(redis.call('HGET', KEYS[1], 'stored') or '0') > fence then
  return {'refused', 0, 0}
end
redis.call('SET', KEYS[6], ARGV[10])
redis.call('HSET', KEYS[1], 'stored', fence, 'digest', ARGV[9])
redis.call('HDEL', KEYS[1], 'lease', 'holder')
if ARGV[7] ~= '' then
  redis.call('ZADD', KEYS[2], ARGV[7], member)
  return {'again', 1, 1}
end
redis.call('HDEL', KEYS[1], 'waiting')
redis.call('ZREM', KEYS[2], member)
return {'home', 1, 1}
