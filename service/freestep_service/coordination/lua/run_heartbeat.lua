-- Prolongs a process's ownership of shards, gives it shards that have no owner, and reads how the run stands.
-- Ownership is a lease with a fencing token. A process takes over at once from a predecessor: one with the same URL on the
-- same host.
-- KEYS     the run's
-- ARGV     1 process, 2 its URL, 3 its host, 4 time to live in ms, 5 shards to take if they are free (JSON list),
--          6 fields of the shards' hash to set for shards that it owns (JSON: field -> value), 7 what those shards have
--          applied of the log (JSON: shard -> [epoch, seq])
-- returns  {missing} (there is no such run), or {run, the run's hash (flat), shards' hash (flat), now in ms, 1 if the run
--          has lost one of its keys alone or else 0, what is wrong with each key that holds another type ...}

local node, url, host, ttl = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
check_type('hash', RUN, SHARDS)
if not run_exists() then return {'missing'} end
local now, taken = clock(), false
local wanted = {}
for _, shard in ipairs(cjson.decode(ARGV[5])) do wanted[shard] = true end
for shard = 0, shard_count() - 1 do
  local owner = redis.call('HMGET', SHARDS, shard .. ':node', shard .. ':url', shard .. ':host', shard .. ':ends',
    shard .. ':ttl')
  -- Older versions wrote no time to live.
  if owner[4] and owner[5] and tonumber(owner[4]) > now + tonumber(owner[5]) then
    owner[4] = text(now + tonumber(owner[5]))
    redis.call('HSET', SHARDS, shard .. ':ends', owner[4])
  end
  -- Older versions wrote no host.
  local is_predecessor = owner[2] == url and (not owner[3] or owner[3] == host)
  if owner[1] == node then
    redis.call('HSET', SHARDS, shard .. ':ends', text(now + ttl), shard .. ':ttl', text(ttl))
  elseif wanted[shard] and (not owner[4] or tonumber(owner[4]) <= now or is_predecessor) then
    local token = text(math.max(run_number('token') + 1, now))
    redis.call('HSET', RUN, 'token', token)
    redis.call('HSET', SHARDS, shard .. ':node', node, shard .. ':url', url, shard .. ':host', host,
      shard .. ':token', token, shard .. ':ends', text(now + ttl), shard .. ':ttl', text(ttl))
    redis.call('HDEL', SHARDS, shard .. ':report', shard .. ':loaded', shard .. ':applied', shard .. ':applied_seq',
      shard .. ':left_url')
    taken = true
  end
end
local function is_owner(shard)
  return redis.call('HGET', SHARDS, shard .. ':node') == node
end
for field, value in pairs(cjson.decode(ARGV[6])) do
  if is_owner(string.match(field, '^%d+')) then redis.call('HSET', SHARDS, field, value) end
end
for shard, position in pairs(cjson.decode(ARGV[7])) do
  if is_owner(shard) and position[1] == run_number('epoch') then
    redis.call('HSET', SHARDS, shard .. ':applied_seq', text(position[2]))
  end
end
-- While the run is being opened, a shard without an owner is waited for: its owner may only be slow, and to begin again for
-- each heartbeat that comes late is never to end.
if taken or (missing_shards(now) ~= '[]' and redis.call('HGET', RUN, 'phase') == 'open') then begin_gathering() end
local wrong = {}
for expected, keys in pairs(TYPES) do
  for _, key in ipairs(keys) do wrong[#wrong + 1] = wrong_type(expected, key) end
end
table.sort(wrong)
local marks = redis.call('HMGET', RUN, 'phase', 'marked', 'grouped', 'in_flight', 'measured')
local has_lost = has_lost_a_key(unpack(marks, 1, 5)) and 1 or 0
return {'run', redis.call('HGETALL', RUN), redis.call('HGETALL', SHARDS), text(now), has_lost, unpack(wrong)}
