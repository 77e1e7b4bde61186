--! uses trail, sinks
-- hand: take the next revision that a sink has not had; one hand-on an order at a time (invariant 6).
--
-- Try and crash are counted here, before the sink is called; `handed` takes the crash back. So a sink that ends its
-- worker, or holds it until the pool does, runs out of both.
-- KEYS  1 record  2 due  3 trail  4 holding of this worker  5 content
-- ARGV  1 now ms  2 lease ms  3 worker  4 member  5 keep ms  6.. sinks
-- Returns {verdict, ...}: nothing; busy (another worker hands on); sink, name, revision, tries, content, request,
--   crashes (hand-ons of this revision before it that began and never ended), digest of the content
local now, member, sinks = tonumber(ARGV[1]), ARGV[4], read_sinks(6)
local r = redis.call('HMGET', KEYS[1], 'wanted', 'done', 'revision', 'hand', 'handler', 'dead', 'request',
  'fetch_at', 'digest', 'erased')
local revision = tonumber(r[3] or '0')
if not r[1] or r[10] then
  return {'nothing'}
end
-- Where a fetch is owed too, the clock is only put forward: begin knows whose time has come.
local idle = r[6] or tonumber(r[2] or '0') >= tonumber(r[1])
local function look_again(at)
  if idle then
    redis.call('ZADD', KEYS[2], at, member)
  else
    redis.call('ZADD', KEYS[2], 'LT', at, member)
  end
end
local sink, at = sink_behind(KEYS[1], revision, sinks)
if not sink then
  if r[6] then
    redis.call('ZREM', KEYS[2], member)
  elseif idle then
    rest(KEYS[2], member, ARGV[5], sinks, KEYS[1], KEYS[3], KEYS[5])
  elseif tonumber(r[8] or '0') > now then
    redis.call('ZADD', KEYS[2], r[8], member)
  end
  return {'nothing'}
end
if tonumber(r[4] or '0') > now and r[5] ~= ARGV[3] then
  return {'busy'}
end
if at > now then
  look_again(at)
  return {'nothing'}
end
-- What this worker itself holds was begun by a call whose answer was lost with the connection: no other try.
local once_more = r[5] == ARGV[3] and tonumber(r[4] or '0') > now and 0 or 1
redis.call('HSET', KEYS[1], 'hand', now + tonumber(ARGV[2]), 'handler', ARGV[3])
local tries = redis.call('HINCRBY', KEYS[1], sink .. ':tries', once_more)
local crashes = redis.call('HINCRBY', KEYS[1], sink .. ':crashes', once_more)
look_again(now + tonumber(ARGV[2]))
redis.call('SET', KEYS[4], member .. ' 0 ' .. sink, 'PX', 3600000)
return {'sink', sink, revision, tries, redis.call('GET', KEYS[5]) or '', r[7] or '', crashes - 1, r[9] or ''}
