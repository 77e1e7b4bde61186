--! uses trail, measure, sinks
-- finish: store what getOrder answered, unless a fetch that began later has stored.
--
-- KEYS  1 record  2 due  3 dead  4 trail  5 holding of this worker  6 content  7 orders  8 dead sinks
--       9.. its references
-- ARGV  1 now ms  2 member  3 fence  4 begun  5 keep ms  6 lease of a hand-on ms
--       7 when to look again in ms, '' = the answer is settled  8 reason to give up, '' = none
--       9 digest  10 content  11 status  12 wallets  13 tickets  14 coupons  15 manifest 0|1  16 http status
--       17 duration ms  18 digests of its guests' addresses (guests.py)  19.. sinks
-- Returns {verdict, revision, changed 0|1}; verdict: refused, erased (nothing is stored), home, hand (a sink
--   is behind), again, dead.
-- Called again by a worker whose connection broke before it heard the answer, it changes nothing.
local now, member, fence, begun = tonumber(ARGV[1]), ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local r = redis.call('HMGET', KEYS[1], 'wanted', 'done', 'fence', 'stored', 'digest', 'revision', 'job', 'dead',
  'begun',
  'heard', 'timed', 'erased')
local wanted, done, revision = tonumber(r[1] or '0'), tonumber(r[2] or '0'), tonumber(r[6] or '0')
local sinks = read_sinks(19)
redis.call('DEL', KEYS[5])
if wanted == 0 then
  return {'refused', revision, 0}
end
if r[12] then
  return {'erased', revision, 0}
end
-- Or it began before Redis was flushed or restored from an older copy: what it saw is not what is counted now.
if tonumber(r[4] or '0') > fence or fence > tonumber(r[3] or '0') or begun > tonumber(r[9] or '0') then
  note(KEYS[4], now .. ' refused ' .. fence)
  return {'refused', revision, 0}
end
if r[4] and tonumber(r[4]) == fence then
  local verdict = r[8] and r[8] == ARGV[8] and 'dead' or 'again'
  if done >= wanted then
    verdict = sink_behind(KEYS[1], revision, sinks) and 'hand' or 'home'
  end
  return {verdict, revision, 0}
end
local changed = 0
-- Also where nothing changed: what stands there may have become unreadable, and a refetch is to mend it.
redis.call('SET', KEYS[6], ARGV[10])
if r[5] ~= ARGV[9] then
  changed = 1
  revision = revision + 1
  -- What a sink refused for good was the old content: the new one gets its own tries.
  for _, sink in ipairs(sinks) do
    redis.call('HDEL', KEYS[1], sink .. ':dead', sink .. ':tries', sink .. ':next', sink .. ':crashes')
    redis.call('ZREM', KEYS[8], member .. ' ' .. sink)
  end
end
if ARGV[7] == '' then
  done = math.max(done, begun)
end
redis.call('HSET', KEYS[1], 'done', done, 'stored', fence, 'digest', ARGV[9], 'revision', revision,
  'fetched', now, 'status', ARGV[11], 'wallets', ARGV[12], 'tickets', ARGV[13], 'coupons', ARGV[14],
  'manifest', ARGV[15], 'http', ARGV[16])
redis.call('HDEL', KEYS[1], 'tries', 'parks', 'rejects', 'crashes', 'missing', 'error')
if ARGV[18] == '' then
  redis.call('HDEL', KEYS[1], 'guests')
else
  redis.call('HSET', KEYS[1], 'guests', ARGV[18])
end
redis.call('ZADD', KEYS[7], now, member)
-- The record ends `keep` ms after its last hand-on, whose tries take a day or two.
for i = 9, #KEYS do
  redis.call('SADD', KEYS[i], member)
  redis.call('PEXPIRE', KEYS[i], tonumber(ARGV[5]) + 604800000)
end
note(KEYS[4], now .. ' stored ' .. fence .. ' ' .. ARGV[11] .. ' ' .. revision .. ' ' .. ARGV[16] .. ' ' .. ARGV[17])
local latest = tonumber(r[3]) == fence
if latest then
  redis.call('HDEL', KEYS[1], 'lease', 'holder')
end
if done >= wanted then
  measure_home(KEYS[1], member, r[10], r[11], now)
  -- A worker that was taken for dead, or outlived its lease, may still bring home what was given up meanwhile.
  redis.call('HDEL', KEYS[1], 'looks', 'dead', 'dead_at')
  redis.call('ZREM', KEYS[3], member)
  local _, at = sink_behind(KEYS[1], revision, sinks)
  if at then
    redis.call('ZADD', KEYS[2], math.max(at, now + tonumber(ARGV[6])), member)
    return {'hand', revision, changed}
  end
  rest(KEYS[2], member, ARGV[5], sinks, KEYS[1], KEYS[4], KEYS[6])
  return {'home', revision, changed}
end
if r[8] then
  -- Given up meanwhile, and still so; but what this answer brought is to be handed on.
  local _, at = sink_behind(KEYS[1], revision, sinks)
  if at then
    redis.call('ZADD', KEYS[2], math.max(at, now + tonumber(ARGV[6])), member)
  end
  return {'again', revision, changed}
end
if not latest then
  return {'again', revision, changed}
end
if wanted > begun then
  if not r[7] then
    redis.call('ZADD', KEYS[2], now, member)
  end
  return {'again', revision, changed}
end
if ARGV[8] ~= '' then
  give_up(KEYS[1], KEYS[2], KEYS[3], member, ARGV[8], now, sink_behind(KEYS[1], revision, sinks))
  note(KEYS[4], now .. ' dead ' .. ARGV[8])
  return {'dead', revision, changed}
end
redis.call('HINCRBY', KEYS[1], 'looks', 1)
redis.call('HSET', KEYS[1], 'fetch_at', ARGV[7])
redis.call('ZADD', KEYS[2], ARGV[7], member)
return {'again', revision, changed}
