-- reclaim: a worker was killed; the slots of an API key that it held are free now instead of when their lease ends.
--
-- KEYS  1 budget  2 slots  3 freed  4 breaker
-- ARGV  1 now ms  2 worker  3 slots
-- Returns how many slots it held.
local held, whose = 0, '-' .. ARGV[2] .. '-'
for _, token in ipairs(redis.call('ZRANGE', KEYS[2], 0, -1)) do
  if string.find(token, whose, 1, true) then
    redis.call('ZREM', KEYS[2], token)
    redis.call('RPUSH', KEYS[3], 1)
    held = held + 1
  end
end
if held > 0 then
  redis.call('LTRIM', KEYS[3], -tonumber(ARGV[3]), -1)
  redis.call('PEXPIRE', KEYS[3], 2000)
  redis.call('HSET', KEYS[1], 'moved', ARGV[1])
end
-- Nobody would ask a half-open breaker again until the probe of a dead worker ran out.
local probe = redis.call('HGET', KEYS[4], 'probe')
if probe and string.find(probe, whose, 1, true) then
  redis.call('HDEL', KEYS[4], 'probe', 'probe_until')
end
return held
