--! uses plan, trail
-- rehand: take the next orders off a plan and owe their stored revision to sinks once more, without a fetch.
--
-- KEYS  1 due  2 dead sinks  3 plan  4 its orders still to do
-- ARGV  1 now ms  2 key prefix  3 name of the backfill queue  4 at most so many orders  5 id of the plan  6.. sinks
-- Returns {state, orders left, ms until the next may be taken}; state: open, done, cancelled, unknown.
-- The revision stays the same, and so does the idempotency key: who receives it can tell.
local now, prefix, backfill, most, plan_id = tonumber(ARGV[1]), ARGV[2], ARGV[3], tonumber(ARGV[4]), ARGV[5]

local function is_stored(member)
  local r = redis.call('HMGET', prefix .. 'order:' .. member, 'wanted', 'revision', 'erased')
  return r[1] and not r[3] and tonumber(r[2] or '0') > 0
end

local taken, passed = take_orders(KEYS[3], KEYS[4], now, most, is_stored)
if not taken then
  return passed
end
local queued = 0
for _, member in ipairs(taken) do
  local record, trail = prefix .. 'order:' .. member, prefix .. 'trail:' .. member
  local r = redis.call('HMGET', record, 'revision', 'wanted', 'done', 'dead', 'job')
  local revision, anew = tonumber(r[1]), false
  -- Nothing owed expires.
  for _, key in ipairs({record, trail, prefix .. 'content:' .. member}) do
    redis.call('PERSIST', key)
  end
  for i = 6, #ARGV do
    local sink = ARGV[i]
    if tonumber(redis.call('HGET', record, sink .. ':at') or '0') >= revision then
      redis.call('HSET', record, sink .. ':at', revision - 1)
      anew = true
    end
    anew = redis.call('HDEL', record, sink .. ':dead') == 1 or anew
    redis.call('HDEL', record, sink .. ':tries', sink .. ':next', sink .. ':crashes', sink .. ':dropped')
    redis.call('ZREM', KEYS[2], member .. ' ' .. sink)
    note(trail, now .. ' rehand ' .. plan_id .. ' ' .. sink)
  end
  -- A fetch that is owed keeps its lane: live traffic is not put back for this.
  if not r[5] and (r[4] or tonumber(r[3] or '0') >= tonumber(r[2])) then
    redis.call('HSET', record, 'lane', backfill)
  end
  redis.call('ZADD', KEYS[1], 'LT', now, member)
  queued = queued + (anew and 1 or 0)
end
return count_orders(KEYS[3], KEYS[4], now, {queued = queued, waiting = #taken - queued, passed = passed})
