-- Tells which leases have run out by Redis's clock, and whether anything else is due: an update that waits for no live
-- worker (the lease of the last absent worker may be lost with Redis's data), a push that holds a slot without arriving
-- while others wait, a refusal that is kept for parts that have not arrived, a queue that was lost, or
-- a push from later than now. Asks shards about parts of pushes that have been arriving for so long: the answer to an
-- admission may have been lost, and the request with it. A shard discards those of which it knows nothing.
-- KEYS     the run's
-- ARGV     1 how long such a push may take, in ms
-- returns  {number of live leases, 1 if anything else is due or else 0, ms until the next live lease ends (0 without live
--          leases), then worker and lease, in turn, of the leases that have run out or whose ends were lost}

local now, patience = clock(), tonumber(ARGV[1])

-- Whether a push that is not queued was admitted, and its shards asked, longer ago than patience.
local function is_unheard(staged)
  local since = staged.asked or staged.at
  return not staged.queued and not staged.slug and (since + patience <= now or since > now)
end

-- The shards whose parts of a push are arriving.
local function arriving_at(staged)
  local shards = {}
  for shard, part in pairs(staged.parts) do
    if not part.digest then shards[#shards + 1] = tonumber(shard) end
  end
  return shards
end

local latest = now + run_number('longest_ttl')
if latest > now then
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '(' .. text(latest), '+inf')) do
    redis.call('ZADD', LEASES, text(latest), worker)
  end
end
local live = live_workers(now)
local waits = live > 0 and rule('batch') == 'live' and is_complete(now)
local are_waiting = redis.call('LLEN', QUEUE) > 0
local pushes, asked = redis.call('HGETALL', STAGED), {}
for index = 1, #pushes, 2 do
  local key, staged = pushes[index], cjson.decode(pushes[index + 1])
  waits = waits or ((staged.slug or are_waiting) and is_overdue(staged, patience, now))
    or (staged.queued and not are_waiting) or (staged.at and staged.at > now)
  local shards = is_unheard(staged) and arriving_at(staged) or {}
  local claim = #shards > 0 and redis.call('HGET', PENDING, key)
  if claim then
    staged.asked = now
    redis.call('HSET', STAGED, key, cjson.encode(staged))
    asked[#asked + 1] = {key = key, attempt = staged.attempt or '', claim = claim, shards = shards}
  end
end
if #asked > 0 then publish({kind = 'arriving', pushes = asked}) end
local following = redis.call('ZRANGEBYSCORE', LEASES, '(' .. text(now), '+inf', 'WITHSCORES', 'LIMIT', 0, 1)
local answer = {live, waits and 1 or 0, following[2] and tonumber(following[2]) - now or 0}
for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '-inf', text(now))) do
  answer[#answer + 1] = worker
  answer[#answer + 1] = redis.call('HGET', WORKERS, worker) or ''
end
if redis.call('HLEN', WORKERS) ~= redis.call('ZCARD', LEASES) then
  -- Where the key of leases was lost, nothing tells when these end.
  local newest = redis.call('HGETALL', WORKERS)
  for index = 1, #newest, 2 do
    if not redis.call('ZSCORE', LEASES, newest[index]) then
      answer[#answer + 1] = newest[index]
      answer[#answer + 1] = newest[index + 1]
    end
  end
end
return answer
