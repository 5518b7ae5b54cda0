-- Closes a run to pushes until its shards have reported where they stand. A run that Redis has lost is begun anew.
-- KEYS     the run's, 13 deleted
-- ARGV     1 spec, 2 batch, 3 max_staleness, 4 distinct, 5 slack, 6 bounds, 7 shards (as for create; for a run that is
--          lost), 8 the generation that is to end (nothing is changed if another has begun since), or an empty string,
--          9 the number of shards to divide the run into, 0 to give that up, or an empty string, 10 the epoch in which
--          the run was created, 0 if that is not known, 11 its id and 12 its creator, or empty strings (for a run that is
--          lost), 13 what shards are to report of their journals (ROUND SEQ: the entries behind SEQ), or an empty string,
--          14 a generation that the new one is to be above, 0 if none is known
-- returns  {generation}, or {deleted}: Redis has not lost the run

if not run_exists() then
  check_type('string', KEYS[13])
  if tonumber(redis.call('GET', KEYS[13]) or 0) >= math.max(tonumber(ARGV[10]), 1) then return {'deleted'} end
  redis.call('DEL', RUN)
  redis.call('HSET', RUN, 'layout', LAYOUT, 'spec', ARGV[1], 'batch', ARGV[2], 'max_staleness', ARGV[3], 'distinct', ARGV[4],
    'slack', ARGV[5], 'bounds', ARGV[6], 'shards', ARGV[7], 'first_epoch', ARGV[10], 'id', ARGV[11], 'creator', ARGV[12], 'lost', 1,
    'created_ms', text(clock()))
elseif ARGV[8] ~= '' and redis.call('HGET', RUN, 'generation') ~= ARGV[8] then
  return {run_number('generation')}
end
if ARGV[9] == '0' then
  redis.call('HDEL', RUN, 'resharding')
elseif ARGV[9] ~= '' then
  redis.call('HSET', RUN, 'resharding', ARGV[9])
end
if ARGV[13] ~= '' then redis.call('HSET', RUN, 'exchange', ARGV[13]) end
return {begin_gathering(tonumber(ARGV[14]))}
