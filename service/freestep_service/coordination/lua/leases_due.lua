-- Tells which leases have run out by Redis's clock, and whether anything else is due: an update that waits for no live
-- worker (the lease of the last absent worker may be lost with Redis's data), a push that holds a slot without arriving
-- while others wait, a refusal that is kept for parts that have not arrived, a queue that was lost, or
-- a push from later than now.
-- KEYS     the run's
-- ARGV     1 how long such a push may take, in ms
-- returns  {number of live leases, 1 if anything else is due or else 0, ms until the next live lease ends (0 without live
--          leases), then worker and lease, in turn, of the leases that have run out}

local now = clock()
local latest = now + run_number('longest_ttl')
if latest > now then
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '(' .. text(latest), '+inf')) do
    redis.call('ZADD', LEASES, text(latest), worker)
  end
end
local live = live_workers(now)
local waits = live > 0 and rule('batch') == 'live' and is_complete(now)
local are_waiting = redis.call('LLEN', QUEUE) > 0
for _, staged in ipairs(redis.call('HVALS', STAGED)) do
  staged = cjson.decode(staged)
  waits = waits or ((staged.slug or are_waiting) and is_overdue(staged, tonumber(ARGV[1]), now))
    or (staged.queued and not are_waiting) or (staged.at and staged.at > now)
end
local following = redis.call('ZRANGEBYSCORE', LEASES, '(' .. text(now), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local answer = {live, waits and 1 or 0, following[2] and tonumber(following[2]) - now or 0}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', text(now))) do
  answer[#answer + 1] = worker
  answer[#answer + 1] = redis.call('HGET', WORKERS, worker) or ''
end
return answer
