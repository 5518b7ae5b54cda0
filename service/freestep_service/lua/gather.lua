-- Closes a run to pushes and has its shards say where they stand; a run that Redis has lost is begun anew.
-- KEYS     the run's
-- ARGV     1 spec, 2 batch, 3 max_staleness, 4 distinct, 5 shards, for a run that is not there; 6 generation that is to
--          end (another caller may have ended it already), or an empty string, 7 shards to cut the run into, or an
--          empty string
-- returns  the generation

if redis.call('EXISTS', RUN) == 0 then
  redis.call('HSET', RUN, 'spec', ARGV[1], 'batch', ARGV[2], 'max_staleness', ARGV[3], 'distinct', ARGV[4],
    'shards', ARGV[5], 'lost', 1, 'created_ms', text(clock()))
elseif ARGV[6] ~= '' and redis.call('HGET', RUN, 'generation') ~= ARGV[6] then
  return run_number('generation')
end
if ARGV[7] ~= '' then redis.call('HSET', RUN, 'resharding', ARGV[7]) end
return begin_gathering()
