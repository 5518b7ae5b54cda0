-- Grants a lease under a new fencing token. The worker's older lease, if any, is fenced off.
-- Tokens are at least the time in ms, so that they go on rising after Redis has lost its data.
-- KEYS     the run's, 13 lease:ID of the new lease, 14 window:ID and 15 lease:ID of the worker's older lease
-- ARGV     1 worker, 2 lease, 3 time to live in ms, 4 the older lease, or an empty string
-- returns  {behind} (Redis has lost the run), {not-open, missing shards (JSON)}, {worker-banned, number of its outliers},
--          {worker-suspended, ms until it may have one},
--          {changed, older lease} (call again with that one), or {granted, token, epoch, step, evicted idempotency keys
--          ...}

local worker, lease, ttl, older = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4]
if is_lost() then return {'behind'} end
-- The epoch of a lease is known only once the run is open.
if redis.call('HGET', RUN, 'phase') ~= 'open' then return {'not-open', missing_shards(clock())} end
if worker_counts('banned')[worker] then return {'worker-banned', worker_counts('outliers')[worker]} end
local suspended, longest = worker_counts('suspended'), run_number('longest_ban')
local left = (suspended[worker] or 0) - clock()
if longest > 0 and left > longest then
  suspended[worker], left = clock() + longest, longest
  redis.call('HSET', RUN, 'suspended', cjson.encode(suspended))
end
if left > 0 then return {'worker-suspended', left} end
local actual = redis.call('HGET', WORKERS, worker) or ''
if actual ~= older then return {'changed', actual} end

check_types()
check_type('list', KEYS[14])
check_type('hash', KEYS[13], KEYS[15])
local now, evicted = clock(), {}
local token = text(math.max(run_number('token') + 1, now))
if older ~= '' then
  retire(older, KEYS[14], evicted)
  redis.call('DEL', KEYS[15])
  publish_evicted(evicted)
elseif redis.call('ZSCORE', LEASES, worker) then
  give_back_orphans()
end
redis.call('HSET', RUN, 'token', token, 'longest_ttl', math.max(run_number('longest_ttl'), ttl))
if slack() then
  -- A new worker starts beside the slowest one, so that nobody waits for it.
  local counts, ends = clocks(), tonumber(redis.call('ZSCORE', LEASES, worker) or 0)
  set_clock(counts, worker, ends > now and counts[worker] or slowest(counts, now), now)
end
redis.call('HSET', WORKERS, worker, lease)
redis.call('HSET', KEYS[13], 'worker', worker, 'token', token, 'ttl_ms', ttl,
  'epoch', redis.call('HGET', RUN, 'epoch'), 'granted_ms', text(now), 'pushes', 0)
extend(KEYS[13], worker, ttl, now)
if shard_count() > 1 then publish({kind = 'lease', change = 'granted', worker = worker}) end
return {'granted', token, run_number('epoch'), run_number('step'), unpack(evicted)}
