-- A process says that it lives, and counts those that do.
-- KEYS     1 freestep:nodes (zset: process -> until when it counts as alive, ms since 1970), which no run owns
-- ARGV     1 node, 2 time to live in ms
-- returns  how many processes live

local now = clock()
redis.call('ZADD', KEYS[1], now + tonumber(ARGV[2]), ARGV[1])
redis.call('ZREMRANGEBYSCORE', KEYS[1], '-inf', text(now))
return redis.call('ZCARD', KEYS[1])
