-- Hands out units of a data set to a lease: those that were given back first, in the order of their numbers, so that a
-- pass begins when none of the one before is open.
-- KEYS     the run's, 13 lease:ID
-- ARGV     1 epoch and 2 newest seq that the shard knows, 3 shard, 4 its owner's token, 5 lease, 6 fencing token, 7 name of
--          the data set, 8 how many units at most, 9 idempotency key or an empty string
-- returns  {behind} (also where Redis has lost some of what belongs together), {not-open, missing shards (JSON)}, {fenced},
--          {run-not-initialized}, {lease-expired}, {epoch-changed, epoch}, {data-not-found}, {laden, units that a lease may
--          have}, or {claimed, spec (JSON), 1 if every unit of every pass has counted or else 0, numbers (text) ...}; for
--          the key of the lease's last claim, those of its units that the lease still has

-- Units that a lease may have, and all of a run.
local MOST_HELD, MOST_OUT = 4096, 65536
local lease, name, count, key = ARGV[5], ARGV[7], tonumber(ARGV[8]), ARGV[9]
if is_behind(ARGV[1], ARGV[2]) then return {'behind'} end
local refusal = shut(ARGV[3], ARGV[4])
if refusal then return refusal end
local now = clock()
local found, reason = claimed(KEYS[13], lease, ARGV[6], 0, now)
if not found then return reason end
check_unit_types()
local spec, total, cursor, done = unpack(redis.call('HMGET', RUN, 'data:' .. name, 'total:' .. name, 'cursor:' .. name,
  'done:' .. name))
if not spec then return {'data-not-found'} end
local is_exhausted = done == total and 1 or 0

local open, out = 0, redis.call('HLEN', OUT)
for known in string.gmatch(redis.call('HGET', RUN, 'datasets'), '%S+') do
  local place = redis.call('HMGET', RUN, 'cursor:' .. known, 'done:' .. known)
  open = open + tonumber(place[1]) - tonumber(place[2])
end
if open ~= out + redis.call('ZCARD', BACK) or out ~= redis.call('ZCARD', HELD) then return {'behind'} end

local answer, last = {'claimed', spec, is_exhausted}, 'claim:' .. name
if key ~= '' then
  local of, numbers = string.match(redis.call('HGET', KEYS[13], last) or '', '^(%S+) (.*)$')
  if of == key then
    local units = {}
    for number in string.gmatch(numbers, '%d+') do units[#units + 1] = {name, number} end
    for _, unit in ipairs((divide_units(lease, units))) do answer[#answer + 1] = unit[2] end
    return answer
  end
end
local room = MOST_HELD - redis.call('ZLEXCOUNT', HELD, '[' .. lease .. ' ', '(' .. lease .. '!')
if room <= 0 then return {'laden', MOST_HELD} end
count = math.min(count, room, MOST_OUT - out)
local numbers, returned = {}, {}
if count > 0 then
  returned = redis.call('ZRANGEBYLEX', BACK, '[' .. name .. ' ', '(' .. name .. '!', 'LIMIT', 0, count)
end
for index, member in ipairs(returned) do numbers[index] = string.match(member, ' 0*(%d+)$') end
cursor = tonumber(cursor)
local left = total == '' and count or tonumber(total) - cursor
for _ = 1, math.min(count - #numbers, left) do
  numbers[#numbers + 1] = text(cursor)
  cursor = cursor + 1
end
if #numbers == 0 then return answer end

local holders, held = {}, {}
for index, number in ipairs(numbers) do
  answer[#answer + 1] = number
  holders[2 * index - 1], holders[2 * index] = name .. ' ' .. number, lease .. ' ' .. text(now)
  held[2 * index - 1], held[2 * index] = 0, lease .. ' ' .. name .. ' ' .. padded(number)
end
call_in_parts('ZREM', BACK, returned)
call_in_parts('HSET', OUT, holders)
call_in_parts('ZADD', HELD, held)
redis.call('HSET', RUN, 'cursor:' .. name, text(cursor))
if key ~= '' then redis.call('HSET', KEYS[13], last, key .. ' ' .. table.concat(numbers, ',')) end
return answer
