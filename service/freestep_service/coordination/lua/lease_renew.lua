-- Renews a lease.
-- KEYS     the run's, 13 lease:ID
-- ARGV     1 lease
-- returns  {lease-expired} (also if Redis has lost the run), {not-open, missing shards (JSON)}, {epoch-changed, epoch}, or
--          {renewed, worker, token, time to live in ms, epoch, step}

if not run_exists() then return {'lease-expired'} end
local now = clock()
local found = held(KEYS[13], ARGV[1], nil, now)
if not found then return {'lease-expired'} end
local epoch, step = unpack(redis.call('HMGET', RUN, 'epoch', 'step'))
-- Redis has lost the run's state, and its shards have not restored it yet.
if not epoch then return {'not-open', missing_shards(now)} end
if found.epoch ~= epoch then return {'epoch-changed', tonumber(epoch)} end
extend(KEYS[13], found.worker, found.ttl_ms, now)
return {'renewed', found.worker, found.token, found.ttl_ms, tonumber(epoch), tonumber(step)}
