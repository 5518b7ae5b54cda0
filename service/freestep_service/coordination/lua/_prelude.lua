-- This file is put before every other script: the names of the run's keys, the clock, and shared functions.
--
-- Before it stands `local LAYOUT = N`, of domain/layout.py.
--
-- KEYS 1-12 and the last four are the same for every script that is called for a run. Their hash tag is the same:
-- freestep:{run}:...
--   run       hash    spec, first_epoch and id (the epoch in which the run was created, and a random word: they tell
--                     the run from others of its name; older versions wrote none), creator (the id of the token
--                     whose quota it counts against, or an empty string), layout (see domain/layout.py; older versions
--                     wrote none), epoch, step, seq, initialized, token, the policy's values, counts of
--                     pushes; shards (how many), phase and generation of the opening (see open.lua), durable (the
--                     newest checkpoint), clocks (JSON: worker -> number of its pushes; only under a policy with a
--                     slack), bounds (JSON {outlier, clip, ban_after, max_batch}, as far as there are any; only under
--                     a robust rule, as what follows), norms (JSON [[worker, norm, whether it was an outlier], ...] of
--                     the newest pushes in the log, oldest first, norms as text in full precision), outliers (JSON:
--                     worker -> number of them), banned (JSON: worker -> number of bans), marked (1 if receipts has its
--                     mark; runs that older versions opened have none), measured (1 if metrics has any), attempt (the number
--                     of the newest attempt of a push; only where there are several shards), compared (EPOCH-SEQ
--                     of the newest update of which distances has had all parts), longest_ttl (of the leases that were granted, in
--                     ms), datasets (names of data sets, with spaces between them), and of data set NAME: data:NAME (its
--                     spec, JSON), total:NAME (units of all passes, or an empty string), cursor:NAME (the next unit that
--                     was never handed out) and done:NAME (units that have counted). What is below the cursor, not out and
--                     not given back has; and control (what was changed of the run, JSON, see domain/control.py), paused
--                     (1 while pushes are refused until the run is resumed), suspended (JSON: worker -> when it may
--                     have a lease again, in ms since 1970) and longest_ban (the longest of such times that was given, in
--                     ms; older versions wrote none), each once something was changed, and answered_ends (JSON [[idempotency
--                     key, worker, 1 if it had a lease else 0], ...], newest last, see end_worker.lua); upload (the key
--                     of the initial weights, or of the import that took their place) and upload_parts (JSON: elements
--                     of each part of the initial weights -> its digest; older versions wrote none).
--                     A run exists if this hash has a spec.
--   leases    zset    worker -> the time at which its lease ends, in ms since 1970 by Redis's clock
--   workers   hash    worker -> its newest lease; any other lease of that worker is fenced off
--   receipts  hash    idempotency key -> record (JSON: claim, digests by range of elements, members of the receipt); and
--                     an empty key, the mark, which tells receipts that are lost from receipts that are empty
--   pending   hash    idempotency key -> claim of a push that is admitted and not yet committed
--   group     hash    worker -> number of its pushes in the update that is being gathered
--   log       stream  the commit log, with the ids SEQ-0: pushes that were committed, and what else all shards take
--                     in the same order
--   ended     list    idempotency keys of leases that have ended, in the order in which their receipts are evicted: the
--                     newest of each lease last, the first of which is that of the lease that ended first
--   shards    hash    of shard K: K:node, K:url, K:host, K:token, K:ends, K:ttl (its owner, when the ownership ends,
--                     and for how long it is prolonged, in ms),
--                     K:left_url (of the owner that has given it up, until there is another),
--                     K:report, K:loaded (see open.lua), K:written (its newest part of a checkpoint), K:applied_seq
--                     (the newest entry of this epoch's log that it has applied), K:journal (the word of who writes its
--                     journal, in the file `owner` beside that), and other fields of heartbeats
--   staged    hash    idempotency key -> JSON {at, queued, lease, attempt, parts: {K: {digest, norm, bytes}}} of a pending
--                     push, where there are several shards; or {at, claim, slug, detail, parts} of one that was refused
--                     before all of its parts had come. attempt: a number, as text, that no other admission of the key
--                     has; calls and messages of a push name it, since they may come late and the key may be admitted
--                     again meanwhile (older versions wrote none). A part without a digest is arriving: asked is when its
--                     shard was last asked whether it is
--   queue     list    idempotency keys that wait for a slot, oldest first
--   cuts      hash    ticket -> JSON {point, seq (0 while it waits for its place), left (shards yet to read it), ends,
--                     kind (push, pull or state; older versions wrote none)}
--   metrics   hash    see report_metric.lua
--   out       hash    NAME UNIT -> lease that has this unit, and since when (ms since 1970)
--   held      zset    LEASE NAME UNIT of the same units, with sixteen digits
--   back      zset    NAME UNIT, with sixteen digits, of the units that were handed out and given back
-- KEYS 13- differ by script: deleted (string: the last epoch of the run of this name that was deleted last; kept until
-- that is noted, see note_deletion.lua, and for an hour more), lease:ID (hash), window:ID (list: the newest idempotency
-- keys of that lease) or distances
-- (hash, see report_distances.lua: shard -> EPOCH-SEQ and its part of the distances between the pushes of an update;
-- all -> EPOCH-SEQ and the parts of the newest update that has them all).
--
-- Scripts publish what they change as JSON on the channel freestep:{run}:messages, to the owners of other shards. Runs
-- of one shard need no messages, except that the slowest worker has moved. An owner that misses messages reads the log.
--
-- Redis's clock may go back. So an end that is later than a whole time to live from now counts as just that, and an instant
-- that is yet to come as now; leases_due, leases_expire, lease_grant, run_heartbeat, node_heartbeat,
-- quota_take and read_places write them so.
--
-- Any of these keys may be lost alone: evicted, expired, or deleted by hand. Where that would give a wrong result, or have
-- something wait for ever, the run's hash has a mark of it, and the run is opened again from its shards: receipts (pushes
-- would count twice), metrics (reports would count twice, and a learning rate that follows them fall twice), group, and
-- pending and staged of several shards (see has_lost_a_key). Of out, held and back the sums tell (see claim_units.lua). The
-- others may be lost safely:
--   leases, workers, lease:ID   pushes are refused with lease-expired, and workers ask for leases anew; what the leases had
--                               is open again with the next look, or with the next lease of one of their workers
--   pending of one shard        the push that travels is refused as lost, and is sent again
--   log                         a shard that has not got an entry finds the gap, and has the run opened again
--   ended, window:ID            their receipts are kept until the run is opened again
--   shards                      the run closes, its owners take their shards again, and it opens where they stand
--   queue                       leases_expire makes it anew, from staged
--   cuts                        readers ask again and get another place, or the same part from shards that have taken it; a
--                               push is answered with its receipt alone; a shard without memory for one place more says so
--   distances                   shards report until they have made the update, and those that have made it report again
--                               where one of them asks (see report_distances.lua)
--   deleted                     others take a run that was deleted just now for one that Redis has lost, unless that is noted
-- The run's hash itself is missed at once.
--
-- Redis keeps what a script wrote before it failed. So a script checks the types of its keys before its first write.

