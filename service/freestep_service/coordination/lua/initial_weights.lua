-- Takes note of how far a shard is with its part of the initial weights; when all parts of one upload are there, the run
-- is initialized by it. The first whole upload wins. Uploads have turns, so that no shard holds memory for one while
-- others hold it for another; a turn ends when a part is withdrawn, or when nothing comes for long while others wait.
-- KEYS     the run's
-- ARGV     1 shard, 2 its owner's token, 3 upload, 4 epoch and 5 newest seq that the shard knows, 6 coming (the part is
--          yet to be received), staged or withdrawn, 7 how long an upload may stand still while others wait, in ms
-- returns  behind, not-open, fenced, coming (it is this upload's turn), waiting (it is not, or no longer), staged (others
--          are not: the outcome will be told), initialized (by this upload), or already-initialized

local shard, upload, progress = ARGV[1], ARGV[3], ARGV[6]
if is_behind(ARGV[4], ARGV[5]) then return 'behind' end
if redis.call('HGET', RUN, 'phase') ~= 'open' then return 'not-open' end
if not owns(shard, ARGV[2]) then return 'fenced' end
if redis.call('HGET', RUN, 'initialized') == '1' then
  return redis.call('HGET', RUN, 'upload') == upload and 'initialized' or 'already-initialized'
end
local count = shard_count()
if count == 1 and progress ~= 'staged' then return progress == 'coming' and 'coming' or 'waiting' end
if count > 1 then
  local now, turn = clock(), redis.call('HGET', RUN, 'initializing')
  turn = turn and cjson.decode(turn)
  if progress == 'coming' and (not turn or (turn.upload ~= upload and turn.at + tonumber(ARGV[7]) <= now)) then
    turn = {upload = upload, parts = {}}
  end
  if not turn or turn.upload ~= upload then return 'waiting' end
  if progress == 'withdrawn' then
    redis.call('HDEL', RUN, 'initializing')
    return 'waiting'
  end
  if progress == 'coming' or turn.parts[shard] ~= ARGV[2] then turn.at = now end
  if progress == 'staged' then turn.parts[shard] = ARGV[2] end
  redis.call('HSET', RUN, 'initializing', cjson.encode(turn))
  if progress == 'coming' then return 'coming' end
  for index = 0, count - 1 do
    local token = turn.parts[tostring(index)]
    if not token or not owns(index, token) then return 'staged' end
  end
  redis.call('HDEL', RUN, 'initializing')
  tell({kind = 'initialized', upload = upload})
end
redis.call('HSET', RUN, 'initialized', 1, 'upload', upload)
return 'initialized'
