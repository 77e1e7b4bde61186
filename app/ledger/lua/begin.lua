--! uses trail, sinks
-- begin: what does this order need, and may this worker do it? Asked before every getOrder.
--
-- KEYS  1 record  2 due  3 dead  4 trail  5 holding of this worker  6 content
-- ARGV  1 now ms  2 lease ms  3 worker  4 member  5 crashes allowed  6 keep ms  7.. sinks
-- Returns {verdict, ...}:
--   nothing   nobody needs this job, or not yet
--   held      another worker fetches this very settlement
--   dead      its fetch ended its workers too often: given up now
--   hand      no fetch is due, but a sink is behind
--   fetch, begun, fence, tries, looks, parks, missing, status last known, request, lane, rejects
local now, lease, worker, member = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local r = redis.call('HMGET', KEYS[1], 'wanted', 'begun', 'done', 'fence', 'lease', 'crashes', 'dead', 'revision',
  'tries', 'looks', 'parks', 'missing', 'status', 'said', 'request', 'lane', 'fetched', 'heard', 'fetch_at', 'rejects',
  'holder', 'erased')
local wanted = tonumber(r[1] or '0')
if wanted == 0 or r[22] then
  redis.call('ZREM', KEYS[2], member)
  return {'nothing'}
end
redis.call('HDEL', KEYS[1], 'job', 'pushes')
local sinks = read_sinks(7)
local sink, sink_at = sink_behind(KEYS[1], tonumber(r[8] or '0'), sinks)
local fetch_at = tonumber(r[19] or '0')
if r[7] or tonumber(r[3] or '0') >= wanted or fetch_at > now then
  -- No fetch now: given up, done, or its time has not come (a job left over from before must not burn a try). The
  -- sinks have a clock of their own.
  if sink and sink_at <= now then
    return {'hand'}
  end
  if not r[7] and fetch_at > now and tonumber(r[3] or '0') < wanted then
    redis.call('ZADD', KEYS[2], sink and math.min(sink_at, fetch_at) or fetch_at, member)
  elseif sink then
    redis.call('ZADD', KEYS[2], sink_at, member)
  elseif r[7] then
    redis.call('ZREM', KEYS[2], member)
  else
    rest(KEYS[2], member, ARGV[6], sinks, KEYS[1], KEYS[4], KEYS[6])
  end
  return {'nothing'}
end
local until_ms, anew = tonumber(r[5] or '0'), tonumber(r[2] or '0') < wanted
-- What this worker itself holds was begun by a call whose answer was lost: it does one thing at a time.
if until_ms > now and not anew and r[21] ~= worker then
  return {'held'}
end
if anew then
  -- The fetches that crashed were of an older settlement; this one has its own tries.
  redis.call('HDEL', KEYS[1], 'crashes')
elseif until_ms > 0 and until_ms <= now then
  local crashes = redis.call('HINCRBY', KEYS[1], 'crashes', 1)
  if crashes >= tonumber(ARGV[5]) then
    redis.call('HDEL', KEYS[1], 'lease', 'holder')
    give_up(KEYS[1], KEYS[2], KEYS[3], member, 'kills_worker', now, sink, sink_at)
    note(KEYS[4], now .. ' dead kills_worker')
    return {'dead'}
  end
end
-- The event and the fetch both tell a status; the later of the two is the last one known.
local known = tonumber(r[17] or '0') > tonumber(r[18] or '0') and r[13] or r[14]
local fence = tonumber(r[4] or '0') + 1
redis.call('HSET', KEYS[1], 'begun', wanted, 'fence', fence, 'lease', now + lease, 'holder', worker)
redis.call('HDEL', KEYS[1], 'fetch_at')
redis.call('ZADD', KEYS[2], now + lease, member)
redis.call('SET', KEYS[5], member .. ' ' .. fence, 'PX', 3600000)
note(KEYS[4], now .. ' begin ' .. wanted .. ' ' .. fence .. ' ' .. worker)
return {'fetch', wanted, fence, tonumber(r[9] or '0'), tonumber(r[10] or '0'), tonumber(r[11] or '0'),
  tonumber(r[12] or '0'), known or '', r[15] or '', r[16] or '', tonumber(r[20] or '0')}
