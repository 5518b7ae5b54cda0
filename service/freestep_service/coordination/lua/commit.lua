-- Commits a push of which a shard has staged its part, once every shard has: decides by the policy, takes a place in the
-- log, keeps a receipt, renews the lease and marks the units that the claim names as done, or has them handed out again
-- if the push is dropped. A repeated call with the same key returns the same record.
-- KEYS     the run's, 13 lease:ID, 14 window:ID
-- ARGV     1 lease, 2 fencing token, 3 step at which the gradient was taken, 4 idempotency key, 5 claim, 6 epoch and
--          7 newest seq that the shard knows, 8 shard, 9 its owner's token, 10 elements of its part (BEGIN-END), 11 digest
--          of that part of the body, 12 norm of that part of the gradient, 13 largest norm allowed or an empty string,
--          14 the point to answer with ("y F32") or an empty string, 15 1 if that point is to be read after the group's
--          update, else 0, 16 the worker's speed or an empty string, 17 bytes of that part of the body, 18 the attempt,
--          as of admit.lua; nothing where there is one shard
-- returns  {behind}, {not-open, missing shards (JSON)}, {fenced}, {lost, epoch, newest seq} (the run was opened again, or
--          the push refused, since it was admitted: its key may have been admitted anew), {lease-expired},
--          {epoch-changed, epoch}, {unit-not-held, units}, {run-paused},
--          {staged} (other shards have not staged their parts; a message with the decision follows), {refused} (the norm
--          is too large), or {committed, record, evicted idempotency keys ...}; the record's seq is 0 if the push was
--          dropped, unless that was for want of norms to compare its own with: then the log tells of it

-- Pushes that are remembered, how many of one worker count for its median, and of how many workers outliers are counted.
local KEPT_NORMS, NEWEST, MOST_NAMED = 128, 5, 1024
-- A push is judged once so many workers have pushed, or all if they are fewer, or so many pushes are known.
local ENOUGH_WORKERS, ENOUGH_NORMS = 3, 16

