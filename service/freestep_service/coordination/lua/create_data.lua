-- Adds a data set to a run. It takes a place in the log, so that every shard has it from the same entry on.
-- KEYS     the run's
-- ARGV     1 epoch and 2 newest seq that the shard knows, 3 shard, 4 its owner's token, 5 name, 6 spec (canonical JSON),
--          7 units of all passes or an empty string, 8 number of data sets that a run may have
-- returns  {behind}, {not-open, missing shards (JSON)}, {fenced}, {run-not-initialized}, {crowded}, {same}
--          or {different, its spec} (the run has one of this name, with this or with another spec), or {created, entry of the log (JSON)}

local name, spec = ARGV[5], ARGV[6]
if is_behind(ARGV[1], ARGV[2]) then return {'behind'} end
local refusal = shut(ARGV[3], ARGV[4])
if refusal then return refusal end
if redis.call('HGET', RUN, 'initialized') ~= '1' then return {'run-not-initialized'} end
local existing = redis.call('HGET', RUN, 'data:' .. name)
if existing then return existing == spec and {'same'} or {'different', existing} end
local names = {}
for known in string.gmatch(redis.call('HGET', RUN, 'datasets') or '', '%S+') do names[#names + 1] = known end
if #names >= tonumber(ARGV[8]) then return {'crowded'} end
names[#names + 1] = name
table.sort(names)
local entry = append(false, {data = {name = name, spec = spec}})
redis.call('HSET', RUN, 'datasets', table.concat(names, ' '), 'data:' .. name, spec, 'total:' .. name, ARGV[7],
  'cursor:' .. name, 0, 'done:' .. name, 0)
publish_entry(entry)
return {'created', cjson.encode(entry)}
