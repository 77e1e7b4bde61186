-- Shared by accept, want and tick: write RQ jobs as RQ's own enqueue does.
--
-- `template` is a flat list made by app/ledger/rq_jobs.py from a job that RQ itself serialised:
--   1 prefix of job keys, 2-4 the data before, between and after the two arguments, 5.. field, value, ...
-- The data is not compressed: RQ restores either form, and Lua has no zlib.
-- Ids are collected in `pushed[queue]` and go to the lists in one RPUSH each by `flush_pushes`.
local pushed = {}

-- The caller notes `job` = queue_name in the order's record, with whatever else it writes there.
local function push_job(template, company, order, id, queue_name, queue_key)
  redis.call('HSET', template[1] .. id,
    'data', template[2] .. company .. template[3] .. order .. template[4],
    'origin', queue_name, unpack(template, 5))
  local list = pushed[queue_key]
  if not list then
    list = {}
    pushed[queue_key] = list
  end
  list[#list + 1] = id
end

local function flush_pushes(queues_key)
  for queue_key, ids in pairs(pushed) do
    redis.call('SADD', queues_key, queue_key)
    for from = 1, #ids, 1000 do
      redis.call('RPUSH', queue_key, unpack(ids, from, math.min(from + 999, #ids)))
    end
  end
end

-- One ZADD for many: `pairs` is score, member, score, member, ...
local function zadd(key, pairs, ...)
  for from = 1, #pairs, 1000 do
    local arguments = {...}
    for i = from, math.min(from + 999, #pairs) do
      arguments[#arguments + 1] = pairs[i]
    end
    redis.call('ZADD', key, unpack(arguments))
  end
end

local function read_template(at)
  local size = tonumber(ARGV[at])
  local template = {}
  for i = 1, size do
    template[i] = ARGV[at + i]
  end
  return template, at + size + 1
end
