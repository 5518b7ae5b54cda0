-- Renews a lease.
-- KEYS     the run's, 13 lease:ID
-- ARGV     1 lease
-- returns  {lease-expired} (also if Redis has lost the run), {not-open, missing shards (JSON)}, {epoch-changed, epoch}, or
--          {renewed, worker, token, time to live in ms, epoch, step}

if not run_exists() then return {'lease-expired'} end
local now = clock()
local worker = holder(KEYS[13], ARGV[1], nil, now)
if not worker then return {'lease-expired'} end
local fields = redis.call('HMGET', KEYS[13], 'epoch', 'token', 'ttl_ms')
local epoch = redis.call('HGET', RUN, 'epoch')
-- Redis has lost the run's state, and its shards have not restored it yet.
if not epoch then return {'not-open', missing_shards(now)} end
if fields[1] ~= epoch then return {'epoch-changed', tonumber(epoch)} end
extend(KEYS[13], worker, now)
return {'renewed', worker, fields[2], tonumber(fields[3]), tonumber(epoch), run_number('step')}
