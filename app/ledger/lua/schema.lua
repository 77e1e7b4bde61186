-- Before every script that writes orders (schema.py puts it there): data of a newer version of ours is not touched.
--
-- One GET a call; the first writer of all, or the first of a newer version, notes the version, in the same step.
do
  local held = redis.call('GET', 'ota:schema')
  local version = held and (tonumber(held) or math.huge) or 0
  if version > schema_version then
    return redis.error_reply('NEWERDATA ' .. held)
  end
  if version < schema_version then
    redis.call('SET', 'ota:schema', schema_version)
  end
end
