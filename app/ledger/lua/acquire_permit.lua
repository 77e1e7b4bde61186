-- acquire_permit: may one request be made with this API key now?
--
-- a  limits and permit as in permits.lua, wait ms (0 = this worker waits no longer)
-- Returns what acquire_permit of permits.lua does, as MessagePack.
if a.wait == 0 then
  redis.call('ZREM', prefix .. 'waiting:' .. a.limits.key, a.permit .. ' ' .. a.limits.breaker)
end
return cmsgpack.pack(acquire_permit(a.limits, a.permit, a.limits.breaker, a.wait))
