-- Gives up shards in order.
-- KEYS     the run's
-- ARGV     shard and its owner's token, in turn
-- returns  how many were the caller's

local left = 0
for index = 1, #ARGV, 2 do
  local shard = ARGV[index]
  if owns(shard, ARGV[index + 1]) then
    redis.call('HDEL', SHARDS, shard .. ':node', shard .. ':url', shard .. ':token', shard .. ':ends',
      shard .. ':report', shard .. ':loaded', shard .. ':applied')
    left = left + 1
  end
end
if left > 0 then begin_gathering() end
return left
