-- Registers a process as live, counts the live processes, and finds one that is in its way: on another host with the same
-- URL, or of an older layout (see domain/layout.py).
-- KEYS     1 freestep:nodes (zset: process -> the time until which it counts as live, in ms since 1970), 2 its hosts
--          (hash: process -> JSON {url, host, ttl (in ms; older versions wrote none), layout (likewise: it is 1)}), 3 the
--          layout of these processes; none belongs to a run
-- ARGV     1 process, 2 time to live in ms, 3 its URL, 4 its host, 5 1 if it has been registered before, else 0: it is
--          then not registered while a process is in its way
-- returns  {number of live processes, newer, the layout} (nothing is changed), or {number of live processes, what is in
--          the way (url, layout, or an empty string), that process or an empty string, its host (for url) or its URL (for
--          layout), the time until which it counts as live or 0}

local NODES, HOSTS, LAYOUT_KEY = KEYS[1], KEYS[2], KEYS[3]
local node, url, host = ARGV[1], ARGV[3], ARGV[4]
local now, is_new = clock(), ARGV[5] ~= '1'
-- What is no number was written by another program, and is replaced.
local layout = tonumber(redis.call('GET', LAYOUT_KEY) or 1) or 1
if layout > LAYOUT then return {redis.call('ZCARD', NODES), 'newer', text(layout)} end
redis.call('ZREMRANGEBYSCORE', NODES, '-inf', text(now))
local rival = {'', '', '', '0'}
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
  elseif is_new and other ~= node and (place.layout or 1) < LAYOUT then
    rival = {'layout', other, place.url, ends}
  elseif other ~= node and place.url == url and place.host ~= host then
    rival = {'url', other, place.host, ends}
  end
end
if rival[1] == '' or not is_new then
  redis.call('ZADD', NODES, now + tonumber(ARGV[2]), node)
  redis.call('HSET', HOSTS, node, cjson.encode({url = url, host = host, ttl = tonumber(ARGV[2]), layout = LAYOUT}))
  redis.call('SET', LAYOUT_KEY, LAYOUT)
end
return {redis.call('ZCARD', NODES), unpack(rival)}
