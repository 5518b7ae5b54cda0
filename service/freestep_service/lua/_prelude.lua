-- Goes before every script: the run's keys by name, the clock, and what several scripts share.
--
-- KEYS 1-8  the same for every script, all under one hash tag, freestep:{run}:...
--   run       hash    spec, epoch, step, seq, initialized, token, the policy's values, counts of pushes
--   leases    zset    worker -> when its lease ends, ms since 1970 by Redis's clock
--   workers   hash    worker -> its newest lease; any other lease of that worker is fenced off
--   receipts  hash    idempotency key -> record (JSON: claim, digest, and the receipt's members)
--   pending   hash    idempotency key -> claim of a push that is admitted and not yet committed
--   group     hash    worker -> its pushes in the update that is being gathered
--   log       stream  one entry a commit, with the id SEQ-0, in the order in which shards apply them
--   ended     list    idempotency keys of leases that have ended, oldest first
-- KEYS 9-   lease:ID (hash) and window:ID (list: the lease's newest idempotency keys), where a script says so

local RUN, LEASES, WORKERS, RECEIPTS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local PENDING, GROUP, LOG, ENDED = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local WINDOW_LENGTH, ENDED_LENGTH, LOG_LENGTH = 64, 4096, 1024
-- Fewer than Lua can return at once; what is left goes at the next opportunity.
local MOST_EVICTED = 1024

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Integers in full: Lua's tostring would write those above 10^14 with an exponent.
local function text(number)
  return string.format('%.0f', number)
end

local function run_number(field)
  return tonumber(redis.call('HGET', RUN, field) or 0)
end

-- True when Redis has lost what a shard has already seen: it was wiped, or came back with older data.
local function is_behind(known_epoch, known_seq)
  return redis.call('EXISTS', RUN) == 0 or run_number('epoch') < tonumber(known_epoch)
    or run_number('seq') < tonumber(known_seq)
end

local function live_workers(now)
  return redis.call('ZCOUNT', LEASES, '(' .. text(now), '+inf')
end

-- The worker that holds a lease, or false when the lease is unknown, expired, fenced off or has another token.
local function holder(lease_key, lease, token, now)
  local fields = redis.call('HMGET', lease_key, 'worker', 'token')
  local worker = fields[1]
  if not worker or (token and fields[2] ~= token) then return false end
  if redis.call('HGET', WORKERS, worker) ~= lease then return false end
  local ends = redis.call('ZSCORE', LEASES, worker)
  if not ends or tonumber(ends) <= now then return false end
  return worker
end

local function extend(lease_key, worker, now)
  local ttl = tonumber(redis.call('HGET', lease_key, 'ttl_ms'))
  redis.call('ZADD', LEASES, now + ttl, worker)
  redis.call('PEXPIRE', lease_key, ttl)
end

-- Keeps a record; returns the idempotency keys that it pushed out of the lease's window.
local function remember(key, record, window)
  redis.call('HSET', RECEIPTS, key, record)
  redis.call('RPUSH', window, key)
  local evicted = {}
  while redis.call('LLEN', window) > WINDOW_LENGTH do
    evicted[#evicted + 1] = redis.call('LPOP', window)
    redis.call('HDEL', RECEIPTS, evicted[#evicted])
  end
  return evicted
end

-- Hands an ended lease's keys to the common list; adds to `evicted` those that no longer fit there.
local function retire(window, evicted)
  for _, key in ipairs(redis.call('LRANGE', window, 0, -1)) do
    redis.call('RPUSH', ENDED, key)
  end
  redis.call('DEL', window)
  while redis.call('LLEN', ENDED) > ENDED_LENGTH and #evicted < MOST_EVICTED do
    evicted[#evicted + 1] = redis.call('LPOP', ENDED)
    redis.call('HDEL', RECEIPTS, evicted[#evicted])
  end
end

-- Whether the gathered pushes make an update: `batch` of them, or one of every live worker.
local function is_complete(now)
  local grouped, batch = run_number('grouped'), redis.call('HGET', RUN, 'batch')
  if grouped == 0 then return false end
  if batch ~= 'live' then return grouped >= tonumber(batch) end
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '(' .. text(now), '+inf')) do
    if redis.call('HEXISTS', GROUP, worker) == 0 then return false end
  end
  return true
end

-- Whether a push of this staleness is admitted; 'adaptive' is four steps for each live worker.
local function is_fresh(staleness, live)
  local bound = redis.call('HGET', RUN, 'max_staleness')
  if bound == 'none' then return true end
  if bound == 'adaptive' then return staleness <= 4 * math.max(live, 1) end
  return staleness <= tonumber(bound)
end

-- Takes the next place in the commit log; `advance` says whether the gathered pushes become an update there.
local function append(advance, entry)
  local seq = redis.call('HINCRBY', RUN, 'seq', 1)
  local step
  if advance then
    step = redis.call('HINCRBY', RUN, 'step', 1)
    redis.call('HSET', RUN, 'grouped', 0)
    redis.call('DEL', GROUP)
  else
    step = run_number('step')
  end
  redis.call('XADD', LOG, 'MAXLEN', '~', LOG_LENGTH, text(seq) .. '-0', 'step', step, unpack(entry))
  return seq, step
end
