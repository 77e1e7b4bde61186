-- accept: record events and ask for a fetch of their orders, in one step; one broken order stops no other.
--
-- a  grace ms, dedup ms, kept ms (age at which events leave the stream), job, traces (request id -> traceparent), events: of
--    each nine values: digest ('' = cannot be a duplicate), company, order, status, buyFromOrderReference, name of the
--    secret that matched, request id, timestamp as sent, ms when it was received (0 = now)
-- Returns per event 0 queued, 1 coalesced with the job that waits in live, 2 duplicate,
--   3 erased: recorded, and its order is not fetched, 4 refused: a key of its order is broken, it is not recorded.
-- An event is marked as seen last: where this script fails before that, the same event is no duplicate, and its order
-- is pending and in `due`, or untouched.
local names = {[0] = 'queued', [1] = 'coalesced', [2] = 'duplicate', [3] = 'erased', [4] = 'refused'}
local events = prefix .. 'events'
local EARLIER = 7 * 56 - 1  -- characters of seven traceparents with blanks between them

local function add_event(company, order, status, reference, outcome, secret, request, sent)
  return redis.call('XADD', events, '*', 'company', company, 'order', order, 'status', status, 'reference', reference,
    'sent', sent, 'outcome', outcome, 'secret', secret, 'request', request)
end

-- Which events are known already, asked for all of them at once.
local seen, is_seen = {}, {}
for i, event in ipairs(a.events) do
  seen[i] = prefix .. 'seen:' .. event[1]
end
if #seen > 0 then
  for i, value in ipairs(redis.call('MGET', unpack(seen))) do
    is_seen[seen[i]] = value
  end
end

-- Most events are the first of their order, come as they are sent, and carry the current secret. This does for them what
-- `record_other` does for all, in 0.75 of its time: two commands fewer, and no table. What is not written is the default:
-- of the event its outcome `queued` and the secret, of the record the queue `live`; the history begins with its second
-- entry (append_history).
local function record_first(company, order, status, reference, request, sent)
  local record, id = prefix .. 'order:' .. company .. ':' .. order, company .. '-' .. order .. '-1'
  local event = redis.call('XADD', events, '*', 'company', company, 'order', order, 'status', status,
    'reference', reference, 'sent', sent, 'request', request)
  redis.call('HSET', record, 'last_event_at', now, 'last_event_status', status, 'reference', reference,
    'request_id', request, 'first_at', now, 'first_event', event, 'generation', 1, 'job', 'live')
  if a.traces[request] then
    redis.call('HSET', record, 'traceparent', a.traces[request])
  end
  push_job('live', 'f-' .. id, a.job.fetch[1] .. company .. a.job.fetch[2] .. order .. a.job.fetch[3], 'fetch order')
end

local function record_other(is_duplicate, company, order, status, reference, secret, request, sent, received)
  local o = load(company .. ':' .. order, {'generation', 'job', 'last_event_at', 'erased_at', 'first_at', 'traceparent'})
  if is_duplicate then
    if o.generation > 0 then
      redis.call('HINCRBY', o.record, 'duplicates', 1)
      append_history(o, 'duplicate', status, secret, request)
    end
    return 2
  end
  local outcome = 3
  if o.erased_at > 0 then
    redis.call('ZREM', due, o.member)
    local id = add_event(company, order, status, '', names[3], secret, request, sent)
    append_history(o, 'event', id, status, names[3], secret, request)
  else
    -- An event that waited in a spool must not replace what a later event wrote, unless the clock was ahead then.
    local received_at, fields = received == 0 and now or math.min(received, now), nil
    if received_at >= o.last_event_at or o.last_event_at > now then
      fields = {'last_event_at', received_at, 'last_event_status', status, 'reference', reference,
        'request_id', request}
      if o.first_at == 0 then
        o.first_at = received_at
        fields[9], fields[10] = 'first_at', received_at
      end
      local trace, earlier = a.traces[request] or '', o.traceparent or ''
      if trace ~= '' or earlier ~= '' then
        -- While a job waits, it will serve the earlier events too.
        earlier = o.job and string.match(earlier, '%S.*') or ''
        fields[#fields + 1], fields[#fields + 2] = 'traceparent',
          trace .. (earlier ~= '' and ' ' .. string.sub(earlier, 1, EARLIER) or '')
      end
    end
    outcome = request_fetch(o, 'live', fields) == 'queued' and 0 or 1
    local id = add_event(company, order, status, reference, names[outcome], secret, request, sent)
    append_history(o, 'event', id, status, names[outcome], secret, request)
  end
  return outcome
end

local function record_event(key, digest, company, order, status, reference, secret, request, sent, received)
  local is_duplicate, outcome = digest ~= '' and is_seen[key], 0
  local is_first = received == 0 and secret == 'current' and not is_duplicate
    and not redis.call('HGET', prefix .. 'order:' .. company .. ':' .. order, 'generation')
  if is_first then
    record_first(company, order, status, reference, request, sent)
  else
    outcome = record_other(is_duplicate, company, order, status, reference, secret, request, sent, received)
  end
  if digest ~= '' and not is_duplicate then
    redis.call('SET', key, 1, 'PX', a.dedup)
    is_seen[key] = '1'
  end
  return outcome
end

local members = {}
for i, event in ipairs(a.events) do
  if event[1] == '' or not is_seen[seen[i]] then
    members[#members + 1] = event[2] .. ':' .. event[3]
  end
end
schedule(members)

local outcomes, companies = {}, {}
for i, event in ipairs(a.events) do
  local recorded, outcome = isolate(record_event, seen[i], unpack(event))
  outcome = recorded and outcome or 4
  outcomes[i] = outcome
  local company, secret = event[2], event[6]
  local counted = companies[company]
  if not counted then
    counted = {outcomes = {}, secrets = {}}
    companies[company] = counted
  end
  counted.outcomes[outcome] = (counted.outcomes[outcome] or 0) + 1
  counted.secrets[secret] = (counted.secrets[secret] or 0) + 1
end
flush_jobs()

-- A failure of what follows must not fail the events. When each secret was last used, and how many new events this
-- hour had, is kept per company: silence is measured by it.
isolate(redis.call, 'XTRIM', events, 'MINID', '~', math.max(now - a.kept, 0))
for company, counted in pairs(companies) do
  local rate, new = prefix .. 'event-rate:' .. company, 0
  for outcome, number in pairs(counted.outcomes) do
    count('events|' .. company .. '|' .. names[outcome], number)
    new = new + ((outcome == 2 or outcome == 4) and 0 or number)
  end
  for secret, number in pairs(counted.secrets) do
    count('secrets|' .. company .. '|' .. secret, number)
    isolate(redis.call, 'HSET', rate, 'secret:' .. secret, now)
  end
  if new > 0 then
    isolate(redis.call, 'HINCRBY', rate, 'hour:' .. math.floor(now / 3600000), new)
  end
end
return outcomes
