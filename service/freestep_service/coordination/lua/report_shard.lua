-- Notes where a shard stands, for the opening of its run.
-- KEYS     the run's
-- ARGV     1 shard, 2 its owner's token, 3 generation, 4 report (JSON)
-- returns  {fenced}, {late} (another generation has begun), {waiting} (for other shards), or
--          {gathered, reports (JSON) in the order of the shards ...}

local shard, generation = ARGV[1], ARGV[3]
if not run_exists() or not owns(shard, ARGV[2]) then return {'fenced'} end
if redis.call('HGET', RUN, 'generation') ~= generation or redis.call('HGET', RUN, 'phase') ~= 'gather' then
  return {'late'}
end
redis.call('HSET', SHARDS, shard .. ':report', generation .. ' ' .. ARGV[4])
local reports, now = {'gathered'}, clock()
if missing_shards(now) ~= '[]' then return {'waiting'} end
for index = 0, shard_count() - 1 do
  local report = redis.call('HGET', SHARDS, index .. ':report') or ''
  local of, rest = string.match(report, '^(%S+) (.*)$')
  if of ~= generation then return {'waiting'} end
  reports[#reports + 1] = rest
end
return reports
