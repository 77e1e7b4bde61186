-- acquire_delivery: acquire the delivery of an order to a sink; one of both at a time.
--
-- Attempt and crash are counted here, before the sink is called; complete_delivery takes the crash back. So a sink that
-- ends its worker, or holds it until the pool does, runs out of both.
-- a  order (member), sink, worker, lease ms, keep ms, longest_open ms (of a breaker)
-- Returns nil when none is due or another worker delivers, else {a MessagePack map (class Delivery of work.py), content}.
local o = load(a.order, {'generation', 'fetched_generation', 'revision', 'dead', 'request_id', 'traceparent', 'digest',
  'fetched_at', 'erased_at'})
local clock, name = deliveries .. a.sink, a.sink .. ':'
if o.generation == 0 or o.erased_at > 0 then
  redis.call('ZREM', clock, o.member)
  return
end
local s = of_sink(o, a.sink, 'revision', 'dead', 'next_at', 'lease', 'worker', 'postponed', 'attempts')
redis.call('HDEL', o.record, name .. 'job', name .. 'enqueues')
if not is_behind(o, s) then
  leave(o, clock)
  return
end
-- A lease that reaches farther than any lease can was taken from a Redis server whose clock was ahead.
local lease, next_at = tonumber(s.lease or '0'), tonumber(s.next_at or '0')
local is_leased = lease > now and lease <= now + a.lease
local is_mine = s.worker == a.worker
if is_leased and not is_mine then
  return
elseif next_at > now then
  redis.call('ZADD', clock, next_at, o.member)
  return
end
local may = may_deliver(a.sink, a.worker)
if may == 'no' then
  -- No attempt is used. The dispatcher pushes a job when one may start.
  redis.call('ZADD', clock, now, o.member)
  return
end
redis.call('ZADD', clock, now + a.lease, o.member)
if may == 'probe' then
  redis.call('HSET', prefix .. 'sink-breaker:' .. a.sink, 'probe', a.worker, 'probe_until', now + a.lease)
end
-- A delivery that this worker holds was acquired by a call whose answer was lost: it is the same attempt, unless a newer
-- revision, or a replay, counts anew since.
local one_more = is_leased and is_mine and s.attempts and 0 or 1
redis.call('HSET', o.record, name .. 'lease', now + a.lease, name .. 'worker', a.worker)
local attempts = redis.call('HINCRBY', o.record, name .. 'attempts', one_more)
local crashes = redis.call('HINCRBY', o.record, name .. 'crashes', one_more)
redis.call('SET', prefix .. 'claim:' .. a.worker, o.member .. ' 0 ' .. a.sink, 'PX', 3600000)
if s.worker and one_more == 1 and crashes > 1 then
  append_history(o, 'crashed', s.worker, a.sink)
end
local delivery = {
  sink = a.sink,
  revision = o.revision,
  attempts = attempts,
  crashes = crashes - 1,
  postponed_ms = math.max(now - tonumber(s.postponed or now), 0),
  fetched_at = o.fetched_at,
  request_id = o.request_id or '',
  traceparents = o.traceparent or '',
  digest = o.digest or '',
}
return {cmsgpack.pack(delivery), redis.call('GET', o.content) or ''}
