-- Shared by all scripts that end a job: is a revision of this order still to be handed to a sink, and when?
--
-- A sink is behind while its position is below the revision and it was not given up. Returns the one whose next try
-- comes first and the ms of that try (0 = at once), or false.
local function sink_behind(record, revision, sinks)
  local name, at = false, nil
  if revision > 0 then
    for _, sink in ipairs(sinks) do
      local s = redis.call('HMGET', record, sink .. ':at', sink .. ':dead', sink .. ':next')
      local next_try = tonumber(s[3] or '0')
      if not s[2] and tonumber(s[1] or '0') < revision and (not name or next_try < at) then
        name, at = sink, next_try
      end
    end
  end
  return name, at
end

local function read_sinks(at)
  local sinks = {}
  for i = at, #ARGV do
    sinks[#sinks + 1] = ARGV[i]
  end
  return sinks
end

-- Give the fetch of an order up. It leaves the clock, unless a sink (sink_behind) is still to be tried at `sink_at`.
local function give_up(record, due, dead, member, reason, now, sink, sink_at)
  redis.call('HSET', record, 'dead', reason, 'dead_at', now)
  redis.call('HINCRBY', 'ota:counters', 'dead|' .. string.match(member, '^[^:]*') .. '|' .. reason, 1)
  redis.call('ZADD', dead, now, member)
  if sink then
    redis.call('ZADD', due, math.max(sink_at, now), member)
  else
    redis.call('ZREM', due, member)
  end
end

-- Nothing is owed any more: leave the clock, and let the order's keys end `keep` ms after this change. A hand-on
-- that was given up is still owed: nothing of it ends.
local function rest(due, member, keep, sinks, record, ...)
  redis.call('ZREM', due, member)
  for _, sink in ipairs(sinks) do
    if redis.call('HEXISTS', record, sink .. ':dead') == 1 then
      return
    end
  end
  for _, key in ipairs({record, ...}) do
    redis.call('PEXPIRE', key, keep)
  end
end
