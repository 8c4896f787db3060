"""What the Redis store does in one atomic step each: Lua, run by the server.

A room's keys, all in one hash slot: ``version`` (a counter), ``values`` and ``versions`` (hashes by key), ``leases``
(sorted by end, in milliseconds of the server's clock) and ``log`` (a stream whose ids are the versions). Every script
first deletes what has expired, so nobody ever sees it, and logs that as a change. A counter that is not there yet
starts at the server's time in microseconds: versions grow even over a Redis that came back empty. They are passed
as strings, since Lua would print such numbers in floating point.
"""

from __future__ import annotations

ROOM_KEYS = ("version", "values", "versions", "leases", "log")

_PRELUDE = """
local version_key, values, versions, leases, log = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local log_length = ARGV[1]
local time = redis.call('TIME')
local now_ms = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)

local function next_version()
  redis.call('INCR', version_key)
  return redis.call('GET', version_key)
end

local function record(version, kind, key, value)
  redis.call('XADD', log, 'MAXLEN', log_length, version .. '-0', 'kind', kind, 'key', key, 'value', value)
end

local function delete(key, kind)
  redis.call('HDEL', values, key)
  redis.call('HDEL', versions, key)
  redis.call('ZREM', leases, key)
  local version = next_version()
  record(version, kind, key, '')
  return version
end

if redis.call('EXISTS', version_key) == 0 then
  redis.call('SET', version_key, time[1] .. string.format('%06d', tonumber(time[2])))
end
for _, key in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', now_ms)) do
  delete(key, 'expired')
end
"""

# key -> [version, value], or []
GET = (
    _PRELUDE
    + """
local version = redis.call('HGET', versions, ARGV[2])
if not version then return {} end
return {version, redis.call('HGET', values, ARGV[2])}
"""
)

# key, expected, "put" or "delete", value, lease in ms or "" -> the new version, or nil
COMPARE_AND_SET = (
    _PRELUDE
    + """
local key, expected, kind, value, ttl_ms = ARGV[2], ARGV[3], ARGV[4], ARGV[5], ARGV[6]
local held = redis.call('HGET', versions, key)
if (held or '0') ~= expected then return false end
if kind == 'delete' then
  if held then return delete(key, 'deleted') end
  return redis.call('GET', version_key)
end
local version = next_version()
redis.call('HSET', values, key, value)
redis.call('HSET', versions, key, version)
redis.call('ZREM', leases, key)
if ttl_ms ~= '' then redis.call('ZADD', leases, now_ms + tonumber(ttl_ms), key) end
record(version, 'put', key, value)
return version
"""
)

# key, expected, lease in ms -> 1, or 0
RENEW = (
    _PRELUDE
    + """
if redis.call('HGET', versions, ARGV[2]) ~= ARGV[3] then return 0 end
redis.call('ZADD', leases, now_ms + tonumber(ARGV[4]), ARGV[2])
return 1
"""
)

# prefix -> [room's version, key, version, value, key, …]
SNAPSHOT = (
    _PRELUDE
    + """
local prefix = ARGV[2]
local found = {redis.call('GET', version_key)}
local held = redis.call('HGETALL', versions)
for i = 1, #held, 2 do
  if string.sub(held[i], 1, #prefix) == prefix then
    found[#found + 1] = held[i]
    found[#found + 1] = held[i + 1]
    found[#found + 1] = redis.call('HGET', values, held[i])
  end
end
return found
"""
)

# version seen, entries a page -> [room's version, ms until a lease ends or "", stream entries]
POLL = (
    _PRELUDE
    + """
local first = redis.call('ZRANGE', leases, 0, 0, 'WITHSCORES')
local wait_ms = ''
if first[2] then wait_ms = string.format('%.0f', math.max(0, tonumber(first[2]) - now_ms)) end
local changes = redis.call('XRANGE', log, '(' .. ARGV[2] .. '-0', '+', 'COUNT', ARGV[3])
return {redis.call('GET', version_key), wait_ms, changes}
"""
)
