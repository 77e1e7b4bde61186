--! uses plan
-- replay: take the next orders off a plan and owe them a fetch, in one step: a feeder that dies before or after it
-- leaves nothing half done, and two feeders never take the same order.
--
-- plans.py puts want.lua before it as the function `want`, which reads KEYS and ARGV as want.lua says.
-- KEYS  1-5 of want.lua  6 plan  7 its orders still to do
-- ARGV  of want.lua without orders, then at most so many orders
-- Returns {state, orders left, ms until the next may be taken}; state: open, done, cancelled, unknown.
local most = tonumber(table.remove(ARGV))
local now, prefix = tonumber(ARGV[1]), ARGV[3]

-- The stored copy is newer than what was told when it was fetched later, and nothing is owed. By force nothing is told.
-- What was erased stays erased.
local function is_older(member, told)
  local r = redis.call('HMGET', prefix .. 'order:' .. member, 'wanted', 'done', 'fetched', 'erased')
  return not r[4] and (not told or tonumber(r[3] or '0') <= told or tonumber(r[2] or '0') < tonumber(r[1] or '0'))
end

local taken, passed = take_orders(KEYS[6], KEYS[7], now, most, is_older)
if not taken then
  return passed
end
local queued = 0
if #taken > 0 then
  for _, member in ipairs(taken) do
    local company, order = string.match(member, '^(.-):(.+)$')
    ARGV[#ARGV + 1] = company
    ARGV[#ARGV + 1] = order
  end
  for _, outcome in ipairs(want()) do
    queued = queued + (outcome == 0 and 1 or 0)
  end
end
return count_orders(KEYS[6], KEYS[7], now, {queued = queued, waiting = #taken - queued, passed = passed})
