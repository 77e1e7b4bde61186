-- snapshot: the state of the receiver, in one step that costs the same with one order and with a million. Writes nothing.
--
-- a  sample (orders of `due` and of each sink to look at, from either end, and latest dead letters), companies (id, slug, and
--    the ids of breaker and API key of each), job_prefix, queue_prefix, queues (names), suspended (key that RQ sets). Companies that a pool
--    has declared are added; breaker and key of each are those that are declared.
-- Returns JSON; its fields are those of app/snapshot.py. Maps only: an empty Lua table has no type.
local companies, sinks, queues = {}, {}, {}
local declared, breakers, keys = redis.call('HGETALL', prefix .. 'companies'), {}, {}
for i = 1, #declared, 2 do
  local slug, breaker, key = string.match(declared[i + 1], '^(%S+) (%S+) ?%S* ?%S* ?(%S*)')
  table.insert(a.companies, {declared[i], slug or declared[i], breaker or '', key or ''})
  breakers[declared[i]], keys[declared[i]] = breaker, key ~= '' and key or nil
end
-- A company that another one of the same name has replaced is shown by its id until it is retired.
local owners = {}
for _, one in ipairs(a.companies) do
  local id, slug = one[1], one[2]
  owners[slug] = owners[slug] or id
  local breaker = redis.call('HMGET', prefix .. 'breaker:' .. (breakers[id] or one[3]), 'open_until', 'opened_at',
    'reason', 'http')
  local key = keys[id] or one[4]
  local secrets = redis.call('HMGET', prefix .. 'event-rate:' .. id, 'secret:current', 'secret:previous')
  local watch = redis.call('ZRANGE', prefix .. 'reconcile-watch:' .. id, 0, 0, 'WITHSCORES')
  companies[id] = companies[id] or {
    slug = owners[slug] == id and slug or id,
    oldest_pending_ms = 0,
    breaker_open_until = tonumber(breaker[1] or '0'),
    breaker_opened_at = tonumber(breaker[2] or '0'),
    breaker_reason = breaker[3] or '',
    breaker_http = tonumber(breaker[4] or '0'),
    key = key,
    throttled_until = tonumber(redis.call('HGET', prefix .. 'limiter:' .. key, 'retry_until') or '0'),
    dead_at = 0,
    current_secret_at = tonumber(secrets[1] or '0'),
    previous_secret_at = tonumber(secrets[2] or '0'),
    unsettled = redis.call('ZCARD', prefix .. 'reconcile-watch:' .. id),
    unsettled_since = tonumber(watch[2] or '0'),
    subscription = redis.call('HGET', prefix .. 'subscription:' .. id, 'state') or '',
  }
end

-- One unreadable record must not hide all others.
local function number(text)
  return tonumber(text or '0') or 0
end

-- Returns the members at either end of a clock, as a set, and the time of the first.
local function sample(clock)
  local found = {}
  local first = redis.call('ZRANGE', clock, 0, a.sample - 1, 'WITHSCORES')
  for i = 1, #first, 2 do
    found[first[i]] = true
  end
  for _, member in ipairs(redis.call('ZREVRANGE', clock, 0, a.sample - 1)) do
    found[member] = true
  end
  return found, tonumber(first[2] or '0')
end

local function failing(clock, sink)
  local count = 0
  for member in pairs(sample(clock)) do
    local s = redis.pcall('HMGET', prefix .. 'order:' .. member, sink .. ':attempts', sink .. ':lease')
    -- The attempt that runs now has been counted, and has not failed.
    local failed = s.err and 0 or number(s[1]) - (number(s[2]) > now and 1 or 0)
    count = count + (failed > 0 and 1 or 0)
  end
  return count
end

