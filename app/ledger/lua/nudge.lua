-- nudge: the job of these orders may be lost with its worker; look at them now. One `begin` too many is the price.
--
-- KEYS  1 due
-- ARGV  1 now ms, then members
-- Only orders that stand in `due` are owed anything.
for i = 2, #ARGV do
  redis.call('ZADD', KEYS[1], 'XX', 'LT', ARGV[1], ARGV[i])
end
return #ARGV - 1
