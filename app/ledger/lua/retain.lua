-- retain: what is older than its days leaves the streams, also when nothing new comes to push it out.
--
-- KEYS  1 plans of replays  2.. streams
-- ARGV  1 now ms  2 ms to keep  3 at most so many entries a stream
-- Returns the number of entries that left the streams.
-- Old by both clocks, the server's and ours: one that is ahead must not empty anything.
local server = redis.call('TIME')
local oldest = math.max(0, math.min(tonumber(ARGV[1]), tonumber(server[1]) * 1000) - tonumber(ARGV[2]))
local removed = 0
for i = 2, #KEYS do
  -- Whole nodes first, as many as allowed; what is left of the last one is below a node, and can be exact.
  local whole = redis.call('XTRIM', KEYS[i], 'MINID', '~', oldest, 'LIMIT', ARGV[3])
  removed = removed + whole
  if whole == 0 then
    removed = removed + redis.call('XTRIM', KEYS[i], 'MINID', '=', oldest)
  end
end
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', '(' .. oldest)
return removed
