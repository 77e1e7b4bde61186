-- resolve_dead_letter: an operator discards a dead fetch, or discards a dead delivery, or retries one now that is dead or
-- waits for its next attempt.
--
-- a  order (member), sink ('' = the fetch of the order), action (discard, retry), keep ms, sinks
-- Returns 1, or 0 when there was nothing (any more) to resolve.
-- A new event, a replay or a refetch raises the generation as ever, and a late answer is stored as ever: either ends the
-- discard.
local o = load(a.order, {'generation', 'fetched_generation', 'dead', 'revision', 'status'})
local clock = a.sink == '' and due or deliveries .. a.sink
if a.sink == '' then
  if o.generation == 0 or not o.dead then
    -- A dead letter without a record has nothing else to resolve.
    return remove_dead_letter(o, '')
  end
  local reason = o.dead
  reset_fetch(o)
  redis.call('HSET', o.record, 'fetched_generation', o.generation, 'discarded_at', now, 'error', reason)
  if o.status == 'DeletedUpstream' then
    redis.call('HDEL', o.record, 'status')
  end
  o.fetched_generation, o.dead = o.generation, nil
  append_history(o, 'discarded', reason, '')
else
  local s = of_sink(o, a.sink, 'dead', 'next_at')
  local reason, is_held = s.dead, false
  if a.action == 'retry' then
    -- An open breaker would hold it for minutes more: the next attempt is the probe, now.
    isolate(function()
      local breaker = prefix .. 'sink-breaker:' .. a.sink
      local open_until = tonumber(redis.call('HGET', breaker, 'open_until') or '0')
      is_held = open_until > 0
      if open_until > now and (reason or s.next_at) then
        redis.call('HSET', breaker, 'open_until', now)
      end
    end)
  end
  local waits = s.next_at and (is_held or tonumber(s.next_at) > now)
  if not reason and not (a.action == 'retry' and waits) then
    return remove_dead_letter(o, a.sink)
  end
  if a.action == 'retry' then
    -- LT: what is due earlier stays so.
    redis.call('ZADD', clock, 'LT', now, o.member)
    reset_delivery(o, a.sink)
    append_history(o, 'retried', a.sink)
    return 1
  end
  reset_delivery(o, a.sink)
  redis.call('HSET', o.record, a.sink .. ':revision', o.revision, a.sink .. ':discarded', o.revision)
  append_history(o, 'discarded', reason, a.sink)
end
leave(o, clock)
return 1
