-- Cuts a run anew, once the state that its shards hold is in a checkpoint: nobody owns any of the new shards yet.
-- KEYS     the run's
-- ARGV     1 generation that was gathered, 2 shards
-- returns  late (another generation has begun), or resharded

if redis.call('HGET', RUN, 'generation') ~= ARGV[1] or redis.call('HGET', RUN, 'phase') ~= 'gather' then return 'late' end
redis.call('DEL', SHARDS)
redis.call('HDEL', RUN, 'resharding')
redis.call('HSET', RUN, 'shards', ARGV[2], 'recut', 1)
begin_gathering()
return 'resharded'