local RUN, LEASES, WORKERS, RECEIPTS = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local PENDING, GROUP, LOG, ENDED = KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local SHARDS, STAGED, QUEUE, CUTS = KEYS[9], KEYS[10], KEYS[11], KEYS[12]
local METRICS, OUT, HELD, BACK = KEYS[#KEYS - 3], KEYS[#KEYS - 2], KEYS[#KEYS - 1], KEYS[#KEYS]
local WINDOW_LENGTH, ENDED_LENGTH = 64, 4096
-- Of these of a lease that has ended, those that are kept for longest: its pushes whose answers may have been lost.
local NEWEST_ENDED = 2
-- Entries of the log that are kept at least, and at most where a shard is behind.
local LOG_LENGTH, LONGEST_LOG = 1024, 16384
local TRIM_INTERVAL = 64
-- Idempotency keys that one call evicts. Lua can return some 8,000 values; later calls evict the rest.
local MOST_EVICTED = 1024
-- Pushes of several shards that may hold memory at once; and places that may be read at once, for the answers of pushes
-- and for pulls, so that no pull holds up a push. Each shard has as many vectors for them. Copies of whole states need
-- none of these, and have a place of their own.
local SLOTS, MOST_CUTS = 4, {push = 4, pull = 2, state = 1}
-- Of these pushes, those of one lease: half, so that no worker holds up all others. Slow ones count here, too.
local SLOTS_OF_LEASE = 2
-- How long a cut is kept for who does not come for it, in ms.
local CUT_TTL = 30000

-- A process that was stopped until others had gone on with a newer layout changes nothing of it.
if string.sub(RUN, -5) == '}:run' then
  -- An error where the key holds another type, which is the script's to tell.
  local layout = redis.pcall('HGET', RUN, 'layout')
  layout = type(layout) == 'string' and tonumber(layout) or 1
  if layout > LAYOUT then return redis.error_reply(string.format('NEWERLAYOUT %.0f', layout)) end
end

local function clock()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end

-- Writes an integer with all its digits: Lua's tostring uses an exponent above 10^14.
local function text(number)
  return string.format('%.0f', number)
end

-- The run's keys by their types.
local TYPES = {
  hash = {RUN, WORKERS, RECEIPTS, PENDING, GROUP, SHARDS, STAGED, CUTS, METRICS, OUT},
  list = {ENDED, QUEUE},
  zset = {LEASES, HELD, BACK},
  stream = {LOG},
}

-- What is wrong with a key that holds another type; nil where it does not.
local function wrong_type(expected, key)
  local found = redis.call('TYPE', key).ok
  if found == expected or found == 'none' then return nil end
  return 'WRONGTYPE ' .. key .. ' is a ' .. found .. ' and not a ' .. expected
    .. ': another program wrote it, DEL it, and the run is opened again from its shards'
end

-- Raises an error if one of the keys holds another type.
local function check_type(expected, ...)
  for _, key in ipairs({...}) do
    local wrong = wrong_type(expected, key)
    if wrong then error(wrong, 0) end
  end
end

-- Raises an error if one of the run's keys holds another type.
local function check_types()
  for expected, keys in pairs(TYPES) do check_type(expected, unpack(keys)) end
end

-- Whether the run exists. A hash without a spec was left by a write that came after Redis had evicted the run.
local function run_exists()
  return redis.call('HEXISTS', RUN, 'spec') == 1
end

-- Whether Redis has lost the run, and its shards have not restored it yet.
local function is_lost()
  return not run_exists() or redis.call('HEXISTS', RUN, 'lost') == 1
end

local function run_number(field)
  return tonumber(redis.call('HGET', RUN, field) or 0)
end

-- A value of the run's policy, its number of shards, or whether it is paused. All are read at once: scripts that change
-- them do so before they first need one.
local known_rules
local function rule(name)
  if not known_rules then
    local read = redis.call('HMGET', RUN, 'shards', 'batch', 'max_staleness', 'distinct', 'slack', 'bounds', 'paused')
    local bounds = read[6] and read[6] ~= '' and cjson.decode(read[6]) or nil
    known_rules = {shards = tonumber(read[1] or 1), batch = read[2], max_staleness = read[3], distinct = read[4] == '1',
      slack = tonumber(read[5] or ''), bounds = bounds, paused = read[7] == '1'}
  end
  return known_rules[name]
end

local function shard_count()
  return rule('shards')
end

local function publish(message)
  redis.call('PUBLISH', string.sub(RUN, 1, -4) .. 'messages', cjson.encode(message))
end

-- Whether an open run has lost one of its keys alone, by eviction, expiry or DEL: without receipts, pushes would count
-- twice, and without metrics their reports; without the others, slots or updates would wait for pushes that nobody knows
-- any more.
local function has_lost_a_key(phase, marked, grouped, in_flight, measured)
  if phase ~= 'open' then return false end
  return (marked == '1' and redis.call('EXISTS', RECEIPTS) == 0)
    or (tonumber(grouped or 0) > 0 and redis.call('EXISTS', GROUP) == 0)
    or (tonumber(in_flight or 0) > 0 and redis.call('EXISTS', PENDING, STAGED) < 2)
    or (measured == '1' and redis.call('EXISTS', METRICS) == 0)
end

-- Whether Redis has lost what a shard has seen: the run, or one of its keys, or it came back with older data.
local function is_behind(known_epoch, known_seq)
  local run = redis.call('HMGET', RUN, 'spec', 'epoch', 'seq', 'phase', 'marked', 'grouped', 'in_flight',
    'measured')
  local epoch, known = tonumber(run[2] or 0), tonumber(known_epoch)
  -- In a later epoch the log begins anew: it is the shard that has to load its state yet.
  return not run[1] or epoch < known or (epoch == known and tonumber(run[3] or 0) < tonumber(known_seq))
    or has_lost_a_key(unpack(run, 4, 8))
end

-- Whether a caller's token is that of the shard's present owner.
local function owns(shard, token)
  return redis.call('HGET', SHARDS, shard .. ':token') == token
end

-- The shards without an owner, as a JSON list.
local function missing_shards(now)
  local missing = {}
  for shard = 0, shard_count() - 1 do
    local ends = redis.call('HGET', SHARDS, shard .. ':ends')
    if not ends or tonumber(ends) <= now then missing[#missing + 1] = shard end
  end
  return #missing == 0 and '[]' or cjson.encode(missing)
end

-- Begins a phase of the run's opening, under a new generation. Generations are at least the time in ms, so that they
-- go on rising after Redis has lost the last one. above: one that a shard knows, if that may be newer than Redis's.
local function enter(phase, above)
  local generation = math.max(run_number('generation') + 1, clock(), (above or 0) + 1)
  redis.call('HSET', RUN, 'phase', phase, 'generation', text(generation))
  return generation
end

-- Closes the run to pushes until every shard has reported where it stands, see open.lua.
local function begin_gathering(above)
  local generation = enter('gather', above)
  if shard_count() > 1 then publish({kind = 'phase', phase = 'gather', generation = generation}) end
  return generation
end

-- The refusal of a call by a shard's owner, or nil: the run is not open, or another process owns the shard.
local function shut(shard, token)
  if redis.call('HGET', RUN, 'phase') ~= 'open' then return {'not-open', missing_shards(clock())} end
  if not owns(shard, token) then return {'fenced'} end
end

local function live_workers(now)
  return redis.call('ZCOUNT', LEASES, '(' .. text(now), '+inf')
end

-- A lease as {worker, token, epoch in which it was granted, ttl_ms}, or false if it is unknown, expired, fenced off or has
-- another token.
local function held(lease_key, lease, token, now)
  local fields = redis.call('HMGET', lease_key, 'worker', 'token', 'epoch', 'ttl_ms')
  local worker = fields[1]
  if not worker or (token and fields[2] ~= token) then return false end
  if redis.call('HGET', WORKERS, worker) ~= lease then return false end
  local ends = redis.call('ZSCORE', LEASES, worker)
  if not ends or tonumber(ends) <= now then return false end
  return {worker = worker, token = fields[2], epoch = fields[3], ttl_ms = tonumber(fields[4])}
end

-- The lease of a claim and the run's step, or false and the refusal of the claim.
local function claimed(lease_key, lease, token, taken_at, now)
  local run = redis.call('HMGET', RUN, 'initialized', 'epoch', 'step')
  if run[1] ~= '1' then return false, {'run-not-initialized'} end
  local found, step = held(lease_key, lease, token, now), tonumber(run[3] or 0)
  if not found then return false, {'lease-expired'} end
  if found.epoch ~= run[2] then return false, {'epoch-changed', tonumber(run[2])} end
  if taken_at > step then return false, {'step-ahead', step} end
  return found, step
end

local function extend(lease_key, worker, ttl_ms, now)
  redis.call('ZADD', LEASES, now + ttl_ms, worker)
  redis.call('PEXPIRE', lease_key, ttl_ms)
end

-- The idempotency keys that the next record will push out of a lease's window.
local function crowded_out(window)
  local excess = redis.call('LLEN', window) + 1 - WINDOW_LENGTH
  return excess > 0 and redis.call('LRANGE', window, 0, excess - 1) or {}
end

-- Keeps a record, and evicts the keys that `crowded_out` returned.
local function remember(key, record, window, evicted)
  redis.call('HSET', RECEIPTS, key, record)
  redis.call('RPUSH', window, key)
  for _, old in ipairs(evicted) do
    redis.call('LPOP', window)
    redis.call('HDEL', RECEIPTS, old)
  end
end

-- A table of workers and numbers among the run's fields: outliers or banned.
local function worker_counts(field)
  return cjson.decode(redis.call('HGET', RUN, field) or '{}')
end

-- How many pushes that are not queued each lease has.
local function held_by_lease()
  local held = {}
  for _, value in ipairs(redis.call('HVALS', STAGED)) do
    local staged = cjson.decode(value)
    if staged.lease and not staged.queued then held[staged.lease] = (held[staged.lease] or 0) + 1 end
  end
  return held
end

-- Whether a lease may have no more pushes on their way at the moment.
local function is_crowded(lease)
  return redis.call('HLEN', STAGED) >= SLOTS_OF_LEASE and (held_by_lease()[lease] or 0) >= SLOTS_OF_LEASE
end

-- Gives the free slots to the next in line whose leases may have them.
local function grant_slots()
  local line, free = redis.call('LRANGE', QUEUE, 0, -1), SLOTS - run_number('in_flight')
  if #line == 0 or free <= 0 then return end
  local held = held_by_lease()
  for _, following in ipairs(line) do
    local waiting = redis.call('HGET', STAGED, following)
    waiting = waiting and cjson.decode(waiting)
    -- Older versions wrote no lease.
    local lease = waiting and waiting.lease or ''
    if not waiting or (held[lease] or 0) < SLOTS_OF_LEASE then redis.call('LREM', QUEUE, 1, following) end
    if waiting and (held[lease] or 0) < SLOTS_OF_LEASE then
      waiting.queued, waiting.at = false, clock()
      redis.call('HSET', STAGED, following, cjson.encode(waiting))
      redis.call('HINCRBY', RUN, 'in_flight', 1)
      publish({kind = 'granted', key = following, attempt = waiting.attempt})
      held[lease] = (held[lease] or 0) + 1
      free = free - 1
      if free == 0 then return end
    end
  end
end

-- Gives up a slot; the next in line gets it.
local function leave_slot()
  redis.call('HINCRBY', RUN, 'in_flight', -1)
  grant_slots()
end

-- Forgets a push that was not committed, and gives up the slot that it held.
local function forget(key)
  local staged = redis.call('HGET', STAGED, key)
  redis.call('HDEL', PENDING, key)
  redis.call('HDEL', STAGED, key)
  redis.call('LREM', QUEUE, 0, key)
  if not staged then return end
  staged = cjson.decode(staged)
  if staged.queued or staged.slug then return end
  if staged.slow then
    -- Its lease may have another.
    grant_slots()
  else
    leave_slot()
  end
end

-- Whether a call that names an attempt is of the pending push that its key has now; of those of older versions it is.
local function is_of(staged, attempt)
  return (staged.attempt or '') == attempt
end

-- Whether every shard has its part of a push, or is receiving it.
local function has_all_parts(parts)
  for shard = 0, shard_count() - 1 do
    if not parts[tostring(shard)] then return false end
  end
  return true
end

-- Whether a push has held its slot, or a refusal been kept, for longer than `patience` while some shard's part has not
-- begun to arrive. A part that is arriving has no limit here: its shard says whether it is, see leases_due.lua.
local function is_overdue(staged, patience, now)
  return not staged.queued and staged.at + patience <= now and not has_all_parts(staged.parts)
end

-- Calls a command with as many arguments as Lua can pass at a time.
local function call_in_parts(command, key, arguments)
  for begin = 1, #arguments, 1000 do
    redis.call(command, key, unpack(arguments, begin, math.min(begin + 999, #arguments)))
  end
end

-- A unit's number with sixteen digits, so that members of sorted sets are in the order of numbers.
local function padded(number)
  return string.rep('0', 16 - #number) .. number
end

-- The lease of a claim, and the units that it names as {name, number} with numbers as text; nil where it names none.
local function units_of(claim)
  local lease, marks = string.match(claim, '^(%S+) %S+ %S+ %S+ (%S+)$')
  if not lease then return nil end
  local units = {}
  for name, numbers in string.gmatch(marks, '([^=;]+)=([^;]+)') do
    for number in string.gmatch(numbers, '%d+') do units[#units + 1] = {name, number} end
  end
  return lease, units
end

local function check_unit_types()
  check_type('hash', OUT)
  check_type('zset', HELD, BACK)
end

-- Which of some units, at least one, a lease has, and which it has not.
local function divide_units(lease, units)
  local fields, has, lacks = {}, {}, {}
  for index, unit in ipairs(units) do fields[index] = unit[1] .. ' ' .. unit[2] end
  local holders = redis.call('HMGET', OUT, unpack(fields))
  for index, unit in ipairs(units) do
    local holder = holders[index] and string.match(holders[index], '^%S+')
    table.insert(holder == lease and has or lacks, unit)
  end
  return has, lacks
end

-- The refusal of a claim that names units which its lease does not have, or nil.
local function unheld_units(claim)
  local lease, units = units_of(claim)
  if not lease then return nil end
  check_unit_types()
  local _, lacks = divide_units(lease, units)
  if #lacks == 0 then return nil end
  local marks, before = '', nil
  for _, unit in ipairs(lacks) do
    if unit[1] == before then
      marks = marks .. ',' .. unit[2]
    else
      marks = marks .. (before and ';' or '') .. unit[1] .. '=' .. unit[2]
    end
    before = unit[1]
  end
  return {'unit-not-held', marks}
end

-- Takes units from the lease that has them.
local function take_units(lease, units)
  local fields, members = {}, {}
  for index, unit in ipairs(units) do
    fields[index] = unit[1] .. ' ' .. unit[2]
    members[index] = lease .. ' ' .. unit[1] .. ' ' .. padded(unit[2])
  end
  call_in_parts('HDEL', OUT, fields)
  call_in_parts('ZREM', HELD, members)
end

-- Has units that a lease has handed out again.
local function give_back(lease, units)
  if #units == 0 then return end
  take_units(lease, units)
  local scored = {}
  for _, unit in ipairs(units) do
    scored[#scored + 1] = 0
    scored[#scored + 1] = unit[1] .. ' ' .. padded(unit[2])
  end
  call_in_parts('ZADD', BACK, scored)
  publish({kind = 'units'})
end

-- Has the units that a claim names handed out again, as far as its lease has them.
local function give_back_claimed(claim)
  local lease, units = units_of(claim)
  if not lease then return end
  check_unit_types()
  give_back(lease, (divide_units(lease, units)))
end

-- The units that a lease has, of one data set or (nil) of all.
local function units_held(lease, name)
  local prefix, units = name and lease .. ' ' .. name or lease, {}
  for _, member in ipairs(redis.call('ZRANGEBYLEX', HELD, '[' .. prefix .. ' ', '(' .. prefix .. '!')) do
    units[#units + 1] = {string.match(member, '^%S+ (%S+) 0*(%d+)$')}
  end
  return units
end

-- Has the units handed out again that no worker's newest lease has: the key of workers was lost.
local function give_back_orphans()
  local newest, from = {}, '-'
  for _, lease in ipairs(redis.call('HVALS', WORKERS)) do newest[lease] = true end
  while true do
    local member = redis.call('ZRANGEBYLEX', HELD, from, '+', 'LIMIT', 0, 1)[1]
    if not member then return end
    local lease = string.match(member, '^%S+')
    if not newest[lease] then give_back(lease, units_held(lease)) end
    from = '(' .. lease .. '!'
  end
end

-- Counts the units that a push's claim names: they are done.
local function count_units(claim)
  local lease, units = units_of(claim)
  if not lease then return end
  take_units(lease, units)
  local counts = {}
  for _, unit in ipairs(units) do counts[unit[1]] = (counts[unit[1]] or 0) + 1 end
  for name, count in pairs(counts) do
    local done = redis.call('HINCRBY', RUN, 'done:' .. name, count)
    if text(done) == redis.call('HGET', RUN, 'total:' .. name) then publish({kind = 'units'}) end
  end
end

-- Refuses a push on all shards. A refusal of its body is kept for the parts that have not begun to arrive, and has the
-- push's units handed out again: it will not come a second time.
local function refuse(key, slug, detail)
  local staged, claim = redis.call('HGET', STAGED, key), redis.call('HGET', PENDING, key)
  local is_of_body = slug == 'non-finite-gradient' or slug == 'malformed-tensors'
  if claim and is_of_body then give_back_claimed(claim) end
  forget(key)
  staged = staged and cjson.decode(staged) or nil
  if staged and claim and is_of_body and not has_all_parts(staged.parts) then
    redis.call('HSET', STAGED, key, cjson.encode({at = clock(), claim = claim, slug = slug, detail = detail,
      parts = staged.parts}))
  end
  publish({kind = 'refused', key = key, attempt = staged and staged.attempt, slug = slug, detail = detail})
end

-- Moves the idempotency keys of an ended lease to the list of ended leases, and adds the keys that this list evicts to
-- `evicted`. Pushes of the lease that are not committed are refused, and its units are handed out again.
local function retire(lease, window, evicted)
  local keys = redis.call('LRANGE', window, 0, -1)
  local newest = math.max(#keys - NEWEST_ENDED + 1, 1)
  for index = newest, #keys do redis.call('RPUSH', ENDED, keys[index]) end
  for index = newest - 1, 1, -1 do redis.call('LPUSH', ENDED, keys[index]) end
  redis.call('DEL', window)
  while redis.call('LLEN', ENDED) > ENDED_LENGTH and #evicted < MOST_EVICTED do
    evicted[#evicted + 1] = redis.call('LPOP', ENDED)
    redis.call('HDEL', RECEIPTS, evicted[#evicted])
  end
  for _, key in ipairs(redis.call('HKEYS', STAGED)) do
    if string.match(redis.call('HGET', PENDING, key) or '', '^%S+') == lease then refuse(key, 'lease-expired', '') end
  end
  give_back(lease, units_held(lease))
end

local function publish_evicted(keys)
  if #keys > 0 and shard_count() > 1 then publish({kind = 'evicted', keys = keys}) end
end

-- Whether the gathered pushes make an update: `batch` pushes, or one of every live worker, or as many as may be kept.
-- None is made while the run is paused. `joining`: a worker whose push is to be counted too, or nil.
local function is_complete(now, joining)
  local grouped, batch = run_number('grouped') + (joining and 1 or 0), rule('batch')
  if grouped == 0 or rule('paused') then return false end
  if batch ~= 'live' then return grouped >= tonumber(batch) end
  local bounds = rule('bounds')
  if bounds and bounds.max_batch and grouped >= bounds.max_batch then return true end
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '(' .. text(now), '+inf')) do
    if worker ~= joining and redis.call('HEXISTS', GROUP, worker) == 0 then return false end
  end
  return true
end

-- Whether a push of this staleness is admitted; the bound 'adaptive' is four steps for each live worker.
local function is_fresh(staleness, live)
  local bound = rule('max_staleness')
  if bound == 'none' then return true end
  if bound == 'adaptive' then return staleness <= 4 * math.max(live, 1) end
  return staleness <= tonumber(bound)
end

-- How many pushes a worker may be ahead of the slowest live worker; nil if the policy sets no such bound.
local function slack()
  return rule('slack')
end

local function clocks()
  return cjson.decode(redis.call('HGET', RUN, 'clocks') or '{}')
end

-- The least number of pushes of a live worker; 0 without live workers.
local function slowest(counts, now)
  local least = nil
  for _, worker in ipairs(redis.call('ZRANGEBYSCORE', LEASES, '(' .. text(now), '+inf')) do
    local count = counts[worker]
    if count and (not least or count < least) then least = count end
  end
  return least or 0
end

-- Sets the number of a worker's pushes, or removes it (nil). Publishes that the slowest worker may have moved.
local function set_clock(counts, worker, count, now)
  local before = slowest(counts, now)
  counts[worker] = count
  redis.call('HSET', RUN, 'clocks', cjson.encode(counts))
  if not count or slowest(counts, now) > before then publish({kind = 'moved'}) end
end

-- Counts a decided push for the policy's slack.
local function count_push(worker, now)
  if not slack() then return end
  local counts = clocks()
  set_clock(counts, worker, (counts[worker] or slowest(counts, now)) + 1, now)
end

-- Ends a worker's lease; under a slack, others wait for the worker no longer.
local function end_lease(worker, now)
  redis.call('ZREM', LEASES, worker)
  redis.call('HDEL', WORKERS, worker)
  if slack() then set_clock(clocks(), worker, nil, now) end
end

-- The places that are read now, as SEQ and point, and how many of each kind there are; and the tickets that wait for one,
-- after tickets whose time is over were dropped. A place that a push's answer reads is a push's, whoever else reads it.
local function read_places(now)
  local kinds, open, waiting = {}, {push = 0, pull = 0, state = 0}, {}
  local all = redis.call('HGETALL', CUTS)
  for index = 1, #all, 2 do
    local ticket, cut = all[index], cjson.decode(all[index + 1])
    local kind = cut.kind or 'pull'
    if cut.seq == 0 then
      waiting[ticket] = cut
    elseif cut.ends <= now then
      redis.call('HDEL', CUTS, ticket)
    else
      if cut.ends > now + CUT_TTL then
        cut.ends = now + CUT_TTL
        redis.call('HSET', CUTS, ticket, cjson.encode(cut))
      end
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
  -- A pull's place becomes a push's when one reads there too, so the sum has its own bound.
  local is_left = kind == 'state' or open.push + open.pull < MOST_CUTS.push + MOST_CUTS.pull
  return kinds[name] ~= nil or (is_left and open[kind] < MOST_CUTS[kind])
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

-- The seq, step and epoch that the next entry of the log has; `advance`: whether it completes an update.
local function next_place(advance)
  local run = redis.call('HMGET', RUN, 'seq', 'step', 'epoch')
  return tonumber(run[1] or 0) + 1, tonumber(run[2] or 0) + (advance and 1 or 0), tonumber(run[3] or 0)
end

-- Trims the log, except for entries that a shard has not applied. A shard that has reported no applied entry in this
-- epoch may need all.
local function trim_log(seq)
  local kept = LOG_LENGTH
  for shard = 0, shard_count() - 1 do
    kept = math.max(kept, seq - tonumber(redis.call('HGET', SHARDS, shard .. ':applied_seq') or 0))
  end
  redis.call('XTRIM', LOG, 'MAXLEN', '~', math.min(kept, LONGEST_LOG))
end

-- Appends an entry to the log, at the next place unless it has that already; `advance`: whether the gathered pushes become
-- an update with it. The entry is written before it is counted: a count without an entry would be a gap that no shard
-- gets over.
local function append(advance, entry)
  check_type('stream', LOG)
  if not entry.seq then entry.seq, entry.step, entry.epoch = next_place(advance) end
  entry.advance = advance
  if shard_count() > 1 then entry.cuts = due_cuts(entry.seq, advance) end
  redis.call('XADD', LOG, text(entry.seq) .. '-0', 'entry', cjson.encode(entry))
  redis.call('HSET', RUN, 'seq', text(entry.seq), 'step', text(entry.step))
  if advance then
    redis.call('HSET', RUN, 'grouped', 0)
    redis.call('DEL', GROUP)
  end
  if entry.seq % TRIM_INTERVAL == 0 then trim_log(entry.seq) end
  return entry
end

-- Publishes an entry to the owners of shards.
local function publish_entry(entry)
  if shard_count() > 1 then
    entry.kind = 'entry'
    publish(entry)
  end
end

-- Takes a place for the tickets that wait, if there is memory for one of them.
local function cut_if_waited_for()
  local kinds, open, waiting = read_places(clock())
  for _, cut in pairs(waiting) do
    if not cut.grouped and has_room(cut, '', kinds, open) then
      publish_entry(append(false, {cut = true}))
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
