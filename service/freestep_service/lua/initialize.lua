-- Takes note that a shard has staged its part of the initial weights; when all parts of one upload are there, the run is
-- initialized by it. The first whole upload wins.
-- KEYS     the run's
-- ARGV     1 shard, 2 its owner's token, 3 upload, 4 epoch and 5 newest seq that the shard knows
-- returns  behind, not-open, fenced, staged (others are not: the outcome will be told), initialized (by this upload), or
--          already-initialized

if is_behind(ARGV[4], ARGV[5]) then return 'behind' end
if redis.call('HGET', RUN, 'phase') ~= 'open' then return 'not-open' end
if not owns(ARGV[1], ARGV[2]) then return 'fenced' end
if redis.call('HGET', RUN, 'initialized') == '1' then
  return redis.call('HGET', RUN, 'upload') == ARGV[3] and 'initialized' or 'already-initialized'
end
local count = shard_count()
if count > 1 then
  local uploads = cjson.decode(redis.call('HGET', RUN, 'initializing') or '{}')
  local parts = uploads[ARGV[3]] or {}
  parts[ARGV[1]], uploads[ARGV[3]] = ARGV[2], parts
  redis.call('HSET', RUN, 'initializing', cjson.encode(uploads))
  for index = 0, count - 1 do
    if not parts[tostring(index)] or not owns(index, parts[tostring(index)]) then return 'staged' end
  end
  redis.call('HDEL', RUN, 'initializing')
  tell({kind = 'initialized', upload = ARGV[3]})
end
redis.call('HSET', RUN, 'initialized', 1, 'upload', ARGV[3])
return 'initialized'
