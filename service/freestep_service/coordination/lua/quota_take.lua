-- Puts what a token takes on the list of what it has, unless the list is full. What is on it counts until it was found
-- to be no more; so nothing that is lost with a process keeps its place.
-- KEYS     1 the list (hash: name -> "WEIGHT TIME", TIME being when it is to be looked for next, in ms since 1970); it
--          belongs to no run
-- ARGV     1 name, 2 weight, 3 the most names and 4 the most weight in all, or empty strings, 5 ms after which a name is to
--          be looked for, 6 ms after which a list that is not used is dropped, then name and 1 (it was found) or 0 (it
--          is no more), in turn
-- returns  {taken}, also for a name that is there, or {names or weight (what is full), what is used of it, names that
--          are to be looked for ...}

local LIST, name, weight, now = KEYS[1], ARGV[1], tonumber(ARGV[2]), clock()
local most, heaviest, later = tonumber(ARGV[3]), tonumber(ARGV[4]), text(now + tonumber(ARGV[5]))
local MOST_DUE = 256
check_type('hash', LIST)
for index = 7, #ARGV, 2 do
  local known, at = string.match(redis.call('HGET', LIST, ARGV[index]) or '', '^(%d+) (%d+)$')
  -- Else it was taken anew since.
  if known and tonumber(at) <= now then
    if ARGV[index + 1] == '1' then
      redis.call('HSET', LIST, ARGV[index], known .. ' ' .. later)
    else
      redis.call('HDEL', LIST, ARGV[index])
    end
  end
end
local is_known = redis.call('HEXISTS', LIST, name)
local names = redis.call('HLEN', LIST) - is_known
local full, used = most and names + 1 > most and 'names', names
local sum, due = 0, {}
if full or heaviest then
  local all = redis.call('HGETALL', LIST)
  for index = 1, #all, 2 do
    local known, at = string.match(all[index + 1], '^(%d+) (%d+)$')
    if all[index] ~= name then
      sum = sum + tonumber(known)
      if tonumber(at) <= now and #due < MOST_DUE then due[#due + 1] = all[index] end
    end
  end
end
if not full and heaviest and sum + weight > heaviest then full, used = 'weight', sum end
if full then return {full, text(used), unpack(due)} end
redis.call('HSET', LIST, name, text(weight) .. ' ' .. later)
redis.call('PEXPIRE', LIST, ARGV[6])
return {'taken'}
