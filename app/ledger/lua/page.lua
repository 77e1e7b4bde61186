-- page: the next members of a zset behind those that were read, also where thousands share one score.
--
-- a  zset (key), up (true = from the lowest score on), start and stop (scores), limit, anchors: members that were read
--    last, all of the score `start`, the latest first
-- Returns member, score, member, score, ...; false if none of the anchors stands there any more.
-- It goes on behind the latest that still does: a score alone reads the same ones again and again, and an offset skips
-- some once others before them are removed.
if #a.anchors == 0 then
  return redis.call(a.up and 'ZRANGEBYSCORE' or 'ZREVRANGEBYSCORE', a.zset, a.start, a.stop, 'WITHSCORES',
    'LIMIT', 0, a.limit)
end
for _, anchor in ipairs(a.anchors) do
  local score = redis.call('ZSCORE', a.zset, anchor)
  if score and tonumber(score) == tonumber(a.start) then
    local at = redis.call(a.up and 'ZRANK' or 'ZREVRANK', a.zset, anchor) + 1
    return redis.call(a.up and 'ZRANGE' or 'ZREVRANGE', a.zset, at, at + a.limit - 1, 'WITHSCORES')
  end
end
return false
