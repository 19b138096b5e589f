-- A file that nobody needs is marked first, and removed from the store a day later.
-- When it was marked. NULL: it is needed, or nobody has looked.
ALTER TABLE files ADD COLUMN unused_at_ms BIGINT;
-- When a node began to remove it: until that has ended, it can be neither published nor uploaded.
ALTER TABLE files ADD COLUMN doomed_at_ms BIGINT;
-- When it was removed although releases, all of them revoked, name it. NULL: the store has it.
ALTER TABLE files ADD COLUMN gone_at_ms BIGINT;
-- When the store was found to have other bytes under its name. NULL: it was not.
ALTER TABLE files ADD COLUMN damaged_at_ms BIGINT;
