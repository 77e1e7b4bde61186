-- Stands before every script: its arguments, the time, the record of an order, its history, and the way to push a job.
--
-- ARGV[1] is a MessagePack map (class Script of app/ledger/redis.py): `prefix` of all keys, `schema` version, `now` in
-- ms if the caller brings the time, and what the header of the script names. Every key is built from `prefix`: Redis
-- Cluster is not supported, by RQ neither. All times are ms; the clock is that of the Redis server.
local a = cmsgpack.unpack(ARGV[1])
local prefix = a.prefix
local due, dead, dead_deliveries = prefix .. 'due', prefix .. 'dead', prefix .. 'dead-deliveries'
local orders, counters = prefix .. 'orders', prefix .. 'counters'
local deliveries = prefix .. 'deliveries:'

local now = a.now
if not now then
  local time = redis.call('TIME')
  now = time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Data of another version is refused; the first writer of all notes the version. Each script that writes
-- begins with this, so that an old process cannot write between a check and the write of a newer one.
if a.schema then
  local held = redis.call('GET', prefix .. 'schema')
  if not held then
    redis.call('SET', prefix .. 'schema', a.schema)
  elseif tonumber(held) ~= a.schema then
    return redis.error_reply('OTHERSCHEMA ' .. held)
  end
end

-- One broken key must not stop the work on all other orders: what fails in `work` belongs to its order. An error of
-- the server's state concerns all orders, and ends the script. Returns whether it worked, and what it returned.
local server_errors = {OOM = 1, READONLY = 1, MISCONF = 1, NOREPLICAS = 1, NOPERM = 1, BUSY = 1, LOADING = 1, MASTERDOWN = 1,
  CLUSTERDOWN = 1}
local function isolate(work, ...)
  local worked, result = pcall(work, ...)
  if not worked then
    local text = type(result) == 'table' and result.err or tostring(result)
    if server_errors[string.match(text, '^[%s%-]*(%u+)')] or string.find(text, 'NOPERM', 1, true)
      or string.find(text, 'permission', 1, true) then
      error(result, 0)
    end
  end
  return worked, result
end

-- The fields of a record that are texts; all others are numbers. keys.py describes them.
local text = {job = 1, queue = 1, worker = 1, error = 1, dead = 1, status = 1, last_event_status = 1, reference = 1,
  request_id = 1, traceparent = 1, digest = 1, first_event = 1}

-- Returns an order with its keys and the named fields of its record; what is not there is 0 or nil.
local function load(member, fields)
  local o = {
    member = member,
    record = prefix .. 'order:' .. member,
    history = prefix .. 'history:' .. member,
    content = prefix .. 'content:' .. member,
    revisions = prefix .. 'revisions:' .. member,
  }
  o.company, o.id = string.match(member, '^([^:]*):(.+)$')
  local values = redis.call('HMGET', o.record, unpack(fields))
  for i = 1, #fields do
    local field, value = fields[i], values[i]
    if text[field] then
      o[field] = value or nil
    else
      o[field] = value and tonumber(value) or 0
    end
  end
  return o
end

-- Returns the entry of the first event of an order, which the stream alone has until something else happens (accept.lua).
local function first_event(o)
  local id, at = unpack(redis.call('HMGET', o.record, 'first_event', 'first_at'))
  local entry = id and redis.call('XRANGE', prefix .. 'events', id, id)[1]
  local f = {}
  for i = 1, entry and #entry[2] or 0, 2 do
    f[entry[2][i]] = entry[2][i + 1]
  end
  return entry and cmsgpack.pack({'event', tonumber(at), id, f.status, f.outcome or 'queued', f.secret or 'current', f.request})
end

-- Add an entry to what happened to an order (history.py names the values of each kind); the last 200 are kept.
-- Where the key of a history or a counter is broken, the step goes on without it.
local function append_history(o, kind, ...)
  local entry = cmsgpack.pack({kind, now, ...})
  local worked, length = isolate(redis.call, 'RPUSHX', o.history, entry)
  if worked and length == 0 then
    local found, first = isolate(first_event, o)
    local entries = {found and first or entry, found and first and entry or nil}
    if isolate(redis.call, 'RPUSH', o.history, unpack(entries)) then
      isolate(redis.call, 'HDEL', o.record, 'first_event')
    end
  elseif worked and length > 200 then
    redis.call('LTRIM', o.history, -200, -1)
  end
