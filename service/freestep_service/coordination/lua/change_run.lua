-- Changes a run while it trains. The change takes a place in the log, so that all shards take it between the same two
-- entries; an update that the new policy finds complete, or that was complete when the run was paused, is made with it.
-- KEYS     the run's
-- ARGV     1 epoch and 2 newest seq that the shard knows, 3 shard, 4 its owner's token, 5 and 6 what the change follows:
--          what was changed so far (JSON, or an empty string) and whether the run is paused (0 or 1), 7 and 8 the same
--          after the change, 9 batch, 10 max_staleness, 11 distinct, 12 slack and 13 bounds from here on (as for create),
--          14 what was asked for (JSON), 15 who asked
-- returns  {behind}, {not-open, missing shards (JSON)}, {fenced}, {run-not-initialized}, {changed} (something else was
--          changed meanwhile), or {noted, epoch, entry of the log (JSON)}

if is_behind(ARGV[1], ARGV[2]) then return {'behind'} end
local refusal = shut(ARGV[3], ARGV[4])
if refusal then return refusal end
if redis.call('HGET', RUN, 'initialized') ~= '1' then return {'run-not-initialized'} end
local before = redis.call('HMGET', RUN, 'control', 'paused', 'slack')
if (before[1] or '') ~= ARGV[5] or (before[2] or '0') ~= ARGV[6] then return {'changed'} end
check_types()
redis.call('HSET', RUN, 'control', ARGV[7], 'paused', ARGV[8], 'batch', ARGV[9], 'max_staleness', ARGV[10],
  'distinct', ARGV[11], 'slack', ARGV[12], 'bounds', ARGV[13])
-- Pushes that were counted under another slack say nothing about who is ahead under this one.
if (before[3] or '') == '' and ARGV[12] ~= '' then redis.call('HDEL', RUN, 'clocks') end
local entry = append(is_complete(clock()), {control = {text = ARGV[7], paused = ARGV[8], asked = ARGV[14], by = ARGV[15]}})
publish_entry(entry)
return {'noted', run_number('epoch'), cjson.encode(entry)}
