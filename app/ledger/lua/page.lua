-- page: the next members of a zset behind those that were read, also where thousands share one score.
--
-- KEYS  1 zset
-- ARGV  1 up or down  2 score to begin at  3 last score  4 at most so many
--       5.. members that were read last, all of the score to begin at, the latest first
-- Returns member, score, member, score, ...; false if none of those members stands there any more.
-- It goes on behind the latest that still does: a score alone reads the same ones again and again, and an offset skips
-- some once others before them are removed.
local up = ARGV[1] == 'up'
if #ARGV == 4 then
  return redis.call(up and 'ZRANGEBYSCORE' or 'ZREVRANGEBYSCORE', KEYS[1], ARGV[2], ARGV[3], 'WITHSCORES',
    'LIMIT', 0, ARGV[4])
end
for i = 5, #ARGV do
  local score = redis.call('ZSCORE', KEYS[1], ARGV[i])
  if score and tonumber(score) == tonumber(ARGV[2]) then
    local at = redis.call(up and 'ZRANK' or 'ZREVRANK', KEYS[1], ARGV[i]) + 1
    return redis.call(up and 'ZRANGE' or 'ZREVRANGE', KEYS[1], at, at + tonumber(ARGV[4]) - 1, 'WITHSCORES')
  end
end
return false
