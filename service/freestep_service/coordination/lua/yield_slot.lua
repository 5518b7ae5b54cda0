-- Gives a push's slot to the next in line: its sender is slow, and what it holds is counted apart on every shard.
-- KEYS     the run's
-- ARGV     1 idempotency key
-- returns  {OK}

local staged = redis.call('HGET', STAGED, ARGV[1])
if not staged then return {'OK'} end
staged = cjson.decode(staged)
if staged.queued or staged.slug or staged.slow then return {'OK'} end
staged.slow = true
redis.call('HSET', STAGED, ARGV[1], cjson.encode(staged))
leave_slot()
return {'OK'}
