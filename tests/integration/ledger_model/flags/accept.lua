--! uses push
-- accept with a flag: `waiting` says that a fetch is queued; an event finds it up, or puts it up and queues one.
-- KEYS, ARGV and answer as app/ledger/lua/accept.lua.
local now, prefix, live = tonumber(ARGV[1]), ARGV[5], ARGV[6]
local template, at = read_template(7)
local outcomes = {}

while at <= #ARGV do
  local digest, company, order = unpack(ARGV, at, at + 2)
  local member = company .. ':' .. order
  local record = prefix .. 'order:' .. member
  if digest ~= '' and not redis.call('SET', prefix .. 'seen:' .. digest, 1, 'NX') then
    outcomes[#outcomes + 1] = 2
  elseif redis.call('HSETNX', record, 'waiting', 1) == 0 then
    outcomes[#outcomes + 1] = 1
  else
    local number = redis.call('HINCRBY', record, 'pushed', 1)
    redis.call('HDEL', record, 'dead')
    redis.call('ZREM', KEYS[7], member)
    redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), member)
    push_job(template, company, order, 'f-' .. company .. '-' .. order .. '-' .. number, live, KEYS[3])
    outcomes[#outcomes + 1] = 0
  end
  at = at + 9
end
flush_pushes(KEYS[4])
return outcomes
