-- store_fetch: store what getOrder answered, unless a fetch that started later has stored.
--
-- ARGV[2]  the content
-- a  order (member), worker, generation and token of the fetch, keep ms, grace ms, sinks, job,
--    recheck_ms (-1 = the answer is settled), give_up (reason when there is no further recheck, or ''),
--    digest, status, wallets, tickets, coupons, manifest 0|1, http, duration_ms, references (keys of the index),
--    packed (the order, as a member of it),
--    bounds and call_bounds (upper bounds of the histograms: from event to stored, and of a getOrder),
--    contents_kept and digests_kept (revisions before the latest: so many with content, and so many in all)
-- Returns a MessagePack map: what, revision, changed, requeued (pairs of order and request_id);
--   what: refused, erased (nothing is stored), fetched, pending (the order needs another fetch), dead.
-- Called again by a worker that did not get the answer, it changes nothing.
local o = load(a.order, {'generation', 'started_generation', 'fetched_generation', 'fencing_token', 'stored_token',
  'digest', 'revision', 'job', 'dead', 'last_event_at', 'latency_recorded_for', 'erased_at', 'fetched_at', 'status',
  'wallets', 'tickets', 'coupons'})
local changed, requeued = false, {}
local function answer(what)
  return cmsgpack.pack({what = what, revision = o.revision, changed = changed, requeued = requeued})
end
if redis.call('DEL', prefix .. 'claim:' .. a.worker) == 1 then
  observe('get_order|' .. o.company .. '|ok', a.duration_ms, a.call_bounds)
end
if o.generation == 0 then
  return answer('refused')
elseif o.erased_at > 0 then
  return answer('erased')
elseif o.stored_token > a.token or a.token > o.fencing_token or a.generation > o.started_generation then
  -- A later fetch has stored; or this one started before Redis was flushed or restored from an older copy, and what
  -- it saw is not what is counted now.
  append_history(o, 'refused', a.token)
  return answer('refused')
elseif o.stored_token == a.token then
  if o.fetched_generation >= o.generation then
    return answer('fetched')
  end
  return answer(o.dead and o.dead == a.give_up and 'dead' or 'pending')
end

