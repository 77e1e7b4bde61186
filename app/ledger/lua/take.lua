-- take: may one request be made with this API key now?
--
-- KEYS  1 budget  2 slots  3 window  4 breaker
-- ARGV  1 now ms  2 token of the slot (`l-` live, `b-` backfill, then who holds it)  3 lease of a slot ms  4 slots
--       5 slots of backfill  6 requests a window  7 window ms  8 longest Retry-After ms  9 longest open ms of a breaker
-- Returns {go}; {full, ms since a slot changed hands}; {closed, ms until, reason code}
local now, token = tonumber(ARGV[1]), ARGV[2]
local b = redis.call('HMGET', KEYS[1], 'retry_until', 'moved')
local breaker = redis.call('HMGET', KEYS[4], 'open_until', 'probe_until')
local retry_until = tonumber(b[1] or '0')
local open_until, probe_until = tonumber(breaker[1] or '0'), tonumber(breaker[2] or '0')
-- What lies further ahead than it can was written by a clock that was ahead, and is right again. Clocks of two machines
-- may differ by as much as a window.
local skew = tonumber(ARGV[7])
if retry_until > now + tonumber(ARGV[8]) + skew then
  retry_until = now
end
if open_until > now + tonumber(ARGV[9]) + skew or probe_until > now + tonumber(ARGV[3]) + skew then
  open_until, probe_until = now, 0
  redis.call('HSET', KEYS[4], 'open_until', now)
  redis.call('HDEL', KEYS[4], 'probe_until')
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '(' .. now + tonumber(ARGV[3]) + skew, '+inf')
redis.call('ZREMRANGEBYSCORE', KEYS[3], '(' .. now + skew, '+inf')
if retry_until > now then
  return {'closed', retry_until, 'throttled'}
end
local half_open = open_until > 0
if open_until > now then
  return {'closed', open_until, 'breaker_open'}
end
if half_open and probe_until > now then
  return {'closed', now + 1000, 'breaker_open'}
end
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local taken, backfill = redis.call('ZRANGE', KEYS[2], 0, -1), 0
for _, slot in ipairs(taken) do
  if string.sub(slot, 1, 2) == 'b-' then
    backfill = backfill + 1
  end
end
if #taken >= tonumber(ARGV[4]) or (string.sub(token, 1, 2) == 'b-' and backfill >= tonumber(ARGV[5])) then
  return {'full', now - tonumber(b[2] or ARGV[1])}
end
redis.call('ZREMRANGEBYSCORE', KEYS[3], '-inf', now - tonumber(ARGV[7]))
if redis.call('ZCARD', KEYS[3]) >= tonumber(ARGV[6]) then
  local oldest = redis.call('ZRANGE', KEYS[3], 0, 0, 'WITHSCORES')
  return {'closed', math.floor(tonumber(oldest[2])) + tonumber(ARGV[7]) + 1, 'window_full'}
end
redis.call('ZADD', KEYS[2], now + tonumber(ARGV[3]), token)
redis.call('PEXPIRE', KEYS[2], ARGV[3])
redis.call('ZADD', KEYS[3], now, token)
redis.call('PEXPIRE', KEYS[3], ARGV[7])
redis.call('HSET', KEYS[1], 'moved', now)
if half_open then
  redis.call('HSET', KEYS[4], 'probe_until', now + tonumber(ARGV[3]), 'probe', token)
end
return {'go'}
