-- The devices that hear of others: few among many.
CREATE INDEX devices_listening ON devices (device_id) WHERE hears <> '[]';
