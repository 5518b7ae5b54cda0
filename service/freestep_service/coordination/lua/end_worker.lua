-- Ends a worker's lease, whoever holds it, and refuses the worker others for a time. Completes the update that waited for
-- that worker alone.
-- KEYS     the run's, 13 lease:ID and 14 window:ID of the worker's lease
-- ARGV     1 epoch and 2 newest seq that the shard knows, 3 shard, 4 its owner's token, 5 worker, 6 its lease, or an empty
--          string, 7 for how long it gets no other, in ms (0 lifts that), or an empty string, 8 what was asked for (JSON),
--          9 who asked, 10 idempotency key, or an empty string
-- returns  {behind}, {not-open, missing shards (JSON)}, {fenced}, {lease, newest lease} (call again with that one),
--          {run-not-initialized} (a refusal is kept with the run's weights), {crowded, most workers that may be refused},
--          or {ended, 1 if the worker had a lease else 0, entry of the log (JSON) or an empty string, evicted idempotency
--          keys ...}; for one of the newest keys what came of it, without an entry, and nothing is changed

local MOST_SUSPENDED, KEPT_KEYS = 1024, 16
if is_behind(ARGV[1], ARGV[2]) then return {'behind'} end
local refusal = shut(ARGV[3], ARGV[4])
if refusal then return refusal end
local worker, lease, key, now = ARGV[5], ARGV[6], ARGV[10], clock()
local answered = cjson.decode(redis.call('HGET', RUN, 'answered_ends') or '[]')
for _, earlier in ipairs(answered) do
  if earlier[1] == key and earlier[2] == worker then return {'ended', earlier[3], ''} end
end
local actual = redis.call('HGET', WORKERS, worker) or ''
if actual ~= lease then return {'lease', actual} end
local ends, suspended, named = ARGV[7] ~= '' and now + tonumber(ARGV[7]), worker_counts('suspended'), 0
if ends and redis.call('HGET', RUN, 'initialized') ~= '1' then return {'run-not-initialized'} end
for name, until_ms in pairs(suspended) do
  if until_ms <= now then suspended[name] = nil elseif name ~= worker then named = named + 1 end
end
if ends and ends > now and named >= MOST_SUSPENDED then return {'crowded', MOST_SUSPENDED} end

check_types()
check_type('hash', KEYS[13])
check_type('list', KEYS[14])
local evicted, entry, control = {}, nil, nil
if ends then
  suspended[worker] = ends > now and ends or nil
  local longest = run_number('longest_ban')
  -- Also of those that came here with the run's state, or by an older version.
  for _, until_ms in pairs(suspended) do longest = math.max(longest, until_ms - now) end
  redis.call('HSET', RUN, 'suspended', cjson.encode(suspended), 'longest_ban', longest)
  control = {worker = worker, ['until'] = text(ends), at = text(now), asked = ARGV[8], by = ARGV[9]}
end
if lease ~= '' then
  end_lease(worker, now)
  redis.call('DEL', KEYS[13])
  retire(lease, KEYS[14], evicted)
  publish_evicted(evicted)
  if shard_count() > 1 then publish({kind = 'lease', change = 'ended', worker = worker}) end
end
local advance = rule('batch') == 'live' and is_complete(now)
if control or advance then
  entry = append(advance, {control = control, closed_by = advance and worker or nil})
  publish_entry(entry)
end
local had_lease = lease ~= '' and 1 or 0
if key ~= '' then
  answered[#answered + 1] = {key, worker, had_lease}
  if #answered > KEPT_KEYS then table.remove(answered, 1) end
  redis.call('HSET', RUN, 'answered_ends', cjson.encode(answered))
end
return {'ended', had_lease, entry and cjson.encode(entry) or '', unpack(evicted)}
