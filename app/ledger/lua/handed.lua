--! uses trail
-- handed: a sink took a revision, or did not. The worker asks `hand` again for what comes next.
--
-- What failed ends the job (RQ's time limit strikes once a job), so the order is due at once for its other sinks.
-- KEYS  1 record  2 trail  3 holding of this worker  4 dead sinks  5 due
-- ARGV  1 now ms  2 member  3 sink  4 revision  5 what: done, again, dead  6 next try ms  7 reason code  8 duration ms
local now, sink, handed, what = ARGV[1], ARGV[3], tonumber(ARGV[4]), ARGV[5]
redis.call('DEL', KEYS[3])
if redis.call('EXISTS', KEYS[1]) == 0 then
  return 0
end
local r = redis.call('HMGET', KEYS[1], 'revision', sink .. ':at', 'handler')
-- A worker that was frozen past its lease must not end the hand-on of the one that took over.
local mine = r[3] and string.sub(KEYS[3], -#r[3] - 1) == ':' .. r[3]
if mine then
  redis.call('HDEL', KEYS[1], 'hand', 'handler', sink .. ':crashes')
end
note(KEYS[2], now .. ' sink ' .. sink .. ' ' .. ARGV[4] .. ' ' .. what .. ' ' .. ARGV[7] .. ' ' .. ARGV[8])
if tonumber(r[1] or '0') < handed then
  -- Handed on before Redis was flushed or restored from an older copy: this record has no such revision yet.
  return 0
elseif what == 'done' then
  if tonumber(r[2] or '0') < handed then
    redis.call('HSET', KEYS[1], sink .. ':at', handed)
  end
  if tonumber(r[1]) == handed then
    redis.call('HDEL', KEYS[1], sink .. ':tries', sink .. ':next', sink .. ':dead', sink .. ':crashes')
    redis.call('ZREM', KEYS[4], ARGV[2] .. ' ' .. sink)
  end
elseif not mine or tonumber(r[1]) ~= handed then
  -- What was not taken is not what is to be handed on now; that has its own tries (finish.lua).
  return 0
elseif what == 'again' then
  redis.call('HSET', KEYS[1], sink .. ':next', ARGV[6])
  redis.call('ZADD', KEYS[5], 'LT', now, ARGV[2])
else
  redis.call('HSET', KEYS[1], sink .. ':dead', ARGV[7])
  redis.call('HINCRBY', 'ota:counters', 'dead_hand_ons|' .. sink, 1)
  redis.call('ZADD', KEYS[4], now, ARGV[2] .. ' ' .. sink)
  redis.call('ZADD', KEYS[5], 'LT', now, ARGV[2])
end
return 1
