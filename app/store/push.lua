-- Shared by accept, want and tick: write one RQ job as RQ's own enqueue does, and note that it waits.
--
-- `template` is a flat list made by app/store/jobs.py from a job that RQ itself serialised:
--   1 prefix of job keys, 2-4 the data before, between and after the two arguments, 5.. field, value, ...
-- The data is not compressed: RQ restores either form, and Lua has no zlib.
-- Ids are collected in `pushed[queue]` and go to the lists in one RPUSH each by `flush_pushes`.
local pushed = {}

local function push_job(template, record, company, order, id, queue_name, queue_key)
  redis.call('HSET', template[1] .. id,
    'data', template[2] .. company .. template[3] .. order .. template[4],
    'description', id, 'origin', queue_name, unpack(template, 5))
  redis.call('HSET', record, 'job', queue_name)
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

local function read_template(at)
  local size = tonumber(ARGV[at])
  local template = {}
  for i = 1, size do
    template[i] = ARGV[at + i]
  end
  return template, at + size + 1
end
