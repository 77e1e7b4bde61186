-- expire: what is older than its days leaves the streams and the lists, also when nothing new comes to push it out.
--
-- a  events_keep ms, orders_keep ms, streams (keys), limit (entries a stream), passed (entries of `ota:orders` to pass
--    over), orders_limit
-- Returns {entries that left the streams, entries of `ota:orders` looked at, of those removed}.
local newer = other_schema()
if newer then
  return newer
end
local oldest = math.max(0, now - a.events_keep)
local removed = 0
for _, stream in ipairs(a.streams) do
  -- Whole nodes first, as many as allowed; what is left of the last one is below a node, and can be exact.
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
