-- return_job: put the job of a fetch back at the end of its queue, for the pools that know the company.
--
-- a  order (member), job
-- Returns request_id and traceparent of the order, or nil.
-- `due` stays as it is: if no worker takes the job, the dispatcher pushes another.
local o = load(a.order, {'generation', 'queue', 'request_id', 'traceparent'})
if o.generation == 0 then
  return
end
local queue = o.queue == 'backfill' and 'backfill' or 'live'
redis.call('HSET', o.record, 'job', queue)
push_fetch(o, queue, next_suffix(o))
flush_jobs()
return {o.request_id or '', o.traceparent or ''}
