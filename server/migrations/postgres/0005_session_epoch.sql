-- The epoch of the session whose registration was committed last: what an older session said, and a slow node commits later, is no news.
ALTER TABLE devices ADD COLUMN session_epoch BIGINT NOT NULL DEFAULT 0;
