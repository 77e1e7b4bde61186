-- dispatch_due: enqueue a job for every order that is due. Any number of dispatchers may run it.
--
-- a  grace ms, longest ms (the longest wait), farthest ms, limit (orders a call), job, sinks
-- Returns {orders that were due, jobs pushed, orders whose keys are broken}: those are due again after `longest`.
-- Pushed again without a start in between, the wait doubles: a long backlog is not filled with repeats.

-- No wait of ours reaches farther than `farthest`: such a time was taken from a Redis server whose clock was ahead.
-- Its right value is unknown: it becomes `grace` from now, by when a fetch in progress has ended.
local function bring_near(member)
  local record, fields = prefix .. 'order:' .. member, {'fetch_at'}
  for _, sink in ipairs(sinks()) do
    table.insert(fields, sink .. ':next_at')
  end
  for i, time in ipairs(redis.call('HMGET', record, unpack(fields))) do
    if time and tonumber(time) > now + a.farthest then
      redis.call('HSET', record, fields[i], now + a.grace)
    end
  end
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', due, '(' .. now + a.farthest, '+inf', 'LIMIT', 0, a.limit)) do
  isolate(bring_near, member)
  redis.call('ZADD', due, now + a.grace, member)
end

local jobs, broken = 0, 0
local function dispatch(member)
  local o = load(member, {'generation', 'fetched_generation', 'dead', 'revision', 'queue', 'enqueues',
    'enqueues_total'})
  -- An order that needs nothing and has no end was left by a worker that died after its last delivery: start_fetch
  -- ends it.
  local pending = not o.dead and (o.fetched_generation < o.generation or redis.call('PTTL', o.record) == -1)
  if o.generation == 0 or not (pending or next_delivery(o)) then
    redis.call('ZREM', due, member)
    return
  end
  local queue = o.queue == 'backfill' and 'backfill' or 'live'
  redis.call('ZADD', due, now + math.min(a.grace * 2 ^ math.min(o.enqueues, 20), a.longest), member)
  redis.call('HSET', o.record, 'enqueues', o.enqueues + 1, 'enqueues_total', o.enqueues_total + 1, 'job', queue)
  push_job(o, queue, o.generation, '-t' .. o.enqueues_total + 1)
  jobs = jobs + 1
end
local members = redis.call('ZRANGEBYSCORE', due, '-inf', now, 'LIMIT', 0, a.limit)
for _, member in ipairs(members) do
  if not isolate(dispatch, member) then
    broken = broken + 1
    redis.call('ZADD', due, now + a.longest, member)
  end
end
flush_jobs()
if broken > 0 then
  count('broken|dispatch', broken)
end
return {#members, jobs, broken}
