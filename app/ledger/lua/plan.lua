-- Shared by replay and rehand: take the next orders off a plan, oldest first, and no faster than its rate.
--
-- The rate is held here, not by who feeds: two feeders of one plan share it. `paced` is the moment up to which it has
-- been used; what was not used is lost after a second (or one order's time), so that nobody makes up for a long pause.
-- `is_needed(member, told)` tells whether an order costs anything; one that does not costs nothing of the rate either.
-- Returns the members taken and how many were passed over; or nil and the reply to give, when the plan is not open.
local function take_orders(plan, todo, now, most, is_needed)
  local p = redis.call('HMGET', plan, 'state', 'rate', 'paced')
  if p[1] ~= 'open' then
    return nil, {p[1] or 'unknown', 0, 0}
  end
  local gap, paced = 1000 / tonumber(p[2]), tonumber(p[3])
  -- Further ahead than any two clocks should be apart: left by one that was wrong.
  if paced > now + 60000 then
    paced = now
  end
  paced = math.max(paced, now - math.max(1000, gap))
  local allowed = math.floor((now - paced) / gap + 0.001)
  local taken, passed = {}, 0
  for _, entry in ipairs(redis.call('LRANGE', todo, 0, most - 1)) do
    local member, told = string.match(entry, '^(%S+) (%S+)$')
    if not is_needed(member, tonumber(told)) then
      passed = passed + 1
    elseif #taken < allowed then
      taken[#taken + 1] = member
    else
      break
    end
  end
  redis.call('LTRIM', todo, #taken + passed, -1)
  redis.call('HSET', plan, 'paced', string.format('%.3f', paced + #taken * gap))
  return taken, passed
end

-- Returns the reply of a step: {state, orders left, ms until the next may be taken}.
local function count_orders(plan, todo, now, counts)
  for name, count in pairs(counts) do
    if count > 0 then
      redis.call('HINCRBY', plan, name, count)
    end
  end
  local left = redis.call('LLEN', todo)
  if left == 0 then
    redis.call('HSET', plan, 'state', 'done', 'ended', now)
    return {'done', 0, 0}
  end
  local p = redis.call('HMGET', plan, 'rate', 'paced')
  return {'open', left, math.max(0, math.ceil(tonumber(p[2]) + 1000 / tonumber(p[1]) - now))}
end
