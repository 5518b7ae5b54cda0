-- Ends leases that have run out, refuses their pushes that are not committed, and completes the update that waited for
-- those workers alone. Refuses pushes that hold a slot without arriving while others wait. Makes a queue that was lost
-- anew.
-- KEYS     the run's, and in between window:ID of each lease
-- ARGV     1 epoch and 2 newest seq that the shard knows, 3 how long a push may hold its slot without arriving, in ms,
--          then worker and lease, in turn, in the order of the windows
-- returns  {behind} (Redis has lost data; the run must be opened again), or
--          {ended, seq, step, epoch, workers whose leases have ended (JSON), evicted idempotency keys ...}; seq is 0 if
--          no update was completed

if is_behind(ARGV[1], ARGV[2]) then return {'behind'} end
check_types()
for index = 13, #KEYS - 4 do check_type('list', KEYS[index]) end
local now = clock()
local evicted, workers, seq, step = {}, {}, 0, 0
for index = 4, #ARGV, 2 do
  local worker, lease = ARGV[index], ARGV[index + 1]
  local ends = redis.call('ZSCORE', LEASES, worker)
  -- Where the key of workers was lost, its leases are unknown and end here.
  if (redis.call('HGET', WORKERS, worker) or '') == lease and (not ends or tonumber(ends) <= now) then
    end_lease(worker, now)
    workers[#workers + 1] = worker
    retire(lease, KEYS[12 + (index - 2) / 2], evicted)
    if lease == '' then give_back_orphans() end
  end
end
publish_evicted(evicted)
if redis.call('LLEN', QUEUE) == 0 then
  for _, key in ipairs(redis.call('HKEYS', STAGED)) do
    if cjson.decode(redis.call('HGET', STAGED, key)).queued then redis.call('RPUSH', QUEUE, key) end
  end
  grant_slots()
end
for _, key in ipairs(redis.call('HKEYS', STAGED)) do
  local staged = redis.call('HGET', STAGED, key)
  staged = staged and cjson.decode(staged)
  if staged and staged.at > now then
    staged.at = now
    redis.call('HSET', STAGED, key, cjson.encode(staged))
  end
  if staged and is_overdue(staged, tonumber(ARGV[3]), now) then
    if staged.slug then
      redis.call('HDEL', STAGED, key)
    elseif redis.call('LLEN', QUEUE) > 0 then
      refuse(key, 'overloaded', 'the push did not reach all shards in time, and others were waiting')
    end
  end
end
if redis.call('HGET', RUN, 'phase') == 'open' and rule('batch') == 'live' and is_complete(now) then
  local entry = append(true, {closed_by = 'expiry'})
  publish_entry(entry)
  seq, step = entry.seq, entry.step
end
return {'ended', seq, step, run_number('epoch'), cjson.encode(workers), unpack(evicted)}
