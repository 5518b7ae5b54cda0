-- Commits a staged push: the policy's decision, the step, a place in the log; renews the lease. Calling it again
-- with the same key, because an answer was lost, gives the same record.
-- KEYS     the run's, 9 lease:ID, 10 window:ID
-- ARGV     1 lease, 2 token, 3 step where the gradient was taken, 4 idempotency key, 5 claim, 6 epoch and 7 newest
--          seq that the shard knows, 8 digest of the body, 9 samples
-- returns  {behind}, {lost} (the run was opened again since the push was admitted), {lease-expired},
--          {epoch-changed, epoch}, or {committed, record, evicted idempotency keys ...}; the record's seq is 0
--          where the push was dropped

local lease, token, taken_at, key, claim = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
if is_behind(ARGV[6], ARGV[7]) then return {'behind'} end
local record = redis.call('HGET', RECEIPTS, key)
if record then return {'committed', record} end
if redis.call('HDEL', PENDING, key) == 0 then return {'lost'} end

local now = clock()
local worker = holder(KEYS[9], lease, token, now)
if not worker then return {'lease-expired'} end
local epoch = redis.call('HGET', RUN, 'epoch')
if redis.call('HGET', KEYS[9], 'epoch') ~= epoch then return {'epoch-changed', tonumber(epoch)} end

local step, live, seq = run_number('step'), live_workers(now), 0
local staleness = step - taken_at
local decision, reason = 'dropped', nil
if not is_fresh(staleness, live) then
  reason = 'stale'
elseif redis.call('HGET', RUN, 'distinct') == '1' and redis.call('HEXISTS', GROUP, worker) == 1 then
  reason = 'duplicate-worker'
else
  redis.call('HINCRBY', GROUP, worker, 1)
  redis.call('HINCRBY', RUN, 'grouped', 1)
  local complete = is_complete(now)
  decision = complete and 'applied' or 'accumulated'
  seq, step = append(complete, {'key', key, 'worker', worker, 'decision', decision,
    'staleness', staleness, 'samples', ARGV[9]})
end
extend(KEYS[9], worker, now)
redis.call('HINCRBY', RUN, decision, 1)
redis.call('HINCRBY', KEYS[9], 'pushes', 1)
redis.call('HSET', KEYS[9], 'step', taken_at, 'staleness', staleness)
record = cjson.encode({claim = claim, digest = ARGV[8], decision = decision, reason = reason, step = step,
  staleness = staleness, seq = seq, live = live, worker = worker, epoch = tonumber(epoch)})
return {'committed', record, unpack(remember(key, record, KEYS[10]))}
