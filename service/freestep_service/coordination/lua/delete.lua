-- Deletes a run. Before this nothing is noted of it anywhere, so that a deletion which fails has changed nothing.
-- KEYS     the run's, 13 deleted, 14 distances, then lease:ID and window:ID of every known lease
-- ARGV     1 the last epoch of the run that the caller knows of, 2 the id of the only run that is to be deleted, or an
--          empty string for any
-- returns  {other} (the run of this name is another; nothing is changed), {leases} (there is one whose keys are not named:
--          call again; nothing is changed), or {deleted, its last epoch, which is left in `deleted`}

check_type('string', KEYS[13])
if ARGV[2] ~= '' and run_exists() and redis.call('HGET', RUN, 'id') ~= ARGV[2] then return {'other'} end
local last = math.max(tonumber(ARGV[1]), run_number('epoch'), tonumber(redis.call('GET', KEYS[13]) or 0))
local named = {}
for index = 15, #KEYS - 4 do named[KEYS[index]] = true end
for _, lease in ipairs(redis.call('HVALS', WORKERS)) do
  if not named[string.sub(RUN, 1, -4) .. 'window:' .. lease] then return {'leases'} end
end
if shard_count() > 1 then publish({kind = 'deleted'}) end
-- First: where memory is full, this fails.
redis.call('SET', KEYS[13], text(last))
-- They may be more than Lua can pass at a time.
for index, key in ipairs(KEYS) do
  if index ~= 13 then redis.call('DEL', key) end
end
return {'deleted', text(last)}
