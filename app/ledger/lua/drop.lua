--! uses trail, sinks
-- drop: what was given up is given up for good, by hand: nothing of it is owed any more.
--
-- KEYS  1 record  2 due  3 dead  4 trail  5 dead sinks  6 content
-- ARGV  1 now ms  2 member  3 sink whose hand-on is dropped, '' = the order's fetch  4 keep ms  5.. sinks
-- Returns 1, or 0 when it was not given up (any more).
-- A new event, replay or refetch raises `wanted` as ever, and a late answer is stored as ever: either ends the drop.
local now, member, dropped, sinks = tonumber(ARGV[1]), ARGV[2], ARGV[3], read_sinks(5)
local r = redis.call('HMGET', KEYS[1], 'wanted', 'done', 'dead', 'revision', 'status')
local revision = tonumber(r[4] or '0')
local listed
if dropped == '' then
  listed = redis.call('ZREM', KEYS[3], member)
else
  listed = redis.call('ZREM', KEYS[5], member .. ' ' .. dropped)
end
if not r[1] then
  -- A letter whose record has gone: there is nothing else of it.
  return listed
end
local done = tonumber(r[2] or '0')
if dropped == '' then
  if not r[3] then
    return listed
  end
  done = tonumber(r[1])
  redis.call('HDEL', KEYS[1], 'dead', 'dead_at', 'tries', 'looks', 'parks', 'rejects', 'missing', 'crashes', 'fetch_at')
  redis.call('HSET', KEYS[1], 'done', done, 'dropped', now, 'error', r[3])
  if r[5] == 'Gone' then
    redis.call('HDEL', KEYS[1], 'status')
  end
  note(KEYS[4], now .. ' dropped ' .. r[3])
else
  local reason = redis.call('HGET', KEYS[1], dropped .. ':dead')
  if not reason then
    return listed
  end
  redis.call('HDEL', KEYS[1], dropped .. ':dead', dropped .. ':tries', dropped .. ':next', dropped .. ':crashes')
  redis.call('HSET', KEYS[1], dropped .. ':at', revision, dropped .. ':dropped', revision)
  note(KEYS[4], now .. ' dropped ' .. reason .. ' ' .. dropped)
end
if done >= tonumber(r[1]) then
  local _, at = sink_behind(KEYS[1], revision, sinks)
  if at then
    redis.call('ZADD', KEYS[2], math.max(at, now), member)
  else
    rest(KEYS[2], member, ARGV[4], sinks, KEYS[1], KEYS[4], KEYS[6])
  end
end
return 1
