-- Admits and commits a push of a run of one shard in one call, once its body is there.
-- INCLUDES admit, commit
-- KEYS     the run's, 13 lease:ID, 14 window:ID
-- ARGV     1-17 as those of commit.lua, 18 the generation of the run's opening in which the body came
-- returns  what commit.lua returns, where the push is admitted or was before, {lost} where the run was opened again since
--          the body came: nobody has it then; otherwise what admit.lua returns

local admission = admit({unpack(ARGV, 1, 9)})
if admission[1] ~= 'admitted' and admission[1] ~= 'pending' then return admission end
if redis.call('HGET', RUN, 'generation') ~= ARGV[18] then
  forget(ARGV[4])
  return {'lost'}
end
return commit(ARGV)
