-- Reads a position.
--
-- KEYS: the position.

-- Changes nothing, but a replica refuses it: see apply.lua.
redis.call('PERSIST', KEYS[1])
return redis.call('HMGET', KEYS[1], 'batch', 'check')
