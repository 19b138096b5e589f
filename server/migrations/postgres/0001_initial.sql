-- The durable state of fwpush, the same as in migrations/sqlite. Ids are TEXT compared bytewise, whatever order of texts the
-- database has, times are milliseconds since 1970, truth values 0 or 1.
-- Phases, states and actions are the numbers of proto/fwpush/v1; phase 0 is a device whose wave is not open yet.

-- One row a name; `clock_ms` is the latest database time that any commit saw.
CREATE TABLE meta (
  name TEXT COLLATE "C" NOT NULL PRIMARY KEY,
  value BIGINT NOT NULL
);
INSERT INTO meta (name, value) VALUES ('clock_ms', 0);

CREATE TABLE files (
  file_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
  size BIGINT NOT NULL,
  created_at_ms BIGINT NOT NULL
);

CREATE TABLE releases (
  release_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
  product TEXT COLLATE "C" NOT NULL,
  channel TEXT COLLATE "C" NOT NULL,
  version TEXT COLLATE "C" NOT NULL,
  seq BIGINT NOT NULL,
  security_counter BIGINT NOT NULL,
  envelope BYTEA NOT NULL,
  -- The file to fetch, and the plain image that it holds.
  file_id TEXT COLLATE "C" NOT NULL,
  size BIGINT NOT NULL,
  file_name TEXT COLLATE "C" NOT NULL,
  image_id TEXT COLLATE "C" NOT NULL,
  image_size BIGINT NOT NULL,
  issued_at_ms BIGINT NOT NULL,
  expires_at_ms BIGINT NOT NULL,
  published_at_ms BIGINT NOT NULL,
  revoked BIGINT NOT NULL DEFAULT 0,
  -- JSON: [{"id", "rev_min", "rev_max"}].
  hw TEXT COLLATE "C" NOT NULL,
  from_min TEXT COLLATE "C",
  from_max TEXT COLLATE "C",
  min_agent TEXT COLLATE "C"
);
CREATE UNIQUE INDEX releases_seq ON releases (product, channel, seq);
CREATE UNIQUE INDEX releases_version ON releases (product, channel, version);

CREATE TABLE release_files (
  release_id TEXT COLLATE "C" NOT NULL REFERENCES releases (release_id),
  file_id TEXT COLLATE "C" NOT NULL REFERENCES files (file_id),
  PRIMARY KEY (release_id, file_id)
);
CREATE INDEX release_files_file ON release_files (file_id);

CREATE TABLE devices (
  device_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
  product TEXT COLLATE "C" NOT NULL,
  hw_id TEXT COLLATE "C" NOT NULL,
  hw_rev BIGINT NOT NULL,
  channel TEXT COLLATE "C" NOT NULL,
  blocked BIGINT NOT NULL DEFAULT 0,
  -- The device's last claim of product, hardware or channel differed from this record.
  held BIGINT NOT NULL DEFAULT 0,
  created_at_ms BIGINT NOT NULL,
  last_seen_at_ms BIGINT,
  cert_fingerprint TEXT COLLATE "C",
  -- JSON list of ids, or ["*"].
  hears TEXT COLLATE "C" NOT NULL DEFAULT '[]',
  -- What the device says of itself.
  state_id TEXT COLLATE "C" NOT NULL DEFAULT '',
  agent_version TEXT COLLATE "C" NOT NULL DEFAULT '',
  channels TEXT COLLATE "C" NOT NULL DEFAULT '[]',
  attributes TEXT COLLATE "C" NOT NULL DEFAULT '{}',
  observed_generation BIGINT NOT NULL DEFAULT 0,
  release_id TEXT COLLATE "C",
  version TEXT COLLATE "C" NOT NULL DEFAULT '',
  security_counter BIGINT NOT NULL DEFAULT 0,
  slot TEXT COLLATE "C" NOT NULL DEFAULT '',
  confirmed BIGINT NOT NULL DEFAULT 0,
  -- What it should do; only the engine writes these.
  desired_generation BIGINT NOT NULL DEFAULT 0,
  desired_action BIGINT NOT NULL DEFAULT 2,
  desired_rollout_id TEXT COLLATE "C",
  -- The rollout that takes over once the present one has ended on this device.
  next_rollout_id TEXT COLLATE "C"
);
CREATE INDEX devices_product ON devices (product, device_id);
CREATE INDEX devices_blocked ON devices (device_id) WHERE blocked = 1;
CREATE INDEX devices_next ON devices (next_rollout_id, device_id) WHERE next_rollout_id IS NOT NULL;

