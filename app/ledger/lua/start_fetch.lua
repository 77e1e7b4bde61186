-- start_fetch: start the fetch of an order, if one is due. Called before every getOrder.
--
-- a  order (member), worker, lease ms, longest_lease ms (of any worker), crashes_allowed, keep ms, sinks,
--    limits as in permits.lua and holder (of a permit), or neither: then it asks for no permit
-- Returns {what, request_id and traceparent of the order's record, for a fetch also a MessagePack map (class Fetch of work.py)};
-- what:
--   nothing   no fetch is due now
--   held      another worker fetches this very settlement
--   dead      its fetches killed their workers too often: it is a dead letter now
--   fetch     this fetch has started
local o = load(a.order, {'generation', 'started_generation', 'fetched_generation', 'fencing_token', 'lease',
  'dead', 'revision', 'attempts', 'rechecks', 'deferrals', 'first_404_at', 'status', 'last_event_status', 'request_id',
  'queue', 'fetched_at', 'last_event_at', 'fetch_at', 'client_errors', 'worker', 'erased_at', 'failing_since',
  'traceparent'})
local function answer(what, fetch)
  return {what, o.request_id or '', o.traceparent or '', fetch}
end
if o.generation == 0 or o.erased_at > 0 then
  redis.call('ZREM', due, o.member)
  return answer('nothing')
end
redis.call('HDEL', o.record, 'job', 'enqueues')
local pending = o.fetched_generation < o.generation and not o.dead
if not pending then
  leave(o, due)
  return answer('nothing')
elseif o.fetch_at > now then
  -- A job that is left over from before must use no attempt.
  redis.call('ZADD', due, o.fetch_at, o.member)
  return answer('nothing')
end
local is_new = o.started_generation < o.generation
-- What this worker itself holds was started by a call whose answer was lost: it does one thing at a time. A lease that
-- reaches farther than any lease can was taken from a Redis server whose clock was ahead.
if o.lease > now and o.lease <= now + a.longest_lease and not is_new and o.worker ~= a.worker then
  return answer('held')
end
-- A lease that has expired belongs to a crash: of this settlement, or of an older one, which does not count.
local crashed = o.lease > 0 and o.lease <= now
if crashed and o.worker then
  -- Else its pool has noticed (release_worker).
  append_history(o, 'crashed', o.worker, '')
end
if crashed and not is_new and redis.call('HINCRBY', o.record, 'crashes', 1) >= a.crashes_allowed then
  redis.call('HDEL', o.record, 'lease', 'worker')
  dead_letter_fetch(o, 'kills_worker')
  append_history(o, 'dead', 'kills_worker')
  return answer('dead')
end
local token = o.fencing_token + 1
redis.call('ZADD', due, now + a.lease, o.member)
redis.call('HSET', o.record, 'started_generation', o.generation, 'fencing_token', token, 'lease', now + a.lease,
  'worker', a.worker)
redis.call('HDEL', o.record, 'fetch_at')
redis.call('SET', prefix .. 'claim:' .. a.worker, o.member .. ' ' .. token, 'PX', 3600000)
append_history(o, 'started', o.generation, token, a.worker)
-- Where its keys are broken, the worker asks alone, and gets the error.
local has_asked, permit = false, nil
if a.limits then
  has_asked, permit = isolate(acquire_permit, a.limits, (o.queue == 'backfill' and 'b-' or 'l-') .. a.holder,
    a.limits.breaker, a.limits.wait)
end
return answer('fetch', cmsgpack.pack({
  generation = o.generation,
  token = token,
  attempts = o.attempts,
  rechecks = o.rechecks,
  deferrals = o.deferrals,
  client_errors = o.client_errors,
  missing_ms = o.first_404_at > 0 and math.max(now - o.first_404_at, 0) or 0,
  failing_since = o.failing_since,
  failing_ms = o.failing_since > 0 and math.max(now - o.failing_since, 0) or 0,
  -- The event and the fetch both name a status; the later of the two is the last one known.
  known_status = (o.fetched_at > o.last_event_at and o.status or o.last_event_status) or '',
  queue = o.queue or 'live',
  permit = has_asked and permit or nil,
}))
