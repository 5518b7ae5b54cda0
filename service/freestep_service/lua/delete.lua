-- Deletes a run.
-- KEYS     the run's, then lease:ID and window:ID of every lease that is known
-- returns  how many keys there were

return redis.call('DEL', unpack(KEYS))
