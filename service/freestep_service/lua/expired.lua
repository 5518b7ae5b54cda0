-- Reads which leases have run out, by Redis's clock.
-- KEYS     the run's
-- returns  {live leases, then worker and lease, in turn, of those that have run out}

local now = clock()
local answer = {live_workers(now)}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', text(now))) do
  answer[#answer + 1] = worker
  answer[#answer + 1] = redis.call('HGET', WORKERS, worker) or ''
end
return answer
