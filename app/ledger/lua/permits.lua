-- permits: what the scripts share that take and release permits; stands between prelude.lua and each of them (redis.py).
--
-- `limits` is a map (class RateLimiter of app/ledger/rate_limit.py): key (id of the API key), breaker (id of key and
-- company), lease ms of a permit, concurrency, backfill_concurrency, requests a window, window ms, longest_retry ms,
-- longest_open ms (of a breaker), wait ms (how long a worker waits for a permit).

-- Take a permit for one request: `permit` is `l-` (live) or `b-` (backfill), then who holds it. With `wait` ms it lines up
-- where all are taken, unless they hang: none has changed hands for so long. Returns {granted, permit};
-- {full, permit, ms that it waits, 0 = it does not}; {closed, permit, ms until it may be asked again, reason code}.
local function acquire_permit(limits, permit, breaker_id, wait)
  local limiter, permits = prefix .. 'limiter:' .. limits.key, prefix .. 'permits:' .. limits.key
  local window, breaker = prefix .. 'window:' .. limits.key, prefix .. 'breaker:' .. breaker_id
  local l = redis.call('HMGET', limiter, 'retry_until', 'moved')
  local b = redis.call('HMGET', breaker, 'open_until', 'probe_until')
  local retry_until, open_until, probe_until = tonumber(l[1] or '0'), tonumber(b[1] or '0'), tonumber(b[2] or '0')
  -- A time that lies farther ahead than it can was taken from a Redis server whose clock was ahead.
  redis.call('ZREMRANGEBYSCORE', permits, '(' .. now + limits.lease, '+inf')
  redis.call('ZREMRANGEBYSCORE', window, '(' .. now, '+inf')
  redis.call('ZREMRANGEBYSCORE', permits, '-inf', now)
  local taken, backfill = redis.call('ZRANGE', permits, 0, -1), 0
  for _, other in ipairs(taken) do
    if other == permit then
      -- Another worker handed it over, or the answer to this call was lost.
      return {'granted', permit}
    elseif string.sub(other, 1, 2) == 'b-' then
      backfill = backfill + 1
    end
  end
  if retry_until > now + limits.longest_retry then
    retry_until = 0
  end
  if math.max(open_until, probe_until) > now + math.max(limits.longest_open, limits.longest_retry, limits.lease) then
    open_until, probe_until = 0, 0
    redis.call('DEL', breaker)
  end
  if retry_until > now then
    return {'closed', permit, retry_until - now, 'throttled'}
  elseif open_until > now then
    return {'closed', permit, open_until - now, 'breaker_open'}
  elseif open_until > 0 and probe_until > now then
    return {'closed', permit, 1000, 'breaker_open'}
  end
  if #taken >= limits.concurrency or (string.sub(permit, 1, 2) == 'b-' and backfill >= limits.backfill_concurrency) then
    if wait == 0 or now - tonumber(l[2] or now) > wait then
      return {'full', permit, 0}
    end
    local waiting = prefix .. 'waiting:' .. limits.key
    redis.call('ZADD', waiting, now + wait, permit .. ' ' .. breaker_id)
    redis.call('PEXPIRE', waiting, wait)
    return {'full', permit, wait}
  end
  redis.call('ZREMRANGEBYSCORE', window, '-inf', now - limits.window)
  if redis.call('ZCARD', window) >= limits.requests then
    local oldest = redis.call('ZRANGE', window, 0, 0, 'WITHSCORES')
    return {'closed', permit, math.floor(tonumber(oldest[2])) + limits.window + 1 - now, 'window_full'}
  end
  redis.call('ZADD', permits, now + limits.lease, permit)
  redis.call('PEXPIRE', permits, limits.lease)
  redis.call('ZADD', window, now, permit)
  redis.call('PEXPIRE', window, limits.window)
  redis.call('HSET', limiter, 'moved', now)
  redis.call('PEXPIRE', limiter, 86400000)
  if open_until > 0 then
    redis.call('HSET', breaker, 'probe_until', now + limits.lease, 'probe', permit)
  end
  return {'granted', permit}
end

-- Hand free permits over to the workers that wait, the first one first: each hears of it by a list of its own, and begins its
-- request without another call. One for which the way is closed by now asks again, and gets the reason.
local function grant_waiting(limits)
  local waiting = prefix .. 'waiting:' .. limits.key
  if redis.call('EXISTS', waiting) == 0 then
    return
  end
  redis.call('ZREMRANGEBYSCORE', waiting, '-inf', now)
  redis.call('ZREMRANGEBYSCORE', waiting, '(' .. now + limits.wait, '+inf')
  for _, member in ipairs(redis.call('ZRANGE', waiting, 0, -1)) do
    local permit, breaker_id = string.match(member, '^(%S+) (%S+)$')
    local outcome = acquire_permit(limits, permit, breaker_id, 0)[1]
    if outcome ~= 'full' then
      local granted = prefix .. 'granted:' .. permit
      redis.call('ZREM', waiting, member)
      redis.call('RPUSH', granted, outcome)
      redis.call('PEXPIRE', granted, 2000)
    elseif string.sub(permit, 1, 2) == 'l-' then
      break
    end
  end
end
