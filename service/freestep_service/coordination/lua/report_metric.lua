-- Notes the value of a metric that an evaluator has measured. A report counts once for each name and step, and takes a
-- place in the log, so that all shards take it between the same two steps.
-- KEYS     the run's, of which metrics is a hash: name -> JSON [[step, value], ...], the newest steps, oldest first
-- ARGV     1 epoch and 2 newest seq that the shard knows, 3 shard, 4 its owner's token, 5 name, 6 value (text, the same
--          for equal numbers), 7 step of the x, 8 its epoch or an empty string
-- returns  {behind}, {not-open, missing shards (JSON)}, {fenced}, {run-not-initialized}, {epoch-changed, epoch},
--          {step-ahead, step}, {conflict} (another value was reported), {forgotten, oldest step} (the step is older than
--          those that are kept, so whether the report counted before is not known), {crowded, number of metrics that a
--          run may have}, {replay, epoch} (the report counted before), or {noted, epoch, entry of the log (JSON)}

local KEPT, MOST_METRICS = 64, 64
local name, value, step = ARGV[5], ARGV[6], tonumber(ARGV[7])
if is_behind(ARGV[1], ARGV[2]) then return {'behind'} end
local refusal = shut(ARGV[3], ARGV[4])
if refusal then return refusal end
if redis.call('HGET', RUN, 'initialized') ~= '1' then return {'run-not-initialized'} end
local epoch = run_number('epoch')
if ARGV[8] ~= '' and tonumber(ARGV[8]) ~= epoch then return {'epoch-changed', epoch} end
if step > run_number('step') then return {'step-ahead', run_number('step')} end

check_type('hash', METRICS)
local known = redis.call('HGET', METRICS, name)
if not known and redis.call('HLEN', METRICS) >= MOST_METRICS then return {'crowded', MOST_METRICS} end
known = known and cjson.decode(known) or {}
local place = 1
for index, earlier in ipairs(known) do
  if earlier[1] == step then
    return earlier[2] == value and {'replay', epoch} or {'conflict'}
  end
  if earlier[1] < step then place = index + 1 end
end
if #known == KEPT and place == 1 then return {'forgotten', known[1][1]} end
table.insert(known, place, {step, value})
if #known > KEPT then table.remove(known, 1) end
local entry = append(false, {measured = {name = name, step = step, value = value}})
redis.call('HSET', METRICS, name, cjson.encode(known))
redis.call('HSET', RUN, 'measured', 1)
publish_entry(entry)
return {'noted', epoch, cjson.encode(entry)}
