-- complete_delivery: a delivery ended. The worker then acquires the next one.
--
-- What failed ends the job (RQ's time limit strikes once a job), so the order is due at once for its other sinks.
-- Repeated by a worker that did not get the answer, it changes nothing.
-- a  order (member), worker, sink, revision, outcome (DeliveryOutcome of work.py), wait ms (until the next attempt), reason,
--    failure (type and place of the error, or the reason of a rejection; '' if it succeeded), duration_ms
local is_first_call = redis.call('DEL', prefix .. 'claim:' .. a.worker) == 1
local o = load(a.order, {'revision', 'delivery_worker', 'erased_at'})
if redis.call('EXISTS', o.record) == 0 then
  return 0
end
-- A worker that was frozen past its lease must not end the delivery of another.
local is_mine = o.delivery_worker == a.worker
if is_mine then
  redis.call('HDEL', o.record, 'delivery_lease', 'delivery_worker', a.sink .. ':crashes')
end
if is_first_call or o.revision < a.revision then
  -- Of an erased order no text of the sink is kept, as in erase.
  local failure = o.erased_at > 0 and a.outcome == 'rejected' and '' or a.failure
  append_history(o, 'delivery', a.sink, a.revision, a.outcome, failure, a.duration_ms)
end
if o.revision < a.revision then
  -- Delivered before Redis was flushed or restored from an older copy: this record has no such revision yet.
  return 0
elseif a.outcome == 'succeeded' then
  if tonumber(redis.call('HGET', o.record, a.sink .. ':revision') or '0') < a.revision then
    redis.call('HSET', o.record, a.sink .. ':revision', a.revision)
  end
  if o.revision == a.revision then
    reset_delivery(o, a.sink)
  end
  isolate(redis.call, 'DEL', prefix .. 'sink-failing:' .. a.sink)
elseif is_mine and o.revision == a.revision then
  -- Else a newer revision is to be delivered, which has its own attempts (store_fetch).
  redis.call('ZADD', due, 'LT', now, o.member)
  if a.outcome == 'retry' or a.outcome == 'postponed' then
    redis.call('HSET', o.record, a.sink .. ':next_at', now + a.wait)
  else
    redis.call('ZADD', dead_deliveries, now, o.member .. ' ' .. a.sink)
    redis.call('HSET', o.record, a.sink .. ':dead', a.reason)
    count('deliveries_dead_lettered|' .. a.sink)
  end
  if a.outcome == 'postponed' then
    redis.call('HINCRBY', o.record, a.sink .. ':attempts', -1)
    redis.call('HSETNX', o.record, a.sink .. ':postponed', now)
    redis.call('HSET', o.record, a.sink .. ':error', a.failure)
  elseif a.outcome == 'rejected' then
    -- The sink works: this order is what it refuses.
    redis.call('HDEL', o.record, a.sink .. ':error')
    isolate(redis.call, 'DEL', prefix .. 'sink-failing:' .. a.sink)
  else
    note_failure(o, a.sink, a.failure)
  end
end
return 1
