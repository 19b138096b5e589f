-- The durable state of fwpush. Ids are TEXT compared bytewise, times are milliseconds since 1970, truth values 0 or 1.
-- Phases, states and actions are the numbers of proto/fwpush/v1; phase 0 is a device whose wave is not open yet.

-- One row a name; `clock_ms` is the latest database time that any commit saw.
CREATE TABLE meta (
  name TEXT NOT NULL PRIMARY KEY,
  value INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
INSERT INTO meta (name, value) VALUES ('clock_ms', 0);

CREATE TABLE files (
  file_id TEXT NOT NULL PRIMARY KEY,
  size INTEGER NOT NULL,
  created_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE releases (
  release_id TEXT NOT NULL PRIMARY KEY,
  product TEXT NOT NULL,
  channel TEXT NOT NULL,
  version TEXT NOT NULL,
  seq INTEGER NOT NULL,
  security_counter INTEGER NOT NULL,
  envelope BLOB NOT NULL,
  -- The file to fetch, and the plain image that it holds.
  file_id TEXT NOT NULL,
  size INTEGER NOT NULL,
  file_name TEXT NOT NULL,
  image_id TEXT NOT NULL,
  image_size INTEGER NOT NULL,
  issued_at_ms INTEGER NOT NULL,
  expires_at_ms INTEGER NOT NULL,
  published_at_ms INTEGER NOT NULL,
  revoked INTEGER NOT NULL DEFAULT 0,
  -- JSON: [{"id", "rev_min", "rev_max"}].
  hw TEXT NOT NULL,
  from_min TEXT,
  from_max TEXT,
  min_agent TEXT
) STRICT;
CREATE UNIQUE INDEX releases_seq ON releases (product, channel, seq);
CREATE UNIQUE INDEX releases_version ON releases (product, channel, version);

CREATE TABLE release_files (
  release_id TEXT NOT NULL REFERENCES releases (release_id),
  file_id TEXT NOT NULL REFERENCES files (file_id),
  PRIMARY KEY (release_id, file_id)
) STRICT, WITHOUT ROWID;
CREATE INDEX release_files_file ON release_files (file_id);

CREATE TABLE devices (
  device_id TEXT NOT NULL PRIMARY KEY,
  product TEXT NOT NULL,
  hw_id TEXT NOT NULL,
  hw_rev INTEGER NOT NULL,
  channel TEXT NOT NULL,
  blocked INTEGER NOT NULL DEFAULT 0,
  -- The device's last claim of product, hardware or channel differed from this record.
  held INTEGER NOT NULL DEFAULT 0,
  created_at_ms INTEGER NOT NULL,
  last_seen_at_ms INTEGER,
  cert_fingerprint TEXT,
  -- JSON list of ids, or ["*"].
  hears TEXT NOT NULL DEFAULT '[]',
  -- What the device says of itself.
  state_id TEXT NOT NULL DEFAULT '',
  agent_version TEXT NOT NULL DEFAULT '',
  channels TEXT NOT NULL DEFAULT '[]',
  attributes TEXT NOT NULL DEFAULT '{}',
  observed_generation INTEGER NOT NULL DEFAULT 0,
  release_id TEXT,
  version TEXT NOT NULL DEFAULT '',
  security_counter INTEGER NOT NULL DEFAULT 0,
  slot TEXT NOT NULL DEFAULT '',
  confirmed INTEGER NOT NULL DEFAULT 0,
  -- What it should do; only the engine writes these.
  desired_generation INTEGER NOT NULL DEFAULT 0,
  desired_action INTEGER NOT NULL DEFAULT 2,
  desired_rollout_id TEXT,
  -- The rollout that takes over once the present one has ended on this device.
  next_rollout_id TEXT
) STRICT;
CREATE INDEX devices_product ON devices (product, device_id);
CREATE INDEX devices_blocked ON devices (device_id) WHERE blocked = 1;
CREATE INDEX devices_next ON devices (next_rollout_id, device_id) WHERE next_rollout_id IS NOT NULL;

CREATE TABLE rollouts (
  rollout_id TEXT NOT NULL PRIMARY KEY,
  -- Rises by one with each rollout: of two rollouts the higher is the newer.
  ordinal INTEGER NOT NULL UNIQUE,
  release_id TEXT NOT NULL REFERENCES releases (release_id),
  product TEXT NOT NULL,
  channel TEXT NOT NULL,
  action INTEGER NOT NULL,
  state INTEGER NOT NULL,
  target_all INTEGER NOT NULL,
  -- JSON list of ids, ascending; NULL when all are meant.
  target_ids TEXT,
  -- Devices added or registered later may join.
  joinable INTEGER NOT NULL,
  -- The last device looked at while choosing; NULL once all were.
  enrol_after TEXT,
  -- Raised in each transaction that changes what a device of this rollout should do, and stamped on its row.
  rev INTEGER NOT NULL DEFAULT 0,
  -- Devices that first finish an earlier update; they have no row yet.
  queued INTEGER NOT NULL DEFAULT 0,
  bytes_done INTEGER NOT NULL DEFAULT 0,
  bytes_total INTEGER NOT NULL DEFAULT 0,
  -- 1 while the driver has to look at it.
  driven INTEGER NOT NULL DEFAULT 1,
  created_at_ms INTEGER NOT NULL,
  created_by TEXT NOT NULL,
  offered_at_ms INTEGER NOT NULL,
  updated_at_ms INTEGER NOT NULL,
  ended_at_ms INTEGER,
  ended_why TEXT NOT NULL DEFAULT ''
) STRICT;
CREATE INDEX rollouts_driven ON rollouts (ordinal) WHERE driven = 1;
CREATE INDEX rollouts_joinable ON rollouts (product, channel, ordinal) WHERE joinable = 1;
CREATE INDEX rollouts_release ON rollouts (release_id);
CREATE INDEX rollouts_updated ON rollouts (updated_at_ms);

CREATE TABLE rollout_devices (
  rollout_id TEXT NOT NULL REFERENCES rollouts (rollout_id),
  device_id TEXT NOT NULL,
  wave INTEGER NOT NULL,
  -- Stable 32-bit hash of rollout and device: the order in which waves take devices.
  hash INTEGER NOT NULL,
  phase INTEGER NOT NULL,
  generation INTEGER NOT NULL,
  attempt INTEGER NOT NULL,
  rev INTEGER NOT NULL,
  -- Place of the last report that counted.
  report_boot INTEGER NOT NULL DEFAULT 0,
  report_seq INTEGER NOT NULL DEFAULT 0,
  bytes_done INTEGER NOT NULL DEFAULT 0,
  bytes_total INTEGER NOT NULL DEFAULT 0,
  error_code TEXT NOT NULL DEFAULT '',
  error_message TEXT NOT NULL DEFAULT '',
  deadline_at_ms INTEGER,
  offered_at_ms INTEGER,
  created_at_ms INTEGER NOT NULL,
  updated_at_ms INTEGER NOT NULL,
  -- The device may join this rollout again: it was never fit for it so far, or its record was removed since.
  rejoin INTEGER NOT NULL DEFAULT 0,
  PRIMARY KEY (rollout_id, device_id)
) STRICT;
-- A device has at most one update that has not ended.
CREATE UNIQUE INDEX rollout_devices_open ON rollout_devices (device_id) WHERE phase < 10;
CREATE INDEX rollout_devices_rev ON rollout_devices (rollout_id, rev, device_id);
CREATE INDEX rollout_devices_phase ON rollout_devices (rollout_id, phase, device_id);
CREATE INDEX rollout_devices_due ON rollout_devices (rollout_id, phase, deadline_at_ms) WHERE deadline_at_ms IS NOT NULL;
CREATE INDEX rollout_devices_chosen ON rollout_devices (rollout_id, wave, hash, device_id) WHERE phase = 0;
CREATE INDEX rollout_devices_history ON rollout_devices (device_id, created_at_ms);

-- How many devices of a rollout are in each phase; changed in the same transaction as the rows, summed over nodes.
CREATE TABLE counters (
  rollout_id TEXT NOT NULL REFERENCES rollouts (rollout_id),
  wave INTEGER NOT NULL,
  phase INTEGER NOT NULL,
  node TEXT NOT NULL,
  devices INTEGER NOT NULL,
  PRIMARY KEY (rollout_id, wave, phase, node)
) STRICT, WITHOUT ROWID;

CREATE TABLE events (
  event_id INTEGER PRIMARY KEY,
  device_id TEXT,
  at_ms INTEGER NOT NULL,
  kind TEXT NOT NULL,
  details TEXT NOT NULL,
  actor TEXT NOT NULL,
  -- What an operator did: kept.
  audit INTEGER NOT NULL
) STRICT;
CREATE INDEX events_device ON events (device_id, audit, event_id);
CREATE INDEX events_old ON events (at_ms) WHERE audit = 0;

CREATE TABLE leases (
  name TEXT NOT NULL PRIMARY KEY,
  owner TEXT NOT NULL,
  -- Random for each life of a process.
  incarnation TEXT NOT NULL,
  -- Fencing number: rises whenever another incarnation takes the lease.
  token INTEGER NOT NULL,
  expires_at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- Roots after the first, and revocation lists, exact bytes. `product` is empty for a root.
CREATE TABLE trust_documents (
  kind TEXT NOT NULL,
  product TEXT NOT NULL,
  root_version INTEGER NOT NULL,
  version INTEGER NOT NULL,
  envelope BLOB NOT NULL,
  created_at_ms INTEGER NOT NULL,
  PRIMARY KEY (kind, product, root_version, version)
) STRICT;
