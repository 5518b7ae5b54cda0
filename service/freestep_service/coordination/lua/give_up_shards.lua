-- Ends the ownership of shards at their owners' request.
-- KEYS     the run's
-- ARGV     shard and its owner's token, in turn
-- returns  {number of shards that the caller owned}

if not run_exists() then return {0} end
local left = 0
for index = 1, #ARGV, 2 do
  local shard = ARGV[index]
  if owns(shard, ARGV[index + 1]) then
    redis.call('HSET', SHARDS, shard .. ':left_url', redis.call('HGET', SHARDS, shard .. ':url') or '')
    redis.call('HDEL', SHARDS, shard .. ':node', shard .. ':url', shard .. ':host', shard .. ':token', shard .. ':ends',
      shard .. ':ttl', shard .. ':report', shard .. ':loaded', shard .. ':applied', shard .. ':applied_seq')
    left = left + 1
  end
end
if left > 0 then begin_gathering() end
return {left}
