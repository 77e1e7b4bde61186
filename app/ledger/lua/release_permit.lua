-- release_permit: a request with this API key has ended, or the worker that held permits has.
--
-- a  limits as in permits.lua, call (its name in a counter), permit (its token, or '' to release all that `worker` holds),
--    worker, order (that the request was for, '' = none), reason, http (of a failure), outcome:
--      good      the order came
--      missing   upstream does not have it, perhaps not yet: a failure only of a probe
--      failed    of this order alone, or of all
--      unknown   nothing is known: upstream throttles, or the worker ended
--    retry_after ms (0 = none): for the key if the outcome is unknown, else for the breaker if it opens
--    failures (orders that fail in a row and open the breaker), first_open ms, longest_open ms
-- Returns {ms until the key may be used again (0 = now), 1 if this opened the breaker, ms when the latest good request
--   began (0 = not known)}.
local limiter, permits = prefix .. 'limiter:' .. a.limits.key, prefix .. 'permits:' .. a.limits.key
local waiting, breaker = prefix .. 'waiting:' .. a.limits.key, prefix .. 'breaker:' .. a.limits.breaker
local failing = prefix .. 'failing:' .. a.limits.breaker
local b = redis.call('HMGET', breaker, 'open_until', 'open_ms', 'answered_at', 'probe')
local open_until, answered_at, probe = tonumber(b[1] or '0'), tonumber(b[3] or '0'), b[4] or ''
local ended, held, holder = {a.permit}, 0, '-' .. a.worker .. '-'
if a.permit == '' then
  ended = {}
  for _, permit in ipairs(redis.call('ZRANGE', permits, 0, -1)) do
    if string.find(permit, holder, 1, true) then
      table.insert(ended, permit)
    end
  end
  for _, member in ipairs(redis.call('ZRANGE', waiting, 0, -1)) do
    if string.find(member, holder, 1, true) then
      redis.call('ZREM', waiting, member)
    end
  end
end
for _, permit in ipairs(ended) do
  held = held + redis.call('ZREM', permits, permit)
end
if #ended > 0 then
  redis.call('HSET', limiter, 'moved', now)
  redis.call('PEXPIRE', limiter, 86400000)
end

-- Note what the request shows; return the answer of this script.
local function note()
  if held > 0 and a.http == 429 then
    count('throttled|' .. a.call)
  end
  if a.outcome == 'unknown' then
    -- Else the breaker would stay closed to all until this probe expired.
    if probe == a.permit or (a.permit == '' and string.find(probe, holder, 1, true)) then
      redis.call('HDEL', breaker, 'probe', 'probe_until')
    end
    local retry_until = a.retry_after > 0 and now + a.retry_after or 0
    if retry_until > tonumber(redis.call('HGET', limiter, 'retry_until') or '0') then
      redis.call('HSET', limiter, 'retry_until', retry_until)
    end
    return {a.retry_after, 0, answered_at}
  elseif a.outcome == 'good' then
    redis.call('DEL', breaker, failing)
    -- When it began: an answer under way shows nothing about a failure that came before it ended.
    local began = redis.call('ZSCORE', prefix .. 'window:' .. a.limits.key, a.permit)
    answered_at = math.max(answered_at, math.floor(tonumber(began or now)))
    redis.call('HSET', breaker, 'answered_at', answered_at)
    redis.call('PEXPIRE', breaker, 172800000)
    return {0, 0, answered_at}
  end

  -- Called again by a worker that did not get the answer, it counts no second failure. An order that fails again does not
  -- count again: one bad order opens nothing.
  local opened = 0
  if held > 0 and a.outcome == 'failed' then
    redis.call('SADD', failing, a.order ~= '' and a.order or a.permit)
    redis.call('PEXPIRE', failing, 86400000)
  end
  -- Requests that fail while it is open had started before: they do not extend it.
  if held > 0 and open_until <= now and (open_until > 0 or redis.call('SCARD', failing) >= a.failures) then
    local open_ms = math.min(math.max(tonumber(b[2] or '0') * 2, a.first_open), a.longest_open)
    open_until, opened = now + math.max(open_ms, a.retry_after), 1
    redis.call('HSET', breaker, 'open_until', open_until, 'open_ms', open_ms, 'reason', a.reason, 'http', a.http)
    redis.call('HSETNX', breaker, 'opened_at', now)
    redis.call('HDEL', breaker, 'probe_until', 'probe')
    redis.call('PEXPIRE', breaker, 172800000)
  end
  return {math.max(open_until, now) - now, opened, answered_at}
end

local answer = note()
isolate(grant_waiting, a.limits)
return answer
