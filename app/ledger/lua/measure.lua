-- Shared by scripts that count what nobody else can count once: in the hash of app/metrics.py.
--
-- Upper bounds of the histogram in ms; counters.BOUNDS says the same.
local bounds = {250, 500, 1000, 2500, 5000, 10000, 30000, 60000, 120000, 300000, 900000, 3600000, 14400000, 86400000}

local function count(name, by)
  redis.call('HINCRBY', 'ota:counters', name, by)
end

-- From the latest event of an order to its content in the ledger, once an event: `heard` is when it came, `timed` the
-- one that was measured last. A fetch that people asked for is none of this.
local function measure_home(record, member, heard, timed, now)
  if not heard or heard == timed then
    return
  end
  local took, bucket = math.max(now - tonumber(heard), 0), 'inf'
  for _, bound in ipairs(bounds) do
    if took <= bound then
      bucket = bound
      break
    end
  end
  local company = string.match(member, '^[^:]*')
  count('home|' .. company .. '|' .. bucket, 1)
  count('home|' .. company .. '|sum', took)
  redis.call('HSET', record, 'timed', heard)
end
