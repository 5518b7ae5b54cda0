-- Replaces the state of a run in Redis by one that its shards were found to have or that a checkpoint holds: after a
-- restart, a restore, a change of owners, or a loss of Redis's data. A run opens in three phases: in `gather` its shards
-- report where they stand, in `load` they load the state that was decided on, and then it is `open`. Leases remain, and
-- so do the epochs in which they were granted.
-- KEYS     the run's, 13 distances, then window:ID of each lease
-- ARGV     1 spec, 2 batch, 3 max_staleness, 4 distinct, 5 slack, 6 bounds (as for create), 7 shards, 8 epoch, 9 step,
--          10 seq, 11 initialized (0 or 1), 12 group (JSON: worker -> pushes), 13 leases (JSON, in the order of their
--          windows), 14 generation that was gathered, 15 what shards load (JSON {cut: [EPOCH, STEP, SEQ] or null, live:
--          true if the state that a shard holds is that cut, and of an import its key as import, its digest, and as
--          upload the name under which shards hold their parts}), 16 metrics (JSON: name -> value as in
--          report_metric.lua), 17 numbers of pushes (JSON: decision -> number) as shards have counted them, or for a
--          Redis that has lost them, 18 norms, 19 outliers and 20 banned (JSON, as the run's hash has them), 21 data
--          sets (JSON: name -> {spec (text), total (text), reached, open}, see domain/data_sets.py), 22 control, 23
--          paused and 24 suspended (as the run's hash has them), 25 a checkpoint that is on disk (EPOCH-STEP-SEQ) and
--          26 its step, for a Redis that knows of none, or empty strings, then idempotency key and record, in turn,
--          oldest first
-- returns  {late} (another generation has begun), or {load}, which begins a generation too

if not run_exists() or redis.call('HGET', RUN, 'generation') ~= ARGV[14] then return {'late'} end
check_type('hash', WORKERS, SHARDS)
check_type('hash', OUT)

-- The units that are out to leases which may still push them, where the run goes on in the same epoch: NAME -> number ->
-- the value in `out`. A data set of which more would be between two of them is another than they were of.
local MOST_BETWEEN = 131072
local data, kept = cjson.decode(ARGV[21]), {}
if redis.call('HGET', RUN, 'epoch') == ARGV[8] then
  local newest, out = {}, redis.call('HGETALL', OUT)
  for _, lease in ipairs(redis.call('HVALS', WORKERS)) do newest[lease] = true end
  for name, set in pairs(data) do
    kept[name] = {}
    for _, number in ipairs(set.open) do kept[name][number] = false end
  end
  for index = 1, #out, 2 do
    local name, number = string.match(out[index], '^(%S+) (%d+)$')
    local set = data[name]
    number = tonumber(number)
    if set and newest[string.match(out[index + 1], '^%S+')] and number < set.reached + MOST_BETWEEN
        and (number >= set.reached or kept[name][number] == false) then
      kept[name][number] = out[index + 1]
    end
  end
end

local generation = enter('load')
local grouped = 0
redis.call('DEL', RECEIPTS, PENDING, GROUP, LOG, ENDED, STAGED, QUEUE, CUTS, METRICS, OUT, HELD, BACK, KEYS[13])
local metrics = cjson.decode(ARGV[16])
for name, steps in pairs(metrics) do redis.call('HSET', METRICS, name, steps) end
for worker, pushes in pairs(cjson.decode(ARGV[12])) do
  redis.call('HSET', GROUP, worker, pushes)
  grouped = grouped + pushes
end
redis.call('HDEL', RUN, 'lost', 'initializing', 'resharding', 'recut', 'exchange', 'compared')
redis.call('HSET', RUN, 'layout', LAYOUT, 'spec', ARGV[1], 'batch', ARGV[2], 'max_staleness', ARGV[3], 'distinct', ARGV[4],
  'slack', ARGV[5], 'bounds', ARGV[6], 'shards', ARGV[7], 'epoch', ARGV[8], 'step', ARGV[9], 'seq', ARGV[10],
  'initialized', ARGV[11], 'grouped', grouped, 'in_flight', 0, 'target', ARGV[15], 'norms', ARGV[18],
  'outliers', ARGV[19], 'banned', ARGV[20], 'control', ARGV[22], 'paused', ARGV[23], 'suspended', ARGV[24],
  'measured', next(metrics) and 1 or 0)
-- The log begins anew, so what was applied of the old one says nothing about it.
for shard = 0, tonumber(ARGV[7]) - 1 do
  redis.call('HDEL', SHARDS, shard .. ':applied_seq', shard .. ':report')
end
redis.call('HSETNX', RUN, 'created_ms', text(clock()))
if ARGV[25] ~= '' and redis.call('HSETNX', RUN, 'durable', ARGV[25]) == 1 then
  redis.call('HSET', RUN, 'durable_step', ARGV[26])
end
local target = cjson.decode(ARGV[15])
if target.upload then
  -- The digest says of which import it is: version 0.1.0 leaves it as it was.
  redis.call('HSET', RUN, 'upload', target.import, 'upload_epoch', ARGV[8],
    'upload_digest', target.import .. ' ' .. target.digest)
elseif type(target.cut) == 'table' and target.cut[1] < run_number('upload_epoch') then
  -- What was imported is gone: whoever sends it again is to have it made.
  redis.call('HDEL', RUN, 'upload', 'upload_epoch', 'upload_digest')
end
for decision, pushes in pairs(cjson.decode(ARGV[17])) do
  -- Shards that go on with what they hold know what has counted, and Redis may be ahead of them or behind. Dropped pushes
  -- are in no log.
  redis.call(target.live and decision ~= 'dropped' and 'HSET' or 'HSETNX', RUN, decision, text(pushes))
end

for name in string.gmatch(redis.call('HGET', RUN, 'datasets') or '', '%S+') do
  redis.call('HDEL', RUN, 'data:' .. name, 'total:' .. name, 'cursor:' .. name, 'done:' .. name)
end
local names = {}
for name, set in pairs(data) do
  names[#names + 1] = name
  local cursor, held, back = set.reached, {}, {}
  for number, value in pairs(kept[name] or {}) do
    if value then cursor = math.max(cursor, number + 1) end
  end
  local function restore(number)
    local value, digits = kept[name] and kept[name][number], text(number)
    if value then
      redis.call('HSET', OUT, name .. ' ' .. digits, value)
      held[#held + 1] = 0
      held[#held + 1] = string.match(value, '^%S+') .. ' ' .. name .. ' ' .. padded(digits)
    else
      back[#back + 1] = 0
      back[#back + 1] = name .. ' ' .. padded(digits)
    end
  end
  for _, number in ipairs(set.open) do restore(number) end
  for number = set.reached, cursor - 1 do restore(number) end
  call_in_parts('ZADD', HELD, held)
  call_in_parts('ZADD', BACK, back)
  redis.call('HSET', RUN, 'data:' .. name, set.spec, 'total:' .. name, set.total, 'cursor:' .. name, text(cursor),
    'done:' .. name, text(set.reached - #set.open))
end
table.sort(names)
redis.call('HSET', RUN, 'datasets', table.concat(names, ' '))

-- Receipts of a live lease go to its window, others to the list of ended leases. A claim begins with its lease.
local granted, windows = {}, {}
for _, lease in ipairs(redis.call('HVALS', WORKERS)) do granted[lease] = true end
for number, lease in ipairs(cjson.decode(ARGV[13])) do
  redis.call('DEL', KEYS[13 + number])
  if granted[lease] then windows[lease] = KEYS[13 + number] end
end
for index = 27, #ARGV, 2 do
  redis.call('HSET', RECEIPTS, ARGV[index], ARGV[index + 1])
  local lease = string.match(cjson.decode(ARGV[index + 1]).claim, '^%S+')
  redis.call('RPUSH', windows[lease] or ENDED, ARGV[index])
end
redis.call('HSET', RECEIPTS, '', '')
redis.call('HSET', RUN, 'marked', 1)
if shard_count() > 1 then publish({kind = 'phase', phase = 'load', generation = generation}) end
return {'load'}
