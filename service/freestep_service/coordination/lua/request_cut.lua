-- Asks for a cut: a point of the model as of one place in the log, the same on all shards. Who asks with a ticket that is
-- known gets that ticket's cut. A state's ticket does not wait for its place: of many that did, most would be of those who
-- have left, and each would hold up the others.
-- KEYS     the run's
-- ARGV     1 epoch and 2 newest seq that the shard knows, 3 shard, 4 its owner's token, 5 ticket, 6 point and dtype, and
--          the shard if no other is to read it, 7 how many shards will read it, 8 pull or state
-- returns  {behind}, {not-open, missing shards}, {fenced}, or {cut, seq}; seq is 0 while there is no memory for another,
--          or the place of states is taken: then the ticket is to be asked for again

if is_behind(ARGV[1], ARGV[2]) then return {'behind'} end
local refusal = shut(ARGV[3], ARGV[4])
if refusal then return refusal end
local ticket, kind = ARGV[5], ARGV[8]
local known = redis.call('HGET', CUTS, ticket)
if known then
  known = cjson.decode(known)
  if known.grouped then
    known.grouped = nil
    redis.call('HSET', CUTS, ticket, cjson.encode(known))
  end
else
  local now = clock()
  if kind == 'state' then
    local _, open = read_places(now)
    if open.state >= MOST_CUTS.state then return {'cut', 0} end
  end
  known = {point = ARGV[6], seq = 0, left = tonumber(ARGV[7]), ends = now + CUT_TTL, kind = kind}
  redis.call('HSET', CUTS, ticket, cjson.encode(known))
end
if known.seq == 0 then cut_if_waited_for() end
return {'cut', cjson.decode(redis.call('HGET', CUTS, ticket)).seq}
