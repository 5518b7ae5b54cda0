-- Makes a run what its shards have been found to be, or what a checkpoint says: after a restart, a restore, a change of
-- owners, or a Redis that lost its data. Opening goes through phases: `gather` (shards say where they stand), `load`
-- (shards take the state that was decided on) and `open`. Leases stand, but the epochs they were granted in do not
-- change with the run's.
-- KEYS     the run's, 13 metrics, then window:ID of each lease
-- ARGV     1 spec, 2 batch, 3 max_staleness, 4 distinct, 5 slack, 6 shards (as for create), 7 epoch, 8 step, 9 seq,
--          10 initialized (0 or 1), 11 group (JSON: worker -> pushes), 12 leases (JSON, in the order of their windows),
--          13 generation that was gathered, 14 what shards load (JSON {cut: [EPOCH, STEP, SEQ] or null, live: true where
--          what a shard holds of it is good}), 15 metrics (JSON: name -> as report_metric.lua keeps it), then idempotency key
--          and record, in turn, oldest first
-- returns  {late} (another generation has begun), or {load}; that begins a generation too

if redis.call('HGET', RUN, 'generation') ~= ARGV[13] then return {'late'} end
local generation = enter('load')
local grouped = 0
redis.call('DEL', RECEIPTS, PENDING, GROUP, LOG, ENDED, STAGED, QUEUE, CUTS, KEYS[13])
for name, steps in pairs(cjson.decode(ARGV[15])) do redis.call('HSET', KEYS[13], name, steps) end
for worker, pushes in pairs(cjson.decode(ARGV[11])) do
  redis.call('HSET', GROUP, worker, pushes)
  grouped = grouped + pushes
end
redis.call('HDEL', RUN, 'lost', 'initializing', 'resharding', 'recut')
redis.call('HSET', RUN, 'spec', ARGV[1], 'batch', ARGV[2], 'max_staleness', ARGV[3], 'distinct', ARGV[4],
  'slack', ARGV[5], 'shards', ARGV[6], 'epoch', ARGV[7], 'step', ARGV[8], 'seq', ARGV[9], 'initialized', ARGV[10], 'grouped', grouped,
  'in_flight', 0, 'target', ARGV[14])
redis.call('HSETNX', RUN, 'created_ms', text(clock()))

-- A live lease's receipts stay in its window, the others' go to the common list; a claim begins with its lease.
local granted, windows = {}, {}
for _, lease in ipairs(redis.call('HVALS', WORKERS)) do granted[lease] = true end
for number, lease in ipairs(cjson.decode(ARGV[12])) do
  redis.call('DEL', KEYS[13 + number])
  if granted[lease] then windows[lease] = KEYS[13 + number] end
end
for index = 16, #ARGV, 2 do
  redis.call('HSET', RECEIPTS, ARGV[index], ARGV[index + 1])
  local lease = string.match(cjson.decode(ARGV[index + 1]).claim, '^%S+')
  redis.call('RPUSH', windows[lease] or ENDED, ARGV[index])
end
if shard_count() > 1 then tell({kind = 'phase', phase = 'load', generation = generation}) end
return {'load'}
