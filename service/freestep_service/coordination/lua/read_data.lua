-- Reads a run's data sets at one moment. Changes nothing.
-- KEYS     the run's
-- ARGV     1 the name of one data set, or an empty string for all
-- returns  {not-open, missing shards (JSON)} (Redis has lost the run), or {data, time in ms, `workers` and `out` (fields
--          and values, in turn), then of each data set {name, spec (JSON), cursor, done, numbers that were given back
--          (text, with sixteen digits) ...}, in the order of names}

if is_lost() then return {'not-open', missing_shards(clock())} end
local answer = {'data', text(clock()), redis.call('HGETALL', WORKERS), redis.call('HGETALL', OUT)}
for name in string.gmatch(redis.call('HGET', RUN, 'datasets') or '', '%S+') do
  if ARGV[1] == '' or ARGV[1] == name then
    local set = {name, unpack(redis.call('HMGET', RUN, 'data:' .. name, 'cursor:' .. name, 'done:' .. name))}
    for _, member in ipairs(redis.call('ZRANGEBYLEX', BACK, '[' .. name .. ' ', '(' .. name .. '!')) do
      set[#set + 1] = string.sub(member, -16)
    end
    answer[#answer + 1] = set
  end
end
return answer
