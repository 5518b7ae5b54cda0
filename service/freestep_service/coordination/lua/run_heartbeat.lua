-- A process's heartbeat for a run: prolongs what it owns, takes shards that nobody does, and reads how the run stands.
-- Ownership is a lease with a fencing token; a process that comes back at its predecessor's URL takes over at once.
-- KEYS     the run's
-- ARGV     1 node, 2 url, 3 time to live in ms, 4 shards to take if they are free (JSON list), 5 what it says of its
--          shards (JSON: field of the shards' hash -> value)
-- returns  {missing} (there is no such run), or {run, the run's hash (flat), shards' hash (flat), now in ms}

local node, url, ttl = ARGV[1], ARGV[2], tonumber(ARGV[3])
if redis.call('EXISTS', RUN) == 0 then return {'missing'} end
local now, taken = clock(), false
local wanted = {}
for _, shard in ipairs(cjson.decode(ARGV[4])) do wanted[shard] = true end
for shard = 0, shard_count() - 1 do
  local owner = redis.call('HMGET', SHARDS, shard .. ':node', shard .. ':url', shard .. ':ends')
  local is_free = not owner[3] or tonumber(owner[3]) <= now or owner[2] == url
  if owner[1] == node then
    redis.call('HSET', SHARDS, shard .. ':ends', text(now + ttl))
  elseif is_free and wanted[shard] then
    local token = text(math.max(run_number('token') + 1, now))
    redis.call('HSET', RUN, 'token', token)
    redis.call('HSET', SHARDS, shard .. ':node', node, shard .. ':url', url, shard .. ':token', token,
      shard .. ':ends', text(now + ttl))
    redis.call('HDEL', SHARDS, shard .. ':report', shard .. ':loaded', shard .. ':applied')
    taken = true
  end
end
for field, value in pairs(cjson.decode(ARGV[5])) do
  if redis.call('HGET', SHARDS, string.match(field, '^%d+') .. ':node') == node then
    redis.call('HSET', SHARDS, field, value)
  end
end
if taken or (missing_shards(now) ~= '[]' and redis.call('HGET', RUN, 'phase') ~= 'gather') then begin_gathering() end
return {'run', redis.call('HGETALL', RUN), redis.call('HGETALL', SHARDS), text(now)}
