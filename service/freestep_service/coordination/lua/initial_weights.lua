-- Notes how far a shard is with its part of the initial weights. The first upload of which all shards have their parts
-- initializes the run. Uploads take turns, so that no two of them wait for memory that the other holds. A turn ends when
-- a part is withdrawn, or when the upload makes no progress for long while others wait.
-- KEYS     the run's
-- ARGV     1 shard, 2 its owner's token, 3 upload, 4 epoch and 5 newest seq that the shard knows, 6 coming (the part is
--          not received yet), staged or withdrawn, 7 how long an upload may make no progress while others wait, in ms,
--          8 elements of the part (BEGIN-END), 9 digest of its body where it is staged, or an empty string
-- returns  {behind}, {not-open, missing shards (JSON)}, {fenced}, {coming} (the upload has its turn), {waiting} (it does
--          not, or no longer), {staged} (a message follows when all shards have their parts), {initialized} (by this
--          upload, whose part it is as far as that is known), or {already-initialized}

local shard, upload, progress, elements, digest = ARGV[1], ARGV[3], ARGV[6], ARGV[8], ARGV[9]
if is_behind(ARGV[4], ARGV[5]) then return {'behind'} end
local refusal = shut(shard, ARGV[2])
if refusal then return refusal end
if redis.call('HGET', RUN, 'initialized') == '1' then
  local made = redis.call('HMGET', RUN, 'upload', 'upload_parts')
  -- Older versions wrote no digests.
  local known = made[2] and cjson.decode(made[2])[elements]
  local is_other = known and digest ~= '' and known ~= digest
  return {made[1] == upload and not is_other and 'initialized' or 'already-initialized'}
end
local now, turn = clock(), redis.call('HGET', RUN, 'initializing')
turn = turn and cjson.decode(turn)
if turn and turn.at > now then
  turn.at = now
  redis.call('HSET', RUN, 'initializing', cjson.encode(turn))
end
if progress == 'coming' and (not turn or (turn.upload ~= upload and turn.at + tonumber(ARGV[7]) <= now)) then
  turn = {upload = upload, parts = {}, digests = {}}
end
if not turn or turn.upload ~= upload then return {'waiting'} end
if progress == 'withdrawn' then
  redis.call('HDEL', RUN, 'initializing')
  return {'waiting'}
end
if progress == 'coming' or turn.parts[shard] ~= ARGV[2] then turn.at = now end
if progress == 'staged' then
  turn.parts[shard] = ARGV[2]
  turn.digests = turn.digests or {}
  turn.digests[elements] = digest
end
redis.call('HSET', RUN, 'initializing', cjson.encode(turn))
if progress == 'coming' then return {'coming'} end
for index = 0, shard_count() - 1 do
  local token = turn.parts[tostring(index)]
  if not token or not owns(index, token) then return {'staged'} end
end
redis.call('HDEL', RUN, 'initializing')
redis.call('HSET', RUN, 'initialized', 1, 'upload', upload, 'upload_parts', cjson.encode(turn.digests))
publish({kind = 'initialized', upload = upload})
return {'initialized'}
