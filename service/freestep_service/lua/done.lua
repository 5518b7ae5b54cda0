-- A shard has sent its part of some cuts. When all shards have, others who wait get theirs.
-- KEYS     the run's
-- ARGV     the cuts' tickets
-- returns  OK

for _, ticket in ipairs(ARGV) do
  local cut = redis.call('HGET', CUTS, ticket)
  if cut then
    cut = cjson.decode(cut)
    cut.left = cut.left - 1
    if cut.left <= 0 then
      redis.call('HDEL', CUTS, ticket)
    else
      redis.call('HSET', CUTS, ticket, cjson.encode(cut))
    end
  end
end
if redis.call('HGET', RUN, 'phase') == 'open' then cut_if_waited_for() end
return 'OK'
