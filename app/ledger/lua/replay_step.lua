-- replay_step: take the next orders off a plan, oldest first and no faster than its rate, and ask for their fetch, or
-- for another delivery of their stored revision, in one step: a feeder that dies before or after it leaves nothing half
-- done, and two feeders never take the same order.
--
-- a  plan (id), limit (orders a call), deliver_to (sinks; empty = fetch), grace ms, job
-- Returns {state, orders left, ms until the next may be taken}; state: draft, open, done, cancelled, unknown.
-- An entry is an order and the ms of its latest event, - for a fetch by force. In a plan of dead letters it is an order,
-- the ms when it became a dead letter, and for a dead delivery its sink.
-- The rate is held here, not by the feeder: two feeders of one plan share it. `paced` is the time up to which it has
-- been used; what was not used is lost after a second (or the time of one order), so a long pause is not made up for.
local plan, todo = prefix .. 'replay:' .. a.plan, prefix .. 'replay-todo:' .. a.plan
local p = redis.call('HMGET', plan, 'state', 'rate', 'paced', 'kind')
if p[1] ~= 'open' then
  return {p[1] or 'unknown', 0, 0}
end

-- Whether this dead letter is still there. One that was requeued, discarded or erased meanwhile is not, and if it failed
-- once more since it is another one, of a later time.
local function is_dead(o, dead_at, sink)
  local list, entry = dead_entry(o, sink)
  return o.generation > 0 and tonumber(redis.call('ZSCORE', list, entry) or '-1') == dead_at
end

-- A fetch is not needed where the stored copy is newer than the event, and nothing is pending (`at` is nil for a fetch by
-- force); a delivery is not where nothing is stored. What was erased stays erased.
local function is_needed(o, at, sink)
  if o.erased_at > 0 then
    return false
  elseif p[4] == 'dead' then
    return is_dead(o, at, sink)
  elseif #a.deliver_to > 0 then
    return o.revision > 0
  end
  return not at or o.fetched_at <= at or o.fetched_generation < o.generation
end

-- Returns whether anything changed. The revision stays the same, and so does the idempotency key.
local function redeliver(o, to)
  local changed = false
  for _, sink in ipairs(to) do
    redis.call('ZADD', deliveries .. sink, 'LT', now, o.member)
  end
  persist(o)
  for _, sink in ipairs(to) do
    local s = of_sink(o, sink, 'revision', 'dead')
    reset_delivery(o, sink)
    redis.call('HDEL', o.record, sink .. ':discarded')
    -- A sink without a revision was declared after the order was fetched.
    local has_it = not s.revision or tonumber(s.revision) >= o.revision
    if has_it then
      redis.call('HSET', o.record, sink .. ':revision', o.revision - 1)
    end
    changed = changed or s.dead or has_it
    append_history(o, 'redelivered', a.plan, sink)
  end
  return changed
end

local gap = 1000 / tonumber(p[2])
local paced = math.max(tonumber(p[3]), now - math.max(1000, gap))
local allowed = math.floor((now - paced) / gap + 0.001)
local counts = {queued = 0, waiting = 0, passed = 0}
local taken, read = 0, 0
local function step(member, at, sink)
  local o = load(member, {'generation', 'fetched_generation', 'fetched_at', 'revision', 'dead', 'job', 'queue',
    'first_at', 'erased_at', 'request_id'})
  if not is_needed(o, tonumber(at), sink) then
    return 'passed'
  elseif taken == allowed then
    return
  end
  taken = taken + 1
  local is_new
  local to = sink == '' and a.deliver_to or {sink}
  if #to > 0 then
    is_new = redeliver(o, to)
  else
    schedule({member})
    is_new = request_fetch(o, 'backfill', {'request_id', o.request_id or a.plan}) == 'queued'
    append_history(o, 'requested', 'replay:' .. a.plan, o.queue)
  end
  return is_new and 'queued' or 'waiting'
end

for _, entry in ipairs(redis.call('LRANGE', todo, 0, a.limit - 1)) do
  local member, at, sink = string.match(entry, '^(%S+) (%S+) ?(.*)$')
  local worked, outcome = isolate(step, member, at, sink)
  if not worked then
    -- A key of the order is broken: the dispatcher reports it, the plan goes on.
    schedule({member})
    outcome = 'passed'
  elseif not outcome then
    break
  end
  counts[outcome] = counts[outcome] + 1
  read = read + 1
end
flush_jobs()
redis.call('LTRIM', todo, read, -1)
paced = paced + taken * gap
redis.call('HSET', plan, 'paced', string.format('%.3f', paced))
for name, by in pairs(counts) do
  if by > 0 then
    redis.call('HINCRBY', plan, name, by)
  end
end
local left = redis.call('LLEN', todo)
if left == 0 then
  redis.call('HSET', plan, 'state', 'done', 'ended', now)
  return {'done', 0, 0}
end
return {'open', left, math.max(0, math.ceil(paced + gap - now))}
