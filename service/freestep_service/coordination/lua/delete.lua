-- Deletes a run.
-- KEYS     the run's, 13 metrics, then lease:ID and window:ID of every lease that is known
-- returns  how many keys there were

if shard_count() > 1 then tell({kind = 'deleted'}) end
return redis.call('DEL', unpack(KEYS))
