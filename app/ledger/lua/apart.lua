-- Shared by the scripts that work on many orders: a broken key of one of them must not stop the others.
--
-- Nothing of ours writes such a key; a foreign program that shares the Redis, or a hand, may. Every other error (Redis
-- is full, read-only, ...) is one of all orders, and ends the script.
local function apart(work)
  local done, failure = pcall(work)
  if done then
    return true
  end
  local text = type(failure) == 'table' and failure.err or tostring(failure)
  if string.find(text, 'WRONGTYPE', 1, true) or string.find(text, 'is not an integer', 1, true) then
    return false
  end
  error(failure, 0)
end
