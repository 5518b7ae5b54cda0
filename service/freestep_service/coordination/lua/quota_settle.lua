-- Says what has come of what a token has taken (quota_take.lua). Several may make what has one name, and one of them may
-- end what another has just made: so an end takes off the list only what it names, and nothing while others make it.
-- KEYS     1 the list
-- ARGV     1 name, 2 what has become of it: made, failed (to be made), kept (it is there, made before), or ended,
--          3 its mark and 4 its weight, 5 ms after which a name is to be looked for, 6 ms after which a list that is not
--          used is dropped
-- returns  OK

local LIST, name, event, mark, now = KEYS[1], ARGV[1], ARGV[2], ARGV[3], clock()
check_type('hash', LIST)
local known = redis.call('HGET', LIST, name)
known = known and cjson.decode(known)
if event == 'ended' or event == 'failed' then
  if not known or (event == 'ended' and known.mark ~= mark) then return 'OK' end
else
  known = known or {weight = 0, claims = 0, at = now + tonumber(ARGV[5])}
  known.mark, known.made = mark, tonumber(ARGV[4])
  known.weight = math.max(known.weight, known.made)
end
if event == 'made' or event == 'failed' then known.claims = math.max(known.claims - 1, 0) end
if event == 'ended' then
  if known.claims == 0 then
    redis.call('HDEL', LIST, name)
    return 'OK'
  end
  known.mark, known.made = nil, nil
end
if known.claims == 0 and known.made then known.weight = known.made end
redis.call('HSET', LIST, name, cjson.encode(known))
redis.call('PEXPIRE', LIST, ARGV[6])
return 'OK'
