-- Creates a run. It opens once all its shards have owners.
-- KEYS     the run's
-- ARGV     1 spec (canonical JSON), 2 batch (a number, or live), 3 max_staleness (a number, none or adaptive),
--          4 distinct (0 or 1), 5 slack (a number, or an empty string), 6 bounds (JSON, or an empty string), 7 epoch,
--          8 id, 9 creator (see _prelude.lua), 10 shards
-- returns  {created}, or {same} or {different}: the run exists with this or with another spec

local existing = redis.call('HGET', RUN, 'spec')
if existing then return {existing == ARGV[1] and 'same' or 'different'} end
redis.call('DEL', RUN)
redis.call('HSET', RUN, 'layout', LAYOUT, 'spec', ARGV[1], 'batch', ARGV[2], 'max_staleness', ARGV[3], 'distinct', ARGV[4],
  'slack', ARGV[5], 'bounds', ARGV[6], 'first_epoch', ARGV[7], 'id', ARGV[8], 'creator', ARGV[9], 'epoch', ARGV[7], 'shards', ARGV[10],
  'step', 0, 'seq', 0, 'initialized', 0, 'token', 0, 'grouped', 0, 'applied', 0, 'accumulated', 0, 'dropped', 0, 'created_ms', text(clock()))
begin_gathering()
return {'created'}
