--! uses push, sinks, apart
-- tick: give every order whose time has come a fresh job. Any number of tickers may run it.
--
-- KEYS  1 due  2 live queue  3 backfill queue  4 RQ's set of queues
-- ARGV  1 now ms  2 grace ms  3 longest wait ms  4 key prefix  5 at most so many  6 name of live  7 name of backfill
--       8 farthest ms ahead that a moment can be  9 length of the job template, the template (push.lua), then the sinks
-- Returns {orders looked at, jobs pushed, orders whose keys are broken}: those are looked at after the longest wait.
-- Pushed again without a begin in between, the wait doubles: a long backlog is not filled with repeats.
local now, grace, longest, prefix = tonumber(ARGV[1]), tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[4]
local farthest = tonumber(ARGV[8])
local template, at = read_template(9)
local sinks = read_sinks(at)

-- A clock that was ahead, and is right again, has left moments that no wait of ours reaches. Nobody knows when they
-- were meant to be: grace from now, which also lets a fetch under way end first.
for _, member in ipairs(redis.call('ZREVRANGEBYSCORE', KEYS[1], '+inf', '(' .. now + farthest, 'LIMIT', 0, ARGV[5])) do
  local record, fields = prefix .. 'order:' .. member, {'lease', 'fetch_at', 'hand'}
  for _, sink in ipairs(sinks) do
    fields[#fields + 1] = sink .. ':next'
  end
  apart(function()
    for i, moment in ipairs(redis.call('HMGET', record, unpack(fields))) do
      if moment and tonumber(moment) > now + farthest then
        redis.call('HSET', record, fields[i], now + grace)
      end
    end
  end)
  redis.call('ZADD', KEYS[1], now + grace, member)
end

local members = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[5])
local jobs, broken = 0, 0

for _, member in ipairs(members) do
  local read = apart(function()
    local record = prefix .. 'order:' .. member
    local r = redis.call('HMGET', record, 'wanted', 'done', 'dead', 'revision', 'lane', 'pushes', 'pushed')
    -- One that owes nothing and has no end was left by a worker that died after its last hand-on: begin ends it.
    local owed = r[1] and (not r[3] and (tonumber(r[2] or '0') < tonumber(r[1]) or redis.call('PTTL', record) == -1)
      or sink_behind(record, tonumber(r[4] or '0'), sinks))
    if owed then
      local company, order = string.match(member, '^(.-):(.+)$')
      local pushes, pushed = tonumber(r[6] or '0'), tonumber(r[7] or '0') + 1
      local backfill = r[5] == ARGV[7]
      redis.call('HSET', record, 'pushes', pushes + 1, 'pushed', pushed, 'job', backfill and ARGV[7] or ARGV[6])
      redis.call('ZADD', KEYS[1], now + math.min(grace * 2 ^ math.min(pushes, 20), longest), member)
      push_job(template, company, order, 'f-' .. company .. '-' .. order .. '-' .. r[1] .. '-t' .. pushed,
        backfill and ARGV[7] or ARGV[6], backfill and KEYS[3] or KEYS[2])
      jobs = jobs + 1
    else
      redis.call('ZREM', KEYS[1], member)
    end
  end)
  if not read then
    broken = broken + 1
    redis.call('ZADD', KEYS[1], now + longest, member)
  end
end
flush_pushes(KEYS[4])
return {#members, jobs, broken}
