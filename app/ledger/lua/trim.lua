-- trim: entries of the list of orders whose record has ended leave it.
--
-- KEYS  1 orders
-- ARGV  1 ms of the last change before which a record may have ended  2 key prefix  3 entries to pass over
--       4 at most so many
-- Returns {entries looked at, entries removed}.
-- Nothing owed ends: an order that is owed, parked or dead, or whose hand-on is, has its record and stays.
local found = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', ARGV[1], 'LIMIT', ARGV[3], ARGV[4])
local ended = {}
for _, member in ipairs(found) do
  if redis.call('EXISTS', ARGV[2] .. 'order:' .. member) == 0 then
    ended[#ended + 1] = member
  end
end
if #ended > 0 then
  redis.call('ZREM', KEYS[1], unpack(ended))
end
return {#found, #ended}
