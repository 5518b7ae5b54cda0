-- Notes the last epoch of a run that was deleted, unless a later one is known. The newest notes are kept by name; of older
-- ones the largest epoch is, beyond which runs of any name begin.
-- KEYS     1 freestep:deleted (hash: run -> its last epoch, and under an empty name that largest epoch), 2 its times (zset:
--          run -> when it was noted, in ms since 1970); both belong to no run
-- ARGV     1 run, 2 epoch, 3 how many notes are kept by name
-- returns  {OK}

local EPOCHS, TIMES, most = KEYS[1], KEYS[2], tonumber(ARGV[3])
check_type('hash', EPOCHS)
check_type('zset', TIMES)
local known = tonumber(redis.call('HGET', EPOCHS, ARGV[1]) or 0)
redis.call('HSET', EPOCHS, ARGV[1], text(math.max(tonumber(ARGV[2]), known)))
-- After all others, also of the same millisecond.
local newest = redis.call('ZRANGE', TIMES, -1, -1, 'WITHSCORES')[2]
redis.call('ZADD', TIMES, math.max(clock(), tonumber(newest or 0) + 1), ARGV[1])
if redis.call('HLEN', EPOCHS) - redis.call('HEXISTS', EPOCHS, '') > redis.call('ZCARD', TIMES) then
  -- Older versions wrote no times.
  for _, run in ipairs(redis.call('HKEYS', EPOCHS)) do
    if run ~= '' then redis.call('ZADD', TIMES, 'NX', 0, run) end
  end
end
local floor = tonumber(redis.call('HGET', EPOCHS, '') or 0)
while redis.call('ZCARD', TIMES) > most do
  local run = redis.call('ZPOPMIN', TIMES)[1]
  floor = math.max(floor, tonumber(redis.call('HGET', EPOCHS, run) or 0))
  redis.call('HSET', EPOCHS, '', text(floor))
  redis.call('HDEL', EPOCHS, run)
end
return {'OK'}
