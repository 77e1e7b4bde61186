--! uses push
-- want with a flag. KEYS, ARGV and answer as app/ledger/lua/want.lua.
local now, prefix, queue = tonumber(ARGV[1]), ARGV[3], ARGV[4]
local template, at = read_template(7)
local outcomes = {}

while at <= #ARGV do
  local company, order = ARGV[at], ARGV[at + 1]
  local member = company .. ':' .. order
  local record = prefix .. 'order:' .. member
  redis.call('HDEL', record, 'dead')
  redis.call('ZREM', KEYS[5], member)
  if redis.call('HSETNX', record, 'waiting', 1) == 0 then
    redis.call('ZADD', KEYS[1], 'LT', now + tonumber(ARGV[2]), member)
    outcomes[#outcomes + 1] = 1
  else
    local number = redis.call('HINCRBY', record, 'pushed', 1)
    redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), member)
    push_job(template, company, order, 'f-' .. company .. '-' .. order .. '-' .. number, queue, KEYS[2])
    outcomes[#outcomes + 1] = 0
  end
  at = at + 2
end
flush_pushes(KEYS[3])
return outcomes
