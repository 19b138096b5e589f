-- Until when the device has put its update off, in whatever phase it is, by its own clock. NULL: it has not.
ALTER TABLE rollout_devices ADD COLUMN deferred_until_at_ms BIGINT;
