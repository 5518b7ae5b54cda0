-- Ends the leases that have run out. Where an update waited for those workers alone, it goes on.
-- KEYS     the run's, then window:ID for each lease
-- ARGV     1 epoch and 2 newest seq that the shard knows, then worker and lease, in turn, in the order of the windows
-- returns  {behind} (Redis has lost data; the shard must open the run again), or
--          {ended, seq, step, epoch, evicted idempotency keys ...}; seq is 0 unless an update was closed

if is_behind(ARGV[1], ARGV[2]) then return {'behind'} end
local now = clock()
local evicted, seq, step = {}, 0, 0
for index = 3, #ARGV, 2 do
  local worker, lease = ARGV[index], ARGV[index + 1]
  local ends = redis.call('ZSCORE', LEASES, worker)
  if redis.call('HGET', WORKERS, worker) == lease and (not ends or tonumber(ends) <= now) then
    redis.call('ZREM', LEASES, worker)
    redis.call('HDEL', WORKERS, worker)
    retire(KEYS[8 + (index - 1) / 2], evicted)
  end
end
if redis.call('HGET', RUN, 'batch') == 'live' and is_complete(now) then
  seq, step = append(true, {'closed_by', 'expiry'})
end
return {'ended', seq, step, run_number('epoch'), unpack(evicted)}
