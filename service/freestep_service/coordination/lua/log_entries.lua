-- Reads the entries of the log after a place. Changes nothing.
-- KEYS     the run's
-- ARGV     1 epoch and 2 seq of that place
-- returns  {newest seq of the log, entries (JSON) ...}; {0} if the run is not in that epoch, whose log is gone then

check_type('hash', RUN)
check_type('stream', LOG)
local run = redis.call('HMGET', RUN, 'epoch', 'seq')
if run[1] ~= ARGV[1] then return {0} end
local answer = {tonumber(run[2])}
for _, entry in ipairs(redis.call('XRANGE', LOG, '(' .. ARGV[2] .. '-0', '+')) do
  answer[#answer + 1] = entry[2][2]
end
return answer
