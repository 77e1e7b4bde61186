-- dispatch_due: enqueue a job for every order whose fetch is due, or whose delivery to a sink. Any number of dispatchers may
-- run it.
--
-- a  sink ('' = fetches), grace ms, longest ms (the longest wait), farthest ms, limit (orders a call), keep ms, job, sinks,
--    lease ms (of a delivery), longest_open ms (of the breaker of a sink)
-- Returns {orders that were due, jobs pushed, orders whose keys are broken}: those are due again after `longest`.
-- Pushed again without a start in between, the wait doubles: a long backlog is not filled with repeats.
local is_fetch = a.sink == ''
local clock, name = is_fetch and due or deliveries .. a.sink, is_fetch and '' or a.sink .. ':'

-- No wait of ours reaches farther than `farthest`: such a time was taken from a Redis server whose clock was ahead.
-- Its right value is unknown: it becomes `grace` from now, by when a fetch in progress has ended.
local function bring_near(member)
  local record, field = prefix .. 'order:' .. member, is_fetch and 'fetch_at' or name .. 'next_at'
  local time = redis.call('HGET', record, field)
  if time and tonumber(time) > now + a.farthest then
    redis.call('HSET', record, field, now + a.grace)
  end
end
for _, member in ipairs(redis.call('ZRANGEBYSCORE', clock, '(' .. now + a.farthest, '+inf', 'LIMIT', 0, a.limit)) do
  isolate(bring_near, member)
  redis.call('ZADD', clock, now + a.grace, member)
end

local jobs, broken, limit = 0, 0, a.limit
if not is_fetch then
  limit = ({yes = a.limit, probe = 1, no = 0})[may_deliver(a.sink)]
end
local function dispatch(member)
  local o = load(member, {'generation', 'fetched_generation', 'dead', 'revision', 'queue', 'erased_at'})
  if o.generation == 0 or o.erased_at > 0 then
    redis.call('ZREM', clock, member)
    return
  end
  local is_pending = o.fetched_generation < o.generation and not o.dead
  if not is_fetch then
    is_pending = is_behind(o, of_sink(o, a.sink, 'revision', 'dead'))
  end
  if not is_pending then
    -- Left by a worker that died after its last step, or by a step that failed.
    leave(o, clock)
    return
  end
  local enqueues = redis.call('HINCRBY', o.record, name .. 'enqueues', 1) - 1
  redis.call('ZADD', clock, now + math.min(a.grace * 2 ^ math.min(enqueues, 20), a.longest), member)
  if is_fetch then
    local queue = o.queue == 'backfill' and 'backfill' or 'live'
    redis.call('HSET', o.record, 'job', queue)
    push_fetch(o, queue, next_suffix(o))
  else
    push_delivery(o, a.sink, next_suffix(o))
  end
  jobs = jobs + 1
end
local members = redis.call('ZRANGEBYSCORE', clock, '-inf', now, 'LIMIT', 0, limit)
for _, member in ipairs(members) do
  if not isolate(dispatch, member) then
    broken = broken + 1
    redis.call('ZADD', clock, now + a.longest, member)
  end
end
flush_jobs()
if broken > 0 then
  count('broken|dispatch', broken)
end
return {#members, jobs, broken}
