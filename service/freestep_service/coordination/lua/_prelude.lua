-- Goes before every script: the run's keys by name, the clock, and what several scripts share.
--
-- KEYS 1-12 the same for every script, all under one hash tag, freestep:{run}:...
--   run       hash    spec, epoch, step, seq, initialized, token, the policy's values, counts of pushes; shards (how
--                     many), phase and generation of its opening (see open.lua), durable (the newest checkpoint),
--                     clocks (JSON: worker -> its pushes, where the policy has a slack)
--   leases    zset    worker -> when its lease ends, ms since 1970 by Redis's clock
--   workers   hash    worker -> its newest lease; any other lease of that worker is fenced off
--   receipts  hash    idempotency key -> record (JSON: claim, digests, and the receipt's members)
--   pending   hash    idempotency key -> claim of a push that is admitted and not yet committed
--   group     hash    worker -> its pushes in the update that is being gathered
--   log       stream  one entry a commit, with the id SEQ-0, in the order in which shards apply them
--   ended     list    idempotency keys of leases that have ended, oldest first
--   shards    hash    K:node, K:url, K:token, K:ends (who owns shard K, and until when), K:report, K:loaded,
--                     K:applied, K:written, and what else its owner says of it
--   staged    hash    idempotency key -> JSON {at, queued, parts: {K: {digest, norm}}} of a pending push, where there
--                     are several shards; or {at, claim, slug, detail, parts} of one that was refused before all of
--                     its parts had come
--   queue     list    idempotency keys that wait for a slot, oldest first
--   cuts      hash    ticket -> JSON {point, seq (0 while it waits for its place), left (shards yet to read it), ends,
--                     kind (push or pull; older versions wrote none)}
-- KEYS 13-  lease:ID (hash) and window:ID (list: the lease's newest idempotency keys), or metrics (see report_metric.lua),
--           where a script says so
--
-- Shards hear what other callers brought about on the channel freestep:{run}:messages, as JSON; a run of one shard has
-- nobody to tell, but of the slowest worker. Whoever misses a message reads the log, or asks again.

local RUN, LEASES, WORKERS, RECEIPTS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local PENDING, GROUP, LOG, ENDED = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local SHARDS, STAGED, QUEUE, CUTS = KEYS[9], KEYS[10], KEYS[11], KEYS[12]
local WINDOW_LENGTH, ENDED_LENGTH, LOG_LENGTH = 64, 4096, 1024
-- Fewer than Lua can return at once; what is left goes at the next opportunity.
local MOST_EVICTED = 1024
-- Pushes of several shards that may hold memory at once; and places that may be read at once, for the answers of pushes
-- and for pulls, so that no pull holds up a push. Each shard has as many vectors for them.
local SLOTS, MOST_CUTS = 4, {push = 4, pull = 2}
-- How long a cut is kept for who does not come for it, in ms.
local CUT_TTL = 30000

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

local function shard_count()
  return tonumber(redis.call('HGET', RUN, 'shards') or 1)
end

local function tell(message)
  redis.call('PUBLISH', string.sub(RUN, 1, -4) .. 'messages', cjson.encode(message))
end

-- True when Redis has lost what a shard has already seen: it was wiped, or came back with older data.
local function is_behind(known_epoch, known_seq)
  return redis.call('EXISTS', RUN) == 0 or run_number('epoch') < tonumber(known_epoch)
    or run_number('seq') < tonumber(known_seq)
end

-- Whether a caller still is a shard's owner; a token that was superseded counts for nothing.
local function owns(shard, token)
  return redis.call('HGET', SHARDS, shard .. ':token') == token
end

-- The shards that nobody owns, as a JSON list.
local function missing_shards(now)
  local missing = {}
  for shard = 0, shard_count() - 1 do
    local ends = redis.call('HGET', SHARDS, shard .. ':ends')
    if not ends or tonumber(ends) <= now then missing[#missing + 1] = shard end
  end
  return #missing == 0 and '[]' or cjson.encode(missing)
end

-- Enters a phase of a run's opening, in a generation of its own; those rise with the clock too, so that they go on
-- rising after Redis has lost the last one.
local function enter(phase)
  local generation = math.max(run_number('generation') + 1, clock())
  redis.call('HSET', RUN, 'phase', phase, 'generation', text(generation))
  return generation
end

-- Closes a run to pushes until every shard has said where it stands, see open.lua.
local function begin_gathering()
  local generation = enter('gather')
  if shard_count() > 1 then tell({kind = 'phase', phase = 'gather', generation = generation}) end
  return generation
end

-- The refusal of a shard's call, or nil: the run is not open, or the caller no longer owns the shard.
local function shut(shard, token)
  if redis.call('HGET', RUN, 'phase') ~= 'open' then return {'not-open', missing_shards(clock())} end
  if not owns(shard, token) then return {'fenced'} end
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

-- The worker whose push a claim may be, or false and the refusal.
local function claimant(lease_key, lease, token, taken_at, now)
  if redis.call('HGET', RUN, 'initialized') ~= '1' then return false, {'run-not-initialized'} end
  local worker = holder(lease_key, lease, token, now)
  if not worker then return false, {'lease-expired'} end
  local epoch = redis.call('HGET', RUN, 'epoch')
  if redis.call('HGET', lease_key, 'epoch') ~= epoch then return false, {'epoch-changed', tonumber(epoch)} end
  if taken_at > run_number('step') then return false, {'step-ahead', run_number('step')} end
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

-- Gives up a slot; the next in line gets it.
local function leave_slot()
  redis.call('HINCRBY', RUN, 'in_flight', -1)
  while run_number('in_flight') < SLOTS do
    local following = redis.call('LPOP', QUEUE)
    if not following then return end
    local waiting = redis.call('HGET', STAGED, following)
    if waiting then
      waiting = cjson.decode(waiting)
      waiting.queued, waiting.at = false, clock()
      redis.call('HSET', STAGED, following, cjson.encode(waiting))
      redis.call('HINCRBY', RUN, 'in_flight', 1)
      tell({kind = 'granted', key = following})
    end
  end
end

-- Forgets a push that was not committed, and gives up the slot that it held.
local function forget(key)
  local staged = redis.call('HGET', STAGED, key)
  redis.call('HDEL', PENDING, key)
  redis.call('HDEL', STAGED, key)
  redis.call('LREM', QUEUE, 0, key)
  if not staged then return end
  staged = cjson.decode(staged)
  if not (staged.queued or staged.slug or staged.slow) then leave_slot() end
end

-- Whether every shard has a part of a push, or is receiving it.
local function has_all_parts(parts)
  for shard = 0, shard_count() - 1 do
    if not parts[tostring(shard)] then return false end
  end
  return true
end

-- Whether a push holds a slot, or the memory of a refusal is kept, for parts that do not come. Parts that are coming in,
-- at whatever speed bodies are allowed, are waited for.
local function is_overdue(staged, patience, now)
  return not staged.queued and staged.at + patience <= now and not has_all_parts(staged.parts)
end

-- Refuses a push on all shards. For what its body is refused for, parts that are still to come are too.
local function refuse(key, slug, detail)
  local staged, claim = redis.call('HGET', STAGED, key), redis.call('HGET', PENDING, key)
  forget(key)
  if staged and claim and (slug == 'non-finite-gradient' or slug == 'malformed-tensors') then
    local parts = cjson.decode(staged).parts
    if not has_all_parts(parts) then
      redis.call('HSET', STAGED, key, cjson.encode({at = clock(), claim = claim, slug = slug, detail = detail,
        parts = parts}))
    end
  end
  tell({kind = 'refused', key = key, slug = slug, detail = detail})
end

-- Hands an ended lease's keys to the common list; adds to `evicted` those that no longer fit there. What it has staged
-- and not committed is refused.
local function retire(lease, window, evicted)
  for _, key in ipairs(redis.call('LRANGE', window, 0, -1)) do
    redis.call('RPUSH', ENDED, key)
  end
  redis.call('DEL', window)
  while redis.call('LLEN', ENDED) > ENDED_LENGTH and #evicted < MOST_EVICTED do
    evicted[#evicted + 1] = redis.call('LPOP', ENDED)
    redis.call('HDEL', RECEIPTS, evicted[#evicted])
  end
  for _, key in ipairs(redis.call('HKEYS', STAGED)) do
    if string.match(redis.call('HGET', PENDING, key) or '', '^%S+') == lease then refuse(key, 'lease-expired', '') end
  end
end

local function tell_evicted(keys)
  if #keys > 0 and shard_count() > 1 then tell({kind = 'evicted', keys = keys}) end
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

-- How many pushes a worker may be ahead of the slowest live one; nil where nobody waits for others.
local function slack()
  return tonumber(redis.call('HGET', RUN, 'slack') or '')
end

local function clocks()
  return cjson.decode(redis.call('HGET', RUN, 'clocks') or '{}')
end

-- The least count of pushes of those who live; 0 where nobody does.
local function slowest(counts, now)
  local least = nil
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '(' .. text(now), '+inf')) do
    local count = counts[worker]
    if count and (not least or count < least) then least = count end
  end
  return least or 0
end

-- Sets a worker's count of pushes, or with nil ends it, and has those wait no longer who waited for that.
local function set_clock(counts, worker, count, now)
  local before = slowest(counts, now)
  counts[worker] = count
  redis.call('HSET', RUN, 'clocks', cjson.encode(counts))
  if not count or slowest(counts, now) > before then tell({kind = 'moved'}) end
end

-- Counts a push that was decided.
local function count_push(worker, now)
  if not slack() then return end
  local counts = clocks()
  set_clock(counts, worker, (counts[worker] or slowest(counts, now)) + 1, now)
end

-- Ends a worker's lease: it holds nobody up any more.
local function end_lease(worker, now)
  redis.call('ZREM', LEASES, worker)
  redis.call('HDEL', WORKERS, worker)
  if slack() then set_clock(clocks(), worker, nil, now) end
end

-- The places that are read now, as SEQ and point, and how many of each kind there are; and the tickets that wait for one,
-- after tickets whose time is over were dropped. A place that a push's answer reads is a push's, whoever else reads it.
local function read_places(now)
  local kinds, open, waiting = {}, {push = 0, pull = 0}, {}
  local all = redis.call('HGETALL', CUTS)
  for index = 1, #all, 2 do
    local ticket, cut = all[index], cjson.decode(all[index + 1])
    local kind = cut.kind or 'pull'
    if cut.seq == 0 then
      waiting[ticket] = cut
    elseif cut.ends <= now then
      redis.call('HDEL', CUTS, ticket)
    else
      local name = text(cut.seq) .. cut.point
      if kinds[name] ~= 'push' then kinds[name] = kind end
    end
  end
  for _, kind in pairs(kinds) do open[kind] = open[kind] + 1 end
  return kinds, open, waiting
end

-- Whether a waiting ticket may have its place at an entry: others read there already, or there is room for its kind.
local function has_room(cut, name, kinds, open)
  local kind = cut.kind or 'pull'
  return kinds[name] ~= nil or open[kind] < MOST_CUTS[kind]
end

-- The tickets that get their place at a log entry, with their points, as far as there is memory for it; nil for none.
-- A ticket that waits for its group's update waits on, unless this entry is an update.
local function due_cuts(seq, advance)
  local now, due, any = clock(), {}, false
  local kinds, open, waiting = read_places(now)
  for ticket, cut in pairs(waiting) do
    local name = text(seq) .. cut.point
    local is_due = advance or not cut.grouped
    if is_due and has_room(cut, name, kinds, open) then
      if not kinds[name] then
        kinds[name] = cut.kind or 'pull'
        open[kinds[name]] = open[kinds[name]] + 1
      end
      cut.seq, cut.ends, cut.grouped = seq, now + CUT_TTL, nil
      redis.call('HSET', CUTS, ticket, cjson.encode(cut))
      due[ticket], any = cut.point, true
    elseif is_due and cut.grouped then
      cut.grouped = nil
      redis.call('HSET', CUTS, ticket, cjson.encode(cut))
    end
  end
  return any and due or nil
end

-- Takes the next place in the commit log; `advance` says whether the gathered pushes become an update there.
local function append(advance, entry)
  local seq = redis.call('HINCRBY', RUN, 'seq', 1)
  if advance then
    redis.call('HINCRBY', RUN, 'step', 1)
    redis.call('HSET', RUN, 'grouped', 0)
    redis.call('DEL', GROUP)
  end
  entry.seq, entry.step, entry.epoch, entry.advance = seq, run_number('step'), run_number('epoch'), advance
  return entry
end

-- Writes an entry into the log and tells the shards. A cut may be taken at any entry.
local function publish(entry)
  local many = shard_count() > 1
  if many then entry.cuts = due_cuts(entry.seq, entry.advance) end
  redis.call('XADD', LOG, 'MAXLEN', '~', LOG_LENGTH, text(entry.seq) .. '-0', 'entry', cjson.encode(entry))
  if many then
    entry.kind = 'entry'
    tell(entry)
  end
end

-- Takes a place for the tickets that wait, if there is memory for one of them.
local function cut_if_waited_for()
  local kinds, open, waiting = read_places(clock())
  for _, cut in pairs(waiting) do
    if not cut.grouped and has_room(cut, '', kinds, open) then
      publish(append(false, {cut = true}))
      return
    end
  end
end

-- Counts a shard off the cuts of some tickets: it has sent its part of them.
local function release_cuts(tickets)
  for _, ticket in ipairs(tickets) do
    local cut = redis.call('HGET', CUTS, ticket)
    if cut then
      cut = cjson.decode(cut)
      cut.left = cut.left - 1
      if cut.left <= 0 then
        redis.call('HDEL', CUTS, ticket)
      else
        redis.call('HSET', CUTS, ticket, cjson.encode(cut))
      end
    end
  end
  if redis.call('HGET', RUN, 'phase') == 'open' then cut_if_waited_for() end
end
