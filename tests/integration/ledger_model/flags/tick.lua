--! uses push
-- tick with a flag: an order is owed a fetch while its flag is up or one is under way.
-- KEYS, ARGV and answer as app/ledger/lua/tick.lua.
local now, prefix = tonumber(ARGV[1]), ARGV[4]
local template = read_template(9)
local members = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now, 'LIMIT', 0, ARGV[5])

for _, member in ipairs(members) do
  local record = prefix .. 'order:' .. member
  local r = redis.call('HMGET', record, 'waiting', 'lease', 'dead')
  if (r[1] or r[2]) and not r[3] then
    local company, order = string.match(member, '^(.-):(.+)$')
    local number = redis.call('HINCRBY', record, 'pushed', 1)
    redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), member)
    push_job(template, company, order, 'f-' .. company .. '-' .. order .. '-' .. number, ARGV[6], KEYS[2])
  else
    redis.call('ZREM', KEYS[1], member)
  end
end
flush_pushes(KEYS[4])
return {#members, 0, 0}
