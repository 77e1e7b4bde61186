-- Shared by all scripts that change an order: add a line to what happened to it, keeping the last 200.
local function note(trail, line)
  if redis.call('RPUSH', trail, line) > 200 then
    redis.call('LTRIM', trail, -200, -1)
  end
end
