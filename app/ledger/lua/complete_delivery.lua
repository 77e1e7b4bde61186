-- complete_delivery: a delivery ended. Where a newer revision has come meanwhile, it gets a job at once.
--
-- Repeated by a worker that did not get the answer, it changes nothing.
-- a  order (member), worker, sink, revision and digest of the delivery, outcome (DeliveryOutcome of work.py), wait ms (until
--    the next attempt), reason, failure (type and place of the error, or the reason of a rejection or a skip; '' if it
--    succeeded), duration_ms,
--    unavailable (1 = its destination takes no order now), keep ms, grace ms, job, sinks, failures (attempts in a row after
--    which the breaker opens), first_open ms, longest_open ms
-- Returns for how many ms this attempt has opened the breaker of the sink, 0 if it has not.
local is_first_call = redis.call('DEL', prefix .. 'claim:' .. a.worker) == 1
local o = load(a.order, {'generation', 'fetched_generation', 'revision', 'dead', 'erased_at', 'digest'})
if redis.call('EXISTS', o.record) == 0 then
  return 0
end
local clock, name = deliveries .. a.sink, a.sink .. ':'
local s = of_sink(o, a.sink, 'revision', 'dead', 'worker', 'job', 'attempts')
-- A worker that was frozen past its lease must not end the delivery of another.
local is_mine = s.worker == a.worker
if is_mine then
  redis.call('HDEL', o.record, name .. 'lease', name .. 'worker', name .. 'crashes')
end
-- Delivered before Redis was flushed or restored from an older copy: this record has no such revision, or counts another
-- content by its number.
local is_unknown = o.revision < a.revision or (o.revision == a.revision and o.digest and o.digest ~= a.digest)
if is_first_call or is_unknown then
  -- Of an erased order no text of the sink is kept, as in erase.
  local failure = o.erased_at > 0 and a.outcome == 'rejected' and '' or a.failure
  append_history(o, 'delivery', a.sink, a.revision, a.outcome, failure, a.duration_ms)
end
-- What this attempt shows of the destination: nothing if the sink was not called. An attempt that began before the breaker
-- opened opens it no further; whatever else a destination answers, it is back.
local was_called = a.outcome ~= 'skipped' and a.reason ~= 'kills_worker' and a.reason ~= 'unreadable_answer'
local function note_destination()
  local key = prefix .. 'sink-breaker:' .. a.sink
  local b = redis.call('HMGET', key, 'probe', 'open_ms', 'open_until')
  if b[1] == a.worker then
    redis.call('HDEL', key, 'probe', 'probe_until')
  end
  if not was_called or not is_first_call then
    return 0
  elseif a.outcome == 'disabled' then
    redis.call('HSETNX', prefix .. 'sinks-disabled', a.sink, now .. ' ' .. a.reason)
  end
  if a.unavailable == 0 then
    redis.call('DEL', key)
    return 0
  end
  local failures, open_until = redis.call('HINCRBY', key, 'failures', 1), tonumber(b[3] or '0')
  if failures < a.failures or (open_until > now and open_until <= now + a.longest_open) then
    return 0
  end
  local open_ms = math.min(b[2] and 2 * tonumber(b[2]) or a.first_open, a.longest_open)
  redis.call('HSETNX', key, 'opened_at', now)
  redis.call('HSET', key, 'open_ms', open_ms, 'open_until', now + open_ms, 'reason', a.reason)
  return open_ms
end
local noted, opened_ms = isolate(note_destination)
opened_ms = noted and opened_ms or 0

local is_done = a.outcome == 'succeeded' or a.outcome == 'skipped'
if is_unknown then
  return opened_ms
elseif is_done then
  if tonumber(s.revision or '0') < a.revision then
    redis.call('HSET', o.record, name .. 'revision', a.revision)
  end
  if o.revision == a.revision then
    reset_delivery(o, a.sink)
  end
  if a.outcome == 'succeeded' then
    isolate(redis.call, 'DEL', prefix .. 'sink-failing:' .. a.sink)
  end
elseif is_mine and o.revision == a.revision and is_behind(o, s) then
  -- Else a newer revision is to be delivered, which has its own attempts (store_fetch), or another worker has delivered.
  if a.outcome == 'retry' or a.outcome == 'postponed' then
    redis.call('ZADD', clock, now + a.wait, o.member)
    redis.call('HSET', o.record, name .. 'next_at', now + a.wait)
  elseif a.outcome == 'disabled' then
    -- It waits for the operator.
    redis.call('ZADD', clock, now, o.member)
  else
    add_dead_letter(o, a.sink, a.reason)
    redis.call('HSET', o.record, name .. 'dead', a.reason)
    count('deliveries_dead_lettered|' .. a.sink)
    is_done = true
  end
  if (a.outcome == 'postponed' or a.outcome == 'disabled') and s.attempts then
    -- Else a replay counts anew meanwhile.
    redis.call('HINCRBY', o.record, name .. 'attempts', -1)
  end
  if a.outcome == 'postponed' then
    redis.call('HSETNX', o.record, name .. 'postponed', now)
    redis.call('HSET', o.record, name .. 'error', a.failure)
  elseif a.outcome == 'rejected' then
    -- The sink works: this order is what it refuses.
    redis.call('HDEL', o.record, name .. 'error')
    isolate(redis.call, 'DEL', prefix .. 'sink-failing:' .. a.sink)
  elseif a.outcome ~= 'disabled' then
    note_failure(o, a.sink, a.failure)
  end
end
if o.erased_at > 0 then
  return opened_ms
elseif o.revision == a.revision and is_done then
  redis.call('HDEL', o.record, name .. 'job', name .. 'enqueues')
  leave(o, clock)
elseif o.revision > a.revision and is_mine then
  redis.call('ZADD', clock, 'LT', now + a.grace, o.member)
  if not s.job then
    push_delivery(o, a.sink, next_suffix(o))
    flush_jobs()
  end
end
return opened_ms
