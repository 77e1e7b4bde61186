-- acquire_delivery: acquire the delivery that is due next; one an order at a time.
--
-- Attempt and crash are counted here, before the sink is called; complete_delivery takes the crash back. So a sink that
-- ends its worker, or holds it until the pool does, runs out of both.
-- a  order (member), worker, lease ms, keep ms, sinks (of this worker; it delivers to no other), grace ms
-- Returns nil when none is due or another worker delivers, {sink} when one is due to a sink that this worker lacks, else
--   {a MessagePack map (class Delivery of work.py), content}.
local o = load(a.order, {'generation', 'fetched_generation', 'revision', 'delivery_lease', 'delivery_worker', 'dead',
  'request_id', 'traceparent', 'fetch_at', 'digest', 'fetched_at', 'erased_at'})
if o.generation == 0 or o.erased_at > 0 then
  return
end
-- Where a fetch is pending too, the order may only become due earlier: start_fetch decides what is due.
local pending = not o.dead and o.fetched_generation < o.generation
local sink, at = next_delivery(o)
if not sink then
  if not pending then
    schedule_delivery(o, now)
  elseif o.fetch_at > now then
    redis.call('ZADD', due, o.fetch_at, o.member)
  end
  return
end
-- A lease that reaches farther than any lease can was taken from a Redis server whose clock was ahead.
local is_leased = o.delivery_lease > now and o.delivery_lease <= now + a.lease
local is_mine = o.delivery_worker == a.worker
if is_leased and not is_mine then
  return
end
local function set_due(time)
  if pending then
    redis.call('ZADD', due, 'LT', time, o.member)
  else
    redis.call('ZADD', due, time, o.member)
  end
end
if at > now then
  set_due(at)
  return
end
local elsewhere = sink
sink, at = next_delivery(o, a.sinks)
if not sink or at > now then
  set_due(now + a.grace)
  return {elsewhere}
end
set_due(now + a.lease)
-- A delivery that this worker holds was acquired by a call whose answer was lost: it is the same attempt.
local one_more = is_leased and is_mine and 0 or 1
redis.call('HSET', o.record, 'delivery_lease', now + a.lease, 'delivery_worker', a.worker)
local attempts = redis.call('HINCRBY', o.record, sink .. ':attempts', one_more)
local crashes = redis.call('HINCRBY', o.record, sink .. ':crashes', one_more)
redis.call('SET', prefix .. 'claim:' .. a.worker, o.member .. ' 0 ' .. sink, 'PX', 3600000)
if o.delivery_worker and one_more == 1 and crashes > 1 then
  append_history(o, 'crashed', o.delivery_worker, sink)
end
local postponed = tonumber(redis.call('HGET', o.record, sink .. ':postponed') or now)
local delivery = {
  sink = sink,
  revision = o.revision,
  attempts = attempts,
  crashes = crashes - 1,
  postponed_ms = math.max(now - postponed, 0),
  fetched_at = o.fetched_at,
  request_id = o.request_id or '',
  traceparent = o.traceparent or '',
  digest = o.digest or '',
}
return {cmsgpack.pack(delivery), redis.call('GET', o.content) or ''}
