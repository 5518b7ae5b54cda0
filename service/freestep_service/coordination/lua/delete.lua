-- Deletes a run.
-- KEYS     the run's, 13 distances, then lease:ID and window:ID of every known lease
-- returns  the number of keys that there were

if shard_count() > 1 then publish({kind = 'deleted'}) end
return redis.call('DEL', unpack(KEYS))
