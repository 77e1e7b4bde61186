-- abandon: a worker ended; what it was busy with is due now instead of when its lease ends.
--
-- KEYS  1 holding of that worker  2 due
-- ARGV  1 now ms  2 worker  3 key prefix  4 how: killed (counts as a crash of what it held), ended (by itself, since
--       Redis was away, or by us: nobody's crash)
-- Returns the order it held, or false.
local held = redis.call('GET', KEYS[1])
if not held then
  return false
end
redis.call('DEL', KEYS[1])
local member, fence = string.match(held, '^(%S+) (%d+)')
local record = ARGV[3] .. 'order:' .. member
local r = redis.call('HMGET', record, 'fence', 'holder', 'handler')
if fence == '0' and r[3] == ARGV[2] then
  redis.call('HDEL', record, 'hand', 'handler')
  if ARGV[4] == 'ended' then
    redis.call('HDEL', record, string.match(held, '^%S+ 0 (.+)$') .. ':crashes')
  end
elseif r[1] == fence and r[2] == ARGV[2] then
  if ARGV[4] == 'ended' then
    redis.call('HDEL', record, 'lease', 'holder')
  else
    redis.call('HSET', record, 'lease', ARGV[1])
  end
else
  return false
end
redis.call('ZADD', KEYS[2], ARGV[1], member)
return member
