-- Notes a shard's part of the distances between the pushes of an update. When all shards have reported theirs, all are told
-- the parts; who repeats its report is told them too, until the next update's are there. A run that is gathered to be
-- opened again takes reports too, since its shards stand at one place only once the update is made. Where all parts were
-- there and are lost, a shard that has not heard them asks the others, by a message, to report theirs again.
-- KEYS     the run's, 13 distances
-- ARGV     1 epoch and 2 newest seq that the shard knows, 3 shard, 4 its owner's token, 5 seq of the entry that makes the
--          update, 6 the part (a word)
-- returns  {behind}, {fenced}, {late} (the run goes on from another state, or has long made the update), {waiting} (for
--          other shards), or {known, parts in the order of the shards (words)}

local DISTANCES = KEYS[13]
local epoch, shard, seq, part = ARGV[1], ARGV[3], ARGV[5], ARGV[6]
if is_behind(epoch, ARGV[2]) then return {'behind'} end
if not owns(shard, ARGV[4]) then return {'fenced'} end
local run = redis.call('HMGET', RUN, 'epoch', 'phase', 'compared')
if run[1] ~= epoch or run[2] == 'load' then return {'late'} end
local place = epoch .. '-' .. seq
local known_epoch, known_seq, known = string.match(redis.call('HGET', DISTANCES, 'all') or '', '^(%d+)-(%d+) (.*)$')
if known_epoch == epoch and known_seq == seq then return {'known', known} end
if known_epoch == epoch and tonumber(known_seq) > tonumber(seq) then return {'late'} end

redis.call('HSET', DISTANCES, shard, place .. ' ' .. part)
local parts = {}
for index = 0, shard_count() - 1 do
  local of, text = string.match(redis.call('HGET', DISTANCES, index) or '', '^(%S+) (.*)$')
  if of ~= place then
    if run[3] == place then publish({kind = 'distances-lost', epoch = tonumber(epoch), seq = tonumber(seq)}) end
    return {'waiting'}
  end
  parts[index + 1] = text
end
known = table.concat(parts, ' ')
redis.call('DEL', DISTANCES)
redis.call('HSET', DISTANCES, 'all', place .. ' ' .. known)
redis.call('HSET', RUN, 'compared', place)
publish({kind = 'distances', epoch = tonumber(epoch), seq = tonumber(seq), parts = known})
return {'known', known}
