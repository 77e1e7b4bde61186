--! uses push, trail, apart
-- accept: record events and owe their orders a fetch, all or nothing, in one step (invariants 1 to 4).
--
-- KEYS  1 due  2 events  3 live queue  4 RQ's set of queues  5 orders  6 counters  7 dead
-- ARGV  1 now ms  2 grace ms  3 dedup ms  4 ms to keep events  5 key prefix  6 name of the live queue
--       7 length of the job template, the template (push.lua), then per event nine values:
--       digest of the event ('' = cannot be a duplicate), company, order, status, buyFromOrderReference,
--       name of the secret that matched, request id, timestamp as sent, ms when it was received ('' = now)
-- Returns per event 0 queued, 1 coalesced with the job that waits in live, 2 duplicate,
--   3 erased (erase.lua): recorded, and nothing is owed; 4 refused: a key of its order is broken, it is not recorded.
local now, grace, dedup, kept = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3], tonumber(ARGV[4])
local prefix, live, last_id = ARGV[5], ARGV[6], nil
local template, at = read_template(7)
local names = {[0] = 'queued', [1] = 'coalesced', [2] = 'duplicate', [3] = 'erased', [4] = 'refused'}
local outcomes, counts, pulses = {}, {}, {}
local touched, due, sooner, pushed_now = {}, {}, {}, {}

while at <= #ARGV do
  local digest, company, order, status, reference, secret, request, sent, received = unpack(ARGV, at, at + 8)
  local member = company .. ':' .. order
  local record, trail = prefix .. 'order:' .. member, prefix .. 'trail:' .. member
  local outcome, first
  local recorded = apart(function()
    local was = redis.call('HMGET', record, 'wanted', 'job', 'dead', 'heard', 'erased')
    first = digest == '' or redis.call('SET', prefix .. 'seen:' .. digest, 1, 'NX', 'PX', dedup)
    if not first then
      outcome = 2
      if was[1] then
        redis.call('HINCRBY', record, 'duplicates', 1)
        note(trail, now .. ' duplicate ' .. status .. ' ' .. secret .. ' ' .. request)
      end
    elseif was[5] then
      outcome = 3
      last_id = redis.call('XADD', KEYS[2], '*', 'company', company, 'order', order, 'status', status,
        'reference', '', 'sent', sent, 'outcome', names[3], 'secret', secret, 'request', request)
      note(trail, now .. ' event ' .. last_id .. ' ' .. status .. ' erased ' .. secret .. ' ' .. request)
    else
      local wanted = tonumber(was[1] or '0') + 1
      if was[1] then
        redis.call('PERSIST', record)
        redis.call('PERSIST', trail)
        redis.call('PERSIST', prefix .. 'content:' .. member)
        redis.call('HDEL', record, 'tries', 'looks', 'parks', 'rejects', 'missing', 'fetch_at', 'crashes', 'error',
          'http')
        if was[3] then
          redis.call('HDEL', record, 'dead', 'dead_at')
          redis.call('ZREM', KEYS[7], member)
        end
      end
      -- An event that waited in a spool is no news of an order heard of since. A word from the future is one of
      -- a clock that was ahead: it must not outlast what comes now.
      local heard, before = received == '' and now or math.min(tonumber(received), now), tonumber(was[4] or '0')
      if heard >= before or before > now then
        redis.call('HSET', record, 'wanted', wanted, 'heard', heard, 'said', status, 'reference', reference,
          'request', request, 'lane', live, 'job', live, unpack(was[1] and {} or {'first', heard}))
      else
        redis.call('HSET', record, 'wanted', wanted, 'lane', live, 'job', live)
      end
      touched[#touched + 1] = now
      touched[#touched + 1] = member
      if was[2] == live then
        outcome = 1
        if not pushed_now[member] then
          sooner[#sooner + 1] = now + grace
          sooner[#sooner + 1] = member
        end
      else
        outcome = 0
        pushed_now[member] = true
        due[#due + 1] = now + grace
        due[#due + 1] = member
        push_job(template, company, order, 'f-' .. company .. '-' .. order .. '-' .. wanted, live, KEYS[3])
      end
      last_id = redis.call('XADD', KEYS[2], '*', 'company', company, 'order', order, 'status', status,
        'reference', reference, 'sent', sent, 'outcome', names[outcome], 'secret', secret, 'request', request)
      note(trail, now .. ' event ' .. last_id .. ' ' .. status .. ' ' .. names[outcome] .. ' ' .. secret .. ' ' ..
        request)
    end
  end)
  if not recorded then
    outcome = 4
    -- Not recorded, so not seen: who sends it again must not be told that it is known.
    if first and digest ~= '' then
      redis.call('DEL', prefix .. 'seen:' .. digest)
    end
  end
  outcomes[#outcomes + 1] = outcome
  for _, name in ipairs({'events|' .. company .. '|' .. names[outcome], 'secrets|' .. company .. '|' .. secret}) do
    counts[name] = (counts[name] or 0) + 1
  end
  pulses[company] = pulses[company] or {fresh = 0, secrets = {}}
  pulses[company].secrets[secret] = true
  pulses[company].fresh = pulses[company].fresh + ((outcome == 2 or outcome == 4) and 0 or 1)
  at = at + 9
end
flush_pushes(KEYS[4])
if last_id then
  -- Old by both clocks, the server's and ours: one that is ahead must not empty the stream.
  local oldest = math.min(now, tonumber(string.match(last_id, '^%d+'))) - kept
  redis.call('XTRIM', KEYS[2], 'MINID', '~', math.max(oldest, 0))
end
zadd(KEYS[5], touched)
zadd(KEYS[1], due)
zadd(KEYS[1], sooner, 'LT')
for name, count in pairs(counts) do
  redis.call('HINCRBY', KEYS[6], name, count)
end
-- When an event last came, and how many came in this hour: what silence is told by.
for company, pulse in pairs(pulses) do
  local key = prefix .. 'pulse:' .. company
  for secret in pairs(pulse.secrets) do
    redis.call('HSET', key, 'secret:' .. secret, now)
  end
  if pulse.fresh > 0 then
    redis.call('HINCRBY', key, 'hour:' .. math.floor(now / 3600000), pulse.fresh)
  end
end
return outcomes
