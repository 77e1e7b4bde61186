-- snapshot: what the ledger says of some orders, in one step, for the audit of the property test.
--
-- ARGV  1 sink, then members
-- Returns per member: the three generations, the two tokens, revision, digest, dead, revision and reason of the sink,
-- score in due, score in dead, then for record, history, content: -2 no such key, -1 no end, 1 will end.
local function ends(key)
  return math.min(redis.call('PTTL', key), 1)
end

local rows = {}
for i = 2, #ARGV do
  local row = redis.call('HMGET', 'ota:order:' .. ARGV[i], 'generation', 'started_generation',
    'fetched_generation', 'fencing_token', 'stored_token', 'revision', 'digest', 'dead', ARGV[1] .. ':revision',
    ARGV[1] .. ':dead')
  row[11] = redis.call('ZSCORE', 'ota:due', ARGV[i])
  row[12] = redis.call('ZSCORE', 'ota:dead', ARGV[i])
  row[13] = ends('ota:order:' .. ARGV[i])
  row[14] = ends('ota:history:' .. ARGV[i])
  row[15] = ends('ota:content:' .. ARGV[i])
  rows[#rows + 1] = row
end
return rows
