-- Reads which leases have run out, by Redis's clock, and whether anything else is due: an update that waits for nobody
-- any more (its last absentee's lease may have been lost with Redis's data, and will never end), a push that holds a slot
-- and does not come while others wait in line, or a refusal that was kept for parts that have not come.
-- KEYS     the run's
-- ARGV     1 how long such a push may take, in ms
-- returns  {live leases, 1 if anything else is due or else 0, how many ms the one that ends next has left (0 without any),
--          then worker and lease, in turn, of those that have run out}

local now = clock()
local live = live_workers(now)
local waits = live > 0 and redis.call('HGET', RUN, 'batch') == 'live' and is_complete(now)
local are_waiting = redis.call('LLEN', QUEUE) > 0
for _, staged in ipairs(redis.call('HVALS', STAGED)) do
  staged = cjson.decode(staged)
  waits = waits or ((staged.slug or are_waiting) and is_overdue(staged, tonumber(ARGV[1]), now))
end
local following = redis.call('ZRANGEBYSCORE', LEASES, '(' .. text(now), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local answer = {live, waits and 1 or 0, following[2] and tonumber(following[2]) - now or 0}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', text(now))) do
  answer[#answer + 1] = worker
  answer[#answer + 1] = redis.call('HGET', WORKERS, worker) or ''
end
return answer
