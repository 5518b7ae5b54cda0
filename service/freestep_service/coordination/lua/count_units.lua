-- Counts the units of a run's data sets. Changes nothing.
-- KEYS     the run's
-- returns  of each data set {name, total (text; an empty string where its passes have no end), cursor, done, units that came
--          back}, in the order of names

local answer = {}
for name in string.gmatch(redis.call('HGET', RUN, 'datasets') or '', '%S+') do
  local set = {name, unpack(redis.call('HMGET', RUN, 'total:' .. name, 'cursor:' .. name, 'done:' .. name))}
  set[#set + 1] = redis.call('ZLEXCOUNT', BACK, '[' .. name .. ' ', '(' .. name .. '!')
  answer[#answer + 1] = set
end
return answer
