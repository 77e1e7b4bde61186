-- Makes every request different at next to no cost, so that wrk's one thread is not what is measured.
--
--   wrk -s load.lua URL -- BODY_FILE FIRST
--
-- BODY_FILE holds a body in which ############ stands wherever the number of the request belongs (12 digits).
-- The whole request, head and all, is cut at these places once; a request is then one format and one concat.

local marker = "############"
local pieces = {}
local number

function init(args)
   local file = assert(io.open(args[1], "rb"))
   local body = file:read("*a")
   file:close()
   number = tonumber(args[2])

   local whole = wrk.format("POST", nil, { ["Content-Type"] = "application/json", ["Host"] = wrk.headers["Host"] }, body)
   local from = 1
   while true do
      local begins, ends = whole:find(marker, from, true)
      pieces[#pieces + 1] = whole:sub(from, (begins or 0) - 1)
      if not begins then break end
      from = ends + 1
   end
end

function request()
   number = number + 1
   return table.concat(pieces, string.format("%012d", number))
end

function done(summary, latency, requests)
   local errors = summary.errors
   io.write(string.format(
      '{"requests":%d,"microseconds":%d,"refused":%d,"broken":%d,"p50_us":%d,"p99_us":%d}\n',
      summary.requests, summary.duration, errors.status,
      errors.connect + errors.read + errors.write + errors.timeout,
      latency:percentile(50), latency:percentile(99)))
end