for _, sink in ipairs(redis.call('HKEYS', prefix .. 'sinks')) do
  a.queues[#a.queues + 1] = 'sink-' .. sink
  local f = redis.pcall('HMGET', prefix .. 'sink-failing:' .. sink, 'since', 'orders', 'attempts', 'error')
  if f.err then
    f = {}
  end
  local b = redis.pcall('HMGET', prefix .. 'sink-breaker:' .. sink, 'open_until', 'opened_at', 'reason', 'probe_until')
  if b.err then
    b = {}
  end
  local disabled = redis.pcall('HGET', prefix .. 'sinks-disabled', sink)
  local disabled_at, why = string.match(type(disabled) == 'string' and disabled or '', '^(%d+) (.*)$')
  local key = prefix .. 'deliveries:' .. sink
  sinks[sink] = {
    behind = redis.call('ZCARD', key),
    failing = failing(key, sink),
    failing_since = tonumber(f[1] or '0'),
    failed_orders = tonumber(f[2] or '0'),
    failed_attempts = tonumber(f[3] or '0'),
    error = f[4] or '',
    dead_at = 0,
    breaker_open_until = tonumber(b[1] or '0'),
    breaker_opened_at = tonumber(b[2] or '0'),
    breaker_reason = b[3] or '',
    probe_until = number(b[4]),
    disabled_at = tonumber(disabled_at or '0'),
    disabled_reason = why or '',
  }
end

-- The consumers of the feed: the names of the valid keys for it. One that has never acknowledged anything waits since its
-- key was made, not since the oldest order.
local consumers = {}
local function add_consumer(text)
  local key = cjson.decode(text)
  local scopes = ' ' .. table.concat(key.scopes, ' ') .. ' '
  if key.revoked_at > 0 or not string.find(scopes, ' feed ', 1, true) then
    return
  end
  local acknowledged = redis.call('ZSCORE', prefix .. 'feed-cursors', key.name)
  local after, feed = '(' .. (acknowledged or 0), prefix .. 'feed'
  local first = redis.call('ZRANGEBYSCORE', feed, after, '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
  local since = first[2] and math.max(tonumber(first[2]), acknowledged and 0 or key.created_at) or 0
  local known = consumers[key.name]
  consumers[key.name] = {
    behind = redis.call('ZCOUNT', feed, after, '+inf'),
    waiting_since = known and math.min(known.waiting_since, since) or since,
  }
end
for _, text in ipairs(redis.pcall('HVALS', prefix .. 'api-keys')) do
  pcall(add_consumer, text)
end

-- The latest dead letters, last first: when the latest of each company and of each sink became one.
local function latest(key, pattern, map)
  local members = redis.call('ZREVRANGE', key, 0, a.sample - 1, 'WITHSCORES')
  for i = 1, #members, 2 do
    local found = map[string.match(members[i], pattern)]
    if found and found.dead_at == 0 then
      found.dead_at = tonumber(members[i + 1])
    end
  end
end
latest(dead, '^[^:]*', companies)
latest(dead_deliveries, ' (.*)$', sinks)

-- Orders due first have waited longest for a worker, orders due last have failed most often.
local elsewhere = {}
local seen, next_due_at = sample(due)
for member in pairs(seen) do
  local record = prefix .. 'order:' .. member
  local r = redis.pcall('HMGET', record, 'generation', 'fetched_generation', 'dead', 'last_event_at',
    'latency_recorded_for', 'rechecks')
  if r.err then
    r = {}
  end
  if not r[3] and number(r[2]) < number(r[1]) and not r[6] and tonumber(r[4] or '') and r[4] ~= r[5] then
    local age, id = now - tonumber(r[4]), string.match(member, '^[^:]*')
    local company = companies[id]
    if company then
      company.oldest_pending_ms = math.max(company.oldest_pending_ms, age)
    else
      elsewhere[id] = math.max(elsewhere[id] or 0, age)
    end
  end
end

local function queue(key)
  local enqueued = ''
  -- A job without its hash has no time; the next one has.
  for _, id in ipairs(redis.call('LRANGE', key, 0, 4)) do
    local at = redis.call('HGET', a.job_prefix .. id, 'enqueued_at')
    if at then
      enqueued = at
      break
    end
  end
  return {jobs = redis.call('LLEN', key), oldest = enqueued}
end

local function map(key)
  local found, flat = {}, redis.call('HGETALL', key)
  for i = 1, #flat, 2 do
    found[flat[i]] = flat[i + 1]
  end
  return found
end

for _, name in ipairs(a.queues) do
  queues[name] = queue(a.queue_prefix .. name)
end
return cjson.encode({
  now = now,
  due = redis.call('ZCARD', due),
  next_due_at = next_due_at,
  dead = redis.call('ZCARD', dead),
  dead_deliveries = redis.call('ZCARD', dead_deliveries),
  suspended = redis.call('EXISTS', a.suspended) == 1,
  pools = map(prefix .. 'pools'),
  schema = redis.call('GET', prefix .. 'schema') or '',
  alerts = map(prefix .. 'alerts'),
  counters = map(prefix .. 'counters'),
  queues = queues,
  companies = companies,
  elsewhere = elsewhere,
  sinks = sinks,
  consumers = consumers,
})
