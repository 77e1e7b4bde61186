-- expire: delete the entries of the streams and lists that are older than their days, also when no new ones come.
--
-- a  events_keep ms, orders_keep ms, streams (keys), limit (entries a stream), passed (entries of `ota:orders` to pass
--    over), orders_limit, late ms (a record that is left for longer had a longer orders_keep)
-- Returns {entries deleted from the streams, entries of `ota:orders` read, entries of it deleted}.
local oldest = math.max(0, now - a.events_keep)
local removed = 0
for _, stream in ipairs(a.streams) do
  -- Whole nodes first, up to the limit; the rest is less than one node, and cheap to trim exactly.
  local whole = redis.call('XTRIM', stream, 'MINID', '~', oldest, 'LIMIT', a.limit)
  removed = removed + whole
  if whole == 0 then
    removed = removed + redis.call('XTRIM', stream, 'MINID', '=', oldest)
  end
end
redis.call('ZREMRANGEBYSCORE', prefix .. 'replays', '-inf', '(' .. oldest)
-- An order that is pending, deferred or dead, or whose delivery is, has its record and stays in the list.
local found = redis.call('ZRANGEBYSCORE', orders, '-inf', now - a.orders_keep, 'LIMIT', a.passed, a.orders_limit)
local ended = {}

-- Whether the last entry of its history is older than ORDER_DAYS too: a late delivery or a discard is a change as well, and
-- is no entry of the list.
local function is_left(member)
  local last = redis.pcall('LRANGE', prefix .. 'history:' .. member, -1, -1)
  local ok, entry = pcall(cmsgpack.unpack, last[1] or '')
  return ok and type(entry) == 'table' and (tonumber(entry[2]) or now) <= now - a.orders_keep
end

for _, member in ipairs(found) do
  local record = prefix .. 'order:' .. member
  local left = redis.call('PTTL', record)
  -- A delivery ends at most a few days after the last change. More is left only of a longer ORDER_DAYS, which counts no
  -- longer; a tombstone stays as long as was promised.
  local is_kept = redis.call('HGET', record, 'erased_at') or redis.call('ZSCORE', due, member)
  if left > a.late and not is_kept and is_left(member) then
    redis.call('UNLINK', record, prefix .. 'history:' .. member, prefix .. 'content:' .. member,
      prefix .. 'revisions:' .. member)
    left = -2
  end
  if left == -2 then
    table.insert(ended, member)
  end
end
if #ended > 0 then
  redis.call('ZREM', orders, unpack(ended))
  redis.call('ZREM', prefix .. 'feed', unpack(ended))
end
return {removed, #found, #ended}
