-- Has units of a data set handed out again that a lease has.
-- KEYS     the run's, 13 lease:ID
-- ARGV     1 lease, 2 fencing token, 3 name of the data set, then numbers of units; none for all that the lease has of it
-- returns  {not-open, missing shards (JSON)} (Redis has lost the run), {run-not-initialized}, {lease-expired},
--          {epoch-changed, epoch}, {data-not-found}, or {returned, numbers (text) ...}: those that the lease had

local lease, name = ARGV[1], ARGV[3]
if is_lost() then return {'not-open', missing_shards(clock())} end
local found, reason = claimed(KEYS[13], lease, ARGV[2], 0, clock())
if not found then return reason end
if redis.call('HEXISTS', RUN, 'data:' .. name) == 0 then return {'data-not-found'} end
check_unit_types()
local units = {}
if ARGV[4] then
  for index = 4, #ARGV do units[#units + 1] = {name, ARGV[index]} end
  units = divide_units(lease, units)
else
  units = units_held(lease, name)
end
give_back(lease, units)
local answer = {'returned'}
for _, unit in ipairs(units) do answer[#answer + 1] = unit[2] end
return answer
