--! uses push, trail
-- want: owe orders a fetch without an event: replay, refetch, dead requeue, reconcile.
--
-- KEYS  1 due  2 queue  3 RQ's set of queues  4 orders  5 dead
-- ARGV  1 now ms  2 grace ms  3 key prefix  4 name of the queue  5 name of live  6 why (one word)
--       7 length of the job template, the template (push.lua), then per order: company, order
-- Returns per order 0 queued, 1 a job of it waits already, in this queue or in live, 2 it was erased: nothing is owed.
local now, grace, prefix, queue, live = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], ARGV[4], ARGV[5]
local why = ARGV[6]
local template, at = read_template(7)
local outcomes = {}

while at <= #ARGV do
  local company, order = ARGV[at], ARGV[at + 1]
  local member = company .. ':' .. order
  local record, trail = prefix .. 'order:' .. member, prefix .. 'trail:' .. member
  local was = redis.call('HMGET', record, 'wanted', 'job', 'first', 'lane', 'erased')
  if was[5] then
    outcomes[#outcomes + 1] = 2
  else
    local wanted = tonumber(was[1] or '0') + 1
    redis.call('PERSIST', record)
    redis.call('PERSIST', trail)
    redis.call('PERSIST', prefix .. 'content:' .. member)
    redis.call('HDEL', record, 'tries', 'looks', 'parks', 'rejects', 'missing', 'fetch_at', 'dead', 'dead_at',
      'crashes', 'error', 'http')
    redis.call('ZREM', KEYS[5], member)
    redis.call('HSET', record, 'wanted', wanted, 'first', was[3] or now)
    redis.call('ZADD', KEYS[4], now, member)
    note(trail, now .. ' wanted ' .. why .. ' ' .. queue)
    if was[2] == queue or was[2] == live then
      redis.call('ZADD', KEYS[1], 'LT', now + grace, member)
      outcomes[#outcomes + 1] = 1
    else
      redis.call('HSET', record, 'lane', queue, 'job', queue)
      redis.call('ZADD', KEYS[1], now + grace, member)
      push_job(template, company, order, 'f-' .. company .. '-' .. order .. '-' .. wanted, queue, KEYS[2])
      outcomes[#outcomes + 1] = 0
    end
  end
  at = at + 2
end
flush_pushes(KEYS[3])
return outcomes
