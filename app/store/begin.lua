--! uses trail, sinks
-- begin: what does this order need, and may this worker do it? Asked before every getOrder.
--
-- KEYS  1 record  2 due  3 dead  4 trail  5 holding of this worker  6 content
-- ARGV  1 now ms  2 lease ms  3 worker  4 member  5 crashes allowed  6 keep ms  7.. sinks
-- Returns {verdict, ...}:
--   nothing   nobody needs this job, or not yet
--   held      another worker fetches this very settlement
--   dead      its fetch ended its workers too often: given up now
--   hand      fetched, but a sink is behind
--   fetch, begun, fence, tries, looks, parks, missing, status last known, request, lane
local now, lease, worker, member = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4]
local r = redis.call('HMGET', KEYS[1], 'wanted', 'begun', 'done', 'fence', 'lease', 'crashes', 'dead', 'revision',
  'tries', 'looks', 'parks', 'missing', 'status', 'said', 'request', 'lane', 'fetched', 'heard', 'job')
local wanted = tonumber(r[1] or '0')
if wanted == 0 then
  redis.call('ZREM', KEYS[2], member)
  return {'nothing'}
end
redis.call('HDEL', KEYS[1], 'job', 'pushes')
if r[7] then
  redis.call('ZREM', KEYS[2], member)
  return {'nothing'}
end
if tonumber(r[3] or '0') >= wanted then
  local sinks = read_sinks(7)
  if sink_behind(KEYS[1], tonumber(r[8] or '0'), sinks) then
    return {'hand'}
  end
  rest(KEYS[2], member, ARGV[6], sinks, KEYS[1], KEYS[4], KEYS[6])
  return {'nothing'}
end
local until_ms, crashes = tonumber(r[5] or '0'), tonumber(r[6] or '0')
if until_ms > now and tonumber(r[2] or '0') >= wanted then
  return {'held'}
end
-- A job left over from before the last begin (ticked twice in a long backlog, or live and backfill): what failed or
-- is unsettled waits for its time, else each such job would burn a try or a look.
if not r[19] and tonumber(redis.call('ZSCORE', KEYS[2], member) or '0') > now then
  return {'nothing'}
end
if until_ms > 0 and until_ms <= now then
  crashes = redis.call('HINCRBY', KEYS[1], 'crashes', 1)
  if crashes >= tonumber(ARGV[5]) then
    redis.call('HDEL', KEYS[1], 'lease', 'holder')
    redis.call('HSET', KEYS[1], 'dead', 'kills_worker', 'dead_at', now)
    redis.call('ZADD', KEYS[3], now, member)
    redis.call('ZREM', KEYS[2], member)
    note(KEYS[4], now .. ' dead kills_worker')
    return {'dead'}
  end
end
-- The event and the fetch both tell a status; the later of the two is the last one known.
local known = tonumber(r[17] or '0') > tonumber(r[18] or '0') and r[13] or r[14]
local fence = tonumber(r[4] or '0') + 1
redis.call('HSET', KEYS[1], 'begun', wanted, 'fence', fence, 'lease', now + lease, 'holder', worker)
redis.call('ZADD', KEYS[2], now + lease, member)
redis.call('SET', KEYS[5], member .. ' ' .. fence, 'PX', 3600000)
note(KEYS[4], now .. ' begin ' .. wanted .. ' ' .. fence .. ' ' .. worker)
return {'fetch', wanted, fence, tonumber(r[9] or '0'), tonumber(r[10] or '0'), tonumber(r[11] or '0'),
  tonumber(r[12] or '0'), known or '', r[15] or '', r[16] or ''}
