-- fail with a flag: up it goes again, unless a later fetch is under way. KEYS, ARGV and answer as app/ledger/lua/fail.lua.
local member, what = ARGV[2], ARGV[6]
redis.call('DEL', KEYS[5])
if redis.call('HGET', KEYS[1], 'fence') ~= ARGV[3] then
  return 'refused'
end
redis.call('HDEL', KEYS[1], 'lease', 'holder')
if what == 'dead' then
  redis.call('HSET', KEYS[1], 'dead', ARGV[8])
  redis.call('ZADD', KEYS[3], ARGV[1], member)
elseif what == 'gone' then
  redis.call('HSET', KEYS[1], 'stored', ARGV[3])
end
if what == 'dead' or (what == 'gone' and redis.call('HEXISTS', KEYS[1], 'waiting') == 0) then
  redis.call('ZREM', KEYS[2], member)
  return what
end
redis.call('HSET', KEYS[1], 'waiting', 1)
redis.call('ZADD', KEYS[2], ARGV[7], member)
return 'again'
