-- Closes a run to pushes until its shards have reported where they stand. A run that Redis has lost is begun anew.
-- KEYS     the run's
-- ARGV     1 spec, 2 batch, 3 max_staleness, 4 distinct, 5 slack, 6 shards (as for create; for a run that is lost),
--          7 the generation that is to end (nothing is changed if another has begun since), or an empty string,
--          8 the number of shards to divide the run into, 0 to give that up, or an empty string, 9 the epoch in which
--          the run was created, 0 if that is not known, and 10 its id, or an empty string (for a run that is lost)
-- returns  {generation}

if not run_exists() then
  redis.call('DEL', RUN)
  redis.call('HSET', RUN, 'spec', ARGV[1], 'batch', ARGV[2], 'max_staleness', ARGV[3], 'distinct', ARGV[4],
    'slack', ARGV[5], 'shards', ARGV[6], 'first_epoch', ARGV[9], 'id', ARGV[10], 'lost', 1, 'created_ms', text(clock()))
elseif ARGV[7] ~= '' and redis.call('HGET', RUN, 'generation') ~= ARGV[7] then
  return {run_number('generation')}
end
if ARGV[8] == '0' then
  redis.call('HDEL', RUN, 'resharding')
elseif ARGV[8] ~= '' then
  redis.call('HSET', RUN, 'resharding', ARGV[8])
end
return {begin_gathering()}
