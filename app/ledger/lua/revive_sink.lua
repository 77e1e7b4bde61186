--! uses trail
-- revive_sink: a hand-on that was given up gets new tries, from now on.
--
-- KEYS  1 record  2 due  3 trail  4 dead sinks
-- ARGV  1 now ms  2 member  3 sink
-- Returns 1, or 0 when there was nothing to revive.
local now, member, sink = ARGV[1], ARGV[2], ARGV[3]
redis.call('ZREM', KEYS[4], member .. ' ' .. sink)
if redis.call('HDEL', KEYS[1], sink .. ':dead') == 0 then
  return 0
end
redis.call('HDEL', KEYS[1], sink .. ':tries', sink .. ':next', sink .. ':crashes')
note(KEYS[3], now .. ' revived ' .. sink)
-- LT: what is due earlier stays so.
redis.call('ZADD', KEYS[2], 'LT', now, member)
return 1