-- The median of a list of numbers, of two in the middle the smaller; nil of none.
local function median(numbers)
  table.sort(numbers)
  return numbers[math.ceil(#numbers / 2)]
end

-- The norm that a worker's push is compared with: the median over workers, so that one who pushes often has one vote, and
-- the worker's own if that is smaller, each of the newest norms. Zeros say nothing of it. nil while too little is known.
local function usual_norm(norms, worker, live)
  local by_worker, workers, medians = {}, 0, {}
  for index = #norms, 1, -1 do
    local name, norm = norms[index][1], tonumber(norms[index][2])
    if not by_worker[name] then by_worker[name], workers = {}, workers + 1 end
    if norm > 0 and #by_worker[name] < NEWEST then table.insert(by_worker[name], norm) end
  end
  if workers < math.min(live, ENOUGH_WORKERS) and #norms < ENOUGH_NORMS then return nil end
  for _, found in pairs(by_worker) do medians[#medians + 1] = median(found) end
  local usual, own = median(medians), by_worker[worker]
  return usual and own and #own == NEWEST and math.min(usual, median(own)) or usual
end

-- Adds one to a worker's count in one of the run's tables of workers, unless it is full of others.
local function count_worker(field, worker)
  local counts, named = worker_counts(field), 0
  for _ in pairs(counts) do named = named + 1 end
  if counts[worker] or named < MOST_NAMED then counts[worker] = (counts[worker] or 0) + 1 end
  redis.call('HSET', RUN, field, cjson.encode(counts))
end

-- How many of the remembered pushes are outliers of a worker.
local function outliers_of(norms, worker)
  local found = 0
  for _, push in ipairs(norms) do
    if push[1] == worker and push[3] then found = found + 1 end
  end
  return found
end

local lease, token, taken_at, key, claim = ARGV[1], ARGV[2], tonumber(ARGV[3]), ARGV[4], ARGV[5]
if is_behind(ARGV[6], ARGV[7]) then return {'behind'} end
local shard = ARGV[8]
local record = redis.call('HGET', RECEIPTS, key)
if record then return {'committed', record} end
local refusal = shut(shard, ARGV[9])
if refusal then return refusal end
local count = shard_count()
local staged = count > 1 and redis.call('HGET', STAGED, key)
staged = staged and cjson.decode(staged)
local is_pending = redis.call('HEXISTS', PENDING, key) == 1
-- One of the two keys was lost, and has been written to since.
if (is_pending and count > 1 and not staged) or (staged and not is_pending and not staged.slug) then return {'behind'} end
if not is_pending or (staged and not is_of(staged, ARGV[18])) then
  return {'lost', run_number('epoch'), run_number('seq')}
end

local parts = {[shard] = {range = ARGV[10], digest = ARGV[11], norm = ARGV[12], token = ARGV[9],
  bytes = ARGV[17]}}
if count > 1 then
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
local found = held(KEYS[13], lease, token, now)
local epoch, step = unpack(redis.call('HMGET', RUN, 'epoch', 'step'))
if not found then
  refuse(key, 'lease-expired', '')
  return {'lease-expired'}
end
if found.epoch ~= epoch then
  refuse(key, 'epoch-changed', '')
  return {'epoch-changed', tonumber(epoch)}
end
if rule('paused') then
  -- It was admitted before. What waits until the run is resumed is its sender, and not memory.
  refuse(key, 'run-paused', '')
  return {'run-paused'}
end
local worker = found.worker
-- Receipts outlive the shards, so their digests are named by elements. A part without a range is of an older version.
local squares, digests, bytes = 0, {}, 0
for index, part in pairs(parts) do
  digests[part.range or index] = part.digest
  -- Older versions wrote none.
  bytes = bytes + tonumber(part.bytes or 0)
end
for index = 0, count - 1 do squares = squares + tonumber(parts[tostring(index)].norm) ^ 2 end
local norm = math.sqrt(squares)
if ARGV[13] ~= '' and norm > tonumber(ARGV[13]) then
  refuse(key, 'non-finite-gradient', '')
  return {'refused'}
end

local unheld = unheld_units(claim)
if unheld then
  refuse(key, 'unit-not-held', 'the lease does not have ' .. unheld[2])
  return unheld
end

-- Whatever can fail comes before the entry is appended and counted.
check_type('stream', LOG)
check_type('hash', GROUP)
check_type('list', QUEUE)
check_type('hash', CUTS)
local evicted = crowded_out(KEYS[14])
local live, seq = live_workers(now), 0
step = tonumber(step)
local staleness = step - taken_at
local bounds, norms, usual = rule('bounds'), nil, nil
if bounds then
  norms = cjson.decode(redis.call('HGET', RUN, 'norms') or '[]')
  usual = usual_norm(norms, worker, live)
end
local decision, reason = 'dropped', nil
if not is_fresh(staleness, live) then
  reason = 'stale'
elseif rule('distinct') and redis.call('HEXISTS', GROUP, worker) == 1 then
  reason = 'duplicate-worker'
elseif bounds and bounds.clip and not usual then
  reason = 'norms-unknown'
else
  decision = is_complete(now, worker) and 'applied' or 'accumulated'
  if usual and norm > bounds.outlier * usual then reason = 'outlier' end
end
local is_logged = decision ~= 'dropped' or reason == 'norms-unknown'
if is_logged then seq, step = next_place(decision == 'applied') end
local exact_norm = string.format('%.17g', norm)
record = cjson.encode({claim = claim, digests = digests, decision = decision, reason = reason, step = step,
  staleness = staleness, seq = seq, live = live, worker = worker, epoch = tonumber(epoch),
  norm = exact_norm, bound = usual and bounds.clip and string.format('%.17g', bounds.clip * usual) or nil})
extend(KEYS[13], worker, found.ttl_ms, now)
count_push(worker, now)
forget(key)
if ARGV[14] ~= '' then
  local grouped = ARGV[15] == '1' and (decision == 'accumulated' or reason == 'duplicate-worker')
  redis.call('HSET', CUTS, key, cjson.encode({point = ARGV[14], seq = 0, left = count, ends = now + CUT_TTL,
    kind = 'push', grouped = grouped or nil}))
end
local entry = is_logged and append(decision == 'applied', {key = key, record = record, evicted = evicted, seq = seq,
  step = step, epoch = tonumber(epoch)})

remember(key, record, KEYS[14], evicted)
if decision == 'dropped' then give_back_claimed(claim) else count_units(claim) end
if decision == 'accumulated' then
  redis.call('HINCRBY', GROUP, worker, 1)
  redis.call('HINCRBY', RUN, 'grouped', 1)
end
redis.call('HINCRBY', RUN, decision, 1)
redis.call('HINCRBY', KEYS[13], 'pushes', 1)
redis.call('HINCRBY', KEYS[13], 'received_bytes', text(bytes))
redis.call('HSET', KEYS[13], 'step', taken_at, 'staleness', staleness)
if ARGV[16] ~= '' then redis.call('HSET', KEYS[13], 'speed', ARGV[16]) end
if bounds and is_logged then
  norms[#norms + 1] = {worker, exact_norm, reason == 'outlier'}
  while #norms > KEPT_NORMS do table.remove(norms, 1) end
  redis.call('HSET', RUN, 'norms', cjson.encode(norms))
  if reason == 'outlier' then count_worker('outliers', worker) end
  if reason == 'outlier' and bounds.ban_after and outliers_of(norms, worker) >= bounds.ban_after then
    count_worker('banned', worker)
    -- Its lease has run out: what that brings about is left to lua/leases_expire.lua.
    redis.call('ZADD', LEASES, text(now), worker)
    redis.call('DEL', KEYS[13])
  end
end
if entry then
  publish_entry(entry)
elseif count > 1 then
  publish({kind = 'decided', key = key, attempt = staged.attempt, record = record, evicted = evicted})
  cut_if_waited_for()
end
return {'committed', record, unpack(evicted)}
