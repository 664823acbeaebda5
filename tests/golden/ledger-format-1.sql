-- A ledger as version 0.1.0 of 2026-11 made it (format 1), with three scans, for the test of its migration.
CREATE TABLE scan (
  scan_id    BLOB PRIMARY KEY,            -- 16 bytes, keyed hash of the content
  session    INTEGER NOT NULL,            -- the run of the daemon that holds or held the claim
  attempts   INTEGER NOT NULL,            -- claims so far
  claimed_at INTEGER NOT NULL,            -- seconds since 1970
  done_at    INTEGER,                     -- NULL until there is an outcome
  outcome    TEXT,                        -- classified | rejected | skipped
  reason     TEXT,                        -- the reject code
  decision   TEXT,                        -- positive | negative | indeterminate
  probability REAL
) WITHOUT ROWID;
CREATE INDEX scan_done_at ON scan(done_at);
CREATE TABLE file (
  path      BLOB PRIMARY KEY,             -- below the export folder
  size      INTEGER NOT NULL,
  mtime_ns  INTEGER NOT NULL,
  ctime_ns  INTEGER NOT NULL,
  inode     INTEGER NOT NULL,
  scan_id   BLOB NOT NULL,
  seen_day  INTEGER NOT NULL              -- days since 1970 when it was last seen there
) WITHOUT ROWID;
CREATE INDEX file_scan ON file(scan_id);
CREATE TABLE study (
  study_id   BLOB PRIMARY KEY,
  group_id   BLOB NOT NULL,
  open       INTEGER NOT NULL,
  opened_at  INTEGER NOT NULL,
  last_at    INTEGER NOT NULL,
  images     INTEGER NOT NULL DEFAULT 0,
  positives  INTEGER NOT NULL DEFAULT 0,
  rejected   INTEGER NOT NULL DEFAULT 0,
  max_probability REAL,
  top_scan   BLOB,
  alert_revision  INTEGER NOT NULL DEFAULT 0,
  alert_positives INTEGER NOT NULL DEFAULT 0,
  alert_at   INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE INDEX study_group ON study(group_id) WHERE open = 1;
CREATE INDEX study_open ON study(last_at) WHERE open = 1;
CREATE TABLE outbox (
  seq        INTEGER PRIMARY KEY AUTOINCREMENT,
  event_id   BLOB NOT NULL UNIQUE,
  topic      TEXT NOT NULL,
  payload    BLOB NOT NULL,
  created_at INTEGER NOT NULL
);
CREATE TABLE counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counter VALUES ('session', 0), ('closed', 1);
PRAGMA user_version = 1;
UPDATE counter SET value = 4 WHERE name = 'session';
INSERT INTO counter VALUES ('classified', 2), ('positive', 1), ('rejected', 1), ('delivered', 5);
INSERT INTO scan VALUES
  (x'01010101010101010101010101010101', 4, 1, 100, 100, 'classified', NULL, 'positive', 0.9),
  (x'02020202020202020202020202020202', 4, 1, 101, 101, 'classified', NULL, 'negative', 0.1),
  (x'03030303030303030303030303030303', 4, 1, 102, 102, 'rejected', 'blank', NULL, NULL);
INSERT INTO file VALUES
  (CAST('1' AS BLOB), 1, 2, 3, 1, x'01010101010101010101010101010101', 0),
  (CAST('2' AS BLOB), 1, 2, 3, 2, x'02020202020202020202020202020202', 0),
  (CAST('3' AS BLOB), 1, 2, 3, 3, x'03030303030303030303030303030303', 0);
INSERT INTO study VALUES
  (x'C9C9C9C9C9C9C9C9C9C9C9C9C9C9C9C9', x'C9C9C9C9C9C9C9C9C9C9C9C9C9C9C9C9', 1, 100, 102, 3, 1, 1, 0.9, x'01010101010101010101010101010101', 1, 1, 100);
INSERT INTO outbox (event_id, topic, payload, created_at) VALUES (x'AA010101010101010101010101010101', 't', x'07', 100);
