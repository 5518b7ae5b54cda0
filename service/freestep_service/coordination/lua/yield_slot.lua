-- Gives a push's slot to the next in line: its sender is slow, and what it holds is counted apart on every shard.
-- KEYS     the run's
-- ARGV     1 idempotency key, 2 attempt, as of admit.lua
-- returns  {OK}

local staged = redis.call('HGET', STAGED, ARGV[1])
if not staged then return {'OK'} end
staged = cjson.decode(staged)
if staged.queued or staged.slug or staged.slow or not is_of(staged, ARGV[2]) then return {'OK'} end
staged.slow = true
redis.call('HSET', STAGED, ARGV[1], cjson.encode(staged))
leave_slot()
return {'OK'}
