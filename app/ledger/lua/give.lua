-- give: a request with this API key has ended; give its slot back and tell how it went.
--
-- KEYS  1 budget  2 slots  3 freed  4 breaker
-- ARGV  1 now ms  2 token of the slot  3 how: answered (the key works), failed, fault (it does not)
--       4 not before ms (Retry-After), 0 = none  5 failures that open  6 first open ms  7 longest open ms  8 slots
-- Returns {ms until the key may be used again (0 = now), 1 if this opened the breaker}.
local now, how, retry_until = tonumber(ARGV[1]), ARGV[3], tonumber(ARGV[4])
redis.call('ZREM', KEYS[2], ARGV[2])
redis.call('RPUSH', KEYS[3], 1)
redis.call('LTRIM', KEYS[3], -tonumber(ARGV[8]), -1)
redis.call('PEXPIRE', KEYS[3], 2000)
redis.call('HSET', KEYS[1], 'moved', now)
redis.call('PEXPIRE', KEYS[1], 86400000)
local b = redis.call('HMGET', KEYS[4], 'open_until', 'failures', 'open_ms')
local open_until, opened = tonumber(b[1] or '0'), 0
if retry_until > tonumber(redis.call('HGET', KEYS[1], 'retry_until') or '0') then
  redis.call('HSET', KEYS[1], 'retry_until', retry_until)
end
if how == 'answered' then
  redis.call('DEL', KEYS[4])
  return {retry_until, 0}
end
local failures = redis.call('HINCRBY', KEYS[4], 'failures', 1)
redis.call('PEXPIRE', KEYS[4], 86400000)
-- Those who failed while it was open began before: they say nothing new and do not make it longer.
if open_until <= now and (how == 'fault' or open_until > 0 or failures >= tonumber(ARGV[5])) then
  local open_ms = math.min(math.max(tonumber(b[3] or '0') * 2, tonumber(ARGV[6])), tonumber(ARGV[7]))
  open_until = now + open_ms
  opened = 1
  redis.call('HSET', KEYS[4], 'open_until', open_until, 'open_ms', open_ms)
  redis.call('HDEL', KEYS[4], 'probe_until', 'probe')
end
return {math.max(open_until, retry_until), opened}
