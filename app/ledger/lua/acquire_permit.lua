-- acquire_permit: may one request be made with this API key now?
--
-- a  key (id of the API key), breaker (id of key and company), permit (token: `l-` live or `b-` backfill, then who holds
--    it), lease ms of a permit, concurrency, backfill_concurrency, requests a window, window ms, longest_retry ms,
--    longest_open ms (of a breaker)
-- Returns {granted}; {full, ms since a permit changed hands}; {closed, ms until it may be asked again, reason code}
local limiter, permits = prefix .. 'limiter:' .. a.key, prefix .. 'permits:' .. a.key
local window, breaker = prefix .. 'window:' .. a.key, prefix .. 'breaker:' .. a.breaker
local l = redis.call('HMGET', limiter, 'retry_until', 'moved')
local b = redis.call('HMGET', breaker, 'open_until', 'probe_until')
local retry_until, open_until, probe_until = tonumber(l[1] or '0'), tonumber(b[1] or '0'), tonumber(b[2] or '0')
-- A time that lies farther ahead than it can was taken from a Redis server whose clock was ahead.
redis.call('ZREMRANGEBYSCORE', permits, '(' .. now + a.lease, '+inf')
redis.call('ZREMRANGEBYSCORE', window, '(' .. now, '+inf')
if retry_until > now + a.longest_retry then
  retry_until = 0
end
if math.max(open_until, probe_until) > now + math.max(a.longest_open, a.longest_retry, a.lease) then
  open_until, probe_until = 0, 0
  redis.call('DEL', breaker)
end
if retry_until > now then
  return {'closed', retry_until - now, 'throttled'}
elseif open_until > now then
  return {'closed', open_until - now, 'breaker_open'}
elseif open_until > 0 and probe_until > now then
  return {'closed', 1000, 'breaker_open'}
end
redis.call('ZREMRANGEBYSCORE', permits, '-inf', now)
local taken, backfill = redis.call('ZRANGE', permits, 0, -1), 0
for _, permit in ipairs(taken) do
  if string.sub(permit, 1, 2) == 'b-' then
    backfill = backfill + 1
  end
end
if #taken >= a.concurrency or (string.sub(a.permit, 1, 2) == 'b-' and backfill >= a.backfill_concurrency) then
  return {'full', now - tonumber(l[2] or now)}
end
redis.call('ZREMRANGEBYSCORE', window, '-inf', now - a.window)
if redis.call('ZCARD', window) >= a.requests then
  local oldest = redis.call('ZRANGE', window, 0, 0, 'WITHSCORES')
  return {'closed', math.floor(tonumber(oldest[2])) + a.window + 1 - now, 'window_full'}
end
redis.call('ZADD', permits, now + a.lease, a.permit)
redis.call('PEXPIRE', permits, a.lease)
redis.call('ZADD', window, now, a.permit)
redis.call('PEXPIRE', window, a.window)
redis.call('HSET', limiter, 'moved', now)
redis.call('PEXPIRE', limiter, 86400000)
if open_until > 0 then
  redis.call('HSET', breaker, 'probe_until', now + a.lease, 'probe', a.permit)
end
return {'granted'}
