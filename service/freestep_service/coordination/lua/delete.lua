-- Deletes a run.
-- KEYS     the run's, 13 distances, then lease:ID and window:ID of every known lease
-- returns  the number of keys that there were

if shard_count() > 1 then publish({kind = 'deleted'}) end
local deleted = 0
-- They may be more than Lua can pass at a time.
for _, key in ipairs(KEYS) do deleted = deleted + redis.call('DEL', key) end
return deleted
