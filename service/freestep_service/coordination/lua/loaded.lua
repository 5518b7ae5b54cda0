-- Notes that a shard has loaded the state that the opening decided on. When all shards have, the run is open.
-- KEYS     the run's
-- ARGV     1 shard, 2 its owner's token, 3 generation, 4 the word of its journal's owner, or an empty string
-- returns  {fenced}, {late} (another generation has begun), {waiting} (for other shards), or {open}

local shard, generation = ARGV[1], ARGV[3]
if not run_exists() or not owns(shard, ARGV[2]) then return {'fenced'} end
if redis.call('HGET', RUN, 'generation') ~= generation then return {'late'} end
local phase = redis.call('HGET', RUN, 'phase')
if phase == 'open' then return {'open'} end
if phase ~= 'load' then return {'late'} end
redis.call('HSET', SHARDS, shard .. ':loaded', generation)
if ARGV[4] ~= '' then redis.call('HSET', SHARDS, shard .. ':journal', ARGV[4]) end
for index = 0, shard_count() - 1 do
  if redis.call('HGET', SHARDS, index .. ':loaded') ~= generation then return {'waiting'} end
end
redis.call('HSET', RUN, 'phase', 'open')
if shard_count() > 1 then publish({kind = 'phase', phase = 'open', generation = tonumber(generation)}) end
return {'open'}
