-- Notes that a shard's part of a checkpoint is on disk. When all parts are, the checkpoint is durable.
-- KEYS     the run's
-- ARGV     1 shard, 2 its owner's token, 3 checkpoint (EPOCH-STEP-SEQ), 4 its step, 5 size of the part in bytes
-- returns  {fenced} (another process owns the shard, or Redis has lost the run), {partial}, or {durable}

if not run_exists() or not owns(ARGV[1], ARGV[2]) then return {'fenced'} end
redis.call('HSET', SHARDS, ARGV[1] .. ':written', ARGV[3] .. ' ' .. ARGV[5], ARGV[1] .. ':durable', ARGV[4])
local bytes = 0
for index = 0, shard_count() - 1 do
  local cut, size = string.match(redis.call('HGET', SHARDS, index .. ':written') or '', '^(%S+) (%d+)$')
  if cut ~= ARGV[3] then return {'partial'} end
  bytes = bytes + tonumber(size)
end
redis.call('HSET', RUN, 'durable', ARGV[3], 'durable_step', ARGV[4])
if shard_count() > 1 then publish({kind = 'durable', cut = ARGV[3], bytes = bytes}) end
return {'durable'}
