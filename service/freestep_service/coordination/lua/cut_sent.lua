-- A shard without a push to say it with has sent its part of some cuts. When all have, others who wait get theirs.
-- KEYS     the run's
-- ARGV     the cuts' tickets
-- returns  OK

release_cuts(ARGV)
return 'OK'
