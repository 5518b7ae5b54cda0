-- Admits and commits a push of a run of one shard in one call, once its body is there.
-- INCLUDES admit, commit
-- KEYS     the run's, 13 lease:ID, 14 window:ID
-- ARGV     as those of commit.lua
-- returns  what commit.lua returns, where the push is admitted or was before; otherwise what admit.lua returns

local admission = admit({unpack(ARGV, 1, 9)})
if admission[1] ~= 'admitted' and admission[1] ~= 'pending' then return admission end
return commit(ARGV)
