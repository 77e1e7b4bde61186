-- return_job: put a job back at the end of its queue, for the pools that know the company or have the sink it is due for.
--
-- a  order (member), job
-- Returns request_id and traceparent of the order, or nil.
-- `due` stays as it is: if no worker takes the job, the dispatcher pushes another.
local o = load(a.order, {'generation', 'enqueues_total', 'queue', 'request_id', 'traceparent'})
if o.generation == 0 then
  return
end
local queue = o.queue == 'backfill' and 'backfill' or 'live'
redis.call('HSET', o.record, 'enqueues_total', o.enqueues_total + 1, 'job', queue)
push_job(o, queue, o.generation, '-t' .. o.enqueues_total + 1)
flush_jobs()
return {o.request_id or '', o.traceparent or ''}
