-- erase_events: delete the events of erased orders from the stream, one page of it a call.
--
-- a  start and stop (ids), limit (entries a page), orders (members)
-- Returns {id of the last entry read, '' = none, entries read, entries removed}.
-- Events after the erasure are recorded without a reference (accept.lua), and stay.
local events, erased = prefix .. 'events', {}
for _, member in ipairs(a.orders) do
  erased[member] = true
end
local last, removed = '', 0
local page = redis.call('XRANGE', events, a.start, a.stop, 'COUNT', a.limit)
for _, entry in ipairs(page) do
  local event = {}
  for i = 1, #entry[2], 2 do
    event[entry[2][i]] = entry[2][i + 1]
  end
  last = entry[1]
  if event.outcome ~= 'erased' and erased[(event.company or '') .. ':' .. (event.order or '')] then
    removed = removed + redis.call('XDEL', events, last)
  end
end
return {last, #page, removed}
