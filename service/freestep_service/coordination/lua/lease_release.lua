-- Ends a lease at its holder's request, and completes the update that waited for that worker alone.
-- KEYS     the run's, 13 lease:ID, 14 window:ID
-- ARGV     1 lease, 2 epoch and 3 newest seq that the shard knows
-- returns  {behind} (Redis has lost data; the run must be opened again), {lease-expired}, or
--          {ended, worker, seq, step, epoch, evicted idempotency keys ...}; seq is 0 if no update was completed

if is_behind(ARGV[2], ARGV[3]) then return {'behind'} end
local now = clock()
local found = held(KEYS[13], ARGV[1], nil, now)
if not found then return {'lease-expired'} end
check_types()
check_type('list', KEYS[14])
local evicted, seq, step = {}, 0, 0
end_lease(found.worker, now)
redis.call('DEL', KEYS[13])
retire(ARGV[1], KEYS[14], evicted)
publish_evicted(evicted)
if shard_count() > 1 then publish({kind = 'lease', change = 'released', worker = found.worker}) end
if redis.call('HGET', RUN, 'phase') == 'open' and rule('batch') == 'live' and is_complete(now) then
  local entry = append(true, {closed_by = found.worker})
  publish_entry(entry)
  seq, step = entry.seq, entry.step
end
return {'ended', found.worker, seq, step, run_number('epoch'), unpack(evicted)}