-- Keep the revision that this answer replaces. Without it the step goes on: the latest content is what counts. Where the
-- step is repeated, the new content stands there already, and NX keeps the old one.
local function keep_replaced()
  redis.call('HSET', o.revisions, o.revision, cmsgpack.pack({o.fetched_at, o.status or '', o.digest or '', o.wallets,
    o.tickets, o.coupons}))
  local content = a.contents_kept > 0 and redis.call('GET', o.content)
  if content then
    redis.call('HSETNX', o.revisions, o.revision .. ':content', content)
  end
  if o.revision > a.contents_kept then
    local ended = {o.revision - a.digests_kept}
    for older = math.max(1, ended[1]), o.revision - a.contents_kept do
      ended[#ended + 1] = older .. ':content'
    end
    redis.call('HDEL', o.revisions, unpack(ended))
  end
end
if o.digest ~= a.digest and o.revision > 0 then
  isolate(keep_replaced)
end
if o.digest ~= a.digest then
  changed = true
  o.revision = o.revision + 1
end
-- Also where nothing changed: what stands there may have become unreadable, and a refetch is to repair it. In the feed an
-- order moves behind all others, above every position ever given, since its readers may have passed over the unreadable one.
if changed or redis.pcall('GET', o.content) ~= ARGV[2] then
  local position = math.max(now, (tonumber(redis.call('GET', prefix .. 'feed-position') or '0') or 0) + 1)
  redis.call('SET', prefix .. 'feed-position', position)
  redis.call('ZADD', prefix .. 'feed', position, o.member)
end
redis.call('SET', o.content, ARGV[2])
local without_job = {}
for _, sink in ipairs(sinks()) do
  -- Every sink that is declared by now is to get it.
  local s = of_sink(o, sink, 'revision', 'dead', 'job')
  if is_behind(o, s) and not changed then
    -- It is on the clock already, unless another program has removed it.
    redis.call('ZADD', deliveries .. sink, 'NX', now + a.grace, o.member)
  elseif changed or not s.revision then
    redis.call('ZADD', deliveries .. sink, 'LT', now + a.grace, o.member)
    redis.call('HSETNX', o.record, sink .. ':revision', 0)
    if not s.job then
      without_job[#without_job + 1] = sink
    end
  end
  if changed and s.revision then
    -- What a sink refused for good was the old content: the new one gets its own attempts.
    reset_delivery(o, sink)
  end
end
if o.fetched_generation >= o.generation then
  -- It was discarded: a sink may take this content only after ORDER_DAYS.
  persist(o)
end
local settled = a.recheck_ms < 0
if settled then
  o.fetched_generation = math.max(o.fetched_generation, a.generation)
end
redis.call('HSET', o.record, 'fetched_generation', o.fetched_generation, 'stored_token', a.token, 'digest', a.digest,
  'revision', o.revision, 'fetched_at', now, 'status', a.status, 'wallets', a.wallets, 'tickets', a.tickets,
  'coupons', a.coupons, 'manifest', a.manifest, 'http', a.http)
redis.call('HDEL', o.record, 'attempts', 'deferrals', 'client_errors', 'crashes', 'first_404_at', 'error',
  'failing_since')
redis.call('ZADD', orders, now, o.member)
-- The record ends `keep` ms after its last delivery, whose attempts take a day or two.
for _, reference in ipairs(a.references) do
  redis.call('SADD', reference, a.packed)
  redis.call('PEXPIRE', reference, a.keep + 604800000)
end
append_history(o, 'stored', a.token, a.status, o.revision, a.http, a.duration_ms)
local is_latest = o.fencing_token == a.token
if is_latest then
  redis.call('HDEL', o.record, 'lease', 'worker')
end

-- Upstream answers again: requeue the oldest orders that failed for good while it answered none, two at a time, as the
-- answers to these requeue the next. `failing_since` stays: it lies before this answer, so a second end is for good.
local function requeue(member)
  local other = load(member, {'dead', 'failing_since', 'request_id'})
  if other.dead then
    redis.call('ZADD', due, now, member)
    redis.call('HSET', other.record, 'queue', 'backfill')
    reset_fetch(other)
    redis.call('HSET', other.record, 'failing_since', other.failing_since)
    append_history(other, 'requested', 'upstream_answers', 'backfill')
    table.insert(requeued, {member, other.request_id or ''})
  end
end

local function finish(what)
  local unanswered = prefix .. 'unanswered:' .. o.company
  for _, member in ipairs(redis.call('ZRANGE', unanswered, 0, 1)) do
    isolate(requeue, member)
    redis.call('ZREM', unanswered, member)
  end
  for _, sink in ipairs(without_job) do
    push_delivery(o, sink, not changed and next_suffix(o))
  end
  flush_jobs()
  return answer(what)
end

if o.fetched_generation >= o.generation then
  -- From the latest event to its content, once an event; a fetch that people asked for is none of this.
  if o.last_event_at > 0 and o.last_event_at ~= o.latency_recorded_for then
    local bucket = observe('latency|' .. o.company, math.max(now - o.last_event_at, 0), a.bounds)
    local hour = prefix .. 'latency:' .. o.company .. ':' .. math.floor(now / 3600000)
    isolate(function()
      if redis.call('HINCRBY', hour, bucket, 1) == 1 then
        redis.call('PEXPIRE', hour, 176400000)
      end
    end)
    redis.call('HSET', o.record, 'latency_recorded_for', o.last_event_at)
  end
  -- A worker that counted as dead may still store an order that is a dead letter by now.
  redis.call('HDEL', o.record, 'rechecks', 'dead', 'dead_at')
  remove_dead_letter(o, '')
  o.dead = nil
  leave(o, due)
  return finish('fetched')
elseif o.dead then
  -- The order stays a dead letter, and this content is delivered.
elseif is_latest and o.generation > a.generation then
  if not o.job then
    redis.call('ZADD', due, now, o.member)
  end
elseif is_latest and a.give_up ~= '' then
  dead_letter_fetch(o, a.give_up)
  append_history(o, 'dead', a.give_up)
  return finish('dead')
elseif is_latest then
  redis.call('ZADD', due, now + a.recheck_ms, o.member)
  redis.call('HINCRBY', o.record, 'rechecks', 1)
  redis.call('HSET', o.record, 'fetch_at', now + a.recheck_ms)
end
return finish('pending')
