-- Registers a process as live, counts the live processes, and finds one on another host that has the same URL.
-- KEYS     1 freestep:nodes (zset: process -> the time until which it counts as live, in ms since 1970), 2 its hosts
--          (hash: process -> JSON {url, host, ttl (in ms; older versions wrote none)}); both belong to no run
-- ARGV     1 process, 2 time to live in ms, 3 its URL, 4 its host, 5 1 if it has been registered before, else 0: it is
--          then not registered while a process on another host has its URL
-- returns  {number of live processes, process on another host with this URL or an empty string, that process's host or an
--          empty string, the time until which it counts as live or 0}

local NODES, HOSTS = KEYS[1], KEYS[2]
local node, url, host = ARGV[1], ARGV[3], ARGV[4]
local now = clock()
redis.call('ZREMRANGEBYSCORE', NODES, '-inf', text(now))
local rival = {'', '', '0'}
local hosts = redis.call('HGETALL', HOSTS)
for index = 1, #hosts, 2 do
  local other, place, ends = hosts[index], cjson.decode(hosts[index + 1]), redis.call('ZSCORE', NODES, hosts[index])
  -- Redis's clock may have gone back.
  if ends and place.ttl and tonumber(ends) > now + place.ttl then
    ends = text(now + place.ttl)
    redis.call('ZADD', NODES, ends, other)
  end
  if not ends then
    redis.call('HDEL', HOSTS, other)
  elseif other ~= node and place.url == url and place.host ~= host then
    rival = {other, place.host, ends}
  end
end
if rival[1] == '' or ARGV[5] == '1' then
  redis.call('ZADD', NODES, now + tonumber(ARGV[2]), node)
  redis.call('HSET', HOSTS, node, cjson.encode({url = url, host = host, ttl = tonumber(ARGV[2])}))
end
return {redis.call('ZCARD', NODES), unpack(rival)}
