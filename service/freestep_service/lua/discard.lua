-- Forgets a push that was admitted and whose body was refused or never came.
-- KEYS     the run's
-- ARGV     1 idempotency key
-- returns  1 if it was pending, else 0

return redis.call('HDEL', PENDING, ARGV[1])
