-- Puts what a token takes on the list of what it has, unless the list is full. What is on it counts until it was found
-- to be no more; so nothing that is lost with a process keeps its place.
-- KEYS     1 the list (hash: name -> JSON {weight, at (when it is to be looked for next, in ms since 1970), claims (of
--          those who are making it), and mark and made: which of that name is there, and its weight}); it belongs to no
--          run. While there are claims, the weight is the largest of any.
-- ARGV     1 name, 2 weight, 3 the most names and 4 the most weight in all, or empty strings, 5 ms after which a name is to
--          be looked for, 6 ms after which a list that is not used is dropped, then name and 1 (it was found) or 0 (it
--          is no more), in turn
-- returns  {taken}, also for a name that is there, or {names or weight (what is full), what is used of it, names that
--          are to be looked for ...}. Who has taken it says by quota_settle.lua what has come of it.

local LIST, name, weight, now = KEYS[1], ARGV[1], tonumber(ARGV[2]), clock()
local most, heaviest, later = tonumber(ARGV[3]), tonumber(ARGV[4]), now + tonumber(ARGV[5])
local MOST_DUE = 256
check_type('hash', LIST)
for index = 7, #ARGV, 2 do
  local known = redis.call('HGET', LIST, ARGV[index])
  known = known and cjson.decode(known)
  -- Else it was taken anew since.
  if known and known.at <= now then
    if ARGV[index + 1] == '1' then
      -- Those who were making it have come to their end.
      known.at, known.claims, known.weight = later, 0, known.made or known.weight
      redis.call('HSET', LIST, ARGV[index], cjson.encode(known))
    else
      redis.call('HDEL', LIST, ARGV[index])
    end
  end
end
local own = redis.call('HGET', LIST, name)
own = own and cjson.decode(own) or {weight = 0, claims = 0}
local claimed = math.max(own.weight, weight)
local names = redis.call('HLEN', LIST) - redis.call('HEXISTS', LIST, name)
local full, used = most and names + 1 > most and 'names', names
local sum, due = 0, {}
if full or heaviest then
  local all = redis.call('HGETALL', LIST)
  for index = 1, #all, 2 do
    local known = cjson.decode(all[index + 1])
    if known.at > later then
      known.at = later
      redis.call('HSET', LIST, all[index], cjson.encode(known))
    end
    if all[index] ~= name then sum = sum + known.weight end
    local matters = all[index] ~= name or claimed > weight
    if matters and known.at <= now and #due < MOST_DUE then due[#due + 1] = all[index] end
  end
end
if not full and heaviest and sum + claimed > heaviest then full, used = 'weight', sum end
if full then return {full, text(used), unpack(due)} end
own.weight, own.at, own.claims = claimed, later, own.claims + 1
redis.call('HSET', LIST, name, cjson.encode(own))
redis.call('PEXPIRE', LIST, ARGV[6])
return {'taken'}
