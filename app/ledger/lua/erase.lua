--! uses trail
-- erase: of an order goes all that is known, save a tombstone that keeps it from coming back. The first step of an
-- erasure (erasure.py), and one: from here on every script refuses whatever would fetch, store or hand on the order.
--
-- KEYS  1 record  2 due  3 dead  4 trail  5 content  6 dead sinks  7 orders of its company watched by reconcile
--       8 erasures under way  9.. the references of its content
-- ARGV  1 now ms  2 member  3 keep ms  4 `stored` of the record when those references were read, '' = none  5 order id
-- Returns {verdict, ms}: unknown (no such order), changed (another content was stored since: read again),
--   erased (with the ms when it was first)
-- Left are what tells a new event from an old one, what gives ids that never come twice, and which revision each sink
-- may have: of one that was tried and did not take it we cannot know what it kept.
local now, member = ARGV[1], ARGV[2]
local flat, r = redis.call('HGETALL', KEYS[1]), {}
for i = 1, #flat, 2 do
  r[flat[i]] = flat[i + 1]
end
if not r.wanted then
  return {'unknown', 0}
end
if (r.stored or '') ~= ARGV[4] then
  return {'changed', 0}
end
local kept = {wanted = 1, begun = 1, done = 1, fence = 1, stored = 1, pushed = 1, duplicates = 1, first = 1, heard = 1,
  revision = 1, erased = 1}
for field, value in pairs(r) do
  local sink = string.match(field, '^(.+):tries$')
  if sink and tonumber(value) > 0 then
    redis.call('HSET', KEYS[1], sink .. ':at', r.revision or 0)
  end
  sink = string.match(field, '^(.+):dead$')
  if sink then
    redis.call('ZREM', KEYS[6], member .. ' ' .. sink)
  end
  if not kept[field] and not string.match(field, ':at$') then
    redis.call('HDEL', KEYS[1], field)
  end
end
redis.call('HSET', KEYS[1], 'done', r.wanted, 'begun', r.wanted, 'erased', r.erased or now)
for _, zset in ipairs({KEYS[2], KEYS[3]}) do
  redis.call('ZREM', zset, member)
end
redis.call('ZREM', KEYS[7], ARGV[5])
redis.call('ZADD', KEYS[8], 'NX', now, member)
for i = 9, #KEYS do
  redis.call('SREM', KEYS[i], member)
end
redis.call('DEL', KEYS[5])
-- Lines of the trail hold words of upstream and of senders; those of the sinks hold none, and say who has a copy.
local lines = redis.call('LRANGE', KEYS[4], 0, -1)
redis.call('DEL', KEYS[4])
for _, line in ipairs(lines) do
  if string.match(line, '^%d+ sink ') or string.match(line, '^%d+ erased$') then
    redis.call('RPUSH', KEYS[4], line)
  end
end
local left = r.erased and redis.call('PTTL', KEYS[1]) or -1
if not r.erased then
  note(KEYS[4], now .. ' erased')
end
for _, key in ipairs({KEYS[1], KEYS[4]}) do
  redis.call('PEXPIRE', key, left > 0 and left or ARGV[3])
end
return {'erased', tonumber(r.erased or now)}
