-- erase_events: the events of erased orders leave the stream, one page of it a call.
--
-- KEYS  1 events
-- ARGV  1 id to begin at  2 last id  3 entries a page  4.. members
-- Returns {id of the last entry looked at, '' = none, entries looked at, entries removed}.
-- What came after the erasure is recorded without a reference (accept.lua), and stays.
local meant = {}
for i = 4, #ARGV do
  meant[ARGV[i]] = true
end
local last, removed = '', 0
local page = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[2], 'COUNT', ARGV[3])
for _, entry in ipairs(page) do
  local company, order, outcome
  local fields = entry[2]
  for i = 1, #fields, 2 do
    if fields[i] == 'company' then
      company = fields[i + 1]
    elseif fields[i] == 'order' then
      order = fields[i + 1]
    elseif fields[i] == 'outcome' then
      outcome = fields[i + 1]
    end
  end
  last = entry[1]
  if outcome ~= 'erased' and meant[(company or '') .. ':' .. (order or '')] then
    removed = removed + redis.call('XDEL', KEYS[1], last)
  end
end
return {last, #page, removed}
