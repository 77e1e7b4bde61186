-- request_fetch: ask for fetches without an event: replay, refetch, dead requeue, reconcile.
--
-- a  orders (members), queue, reason code, grace ms, job, listed_rows (of each order the digest of its row in the order
--    list, '' = none), request_id (for orders that have none: no event announced them)
-- Returns per order 0 queued, 1 a job of it waits already, in this queue or in live, 2 it was erased: no fetch, 3 a key
--   of it is broken: no fetch.
local function request(member, listed_row, due_at)
  local o = load(member, {'generation', 'job', 'first_at', 'erased_at', 'queue', 'fetched_generation', 'dead',
    'request_id'})
  -- What was lost from `due` may have lost its job as well.
  o.job = due_at and o.job
  if o.erased_at > 0 then
    redis.call('ZREM', due, member)
    return 2
  end
  local fields = {'request_id', o.request_id or a.request_id}
  if listed_row ~= '' then
    fields[3], fields[4] = 'listed_row', listed_row
  end
  local outcome = request_fetch(o, a.queue, fields)
  append_history(o, 'requested', a.reason, o.queue)
  return outcome == 'queued' and 0 or 1
end

local due_at = {}
for i, member in ipairs(a.orders) do
  due_at[i] = redis.call('ZSCORE', due, member)
end
schedule(a.orders)
local outcomes = {}
for i, member in ipairs(a.orders) do
  local requested, outcome = isolate(request, member, a.listed_rows[i], due_at[i])
  table.insert(outcomes, requested and outcome or 3)
end
flush_jobs()
return outcomes
