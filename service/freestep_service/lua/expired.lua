-- Reads which leases have run out, by Redis's clock, and whether an update waits for nobody any more: its last
-- absentee's lease may have been lost with Redis's data, and will never end.
-- KEYS     the run's
-- returns  {live leases, 1 if such an update waits or else 0, then worker and lease, in turn, of those that have run
--          out}

local now = clock()
local live = live_workers(now)
local waits = live > 0 and redis.call('HGET', RUN, 'batch') == 'live' and is_complete(now)
local answer = {live, waits and 1 or 0}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', text(now))) do
  answer[#answer + 1] = worker
  answer[#answer + 1] = redis.call('HGET', WORKERS, worker) or ''
end
return answer
