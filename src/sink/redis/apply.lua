-- Applies a batch: all of its usage, or nothing. What a script has written stays when it fails. So
-- everything that can be looked at is looked at before the first write; what can't, see there.
--
-- KEYS: the position; then for each window of a quota: its usage, its meaning, the quota's limits.
-- ARGV: from and to, as number and check, empty for none; then for each window: decimals, its end
-- or nothing, when it expires or nothing, and "user added limit" of each row.

-- An answer without a change. What a replica has may be old, or nothing: it must not answer. It
-- refuses PERSIST as it refuses every write, and a position does not expire. Not called before a
-- change: once a script has written, it may go on writing where there is no memory.
local function unchanged(...)
    redis.call('PERSIST', KEYS[1])
    return {...}
end

local position = redis.call('HMGET', KEYS[1], 'batch', 'check')
local batch, check = position[1] or '', position[2] or ''
if batch == ARGV[3] and check == ARGV[4] then
    return unchanged('before')
end
if batch ~= ARGV[1] or check ~= ARGV[2] then
    return unchanged('disagrees', batch, check)
end

-- Numbers are doubles here. A decimal number as two exact ones: high * 10^9 + low.
local function parts(text)
    local sign, digits = string.match(text, '^(-?)(%d+)$')
    local high = tonumber(string.sub(digits, 1, -10)) or 0
    local low = tonumber(string.sub(digits, -9))
    if sign == '-' then
        return -high, -low
    end
    return high, low
end

-- Whether the sum is one of 64 bits, as HINCRBY requires.
local function fits(one, other)
    if math.abs(tonumber(one)) < 4e18 and math.abs(tonumber(other)) < 4e18 then
        return true
    end
    local high, low = parts(one)
    local other_high, other_low = parts(other)
    high, low = high + other_high, low + other_low
    local carry = math.floor(low / 1e9)
    high, low = high + carry, low - carry * 1e9
    if high >= 0 then
        return high < 9223372036 or (high == 9223372036 and low <= 854775807)
    end
    return high > -9223372037 or (high == -9223372037 and low >= 145224192)
end

-- What a field gets whose sum is beyond 64 bits: one user's sum must not keep all others out.
local function bound(added)
    return string.sub(added, 1, 1) == '-' and '-9223372036854775807' or '9223372036854775807'
end

-- Whether HINCRBY takes the value as a number.
local function is_count(text)
    return text == '0' or (string.match(text, '^-?[1-9]%d*$') and fits(text, '0'))
end

for key = 1, #KEYS do
    local kind = redis.call('TYPE', KEYS[key]).ok
    if kind ~= 'hash' and kind ~= 'none' then
        return unchanged('type', KEYS[key], kind)
    end
end

local windows = (#KEYS - 1) / 3
-- Of each window, what users have whose sum is beyond 64 bits; how many of them were not at the
-- last number before, and the first of these.
local beyond, beyond_count, beyond_first = {}, 0, nil
for window = 0, windows - 1 do
    beyond[window] = {}
    local usage, meaning = KEYS[3 * window + 2], KEYS[3 * window + 3]
    local first = 4 * window + 5
    local known = redis.call('HMGET', meaning, 'decimals', 'window_end')
    if known[1] and (known[1] ~= ARGV[first] or known[2] ~= ARGV[first + 1]) then
        return unchanged('meaning', usage)
    end
    for user, added in string.gmatch(ARGV[first + 3], '(%d+) (-?%d+) %d+') do
        local used = redis.call('HGET', usage, user)
        if used and not is_count(used) then
            return unchanged('value', usage, user, used)
        end
        if not (fits(added, '0') and fits(used or '0', added)) then
            beyond[window][user] = used or '0'
            if used ~= bound(added) then
                beyond_count = beyond_count + 1
                beyond_first = beyond_first or {usage, user}
            end
        end
    end
end

-- Rights show only when a command is called, and are checked at each call, by command and key. So
-- what adds usage comes last, and each of its calls has been made before, on the same key, in a way
-- that may be repeated: when something is refused, no usage has been written yet.

-- The position as it is. That of a first batch is empty, which is none.
redis.call('HSET', KEYS[1], 'batch', ARGV[1], 'check', ARGV[2])
for window = 0, windows - 1 do
    local usage, meaning, limits = KEYS[3 * window + 2], KEYS[3 * window + 3], KEYS[3 * window + 4]
    local first = 4 * window + 5
    for user, limit in string.gmatch(ARGV[first + 3], '(%d+) %-?%d+ (%d+)') do
        redis.call('HSET', limits, user, limit)
    end
    redis.call('HSET', meaning, 'decimals', ARGV[first], 'window_end', ARGV[first + 1])
    if ARGV[first + 2] ~= '' then
        redis.call('PEXPIREAT', usage, ARGV[first + 2])
        redis.call('PEXPIREAT', meaning, ARGV[first + 2])
    end
end
-- Last of these, since it may leave a user with nothing used.
for window = 0, windows - 1 do
    local user = string.match(ARGV[4 * window + 8], '^%d+')
    redis.call('HINCRBY', KEYS[3 * window + 2], user, 0)
    for user, used in pairs(beyond[window]) do
        redis.call('HSET', KEYS[3 * window + 2], user, used)
    end
end

for window = 0, windows - 1 do
    local usage, first = KEYS[3 * window + 2], 4 * window + 5
    for user, added in string.gmatch(ARGV[first + 3], '(%d+) (-?%d+) %d+') do
        if beyond[window][user] then
            redis.call('HSET', usage, user, bound(added))
        else
            redis.call('HINCRBY', usage, user, added)
        end
    end
    -- Once more, since the key may be new.
    if ARGV[first + 2] ~= '' then
        redis.call('PEXPIREAT', usage, ARGV[first + 2])
    end
end
redis.call('HSET', KEYS[1], 'batch', ARGV[3], 'check', ARGV[4])
if beyond_first then
    return {'now', tostring(beyond_count), beyond_first[1], beyond_first[2]}
end
return {'now'}
