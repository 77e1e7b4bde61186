-- release_permit: a request with this API key has ended, or the worker that held permits has.
--
-- a  key, breaker, permit (its token, or '' to release all that `worker` holds), worker, concurrency,
--    outcome: answered (the key works), failed, fault (it does not), released (nothing is known: the worker ended)
--    retry_after ms (0 = none), failures (in a row that open the breaker), first_open ms, longest_open ms
-- Returns {ms until the key may be used again (0 = now), 1 if this opened the breaker}.
local limiter, permits = prefix .. 'limiter:' .. a.key, prefix .. 'permits:' .. a.key
local wakeups, breaker = prefix .. 'wakeups:' .. a.key, prefix .. 'breaker:' .. a.breaker
local ended, held, holder = {a.permit}, 0, '-' .. a.worker .. '-'
if a.permit == '' then
  ended = {}
  for _, permit in ipairs(redis.call('ZRANGE', permits, 0, -1)) do
    if string.find(permit, holder, 1, true) then
      table.insert(ended, permit)
    end
  end
  -- Else the breaker would stay closed to all until the probe of the ended worker expired.
  local probe = redis.call('HGET', breaker, 'probe')
  if probe and string.find(probe, holder, 1, true) then
    redis.call('HDEL', breaker, 'probe', 'probe_until')
  end
end
for _, permit in ipairs(ended) do
  held = held + redis.call('ZREM', permits, permit)
  redis.call('RPUSH', wakeups, 1)
end
if #ended > 0 then
  redis.call('LTRIM', wakeups, -a.concurrency, -1)
  redis.call('PEXPIRE', wakeups, 2000)
  redis.call('HSET', limiter, 'moved', now)
  redis.call('PEXPIRE', limiter, 86400000)
end
local retry_until = a.retry_after > 0 and now + a.retry_after or 0
if retry_until > tonumber(redis.call('HGET', limiter, 'retry_until') or '0') then
  redis.call('HSET', limiter, 'retry_until', retry_until)
end
if a.outcome == 'released' then
  return {0, 0}
elseif a.outcome == 'answered' then
  redis.call('DEL', breaker)
  return {a.retry_after, 0}
end
local b = redis.call('HMGET', breaker, 'open_until', 'open_ms')
local open_until, opened = tonumber(b[1] or '0'), 0
-- Called again by a worker that did not get the answer, it counts no second failure.
local failures = held > 0 and redis.call('HINCRBY', breaker, 'failures', 1) or 0
redis.call('PEXPIRE', breaker, 86400000)
-- Requests that fail while it is open had started before: they do not extend it.
if held > 0 and open_until <= now and (a.outcome == 'fault' or open_until > 0 or failures >= a.failures) then
  local open_ms = math.min(math.max(tonumber(b[2] or '0') * 2, a.first_open), a.longest_open)
  open_until, opened = now + open_ms, 1
  redis.call('HSET', breaker, 'open_until', open_until, 'open_ms', open_ms)
  redis.call('HDEL', breaker, 'probe_until', 'probe')
end
return {math.max(open_until, retry_until, now) - now, opened}
