--! uses trail, sinks
-- fail: a fetch ended without an order.
--
-- KEYS  1 record  2 due  3 dead  4 trail  5 holding of this worker  6 content
-- ARGV  1 now ms  2 member  3 fence  4 begun  5 keep ms  6 what  7 when to look again ms  8 reason code
--       9 http status ('' = no answer)  10 duration ms  11.. sinks
--       what: again (a try is burnt), reject (a try of its own is), park (none is: the order is not at fault),
--       missing (404, not yet), dead, gone
-- Returns the verdict: refused (a later fetch began, or the order was given up), again, parked, dead, gone.
-- Called again by a worker whose connection broke before it heard the answer, it changes nothing.
local now, member, fence, begun = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local what, reason = ARGV[6], ARGV[8]
local r = redis.call('HMGET', KEYS[1], 'wanted', 'done', 'fence', 'job', 'revision', 'dead', 'stored', 'lease')
local wanted, done = tonumber(r[1] or '0'), tonumber(r[2] or '0')
redis.call('DEL', KEYS[5])
if wanted == 0 then
  return 'refused'
end
if tonumber(r[3] or '0') == fence and not r[8] then
  -- This fetch has ended already.
  if r[6] then
    return r[6] == reason and 'dead' or 'refused'
  elseif done >= wanted then
    return what == 'gone' and 'gone' or 'refused'
  end
  return what == 'park' and 'parked' or 'again'
end
-- Not equal: a later fetch began, or this one before Redis was flushed or restored from an older copy.
if tonumber(r[3] or '0') ~= fence or tonumber(r[7] or '0') >= fence or (r[6] and what ~= 'gone') then
  note(KEYS[4], now .. ' refused ' .. fence)
  return 'refused'
end
redis.call('HDEL', KEYS[1], 'lease', 'holder', 'crashes')
redis.call('HSET', KEYS[1], 'error', reason, 'http', ARGV[9])
note(KEYS[4], now .. ' ' .. what .. ' ' .. fence .. ' ' .. reason .. ' ' .. (ARGV[9] == '' and '-' or ARGV[9]) ..
  ' ' .. ARGV[10])
if what == 'gone' then
  done = math.max(done, begun)
  -- An answer like any other: what an older fetch has still to store must not undo it.
  redis.call('HSET', KEYS[1], 'done', done, 'status', 'Gone', 'stored', fence)
  if done >= wanted then
    redis.call('HDEL', KEYS[1], 'tries', 'looks', 'parks', 'rejects', 'missing', 'dead', 'dead_at')
    redis.call('ZREM', KEYS[3], member)
    local sinks = read_sinks(11)
    local _, at = sink_behind(KEYS[1], tonumber(r[5] or '0'), sinks)
    if at then
      redis.call('ZADD', KEYS[2], math.max(at, now), member)
    else
      rest(KEYS[2], member, ARGV[5], sinks, KEYS[1], KEYS[4], KEYS[6])
    end
    return 'gone'
  end
end
if what == 'park' then
  redis.call('HINCRBY', KEYS[1], 'parks', 1)
  redis.call('HSET', KEYS[1], 'fetch_at', ARGV[7])
  redis.call('ZADD', KEYS[2], ARGV[7], member)
  return 'parked'
end
if wanted > begun then
  if not r[4] then
    redis.call('ZADD', KEYS[2], now, member)
  end
  return 'again'
end
if what == 'dead' then
  local sinks = read_sinks(11)
  give_up(KEYS[1], KEYS[2], KEYS[3], member, reason, now, sink_behind(KEYS[1], tonumber(r[5] or '0'), sinks))
  return 'dead'
end
if what == 'missing' then
  redis.call('HSETNX', KEYS[1], 'missing', now)
end
redis.call('HINCRBY', KEYS[1], what == 'reject' and 'rejects' or 'tries', 1)
redis.call('HDEL', KEYS[1], 'parks')
redis.call('HSET', KEYS[1], 'fetch_at', ARGV[7])
redis.call('ZADD', KEYS[2], ARGV[7], member)
return 'again'
