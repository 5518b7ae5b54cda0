-- Ends a lease at its holder's wish. Where an update waited for that worker alone, it goes on.
-- KEYS     the run's, 13 lease:ID, 14 window:ID
-- ARGV     1 lease, 2 epoch and 3 newest seq that the shard knows
-- returns  {behind} (Redis has lost data; the shard must open the run again), {lease-expired}, or
--          {ended, seq, step, epoch, evicted idempotency keys ...}; seq is 0 unless an update was closed

if is_behind(ARGV[2], ARGV[3]) then return {'behind'} end
local now = clock()
local worker = holder(KEYS[13], ARGV[1], nil, now)
if not worker then return {'lease-expired'} end
local evicted, seq, step = {}, 0, 0
end_lease(worker, now)
redis.call('DEL', KEYS[13])
retire(ARGV[1], KEYS[14], evicted)
tell_evicted(evicted)
if redis.call('HGET', RUN, 'phase') == 'open' and redis.call('HGET', RUN, 'batch') == 'live' and is_complete(now) then
  local entry = append(true, {closed_by = worker})
  publish(entry)
  seq, step = entry.seq, entry.step
end
return {'ended', seq, step, run_number('epoch'), unpack(evicted)}
