--! uses trail
-- handed: a sink took a revision, or did not. The worker asks `hand` again for what comes next.
--
-- KEYS  1 record  2 trail  3 holding of this worker  4 dead sinks
-- ARGV  1 now ms  2 member  3 sink  4 revision  5 what: done, again, dead  6 next try ms  7 reason code  8 duration ms
local now, sink, what = ARGV[1], ARGV[3], ARGV[5]
redis.call('DEL', KEYS[3])
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
redis.call('HDEL', KEYS[1], 'hand', 'handler')
note(KEYS[2], now .. ' sink ' .. sink .. ' ' .. ARGV[4] .. ' ' .. what .. ' ' .. ARGV[7] .. ' ' .. ARGV[8])
if what == 'done' then
  redis.call('HDEL', KEYS[1], sink .. ':tries', sink .. ':next')
  redis.call('HSET', KEYS[1], sink .. ':at', ARGV[4])
elseif what == 'again' then
  redis.call('HSET', KEYS[1], sink .. ':next', ARGV[6])
else
  redis.call('HSET', KEYS[1], sink .. ':dead', ARGV[7])
  redis.call('ZADD', KEYS[4], now, ARGV[2] .. ' ' .. sink)
end
return 1
