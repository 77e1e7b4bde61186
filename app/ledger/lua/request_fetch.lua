-- request_fetch: ask for fetches without an event: replay, refetch, dead requeue, reconcile.
--
-- a  orders (members), queue, reason code, grace ms, job
-- Returns per order 0 queued, 1 a job of it waits already, in this queue or in live, 2 it was erased: no fetch.
schedule(a.orders)
local outcomes = {}
for _, member in ipairs(a.orders) do
  local o = load(member, {'generation', 'job', 'first_at', 'erased_at'})
  if o.erased_at > 0 then
    redis.call('ZREM', due, member)
    table.insert(outcomes, 2)
  else
    table.insert(outcomes, request_fetch(o, a.queue) == 'queued' and 0 or 1)
    append_history(o, 'requested', a.reason, a.queue)
  end
end
flush_jobs()
return outcomes
