-- Forgets a shard's part of an admitted push whose body was refused or did not arrive. After a refusal all shards refuse
-- the push, and its units are handed out again. Otherwise the part may be sent again, and the push is forgotten when no
-- shard has a part of it. Changes nothing of another attempt with the same key.
-- KEYS     the run's
-- ARGV     1 idempotency key, 2 attempt, as of admit.lua, 3 shard, 4 slug of the refusal or an empty string, 5 its detail
-- returns  {OK}

if not run_exists() then return {'OK'} end
check_type('hash', PENDING)
check_type('list', QUEUE)
local key, shard, slug = ARGV[1], ARGV[3], ARGV[4]
local staged = redis.call('HGET', STAGED, key)
staged = staged and cjson.decode(staged)
if not staged then
  local claim = redis.call('HGET', PENDING, key)
  if claim and slug ~= '' then give_back_claimed(claim) end
  redis.call('HDEL', PENDING, key)
elseif redis.call('HEXISTS', PENDING, key) == 0 or not is_of(staged, ARGV[2]) then
  -- Another shard has refused it.
  return {'OK'}
elseif slug ~= '' then
  refuse(key, slug, ARGV[5])
else
  staged.parts[shard] = nil
  if next(staged.parts) then
    redis.call('HSET', STAGED, key, cjson.encode(staged))
  else
    forget(key)
  end
end
return {'OK'}
