-- Commits a push that a shard has staged, once every shard has: the policy's decision, the step, a place in the log;
-- renews the lease. Calling it again with the same key, because an answer was lost, gives the same record.
-- KEYS     the run's, 13 lease:ID, 14 window:ID
-- ARGV     1 lease, 2 token, 3 step where the gradient was taken, 4 idempotency key, 5 claim, 6 epoch and 7 newest
--          seq that the shard knows, 8 shard, 9 its owner's token, 10 digest of its part of the body, 11 its part's
--          norm, 12 largest norm allowed or an empty string, 13 the point wanted in answer ("y F32") or an empty
--          string, 14 1 if that is to be after the group's update, else 0, 15 the worker's speed or an empty string
-- returns  {behind}, {not-open, missing shards}, {fenced}, {lost} (the run was opened again, or the push refused, since
--          it was admitted), {lease-expired}, {epoch-changed, epoch}, {staged} (other shards have not: the decision will
--          be told), {refused} (the norm is too large), or {committed, record, evicted idempotency keys ...}; the
--          record's seq is 0 where the push was dropped

local lease, token, taken_at, key, claim = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
if is_behind(ARGV[6], ARGV[7]) then return {'behind'} end
local shard = ARGV[8]
local record = redis.call('HGET', RECEIPTS, key)
if record then return {'committed', record} end
local refusal = shut(shard, ARGV[9])
if refusal then return refusal end
if redis.call('HEXISTS', PENDING, key) == 0 then return {'lost'} end

local count = shard_count()
local parts = {[shard] = {digest = ARGV[10], norm = ARGV[11], token = ARGV[9]}}
if count > 1 then
  local staged = cjson.decode(redis.call('HGET', STAGED, key))
  staged.parts[shard] = parts[shard]
  parts = staged.parts
  for index = 0, count - 1 do
    local part = parts[tostring(index)]
    if not part or not part.digest or not owns(index, part.token) then
      redis.call('HSET', STAGED, key, cjson.encode(staged))
      return {'staged'}
    end
  end
end

local now = clock()
local worker = holder(KEYS[13], lease, token, now)
local epoch = redis.call('HGET', RUN, 'epoch')
if not worker then
  if count > 1 then refuse(key, 'lease-expired', '') else forget(key) end
  return {'lease-expired'}
end
if redis.call('HGET', KEYS[13], 'epoch') ~= epoch then
  if count > 1 then refuse(key, 'epoch-changed', '') else forget(key) end
  return {'epoch-changed', tonumber(epoch)}
end
local squares, digests = 0, {}
for index, part in pairs(parts) do digests[index] = part.digest end
for index = 0, count - 1 do squares = squares + tonumber(parts[tostring(index)].norm) ^ 2 end
local norm = math.sqrt(squares)
if count == 1 then norm = tonumber(ARGV[11]) end
if ARGV[12] ~= '' and norm > tonumber(ARGV[12]) then
  if count > 1 then refuse(key, 'non-finite-gradient', '') else forget(key) end
  return {'refused'}
end
forget(key)

local step, live, seq = run_number('step'), live_workers(now), 0
local staleness = step - taken_at
local decision, reason, entry = 'dropped', nil, nil
if not is_fresh(staleness, live) then
  reason = 'stale'
elseif redis.call('HGET', RUN, 'distinct') == '1' and redis.call('HEXISTS', GROUP, worker) == 1 then
  reason = 'duplicate-worker'
else
  redis.call('HINCRBY', GROUP, worker, 1)
  redis.call('HINCRBY', RUN, 'grouped', 1)
  local complete = is_complete(now)
  decision = complete and 'applied' or 'accumulated'
  entry = append(complete, {key = key})
  seq, step = entry.seq, entry.step
end
extend(KEYS[13], worker, now)
redis.call('HINCRBY', RUN, decision, 1)
redis.call('HINCRBY', KEYS[13], 'pushes', 1)
count_push(worker, now)
redis.call('HSET', KEYS[13], 'step', taken_at, 'staleness', staleness)
if ARGV[15] ~= '' then redis.call('HSET', KEYS[13], 'speed', ARGV[15]) end
record = cjson.encode({claim = claim, digests = digests, decision = decision, reason = reason, step = step,
  staleness = staleness, seq = seq, live = live, worker = worker, epoch = tonumber(epoch),
  norm = string.format('%.17g', norm)})
local evicted = remember(key, record, KEYS[14])
if count > 1 and ARGV[13] ~= '' then
  local grouped = ARGV[14] == '1' and (decision == 'accumulated' or reason == 'duplicate-worker')
  redis.call('HSET', CUTS, key, cjson.encode({point = ARGV[13], seq = 0, left = count, ends = now + CUT_TTL,
    kind = 'push', grouped = grouped or nil}))
end
if entry then
  entry.record, entry.evicted = record, evicted
  publish(entry)
elseif count > 1 then
  tell({kind = 'decided', key = key, record = record, evicted = evicted})
  cut_if_waited_for()
end
return {'committed', record, unpack(evicted)}
