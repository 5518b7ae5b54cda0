-- Checks the claim of a push to all shards before its body is read. Changes nothing.
-- KEYS     the run's, 13 lease:ID
-- ARGV     1 lease, 2 fencing token, 3 step at which the gradient was taken, 4 idempotency key, 5 claim
-- returns  {idempotency-conflict}, {run-not-initialized}, {lease-expired}, {epoch-changed, epoch}, {step-ahead, step},
--          {run-paused}, {unit-not-held, units}, or {passed}: each shard's admission checks the rest

local record, pending = redis.call('HGET', RECEIPTS, ARGV[4]), redis.call('HGET', PENDING, ARGV[4])
local earlier = record and cjson.decode(record).claim or pending
if earlier and earlier ~= ARGV[5] then return {'idempotency-conflict'} end
if record or redis.call('HGET', RUN, 'phase') ~= 'open' then return {'passed'} end
local found, refusal = claimed(KEYS[13], ARGV[1], ARGV[2], tonumber(ARGV[3]), clock())
if not found then return refusal end
if not pending and rule('paused') then return {'run-paused'} end
return not pending and unheld_units(ARGV[5]) or {'passed'}
