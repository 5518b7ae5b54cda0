-- Decides whether a push is admitted, by its claim and before its body is read, and renews its lease.
-- KEYS     the run's, 13 lease:ID, 14 window:ID
-- ARGV     1 lease, 2 fencing token, 3 step at which the gradient was taken, 4 idempotency key, 5 claim (has to be the
--          same when the key comes again), 6 epoch and 7 newest seq that the shard knows, 8 shard, 9 its owner's
--          token, 10- tickets of the cuts that the shard has sent since it last reported any
-- returns  {behind}                 Redis has lost data; the run must be opened again
--          {not-open, missing shards (JSON)}, {fenced} (another process owns the shard)
--          {replay, record}         the key was committed before
--          {pending}                another request carries the push at the moment
--          {idempotency-conflict}   the key was used with another claim
--          {run-not-initialized}, {lease-expired}, {epoch-changed, epoch}, {step-ahead, step}
--          {unit-not-held, units}   the lease does not have these units that the claim names
--          {refused-before, slug, detail}   the body of another part was refused
--          {run-paused}             pushes are refused until the run is resumed; the lease is renewed
--          {dropped, record, evicted idempotency keys ...}   the push is too stale already
--          {ahead}                  the worker is too far ahead of the slowest one and has to wait
--          {admitted, attempt}, or {queued, attempt}: a message {granted} follows when the body may be sent. attempt: its
--          number, which calls and messages of the push name; an empty string where there is one shard

local lease, token, taken_at, key, claim = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
if is_behind(ARGV[6], ARGV[7]) then return {'behind'} end
local shard = ARGV[8]
local refusal = shut(shard, ARGV[9])
if refusal then return refusal end
if ARGV[10] then release_cuts({unpack(ARGV, 10)}) end

local record = redis.call('HGET', RECEIPTS, key)
if record then
  if cjson.decode(record).claim ~= claim then return {'idempotency-conflict'} end
  return {'replay', record}
end
local many = shard_count() > 1
local pending = redis.call('HGET', PENDING, key)
if pending and pending ~= claim then return {'idempotency-conflict'} end
if pending and not many then return {'pending'} end
local staged = many and redis.call('HGET', STAGED, key)
staged = staged and cjson.decode(staged)
-- One of the two keys was lost, and has been written to since.
if (pending and many and not staged) or (staged and not pending and not staged.slug) then return {'behind'} end
local refused = not pending and staged

local now = clock()
local found, step = claimed(KEYS[13], lease, token, taken_at, now)
if not found then return step end
local worker = found.worker
extend(KEYS[13], worker, found.ttl_ms, now)
if refused then
  local is_news = refused.claim == claim and not refused.parts[shard]
  refused.parts[shard] = {}
  if is_news and not has_all_parts(refused.parts) then
    redis.call('HSET', STAGED, key, cjson.encode(refused))
  else
    redis.call('HDEL', STAGED, key)
  end
  if is_news then return {'refused-before', refused.slug, refused.detail} end
end
if pending then
  staged.parts[shard] = staged.parts[shard] or {}
  redis.call('HSET', STAGED, key, cjson.encode(staged))
  return {staged.queued and 'queued' or 'admitted', staged.attempt or ''}
end
if rule('paused') then return {'run-paused'} end
local unheld = unheld_units(claim)
if unheld then return unheld end
local live = live_workers(now)
if not is_fresh(step - taken_at, live) then
  record = cjson.encode({claim = claim, digests = {}, decision = 'dropped', reason = 'stale', step = step,
    staleness = step - taken_at, seq = 0, live = live, worker = worker, epoch = tonumber(found.epoch)})
  local evicted = crowded_out(KEYS[14])
  redis.call('HINCRBY', RUN, 'dropped', 1)
  count_push(worker, now)
  remember(key, record, KEYS[14], evicted)
  give_back_claimed(claim)
  -- No shard waits for what was never admitted.
  if many then publish({kind = 'decided', key = key, attempt = 'none', record = record, evicted = evicted}) end
  return {'dropped', record, unpack(evicted)}
end
local may_lead = slack()
if may_lead then
  local counts = clocks()
  if (counts[worker] or 0) - slowest(counts, now) > may_lead then return {'ahead'} end
end
redis.call('HSET', PENDING, key, claim)
if not many then return {'admitted', ''} end
local run = redis.call('HMGET', RUN, 'in_flight', 'attempt')
local in_flight = tonumber(run[1] or 0)
local queued = in_flight >= SLOTS or is_crowded(lease)
-- Attempts are at least the time in ms, so that they go on rising after Redis has lost its data.
local attempt = text(math.max(tonumber(run[2] or 0) + 1, now))
redis.call('HSET', STAGED, key, cjson.encode({at = now, queued = queued, lease = lease, attempt = attempt,
  parts = {[shard] = {}}}))
redis.call('HSET', RUN, 'attempt', attempt, 'in_flight', in_flight + (queued and 0 or 1))
if queued then
  redis.call('RPUSH', QUEUE, key)
  return {'queued', attempt}
end
return {'admitted', attempt}
