-- release_worker: a worker ended; the order it claimed is due now instead of when its lease ends.
--
-- a  worker, how: killed (counts as a crash of its order) or ended (by itself, since Redis was unavailable, or stopped by
--    us: no crash), fetches (members) and deliveries (pairs of member and sink) whose jobs may be lost with the worker: due
--    now if their clock has them at all
-- Returns the order it had claimed, or false.
for _, member in ipairs(a.fetches) do
  redis.call('ZADD', due, 'XX', 'LT', now, member)
end
for _, one in ipairs(a.deliveries) do
  redis.call('ZADD', deliveries .. one[2], 'XX', 'LT', now, one[1])
end
local claim = redis.call('GET', prefix .. 'claim:' .. a.worker)
if not claim then
  return false
end
redis.call('DEL', prefix .. 'claim:' .. a.worker)
local member, token, sink = string.match(claim, '^(%S+) (%d+) ?(.*)$')
local o = load(member, {'fencing_token', 'worker'})
token = tonumber(token)
if token == 0 and of_sink(o, sink, 'worker').worker == a.worker then
  redis.call('ZADD', deliveries .. sink, now, member)
  redis.call('HDEL', o.record, sink .. ':lease', sink .. ':worker')
  local breaker = prefix .. 'sink-breaker:' .. sink
  isolate(function()
    if redis.call('HGET', breaker, 'probe') == a.worker then
      redis.call('HDEL', breaker, 'probe', 'probe_until')
    end
  end)
  if a.how == 'ended' then
    redis.call('HDEL', o.record, sink .. ':crashes')
  else
    append_history(o, 'crashed', a.worker, sink)
    note_failure(o, sink, 'it ended its worker, or ran too long')
  end
elseif token > 0 and o.fencing_token == token and o.worker == a.worker then
  redis.call('ZADD', due, now, member)
  redis.call('HDEL', o.record, 'worker')
  if a.how == 'ended' then
    redis.call('HDEL', o.record, 'lease')
  else
    redis.call('HSET', o.record, 'lease', now)
    append_history(o, 'crashed', a.worker, '')
  end
else
  return false
end
return member
