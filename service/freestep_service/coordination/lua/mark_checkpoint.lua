-- Takes a place in the log at which every shard copies its part of a checkpoint.
-- KEYS     the run's
-- ARGV     1 epoch and 2 newest seq that the shard knows, 3 shard, 4 its owner's token
-- returns  {behind}, {not-open, missing shards (JSON)}, {fenced}, or {marked, epoch, step, seq}

if is_behind(ARGV[1], ARGV[2]) then return {'behind'} end
local refusal = shut(ARGV[3], ARGV[4])
if refusal then return refusal end
local entry = append(false, {checkpoint = true})
publish_entry(entry)
return {'marked', entry.epoch, entry.step, entry.seq}