end

local function count(name, by)
  isolate(redis.call, 'HINCRBY', counters, name, by or 1)
end

-- Count a duration in its bucket of a histogram, and add it to the sum. Returns the bucket.
local function observe(name, took, bounds)
  local bucket = 'inf'
  for _, bound in ipairs(bounds) do
    if took <= bound then
      bucket = bound
      break
    end
  end
  count(name .. '|' .. bucket)
  count(name .. '|sum', took)
  return bucket
end

-- A dead letter stands in its list, and in the list of its kind: sink ('' = fetches) and reason up to its first colon,
-- behind which a sink writes what it likes. `dead-kinds` has the kinds that have any.
local dead_kinds = prefix .. 'dead-kinds'
local function dead_entry(o, sink)
  if sink == '' then
    return dead, o.member
  end
  return dead_deliveries, o.member .. ' ' .. sink
end

-- Its record, and so its reason, may be lost: there are few kinds.
local function remove_from_kinds(entry, sink)
  local start = sink .. '|'
  for _, kind in ipairs(redis.call('SMEMBERS', dead_kinds)) do
    if string.sub(kind, 1, #start) == start then
      local key = prefix .. 'dead-by:' .. kind
      redis.call('ZREM', key, entry)
      if redis.call('EXISTS', key) == 0 then
        redis.call('SREM', dead_kinds, kind)
      end
    end
  end
end

local function add_dead_letter(o, sink, reason)
  local list, entry = dead_entry(o, sink)
  if redis.call('ZADD', list, now, entry) == 0 then
    -- A step that failed has left it there, perhaps for another reason.
    remove_from_kinds(entry, sink)
  end
  local kind = sink .. '|' .. string.match(reason, '^[^:]*')
  redis.call('SADD', dead_kinds, kind)
  redis.call('ZADD', prefix .. 'dead-by:' .. kind, now, entry)
end

-- Returns 1, or 0 if it is none. The list comes last: where this script fails before that, the next removal finds it.
local function remove_dead_letter(o, sink)
  local list, entry = dead_entry(o, sink)
  if not redis.call('ZSCORE', list, entry) then
    return 0
  end
  remove_from_kinds(entry, sink)
  return redis.call('ZREM', list, entry)
end

-- Clear what earlier fetches counted: a new settlement, or a request, has all its attempts.
local function reset_fetch(o)
  redis.call('HDEL', o.record, 'attempts', 'rechecks', 'deferrals', 'client_errors', 'first_404_at', 'crashes',
    'fetch_at', 'error', 'http', 'dead', 'dead_at', 'failing_since')
  if o.dead then
    redis.call('ZREM', prefix .. 'unanswered:' .. o.company, o.member)
  end
  remove_dead_letter(o, '')
end

-- A sink fails for everything from a first attempt that failed until a delivery succeeds. A later attempt that fails may
-- be the fault of its order, so it begins nothing; one after the sink asked for another time is such. Where this key is
-- broken, the step goes on without it.
local function note_failure(o, sink, failure)
  local key, record = prefix .. 'sink-failing:' .. sink, o.record
  local called = redis.call('HMGET', record, sink .. ':attempts', sink .. ':postponed')
  local is_first = called[1] == '1' and not called[2]
  redis.call('HSET', record, sink .. ':error', failure)
  isolate(function()
    if is_first then
      redis.call('HSETNX', key, 'since', now)
      redis.call('HINCRBY', key, 'orders', 1)
      redis.call('HSET', key, 'order', o.member)
    elseif redis.call('EXISTS', key) == 0 then
      return
    end
    redis.call('HINCRBY', key, 'attempts', 1)
    redis.call('HSET', key, 'error', failure)
  end)
end

-- Clear what earlier deliveries counted: the next one has all its attempts, and is due at once. A failure of this order
-- alone no longer counts against the sink.
local function reset_delivery(o, sink)
  redis.call('HDEL', o.record, sink .. ':dead', sink .. ':attempts', sink .. ':next_at', sink .. ':crashes',
    sink .. ':error', sink .. ':postponed')
  remove_dead_letter(o, sink)
  isolate(function()
    local key = prefix .. 'sink-failing:' .. sink
    local failing = redis.call('HMGET', key, 'orders', 'order')
    if failing[1] == '1' and failing[2] == o.member then
      redis.call('DEL', key)
    end
  end)
end

-- Returns the sinks of the deployment. Those of this process (`a.sinks`) are among them from now on, also when Redis was
-- flushed since its pool declared them.
local declared
local function sinks()
  if not declared then
    declared = redis.call('HKEYS', prefix .. 'sinks')
    local known = {}
    for _, sink in ipairs(declared) do
      known[sink] = true
    end
    for _, sink in ipairs(a.sinks or {}) do
      if not known[sink] then
        redis.call('HSET', prefix .. 'sinks', sink, now)
        declared[#declared + 1] = sink
      end
    end
  end
  return declared
end

-- Returns the named fields of the deliveries of an order to a sink, as texts; what is not there is false.
local function of_sink(o, sink, ...)
  local s, names, fields = {}, {...}, {}
  for i, name in ipairs(names) do
    fields[i] = sink .. ':' .. name
  end
  for i, value in ipairs(redis.call('HMGET', o.record, unpack(fields))) do
    s[names[i]] = value
  end
  return s
end

-- Whether a sink is still to get the latest revision; `s` has its revision and dead. A sink without a revision in the
-- record was declared after the order was fetched, and is to get it only by a replay.
local function is_behind(o, s)
  return s.revision and not s.dead and tonumber(s.revision) < o.revision
end

-- Returns whether deliveries to a sink may start: yes, probe (one, to see whether its destination is back), or no: it is
-- disabled, its breaker is open, or another worker makes the probe. Where these keys are broken they may. A time that
-- reaches farther than any wait was taken from a Redis server whose clock was ahead.
local function may_deliver(sink, worker)
  local worked, answer = isolate(function()
    if redis.call('HGET', prefix .. 'sinks-disabled', sink) then
      return 'no'
    end
    local b = redis.call('HMGET', prefix .. 'sink-breaker:' .. sink, 'open_until', 'probe_until', 'probe')
    local open_until, probe_until = tonumber(b[1] or '0'), tonumber(b[2] or '0')
    if open_until == 0 then
      return 'yes'
    end
    local is_open = open_until > now and open_until <= now + a.longest_open
    local is_probed = probe_until > now and probe_until <= now + a.lease and b[3] ~= worker
    return (is_open or is_probed) and 'no' or 'probe'
  end)
  return worked and answer or 'yes'
end

-- Of an order that was complete and is no longer: its keys do not expire.
local function persist(o)
  for _, key in ipairs({o.record, o.history, o.content}) do
    redis.call('PERSIST', key)
  end
end

-- Of an order without a pending fetch, or whose fetch is dead: take it off `clock`, which is `due` or that of a sink. Where
-- no sink is to get it and nothing of it is dead, its keys expire after `a.keep`. The clock comes last: where this script
-- fails before that, the order is due again. `o` needs generation, fetched_generation, dead and revision.
local function leave(o, clock)
  local is_kept = o.dead or o.fetched_generation < o.generation
  for _, sink in ipairs(is_kept and {} or sinks()) do
    local s = of_sink(o, sink, 'revision', 'dead')
    is_kept = is_kept or s.dead or is_behind(o, s)
  end
  if not is_kept then
    for _, key in ipairs({o.record, o.history, o.content}) do
      redis.call('PEXPIRE', key, a.keep)
    end
    if o.revision > 1 then
      redis.call('PEXPIRE', o.revisions, a.keep)
    end
  end
  redis.call('ZREM', clock, o.member)
end

-- Make the fetch of an order a dead letter; its sinks still get the stored revision.
local function dead_letter_fetch(o, reason)
  o.dead = reason
  add_dead_letter(o, '', reason)
  redis.call('HSET', o.record, 'dead', reason, 'dead_at', now)
  count('dead|' .. o.company .. '|' .. reason)
  redis.call('ZREM', due, o.member)
end

-- Write an RQ job as RQ's own enqueue does; `flush_jobs` hands the collected ids to the queues. `a.job` is made by
-- rq_jobs.py from a job that RQ itself serialised. Its data is not compressed: RQ restores either form.
-- The jobs of one script differ in their data alone: that is put into a template, of which each job is a copy. To write
-- every field of each costs Redis 5 of 45 us an event more, and 420 bytes of its append-only file.
local pushed = {}
local function push_job(queue, id, data, description)
  local job = a.job
  local template = prefix .. 'job:' .. job.layout .. ':' .. queue
  if not pushed[queue] then
    if redis.call('EXISTS', template) == 0 then
      redis.call('HSET', template, 'origin', job.names .. queue, 'description', description, unpack(job.fields))
    end
    redis.call('HSET', template, 'created_at', job.at, 'enqueued_at', job.at)
    pushed[queue] = {}
  end
  id = job.names .. id
  redis.call('HSET', template, 'data', data)
  redis.call('COPY', template, job.prefix .. id, 'REPLACE')
  pushed[queue][#pushed[queue] + 1] = id
end

local function push_fetch(o, queue, suffix)
  local data = a.job.fetch
  push_job(queue, 'f-' .. o.company .. '-' .. o.id .. '-' .. o.generation .. (suffix or ''),
    data[1] .. o.company .. data[2] .. o.id .. data[3], 'fetch order')
end

-- RQ takes no colon in an id, and the name of a sink may have some: its id stands there (rq_jobs.py).
local function push_delivery(o, sink, suffix)
  local data = a.job.deliver
  redis.call('HSET', o.record, sink .. ':job', 1)
  local sink_id = string.sub(redis.sha1hex(sink), 1, 8)
  push_job('sink-' .. sink, 'd-' .. o.company .. '-' .. o.id .. '-' .. sink_id .. '-' .. o.revision .. (suffix or ''),
    data[1] .. o.company .. data[2] .. o.id .. data[3] .. sink .. data[4], 'deliver order')
end

-- Returns what makes the id of a further job for the same generation or revision another one: no id comes twice.
local function next_suffix(o)
  return '-t' .. redis.call('HINCRBY', o.record, 'enqueues_total', 1)
end

local function flush_jobs()
  for queue, ids in pairs(pushed) do
    local key = a.job.queue_prefix .. a.job.names .. queue
    redis.call('SADD', a.job.queues, key)
    for from = 1, #ids, 1000 do
      redis.call('RPUSH', key, unpack(ids, from, math.min(from + 999, #ids)))
    end
  end
  pushed = {}
end

-- Add orders (members) to `due` and to the list of orders, before anything else of them is written: whatever fails later,
-- the dispatcher finds them. LT: an order that is due earlier stays so.
local function schedule(members)
  local times, changes = {}, {}
  for i, member in ipairs(members) do
    times[2 * i - 1], times[2 * i] = now + a.grace, member
    changes[2 * i - 1], changes[2 * i] = now, member
  end
  for from = 1, #times, 1000 do
    redis.call('ZADD', due, 'LT', unpack(times, from, math.min(from + 999, #times)))
    redis.call('ZADD', orders, unpack(changes, from, math.min(from + 999, #changes)))
  end
end

-- Ask for a fetch of an order that is scheduled: raise its generation, and push a job unless one waits already, in this
-- queue or in live. `o` needs generation, job and first_at, and for backfill also queue, fetched_generation and dead:
-- what is pending in live stays in live. `fields` is a flat list of more fields to write, or nil.
-- Returns queued or coalesced, and sets o.queue; the caller ends with flush_jobs.
local function request_fetch(o, queue, fields)
  if queue == 'backfill' and o.queue ~= 'backfill' and not o.dead and o.fetched_generation < o.generation then
    queue = 'live'
  end
  local waits = o.job == queue or o.job == 'live'
  o.queue = waits and o.job or queue
  if o.generation > 0 then
    persist(o)
    reset_fetch(o)
  end
  o.generation = o.generation + 1
  local changed = fields or {}
  local last = #changed
  changed[last + 1], changed[last + 2] = 'generation', o.generation
  if not waits then
    changed[last + 3], changed[last + 4], changed[last + 5], changed[last + 6] = 'queue', queue, 'job', queue
  end
  if o.first_at == 0 then
    last = #changed
    changed[last + 1], changed[last + 2] = 'first_at', now
  end
  redis.call('HSET', o.record, unpack(changed))
  if waits then
    return 'coalesced'
  end
  push_fetch(o, queue)
  return 'queued'
end
