-- erase_jobs: jobs of erased orders that wait leave their queue, one stretch of it a call.
--
-- KEYS  1 queue
-- ARGV  1 first and 2 last place of the stretch, counted from the end (-1 is the last)  3 prefix of RQ's job keys
--       4.. beginnings of job ids
-- Returns {jobs looked at, jobs removed}.
-- From the end, since workers take from the front: what moves up meanwhile is looked at twice and never passed over.
-- One that a worker has taken is its own to end: begin has nothing for it to do.
local stretch = redis.call('LRANGE', KEYS[1], ARGV[1], ARGV[2])
local removed = 0
for _, id in ipairs(stretch) do
  for i = 4, #ARGV do
    if string.sub(id, 1, #ARGV[i]) == ARGV[i] then
      redis.call('LREM', KEYS[1], -1, id)
      redis.call('DEL', ARGV[3] .. id)
      removed = removed + 1
      break
    end
  end
end
return {#stretch, removed}