CREATE TABLE rollouts (
  rollout_id TEXT COLLATE "C" NOT NULL PRIMARY KEY,
  -- Rises by one with each rollout: of two rollouts the higher is the newer.
  ordinal BIGINT NOT NULL UNIQUE,
  release_id TEXT COLLATE "C" NOT NULL REFERENCES releases (release_id),
  product TEXT COLLATE "C" NOT NULL,
  channel TEXT COLLATE "C" NOT NULL,
  action BIGINT NOT NULL,
  state BIGINT NOT NULL,
  target_all BIGINT NOT NULL,
  -- JSON list of ids, ascending; NULL when all are meant.
  target_ids TEXT COLLATE "C",
  -- Devices added or registered later may join.
  joinable BIGINT NOT NULL,
  -- The last device looked at while choosing; NULL once all were.
  enrol_after TEXT COLLATE "C",
  -- Raised in each transaction that changes what a device of this rollout should do, and stamped on its row.
  rev BIGINT NOT NULL DEFAULT 0,
  -- Devices that first finish an earlier update; they have no row yet.
  queued BIGINT NOT NULL DEFAULT 0,
  bytes_done BIGINT NOT NULL DEFAULT 0,
  bytes_total BIGINT NOT NULL DEFAULT 0,
  -- 1 while the driver has to look at it.
  driven BIGINT NOT NULL DEFAULT 1,
  created_at_ms BIGINT NOT NULL,
  created_by TEXT COLLATE "C" NOT NULL,
  offered_at_ms BIGINT NOT NULL,
  updated_at_ms BIGINT NOT NULL,
  ended_at_ms BIGINT,
  ended_why TEXT COLLATE "C" NOT NULL DEFAULT ''
);
CREATE INDEX rollouts_driven ON rollouts (ordinal) WHERE driven = 1;
CREATE INDEX rollouts_joinable ON rollouts (product, channel, ordinal) WHERE joinable = 1;
CREATE INDEX rollouts_release ON rollouts (release_id);
CREATE INDEX rollouts_updated ON rollouts (updated_at_ms);

CREATE TABLE rollout_devices (
  rollout_id TEXT COLLATE "C" NOT NULL REFERENCES rollouts (rollout_id),
  device_id TEXT COLLATE "C" NOT NULL,
  wave BIGINT NOT NULL,
  -- Stable 32-bit hash of rollout and device: the order in which waves take devices.
  hash BIGINT NOT NULL,
  phase BIGINT NOT NULL,
  generation BIGINT NOT NULL,
  attempt BIGINT NOT NULL,
  rev BIGINT NOT NULL,
  -- Place of the last report that counted.
  report_boot BIGINT NOT NULL DEFAULT 0,
  report_seq BIGINT NOT NULL DEFAULT 0,
  bytes_done BIGINT NOT NULL DEFAULT 0,
  bytes_total BIGINT NOT NULL DEFAULT 0,
  error_code TEXT COLLATE "C" NOT NULL DEFAULT '',
  error_message TEXT COLLATE "C" NOT NULL DEFAULT '',
  deadline_at_ms BIGINT,
  offered_at_ms BIGINT,
  created_at_ms BIGINT NOT NULL,
  updated_at_ms BIGINT NOT NULL,
  -- The device may join this rollout again: it was never fit for it so far, or its record was removed since.
  rejoin BIGINT NOT NULL DEFAULT 0,
  PRIMARY KEY (rollout_id, device_id)
);
-- A device has at most one update that has not ended.
CREATE UNIQUE INDEX rollout_devices_open ON rollout_devices (device_id) WHERE phase < 10;
CREATE INDEX rollout_devices_rev ON rollout_devices (rollout_id, rev, device_id);
CREATE INDEX rollout_devices_phase ON rollout_devices (rollout_id, phase, device_id);
CREATE INDEX rollout_devices_due ON rollout_devices (rollout_id, phase, deadline_at_ms) WHERE deadline_at_ms IS NOT NULL;
CREATE INDEX rollout_devices_chosen ON rollout_devices (rollout_id, wave, hash, device_id) WHERE phase = 0;
CREATE INDEX rollout_devices_history ON rollout_devices (device_id, created_at_ms);

-- How many devices of a rollout are in each phase; changed in the same transaction as the rows, summed over nodes.
CREATE TABLE counters (
  rollout_id TEXT COLLATE "C" NOT NULL REFERENCES rollouts (rollout_id),
  wave BIGINT NOT NULL,
  phase BIGINT NOT NULL,
  node TEXT COLLATE "C" NOT NULL,
  devices BIGINT NOT NULL,
  PRIMARY KEY (rollout_id, wave, phase, node)
);

CREATE TABLE events (
  event_id BIGINT GENERATED BY DEFAULT AS IDENTITY PRIMARY KEY,
  device_id TEXT COLLATE "C",
  at_ms BIGINT NOT NULL,
  kind TEXT COLLATE "C" NOT NULL,
  details TEXT COLLATE "C" NOT NULL,
  actor TEXT COLLATE "C" NOT NULL,
  -- What an operator did: kept.
  audit BIGINT NOT NULL
);
CREATE INDEX events_device ON events (device_id, audit, event_id);
CREATE INDEX events_old ON events (at_ms) WHERE audit = 0;

CREATE TABLE leases (
  name TEXT COLLATE "C" NOT NULL PRIMARY KEY,
  owner TEXT COLLATE "C" NOT NULL,
  -- Random for each life of a process.
  incarnation TEXT COLLATE "C" NOT NULL,
  -- Fencing number: rises whenever another incarnation takes the lease.
  token BIGINT NOT NULL,
  expires_at_ms BIGINT NOT NULL
);

-- Roots after the first, and revocation lists, exact bytes. `product` is empty for a root.
CREATE TABLE trust_documents (
  kind TEXT COLLATE "C" NOT NULL,
  product TEXT COLLATE "C" NOT NULL,
  root_version BIGINT NOT NULL,
  version BIGINT NOT NULL,
  envelope BYTEA NOT NULL,
  created_at_ms BIGINT NOT NULL,
  PRIMARY KEY (kind, product, root_version, version)
);
