-- Divides a run into another number of shards, once the state of the present ones is in a checkpoint. The new shards
-- have no owners yet.
-- KEYS     the run's
-- ARGV     1 generation that was gathered, 2 number of shards
-- returns  {late} (another generation has begun), or {resharded}

local run = redis.call('HMGET', RUN, 'spec', 'generation', 'phase')
if not run[1] or run[2] ~= ARGV[1] or run[3] ~= 'gather' then return {'late'} end
redis.call('DEL', SHARDS)
redis.call('HDEL', RUN, 'resharding')
redis.call('HSET', RUN, 'shards', ARGV[2], 'recut', 1)
begin_gathering()
return {'resharded'}
