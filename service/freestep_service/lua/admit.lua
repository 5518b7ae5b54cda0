-- Decides all of a push that its claim can decide, before its body is read, and renews its lease.
-- KEYS     the run's, 9 lease:ID, 10 window:ID
-- ARGV     1 lease, 2 token, 3 step where the gradient was taken, 4 idempotency key, 5 claim (what must be the
--          same when the key comes again), 6 epoch and 7 newest seq that the shard knows
-- returns  {behind}                 Redis has lost data; the shard must open the run again
--          {replay, record}         the key was committed before
--          {pending}                the key is on its way through another request
--          {idempotency-conflict}   the key came before with another claim
--          {run-not-initialized}, {lease-expired}, {epoch-changed, epoch}, {step-ahead, step}
--          {dropped, record, evicted idempotency keys ...}   too stale already
--          {admitted}

local lease, token, taken_at, key, claim = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
if is_behind(ARGV[6], ARGV[7]) then return {'behind'} end

local record = redis.call('HGET', RECEIPTS, key)
if record then
  if cjson.decode(record).claim ~= claim then return {'idempotency-conflict'} end
  return {'replay', record}
end
local pending = redis.call('HGET', PENDING, key)
if pending then return {pending == claim and 'pending' or 'idempotency-conflict'} end

if redis.call('HGET', RUN, 'initialized') ~= '1' then return {'run-not-initialized'} end
local now = clock()
local worker = holder(KEYS[9], lease, token, now)
if not worker then return {'lease-expired'} end
local epoch = redis.call('HGET', RUN, 'epoch')
if redis.call('HGET', KEYS[9], 'epoch') ~= epoch then return {'epoch-changed', tonumber(epoch)} end
local step = run_number('step')
if taken_at > step then return {'step-ahead', step} end

extend(KEYS[9], worker, now)
local live = live_workers(now)
if not is_fresh(step - taken_at, live) then
  record = cjson.encode({claim = claim, digest = '', decision = 'dropped', reason = 'stale', step = step,
    staleness = step - taken_at, seq = 0, live = live, worker = worker, epoch = tonumber(epoch)})
  redis.call('HINCRBY', RUN, 'dropped', 1)
  return {'dropped', record, unpack(remember(key, record, KEYS[10]))}
end
redis.call('HSET', PENDING, key, claim)
return {'admitted'}
