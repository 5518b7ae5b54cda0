-- Has units of a data set handed out again that a lease has.
-- KEYS     the run's, 13 lease:ID
-- ARGV     1 lease, 2 fencing token, 3 name of the data set, 4 idempotency key or an empty string, then numbers of units;
--          none for all that the lease has of it
-- returns  {not-open, missing shards (JSON)} (Redis has lost the run), {run-not-initialized}, {lease-expired},
--          {epoch-changed, epoch}, {data-not-found}, or {returned, numbers (text) ...}: those that the lease had; for
--          the key of its last return of that data set, those of then, and nothing is changed

local lease, name, key = ARGV[1], ARGV[3], ARGV[4]
if is_lost() then return {'not-open', missing_shards(clock())} end
local found, reason = claimed(KEYS[13], lease, ARGV[2], 0, clock())
if not found then return reason end
if redis.call('HEXISTS', RUN, 'data:' .. name) == 0 then return {'data-not-found'} end
local answer, last = {'returned'}, 'return:' .. name
local of, before = string.match(redis.call('HGET', KEYS[13], last) or '', '^(%S+) (.*)$')
if of and of == key then
  for number in string.gmatch(before, '%d+') do answer[#answer + 1] = number end
  return answer
end
check_unit_types()
local units = {}
if ARGV[5] then
  for index = 5, #ARGV do units[#units + 1] = {name, ARGV[index]} end
  units = divide_units(lease, units)
else
  units = units_held(lease, name)
end
give_back(lease, units)
for _, unit in ipairs(units) do answer[#answer + 1] = unit[2] end
if key ~= '' then redis.call('HSET', KEYS[13], last, key .. ' ' .. table.concat(answer, ',', 2)) end
return answer
