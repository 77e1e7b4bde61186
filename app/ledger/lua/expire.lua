-- expire: delete the entries of the streams and lists that are older than their days, also when no new ones come.
--
-- a  events_keep ms, orders_keep ms, streams (keys), limit (entries a stream), passed (entries of `ota:orders` to pass
--    over), orders_limit
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
for _, member in ipairs(found) do
  if redis.call('EXISTS', prefix .. 'order:' .. member) == 0 then
    table.insert(ended, member)
  end
end
if #ended > 0 then
  redis.call('ZREM', orders, unpack(ended))
end
return {removed, #found, #ended}
