-- Notes that the run has its parameters.
-- KEYS     the run's
-- returns  initialized, or missing (there is no such run)

if redis.call('EXISTS', RUN) == 0 then return 'missing' end
redis.call('HSET', RUN, 'initialized', 1)
return 'initialized'
