-- erase: delete everything stored of an order but a tombstone, which keeps it from being fetched again. The first step of an
-- erasure (app/erasure.py), and one: from here on every script refuses to fetch, store or deliver the order.
--
-- a  order (member), stored_token when the references of its content were read, references (their keys),
--    packed (the order, as a member of them), keep ms
-- Returns {what, ms}: unknown (no such order), changed (another content was stored since: read again), erased (with the
--   ms when it was first)
-- The tombstone keeps what recognises old events, keeps ids unique, and names the revision that each sink may hold: also
-- of an attempt that failed or was postponed, since a sink may have kept data before.
local o = load(a.order, {'generation', 'stored_token', 'revision', 'erased_at'})
if o.generation == 0 then
  return {'unknown', 0}
elseif o.stored_token ~= a.stored_token then
  return {'changed', 0}
end
redis.call('ZADD', prefix .. 'erasing', 'NX', now, o.member)
local kept = {generation = 1, started_generation = 1, fetched_generation = 1, fencing_token = 1, stored_token = 1,
  enqueues_total = 1, duplicates = 1, first_at = 1, last_event_at = 1, revision = 1, erased_at = 1}
local flat = redis.call('HGETALL', o.record)
for i = 1, #flat, 2 do
  local field, value = flat[i], flat[i + 1]
  local sink, name = string.match(field, '^(.+):(%w+)$')
  if (name == 'attempts' or name == 'postponed') and tonumber(value) > 0 then
    redis.call('HSET', o.record, sink .. ':revision', o.revision)
    reset_delivery(o, sink)
  end
  if not kept[field] and name ~= 'revision' then
    redis.call('HDEL', o.record, field)
  end
end
local erased_at = o.erased_at > 0 and o.erased_at or now
redis.call('HSET', o.record, 'fetched_generation', o.generation, 'started_generation', o.generation,
  'erased_at', erased_at)
redis.call('ZREM', due, o.member)
for _, sink in ipairs(sinks()) do
  redis.call('ZREM', deliveries .. sink, o.member)
  remove_dead_letter(o, sink)
end
remove_dead_letter(o, '')
redis.call('ZREM', prefix .. 'feed', o.member)
redis.call('ZREM', prefix .. 'reconcile-watch:' .. o.company, o.id)
for _, reference in ipairs(a.references) do
  redis.call('SREM', reference, a.packed)
end
redis.call('DEL', o.content, o.revisions)
-- Entries of the history may hold text of upstream and of senders; those of deliveries name the sinks
-- that have a copy, and hold none but the reason of a rejection.
local entries = redis.call('LRANGE', o.history, 0, -1)
redis.call('DEL', o.history)
for _, entry in ipairs(entries) do
  local values = cmsgpack.unpack(entry)
  local kind = values[1]
  if kind == 'delivery' and values[5] == 'rejected' then
    values[6] = ''
    entry = cmsgpack.pack(values)
  end
  if kind == 'delivery' or kind == 'erased' then
    redis.call('RPUSH', o.history, entry)
  end
end
local left = o.erased_at > 0 and redis.call('PTTL', o.record) or -1
if o.erased_at == 0 then
  append_history(o, 'erased')
end
for _, key in ipairs({o.record, o.history}) do
  redis.call('PEXPIRE', key, left > 0 and left or a.keep)
end
return {'erased', erased_at}
