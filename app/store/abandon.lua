-- abandon: a worker ended; what it was busy with is due now instead of when its lease ends.
--
-- KEYS  1 holding of that worker  2 due
-- ARGV  1 now ms  2 worker  3 key prefix
-- Returns the order it held, or false.
local held = redis.call('GET', KEYS[1])
if not held then
  return false
end
redis.call('DEL', KEYS[1])
local member, fence = string.match(held, '^(%S+) (%d+)$')
local record = ARGV[3] .. 'order:' .. member
local r = redis.call('HMGET', record, 'fence', 'holder', 'handler')
if fence == '0' and r[3] == ARGV[2] then
  redis.call('HDEL', record, 'hand', 'handler')
elseif r[1] == fence and r[2] == ARGV[2] then
  redis.call('HSET', record, 'lease', ARGV[1])
else
  return false
end
redis.call('ZADD', KEYS[2], ARGV[1], member)
return member
