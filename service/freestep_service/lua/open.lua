-- Makes a run what its shard says it is: after a restart, a restore, or a Redis that lost its data.
-- Leases stand, but the epochs they were granted in do not change with the run's.
-- KEYS     the run's, then window:ID of each lease
-- ARGV     1 spec, 2 batch, 3 max_staleness, 4 distinct (as for create), 5 epoch, 6 step, 7 seq, 8 initialized
--          (0 or 1), 9 group (JSON: worker -> pushes), 10 leases (JSON, in the order of their windows), then
--          idempotency key and record, in turn, oldest first
-- returns  OK

local grouped = 0
redis.call('DEL', RECEIPTS, PENDING, GROUP, LOG, ENDED)
for worker, pushes in pairs(cjson.decode(ARGV[9])) do
  redis.call('HSET', GROUP, worker, pushes)
  grouped = grouped + pushes
end
redis.call('HSET', RUN, 'spec', ARGV[1], 'batch', ARGV[2], 'max_staleness', ARGV[3], 'distinct', ARGV[4],
  'epoch', ARGV[5], 'step', ARGV[6], 'seq', ARGV[7], 'initialized', ARGV[8], 'grouped', grouped)
redis.call('HSETNX', RUN, 'created_ms', text(clock()))

-- A live lease's receipts stay in its window, the others' go to the common list; a claim begins with its lease.
local granted, windows = {}, {}
for _, lease in ipairs(redis.call('HVALS', WORKERS)) do granted[lease] = true end
for number, lease in ipairs(cjson.decode(ARGV[10])) do
  redis.call('DEL', KEYS[8 + number])
  if granted[lease] then windows[lease] = KEYS[8 + number] end
end
for index = 11, #ARGV, 2 do
  redis.call('HSET', RECEIPTS, ARGV[index], ARGV[index + 1])
  local lease = string.match(cjson.decode(ARGV[index + 1]).claim, '^%S+')
  redis.call('RPUSH', windows[lease] or ENDED, ARGV[index])
end
return 'OK'
