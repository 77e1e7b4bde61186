-- fail_fetch: a fetch ended without an order.
--
-- a  order (member), worker, generation and token of the fetch, outcome, wait ms (until the next fetch), reason,
--    http (0 = no answer), duration_ms, call_bounds (upper bounds of its histogram), keep ms, sinks, unanswered (1 = dead
--    although perhaps all failed: requeued when upstream answers another order of the company)
--    outcome: retry (uses an attempt), client_error (uses one of its own few), uncounted (uses none: perhaps all fail),
--    deferred (uses none: not the order's fault), not_found (404, perhaps not yet), dead, deleted_upstream
-- Returns what follows: refused (a later fetch started, or the order is dead), retry, deferred, dead,
--   deleted_upstream. Repeated by a worker that did not get the answer, the call changes nothing.
local o = load(a.order, {'generation', 'fetched_generation', 'fencing_token', 'job', 'revision', 'dead',
  'stored_token', 'lease'})
local deleted = a.outcome == 'deleted_upstream'
local uses_none = a.outcome == 'deferred' or a.outcome == 'uncounted'
-- Without a permit, or for an unknown company, there was no call.
if redis.call('DEL', prefix .. 'claim:' .. a.worker) == 1 and (a.http > 0 or a.duration_ms > 0) then
  local outcomes = {[0] = 'no_answer', [404] = 'not_found', [429] = 'throttled'}
  observe('get_order|' .. o.company .. '|' .. (outcomes[a.http] or 'failed'), a.duration_ms, a.call_bounds)
end
if o.generation == 0 then
  return 'refused'
elseif o.fencing_token == a.token and o.lease == 0 then
  -- This fetch has ended already.
  if o.dead then
    return o.dead == a.reason and 'dead' or 'refused'
  elseif o.fetched_generation >= o.generation then
    return deleted and 'deleted_upstream' or 'refused'
  end
  return uses_none and 'deferred' or 'retry'
elseif o.fencing_token ~= a.token or o.stored_token >= a.token or (o.dead and not deleted) then
  -- A later fetch has started, or this one started before Redis was flushed or restored from an older copy.
  append_history(o, 'refused', a.token)
  return 'refused'
end

append_history(o, 'failed', a.outcome, a.token, a.reason, a.http, a.duration_ms)
redis.call('HSET', o.record, 'error', a.reason, 'http', a.http)
if deleted then
  -- An answer like any other: what an older fetch stores later must not undo it.
  o.fetched_generation = math.max(o.fetched_generation, a.generation)
  redis.call('HSET', o.record, 'fetched_generation', o.fetched_generation, 'status', 'DeletedUpstream',
    'stored_token', a.token)
end
redis.call('HDEL', o.record, 'lease', 'worker', 'crashes')
if deleted and o.fetched_generation >= o.generation then
  redis.call('HDEL', o.record, 'attempts', 'rechecks', 'deferrals', 'client_errors', 'first_404_at', 'dead', 'dead_at',
    'failing_since')
  remove_dead_letter(o, '')
  o.dead = nil
  leave(o, due)
  return 'deleted_upstream'
elseif o.fetched_generation >= o.generation then
  -- An older fetch, which counted as lost, has stored everything meanwhile: this failure changes nothing.
  leave(o, due)
  return 'refused'
elseif not uses_none and o.generation > a.generation then
  -- A new settlement was accepted meanwhile, and has all its attempts.
  if not o.job then
    redis.call('ZADD', due, now, o.member)
  end
  return 'retry'
elseif a.outcome == 'dead' then
  if a.unanswered == 1 then
    redis.call('ZADD', prefix .. 'unanswered:' .. o.company, now, o.member)
  end
  dead_letter_fetch(o, a.reason)
  return 'dead'
end
redis.call('ZADD', due, now + a.wait, o.member)
redis.call('HSET', o.record, 'fetch_at', now + a.wait)
if a.outcome == 'uncounted' or a.outcome == 'not_found' then
  redis.call('HSETNX', o.record, 'failing_since', now)
end
if uses_none then
  redis.call('HINCRBY', o.record, 'deferrals', 1)
  return 'deferred'
elseif a.outcome == 'not_found' then
  redis.call('HSETNX', o.record, 'first_404_at', now)
end
redis.call('HINCRBY', o.record, a.outcome == 'client_error' and 'client_errors' or 'attempts', 1)
redis.call('HDEL', o.record, 'deferrals')
return 'retry'
