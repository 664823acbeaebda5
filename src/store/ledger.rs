//! The tables and every statement on them.

use std::path::{Path, PathBuf};

use rusqlite::config::DbConfig;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};

use super::StoreError;
use crate::config::AlertRule;
use crate::failpoint;
use crate::message::{AlertChange, Counts, OutboxMessage, PositivePicture, StudyState};
use crate::prediction::{Decision, RejectCode};
use crate::scan::{Pseudonym, ScanFile, ScanId, Stamp, path_bytes, path_from_bytes};

/// Format of the database, in `PRAGMA user_version`: as many as there are steps.
const FORMAT: i64 = STEPS.len() as i64;

/// Bytes of a page of a new database.
pub(super) const PAGE: u64 = 1024;

/// Pages in the write-ahead log with which `SQLite` moves them into the database and begins the log anew.
pub(super) const CHECKPOINT: u64 = 4000;

/// Each step brings a database from one format to the next; a new one takes all of them.
const STEPS: [&str; 4] = [FORMAT_1, FORMAT_2, FORMAT_3, FORMAT_4];

/// Positive pictures kept by name for each study: those with the highest probabilities.
const POSITIVES: usize = 32;

/// Answers to commands that are remembered, so that the same command is not carried out twice.
const ANSWERS: i64 = 100;

/// Parked messages that are kept.
const PARKED: usize = 10_000;

const FORMAT_1: &str = "
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
";

/// Scans can be classified again, studies go on after they were closed, alerts have a rule, commands an answer.
const FORMAT_2: &str = "
ALTER TABLE scan ADD COLUMN revision INTEGER NOT NULL DEFAULT 1;  -- how often it has been classified
ALTER TABLE scan ADD COLUMN again INTEGER NOT NULL DEFAULT 0;     -- 1: to be classified again; the outcome stands until then
ALTER TABLE scan ADD COLUMN study_id BLOB;                        -- what it was counted in, and with how much
ALTER TABLE scan ADD COLUMN images INTEGER NOT NULL DEFAULT 1;
ALTER TABLE scan ADD COLUMN positives INTEGER NOT NULL DEFAULT 0;
ALTER TABLE scan ADD COLUMN rejected INTEGER NOT NULL DEFAULT 0;
UPDATE scan SET positives = coalesce(decision = 'positive', 0), rejected = coalesce(outcome = 'rejected', 0);
ALTER TABLE study ADD COLUMN active_at INTEGER NOT NULL DEFAULT 0;   -- last outcome, also of a scan that was classified again
ALTER TABLE study ADD COLUMN recent INTEGER NOT NULL DEFAULT 0;      -- the last 64 classified pictures, the latest as lowest bit: 1 is positive
ALTER TABLE study ADD COLUMN alert_open INTEGER NOT NULL DEFAULT 0;
ALTER TABLE study ADD COLUMN closings INTEGER NOT NULL DEFAULT 0;
UPDATE study SET active_at = last_at, alert_open = (open AND alert_revision > 0), closings = NOT open;
DROP INDEX study_open;
CREATE INDEX study_open ON study(active_at) WHERE open = 1;
CREATE INDEX study_alert ON study(alert_open) WHERE alert_open = 1;
CREATE TABLE positive (                     -- the positive pictures with the highest probabilities of each study
  study_id    BLOB NOT NULL,
  scan_id     BLOB NOT NULL,
  frame       INTEGER NOT NULL,             -- 0 for single pictures
  probability REAL NOT NULL,
  PRIMARY KEY (study_id, scan_id, frame)
) WITHOUT ROWID;
CREATE TABLE answer (                       -- to the latest commands
  seq      INTEGER PRIMARY KEY AUTOINCREMENT,
  id       TEXT NOT NULL UNIQUE,
  event_id BLOB NOT NULL,
  topic    TEXT NOT NULL,
  payload  BLOB NOT NULL
);
CREATE TABLE note (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
";

/// What a rejection said.
const FORMAT_3: &str = "
ALTER TABLE scan ADD COLUMN message TEXT;                         -- one line beside the reject code; NULL from before this format
";

/// Messages that the broker does not take are set aside, and may come back.
const FORMAT_4: &str = "
ALTER TABLE outbox ADD COLUMN returned INTEGER NOT NULL DEFAULT 0; -- 1: it has been parked before
CREATE TABLE parked (                       -- messages that the broker did not take while it took others
  seq        INTEGER PRIMARY KEY,           -- their position in the outbox before
  event_id   BLOB NOT NULL UNIQUE,
  topic      TEXT NOT NULL,
  created_at INTEGER NOT NULL,
  parked_at  INTEGER NOT NULL,
  reason     TEXT NOT NULL,
  payload    BLOB NOT NULL
);
";

/// What a worker may do with a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Claim {
    /// Work on it; this is the `attempt`-th time, 1 the first.
    Run {
        /// Which attempt this is.
        attempt: u32,
    },
    /// These bytes have their outcome already.
    Known,
    /// Another worker of this run has these bytes in hand, under another name.
    InProgress,
    /// The process died on these bytes as often as is allowed.
    GiveUp {
        /// Attempts before this claim.
        deaths: u32,
    },
}

/// An outcome to record.
#[derive(Debug, Clone, PartialEq)]
pub struct NewOutcome {
    /// Whose outcome.
    pub scan_id: ScanId,
    /// `classified`, `rejected` or `skipped`.
    pub outcome: &'static str,
    /// The reject code.
    pub reason: Option<&'static str>,
    /// The line beside it.
    pub message: Option<String>,
    /// The decision; for several frames the gravest.
    pub decision: Option<&'static str>,
    /// The probability; for several frames the highest.
    pub probability: Option<f64>,
    /// The study to which the scan belongs.
    pub group: StudyGroup,
    /// Its pictures (frames), in order, rejected ones included.
    pub pictures: Vec<PictureOutcome>,
}

/// What became of one picture of a scan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PictureOutcome {
    /// Frame of a multi-frame file, from 1.
    pub frame: Option<u32>,
    /// Its probability; `None` when it was rejected.
    pub probability: Option<f64>,
    /// Whether the decision is positive.
    pub positive: bool,
}

/// What an outcome was recorded as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Recorded {
    /// The study that the scan was counted in.
    pub study_id: Pseudonym,
    /// How often the scan has been classified.
    pub revision: u64,
}

impl NewOutcome {
    fn share(&self) -> Share {
        let count = |which: fn(&PictureOutcome) -> bool| {
            self.pictures.iter().filter(|p| which(p)).count() as i64
        };
        let rejected = count(|p| p.probability.is_none());
        Share {
            images: self.pictures.len() as i64,
            positives: count(|p| p.positive),
            rejected: if self.outcome == "skipped" {
                0
            } else {
                rejected
            },
        }
    }
}

/// What a scan adds to its study.
#[derive(Debug, Clone, Copy, Default)]
struct Share {
    images: i64,
    positives: i64,
    rejected: i64,
}

/// The outcome that a scan has already.
struct Earlier {
    outcome: String,
    decision: Option<String>,
    /// When there was one for the first time, seconds since 1970.
    done_at: i64,
    /// `None` for a scan from format 1, which did not keep it; its share is that of a single picture then.
    study_id: Option<[u8; 16]>,
    share: Share,
}

/// How a scan was counted into its study.
struct Counted {
    study_id: Pseudonym,
    /// Whether the study meets the rule for an alert now.
    met: bool,
    /// Whether it took the place of an earlier outcome there.
    replaced: bool,
}

/// Which past scans are meant.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Selection {
    /// Those whose outcome was first recorded then or later, seconds since 1970.
    pub since: Option<i64>,
    /// Those whose outcome was first recorded before then, seconds since 1970.
    pub until: Option<i64>,
    /// Those with this decision.
    pub decision: Option<Decision>,
    /// Rejected ones only.
    pub rejected: bool,
    /// Those with this reject code.
    pub code: Option<RejectCode>,
    /// Those with these ids.
    pub scan_ids: Option<Vec<ScanId>>,
}

/// A rejected scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rejected {
    /// Which.
    pub scan_id: ScanId,
    /// The reject code.
    pub code: String,
    /// The line beside it; `None` where it was rejected by an earlier version.
    pub message: Option<String>,
    /// When it was last worked on, seconds since 1970.
    pub at: i64,
    /// Whether it is to be looked at again.
    pub again: bool,
    /// Where it was seen, below the export folder; empty when the files are gone or hold something else by now.
    pub places: Vec<PathBuf>,
}

/// A message that was set aside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parked {
    /// Its position in the outbox before; names it.
    pub seq: i64,
    /// Full topic.
    pub topic: String,
    /// Bytes of its payload.
    pub bytes: u64,
    /// When it was recorded, seconds since 1970.
    pub created_at: i64,
    /// When it was parked, seconds since 1970.
    pub parked_at: i64,
    /// What it failed of.
    pub reason: String,
}

/// How a scan finds its study.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StudyGroup {
    /// Keyed hash of what the group shares: DICOM study, sub-folder, or "loose files".
    pub group_id: Pseudonym,
    /// The study's id if it is fixed by the group (DICOM); otherwise a new one begins whenever none is open.
    pub fixed: bool,
    /// The id of a study that this scan would begin.
    pub fresh_id: Pseudonym,
}

/// The open database.
#[derive(Debug)]
pub struct Ledger {
    conn: Connection,
    session: i64,
    outbox: u64,
    parked: u64,
    suspects: bool,
    damaged: bool,
    /// `PRAGMA data_version`: another number when another process has written.
    data_version: i64,
}

type Result<T> = std::result::Result<T, StoreError>;

impl Ledger {
    /// Opens or makes the database and begins a new session.
    pub fn open(path: &Path) -> Result<Self> {
        let conn = Connection::open(path)?;
        conn.busy_timeout(std::time::Duration::from_secs(10))?;
        conn.set_prepared_statement_cache_capacity(64);
        // Else a statement with `LIMIT ?` is compiled anew each time, to plan by what is bound.
        conn.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
        // FULL for what is done here; from then on the flusher puts commits on the disk.
        // Small pages, because a commit writes whole ones and SD cards wear: about 31 kB an image instead of 82 with pages of 4096 bytes. A new
        // database only; and a checkpoint every 4 MB, as with the larger pages. What is not in half a megabyte of them is in the system's own cache.
        conn.execute_batch(&format!(
            "PRAGMA page_size = {PAGE}; PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY;
             PRAGMA wal_autocheckpoint = {CHECKPOINT}; PRAGMA cache_size = -512;",
        ))?;
        let found: i64 = conn.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        let Some(steps) = usize::try_from(found).ok().and_then(|f| STEPS.get(f..)) else {
            return Err(StoreError::Newer {
                found,
                known: FORMAT,
            });
        };
        if found > 0 {
            check_after_crash(&conn)?;
        }
        if !steps.is_empty() {
            // All or nothing: a crash half-way leaves the old format.
            let steps = steps.concat();
            conn.execute_batch(&format!(
                "BEGIN IMMEDIATE; {steps} PRAGMA user_version = {FORMAT}; COMMIT;"
            ))?;
        }
        conn.execute_batch(
            "UPDATE counter SET value = CASE name WHEN 'session' THEN value + 1 ELSE 0 END WHERE name IN ('session', 'closed')",
        )?;
        let session = conn.query_row(
            "SELECT value FROM counter WHERE name = 'session'",
            [],
            |row| row.get(0),
        )?;
        let (outbox, parked) = count_messages(&conn)?;
        conn.pragma_update(None, "synchronous", "NORMAL")?;
        let data_version = data_version(&conn)?;
        let suspects = conn.query_row(
            "SELECT EXISTS (SELECT 1 FROM scan WHERE (done_at IS NULL OR again = 1) AND attempts > 0)",
            [],
            |row| row.get(0),
        )?;
        Ok(Self {
            conn,
            session,
            outbox,
            parked,
            suspects,
            damaged: false,
            data_version,
        })
    }

    /// Opens an existing database for reading, beside a running daemon. No session begins.
    pub fn open_read_only(path: &Path) -> Result<Self> {
        Self::open_beside(path, OpenFlags::SQLITE_OPEN_READ_ONLY)
    }

    /// Opens an existing database to queue scans again, whether a daemon runs on it or not. No session begins.
    pub fn open_to_queue(path: &Path) -> Result<Self> {
        Self::open_beside(path, OpenFlags::SQLITE_OPEN_READ_WRITE)
    }

    fn open_beside(path: &Path, access: OpenFlags) -> Result<Self> {
        let conn = Connection::open_with_flags(path, access | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        conn.busy_timeout(std::time::Duration::from_secs(10))?;
        let found: i64 = conn.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if found < FORMAT {
            return Err(StoreError::Other(format!(
                "has format {found}, this version's is {FORMAT}; start the daemon once, which brings it up to date"
            )));
        }
        if found > FORMAT {
            return Err(StoreError::Newer {
                found,
                known: FORMAT,
            });
        }
        let (outbox, parked) = count_messages(&conn)?;
        Ok(Self {
            conn,
            session: 0,
            outbox,
            parked,
            suspects: false,
            damaged: false,
            data_version: 0,
        })
    }

    /// Whether an earlier run died with files in work: one of them may be the cause.
    pub fn suspects(&self) -> bool {
        self.suspects
    }

    /// Whether another process has written since this was last asked.
    pub fn written_elsewhere(&mut self) -> Result<bool> {
        let before = std::mem::replace(&mut self.data_version, data_version(&self.conn)?);
        let written = self.data_version != before;
        if written {
            self.count_outbox();
        }
        Ok(written)
    }

    /// Whether a call has met damage. The database is not to be used any more then.
    pub(super) fn damaged(&self) -> bool {
        self.damaged
    }

    /// Notes damage that an error tells of.
    fn note_damage<R>(&mut self, result: Result<R>) -> Result<R> {
        self.damaged |= matches!(result, Err(StoreError::Corrupt(_)));
        result
    }

    /// Executes a statement that is needed often and has no parameters.
    fn statement(&self, sql: &str) -> rusqlite::Result<()> {
        self.conn.prepare_cached(sql)?.execute([])?;
        Ok(())
    }

    /// Begins a transaction.
    pub(super) fn begin(&mut self) -> Result<()> {
        // Immediate: the write lock is taken here, not half-way through, where waiting for it is not possible.
        let begun = self.statement("BEGIN IMMEDIATE");
        self.note_damage(begun.map_err(StoreError::from))
    }

    pub(super) fn commit(&mut self) -> Result<()> {
        if self.conn.is_autocommit() {
            // SQLite has rolled everything back by itself, as it does on a full disk.
            self.count_outbox();
            return Err(StoreError::Unwritable(
                "the transaction was rolled back".into(),
            ));
        }
        let committed = self.statement("COMMIT");
        if committed.is_err() {
            // A failed COMMIT may leave the transaction open; end it, nothing of it was answered.
            let _ = self.conn.execute_batch("ROLLBACK");
            self.count_outbox();
        }
        self.note_damage(committed.map_err(StoreError::from))
    }

    pub(super) fn in_savepoint<R>(
        &mut self,
        call: impl FnOnce(&mut Self) -> Result<R>,
    ) -> Result<R> {
        if self.conn.is_autocommit() {
            return Err(StoreError::Unwritable(
                "no transaction could be begun".into(),
            ));
        }
        self.statement("SAVEPOINT call")?;
        let result = call(self);
        let result = self.note_damage(result);
        if result.is_err() && self.conn.execute_batch("ROLLBACK TO call").is_ok() {
            self.count_outbox();
        }
        if !self.conn.is_autocommit() {
            self.statement("RELEASE call")?;
        }
        result
    }

    /// A mark that grows with whatever is written here.
    pub(super) fn written(&self) -> u64 {
        self.conn.total_changes()
    }

    pub(super) fn close(self) {
        let _ = self
            .conn
            .execute("UPDATE counter SET value = 1 WHERE name = 'closed'", []);
        // SQLite checkpoints the WAL when the last connection closes; a failure leaves the WAL for the next start.
        let _ = self.conn.close();
    }

    fn count_outbox(&mut self) {
        if let Ok(counts) = count_messages(&self.conn) {
            (self.outbox, self.parked) = counts;
        }
    }

    /// Which of `files` have no outcome under their present stamp, in the same order. Files that have one are marked as seen on `day`.
    pub fn unknown(&mut self, files: Vec<ScanFile>, day: i64) -> Result<Vec<ScanFile>> {
        let mut find = self.conn.prepare_cached(
            "SELECT f.seen_day FROM file f JOIN scan s USING (scan_id)
             WHERE f.path = ?1 AND f.size = ?2 AND f.mtime_ns = ?3 AND f.ctime_ns = ?4 AND f.inode = ?5 AND s.done_at IS NOT NULL AND s.again = 0",
        )?;
        let mut mark = self
            .conn
            .prepare_cached("UPDATE file SET seen_day = ?2 WHERE path = ?1")?;
        let mut unknown = Vec::new();
        for file in files {
            let path = path_bytes(&file.path);
            let Stamp {
                size,
                mtime_ns,
                ctime_ns,
                inode,
            } = file.stamp;
            let seen: Option<i64> = find
                .query_row(
                    params![path, size as i64, mtime_ns, ctime_ns, inode as i64],
                    |row| row.get(0),
                )
                .optional()?;
            match seen {
                None => unknown.push(file),
                Some(seen) if seen < day => {
                    mark.execute(params![path, day])?;
                }
                Some(_) => {}
            }
        }
        Ok(unknown)
    }

    /// Claims `scan_id`, found at `file`, for this session; at most `max_attempts` claims end in [`Claim::Run`].
    pub fn claim(
        &mut self,
        scan_id: ScanId,
        file: &ScanFile,
        now: i64,
        max_attempts: u32,
    ) -> Result<Claim> {
        self.remember(scan_id, file, now)?;
        let row: Option<(i64, u32, bool)> = self
            .conn
            .prepare_cached("SELECT session, attempts, done_at IS NOT NULL AND again = 0 FROM scan WHERE scan_id = ?1")?
            .query_row([&scan_id.0[..]], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .optional()?;
        let attempts = match row {
            Some((_, _, true)) => return Ok(Claim::Known),
            Some((session, attempts, false)) if session == self.session && attempts > 0 => {
                return Ok(Claim::InProgress);
            }
            Some((_, attempts, false)) => attempts,
            None => 0,
        };
        self.conn
            .prepare_cached(
                "INSERT INTO scan (scan_id, session, attempts, claimed_at) VALUES (?1, ?2, 1, ?3)
                 ON CONFLICT (scan_id) DO UPDATE SET session = ?2, attempts = attempts + 1, claimed_at = ?3",
            )?
            .execute(params![&scan_id.0[..], self.session, now])?;
        failpoint::hit("claim", 0);
        if attempts >= max_attempts {
            return Ok(Claim::GiveUp { deaths: attempts });
        }
        Ok(Claim::Run {
            attempt: attempts + 1,
        })
    }

    /// Gives the `attempt`-th claim back without an outcome: the file was not complete, or the daemon stops. The attempt does not count.
    /// Nothing changes if it is not the claim that holds: it was taken away, and somebody else has the file.
    pub fn release(&mut self, scan_id: ScanId, attempt: u32) -> Result<()> {
        // The first attempt leaves no trace, or every version of a file that grows slowly would leave a row.
        let first = "DELETE FROM scan WHERE scan_id = ?1 AND done_at IS NULL AND attempts = 1 AND ?2 = 1 AND session = ?3";
        let values = params![&scan_id.0[..], attempt, self.session];
        self.conn.prepare_cached(first)?.execute(values)?;
        self.conn
            .prepare_cached("UPDATE scan SET session = 0, attempts = attempts - 1 WHERE scan_id = ?1 AND (done_at IS NULL OR again = 1) AND attempts = ?2 AND session = ?3")?
            .execute(values)?;
        Ok(())
    }

    /// Takes the claim that this session holds on the bytes at `path` away from a worker that hangs on them. The attempt counts, as if
    /// the process had died on them. Returns whose claim it was, if there was one.
    pub fn take_away(&mut self, path: &Path) -> Result<Option<ScanId>> {
        Ok(self
            .conn
            .prepare_cached(
                "UPDATE scan SET session = 0 WHERE scan_id = (SELECT scan_id FROM file WHERE path = ?1) AND session = ?2
                   AND (done_at IS NULL OR again = 1) AND attempts > 0 RETURNING scan_id",
            )?
            .query_row(params![path_bytes(path), self.session], |row| {
                Ok(Pseudonym(row.get(0)?))
            })
            .optional()?)
    }

    fn remember(&mut self, scan_id: ScanId, file: &ScanFile, now: i64) -> Result<()> {
        let Stamp {
            size,
            mtime_ns,
            ctime_ns,
            inode,
        } = file.stamp;
        self.conn
            .prepare_cached(
                "INSERT INTO file (path, size, mtime_ns, ctime_ns, inode, scan_id, seen_day) VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7)
                 ON CONFLICT (path) DO UPDATE SET size = ?2, mtime_ns = ?3, ctime_ns = ?4, inode = ?5, scan_id = ?6, seen_day = ?7",
            )?
            .execute(params![
                path_bytes(&file.path),
                size as i64,
                mtime_ns,
                ctime_ns,
                inode as i64,
                &scan_id.0[..],
                now.div_euclid(86_400)
            ])?;
        Ok(())
    }

    /// Records an outcome with its messages. A study whose id is not fixed by its group goes on as long as its last new picture is from after
    /// `quiet_before`, or nothing but new pictures has kept it open. `encode` is given the study (this scan counted in), whether an alert is to be raised by
    /// `rule` (`None`: no alerts), and the revision of the outcome, and returns the messages. `None`, and nothing changed, if the scan
    /// already has an outcome and is not to be classified again.
    pub fn record(
        &mut self,
        new: &NewOutcome,
        now: i64,
        quiet_before: i64,
        rule: Option<AlertRule>,
        encode: impl FnOnce(&StudyState, Option<AlertChange>, u64) -> Vec<OutboxMessage>,
    ) -> Result<Option<Recorded>> {
        let row: Option<(u64, bool, Option<Earlier>)> = self
            .conn
            .prepare_cached(
                "SELECT revision, again, outcome, decision, study_id, images, positives, rejected, done_at FROM scan WHERE scan_id = ?1",
            )?
            .query_row([&new.scan_id.0[..]], |row| {
                let earlier = match row.get(2)? {
                    None => None,
                    Some(outcome) => Some(Earlier {
                        outcome,
                        decision: row.get(3)?,
                        study_id: row.get(4)?,
                        done_at: row.get(8)?,
                        share: Share {
                            images: row.get(5)?,
                            positives: row.get(6)?,
                            rejected: row.get(7)?,
                        },
                    }),
                };
                Ok((row.get(0)?, row.get(1)?, earlier))
            })
            .optional()?;
        let (revision, earlier) = match row {
            None | Some((_, false, Some(_))) => return Ok(None),
            Some((revision, _, None)) => (revision, None),
            Some((revision, true, Some(earlier))) => (revision + 1, Some(earlier)),
        };
        if let Some(earlier) = &earlier {
            self.count(&earlier.outcome, -1)?;
            if let Some(decision) = &earlier.decision {
                self.count(decision, -1)?;
            }
        }
        self.count(new.outcome, 1)?;
        if let Some(decision) = new.decision {
            self.count(decision, 1)?;
        }
        let counted = self.add_to_study(new, earlier.as_ref(), now, quiet_before, rule)?;
        let study_id = counted.study_id;
        let share = new.share();
        self.conn
            .prepare_cached(
                "UPDATE scan SET done_at = coalesce(done_at, ?2), outcome = ?3, reason = ?4, decision = ?5, probability = ?6,
                   revision = ?7, again = 0, study_id = ?8, images = ?9, positives = ?10, rejected = ?11, message = ?12 WHERE scan_id = ?1",
            )?
            .execute(params![
                &new.scan_id.0[..],
                now,
                new.outcome,
                new.reason,
                new.decision,
                new.probability,
                revision as i64,
                &study_id.0[..],
                share.images,
                share.positives,
                share.rejected,
                new.message
            ])?;
        if counted.replaced {
            self.find_top_again(study_id, new.scan_id)?;
        }
        let mut study = self.study(study_id)?;
        let raise = counted.met && !study.alert_open;
        if raise {
            study = self.note_alert(study, now, true)?;
        }
        for message in encode(&study, raise.then_some(AlertChange::Raised), revision) {
            self.enqueue(&message, now)?;
        }
        failpoint::hit("record", 0);
        Ok(Some(Recorded { study_id, revision }))
    }

    /// Counts a scan into its study, in the place of an earlier outcome if there is one.
    fn add_to_study(
        &mut self,
        new: &NewOutcome,
        earlier: Option<&Earlier>,
        now: i64,
        quiet_before: i64,
        rule: Option<AlertRule>,
    ) -> Result<Counted> {
        let group = &new.group;
        let study_id = match earlier {
            // A scan that is classified again stays in its study, and is never counted in the one that is open now: that may be of
            // somebody else. From format 1 the study is known only where it is fixed, or where this scan began it.
            Some(Earlier {
                study_id: Some(id), ..
            }) => *id,
            _ if group.fixed => group.group_id.0,
            Some(_) => group.fresh_id.0,
            None => self
                .going_on(group.group_id, quiet_before)?
                .unwrap_or(group.fresh_id.0),
        };
        let state = self
            .conn
            .prepare_cached("SELECT open, recent FROM study WHERE study_id = ?1")?
            .query_row([&study_id[..]], |row| {
                Ok((row.get::<_, bool>(0)?, row.get::<_, i64>(1)?))
            })
            .optional()?;
        let share = new.share();
        let taken_back = match (state, earlier) {
            // How many frames it was counted with in format 1 is not known: as many as it has.
            (Some(_), Some(earlier)) if earlier.study_id.is_none() && new.pictures.len() != 1 => {
                share
            }
            (Some(_), Some(earlier)) => earlier.share,
            _ => Share::default(),
        };
        // What was before a study was closed does not count towards another alert.
        let mut recent = match state {
            Some((true, recent)) => recent.cast_unsigned(),
            _ => 0,
        };
        let mut met = false;
        // Classified again with no more positives than before, a scan moves nothing: its pictures have had their place.
        if taken_back.images == 0 || share.positives > taken_back.positives {
            for picture in new.pictures.iter().filter(|p| p.probability.is_some()) {
                recent = recent << 1 | u64::from(picture.positive);
                met |= rule.is_some_and(|rule| rule.met_by(recent));
            }
        }
        // A study has the times of its new pictures; only its activity is also that of scans that are classified again.
        let came = earlier.map_or(now, |e| e.done_at);
        self.conn
            .prepare_cached(
                "INSERT INTO study (study_id, group_id, open, opened_at, last_at, active_at, images, positives, rejected, max_probability, top_scan, recent)
                 VALUES (?1, ?2, 1, ?10, ?10, ?3, ?4, ?5, ?6, ?7, CASE WHEN ?7 IS NULL THEN NULL ELSE ?8 END, ?9)
                 ON CONFLICT (study_id) DO UPDATE SET open = 1, active_at = ?3, recent = ?9,
                   opened_at = min(opened_at, ?10), last_at = max(last_at, ?10),
                   images = max(0, images + ?4), positives = max(0, positives + ?5), rejected = max(0, rejected + ?6),
                   top_scan = CASE WHEN ?7 > coalesce(max_probability, -1) THEN ?8 ELSE top_scan END,
                   max_probability = CASE WHEN ?7 > coalesce(max_probability, -1) THEN ?7 ELSE max_probability END",
            )?
            .execute(params![
                &study_id[..],
                &group.group_id.0[..],
                now,
                share.images - taken_back.images,
                share.positives - taken_back.positives,
                share.rejected - taken_back.rejected,
                new.probability,
                &new.scan_id.0[..],
                recent.cast_signed(),
                came
            ])?;
        self.note_positives(&study_id, new, taken_back.positives > 0)?;
        Ok(Counted {
            study_id: Pseudonym(study_id),
            met,
            replaced: state.is_some() && earlier.is_some_and(|e| e.study_id.is_some()),
        })
    }

    /// The study of a group that a new picture continues. One that only scans that are classified again have opened or keep open is none.
    fn going_on(&self, group_id: Pseudonym, quiet_before: i64) -> Result<Option<[u8; 16]>> {
        Ok(self
            .conn
            .prepare_cached(
                "SELECT study_id FROM study WHERE group_id = ?1 AND open = 1 AND closings = 0 AND (last_at > ?2 OR active_at <= last_at)
                 ORDER BY last_at DESC LIMIT 1",
            )?
            .query_row(params![&group_id.0[..], quiet_before], |row| row.get(0))
            .optional()?)
    }

    /// Keeps the positive pictures with the highest probabilities of a study.
    fn note_positives(
        &mut self,
        study_id: &[u8; 16],
        new: &NewOutcome,
        replace: bool,
    ) -> Result<()> {
        let scan_id = &new.scan_id.0[..];
        if replace {
            self.conn
                .prepare_cached("DELETE FROM positive WHERE study_id = ?1 AND scan_id = ?2")?
                .execute(params![&study_id[..], scan_id])?;
        }
        let mut any = false;
        for picture in new.pictures.iter().filter(|p| p.positive) {
            self.conn
                .prepare_cached("INSERT OR REPLACE INTO positive (study_id, scan_id, frame, probability) VALUES (?1, ?2, ?3, ?4)")?
                .execute(params![
                    &study_id[..],
                    scan_id,
                    picture.frame.unwrap_or(0),
                    picture.probability
                ])?;
            any = true;
        }
        if any {
            self.conn
                .prepare_cached(
                    "DELETE FROM positive WHERE study_id = ?1 AND (scan_id, frame) IN
                       (SELECT scan_id, frame FROM positive WHERE study_id = ?1 ORDER BY probability DESC, scan_id, frame LIMIT -1 OFFSET ?2)",
                )?
                .execute(params![&study_id[..], POSITIVES as i64])?;
        }
        Ok(())
    }

    /// Finds the highest probability of a study anew if it belonged to `scan_id`, whose outcome has changed.
    fn find_top_again(&mut self, study_id: Pseudonym, scan_id: ScanId) -> Result<()> {
        // By the time of the outcomes, which has an index: no index by study has to be kept for this rare case.
        self.conn
            .prepare_cached(
                "UPDATE study SET (top_scan, max_probability) = (SELECT s.scan_id, s.probability FROM scan s
                   WHERE s.done_at BETWEEN study.opened_at AND study.last_at AND s.study_id = study.study_id AND s.probability IS NOT NULL
                   ORDER BY s.probability DESC LIMIT 1)
                 WHERE study_id = ?1 AND top_scan = ?2",
            )?
            .execute(params![&study_id.0[..], &scan_id.0[..]])?;
        Ok(())
    }

    fn study(&self, study_id: Pseudonym) -> Result<StudyState> {
        Ok(self
            .conn
            .prepare_cached(&format!("{STUDY_COLUMNS} WHERE study_id = ?1"))?
            .query_row([&study_id.0[..]], study_row)?)
    }

    /// The positive pictures of a study with the highest probabilities, highest first.
    fn positives(&self, study_id: Pseudonym) -> Result<Vec<PositivePicture>> {
        let mut select = self.conn.prepare_cached(
            "SELECT scan_id, frame, probability FROM positive WHERE study_id = ?1 ORDER BY probability DESC, scan_id, frame",
        )?;
        let rows = select.query_map([&study_id.0[..]], |row| {
            Ok(PositivePicture {
                scan_id: Pseudonym(row.get(0)?),
                frame: Some(row.get(1)?).filter(|frame| *frame > 0),
                probability: row.get(2)?,
            })
        })?;
        Ok(rows.collect::<std::result::Result<_, _>>()?)
    }

    /// Counts an alert message up, and looks up what it says.
    fn note_alert(&mut self, mut study: StudyState, now: i64, open: bool) -> Result<StudyState> {
        study.alert_revision += 1;
        study.alert_open = open;
        study.alert_positives = study.positives;
        study.positive_pictures = self.positives(study.study_id)?;
        self.conn
            .prepare_cached("UPDATE study SET alert_revision = ?2, alert_positives = positives, alert_at = ?3, alert_open = ?4 WHERE study_id = ?1")?
            .execute(params![&study.study_id.0[..], study.alert_revision as i64, now, open])?;
        Ok(study)
    }

    /// Closes the studies without an outcome since `quiet_before` and updates the open alerts whose count of positives has changed
    /// and whose last message is from `update_before` or earlier (at most `limit` of each). Times after `now`, from before the clock was
    /// set back, count as `now`. `encode` makes the messages of a study and, if
    /// there is something to say about it, its alert; a study that is not open any more was closed by this. Returns how many studies
    /// were touched.
    pub fn tend_studies(
        &mut self,
        now: i64,
        quiet_before: i64,
        update_before: i64,
        limit: usize,
        mut encode: impl FnMut(&StudyState, Option<AlertChange>) -> Vec<OutboxMessage>,
    ) -> Result<usize> {
        for later in [
            "UPDATE study SET active_at = ?1 WHERE open = 1 AND active_at > ?1",
            "UPDATE study SET alert_at = ?1 WHERE alert_open = 1 AND alert_at > ?1",
        ] {
            self.conn.prepare_cached(later)?.execute([now])?;
        }
        let due = |ledger: &Self, filter: &str, before: i64| -> Result<Vec<StudyState>> {
            let mut select = ledger.conn.prepare_cached(&format!(
                "{STUDY_COLUMNS} WHERE open = 1 AND {filter} LIMIT ?2"
            ))?;
            let rows = select.query_map(params![before, limit as i64], study_row)?;
            Ok(rows.collect::<std::result::Result<_, _>>()?)
        };
        let quiet = due(self, "active_at <= ?1", quiet_before)?;
        let closed = quiet.len();
        for mut study in quiet {
            study.open = false;
            study.closings += 1;
            study.positive_pictures = self.positives(study.study_id)?;
            self.conn
                .prepare_cached("UPDATE study SET open = 0, closings = ?2 WHERE study_id = ?1")?
                .execute(params![&study.study_id.0[..], study.closings as i64])?;
            // An alert that was closed before and has nothing new stays as it is.
            let corrected = study.alert_revision > 0 && study.positives != study.alert_positives;
            let change = (study.alert_open || corrected).then_some(AlertChange::Closed);
            if change.is_some() {
                study = self.note_alert(study, now, false)?;
            }
            for message in encode(&study, change) {
                self.enqueue(&message, now)?;
            }
        }
        let changed = due(
            self,
            &format!("{ALERT_BEHIND} AND alert_at <= ?1"),
            update_before,
        )?;
        let updated = changed.len();
        for study in changed {
            let study = self.note_alert(study, now, true)?;
            for message in encode(&study, Some(AlertChange::Updated)) {
                self.enqueue(&message, now)?;
            }
        }
        Ok(closed + updated)
    }

    /// When [`Self::tend_studies`] will find the next study to close, after `quiet_s` without an outcome (`None`: none is to be closed), or the next
    /// alert to update, `update_s` after its last message. Seconds, as everywhere.
    pub fn studies_due(&self, quiet_s: Option<i64>, update_s: i64) -> Result<Option<i64>> {
        let earliest = format!(
            "SELECT min(due) FROM (
             SELECT active_at + ?1 AS due FROM study WHERE open = 1
             UNION ALL
             SELECT alert_at + ?2 FROM study WHERE open = 1 AND {ALERT_BEHIND})"
        );
        Ok(self
            .conn
            .prepare_cached(&earliest)?
            .query_row([quiet_s, Some(update_s)], |row| row.get(0))?)
    }

    /// Alerts that are raised and not closed.
    pub fn open_alerts(&self) -> Result<u64> {
        let count = "SELECT count(*) FROM study WHERE alert_open = 1";
        Ok(self
            .conn
            .prepare_cached(count)?
            .query_row([], |row| row.get(0))?)
    }

    /// Scans of a selection that have an outcome, in the order of their ids after `after`, at most `limit`, with the places where their
    /// files were seen, below the export folder.
    pub fn selected(
        &self,
        selection: &Selection,
        after: Option<ScanId>,
        limit: usize,
    ) -> Result<Vec<(ScanId, Vec<PathBuf>)>> {
        let which = params![
            selection.since.unwrap_or(i64::MIN),
            selection.until.unwrap_or(i64::MAX),
            selection.decision.map(Decision::as_str),
            selection.rejected,
            selection.code.map(RejectCode::as_str),
        ];
        let after = after.map_or_else(Vec::new, |id| id.0.to_vec());
        let ids: Vec<Pseudonym> = if let Some(ids) = &selection.scan_ids {
            let mut ids: Vec<_> = ids.iter().filter(|id| id.0[..] > after[..]).collect();
            ids.sort_unstable();
            ids.dedup();
            let mut known = self.conn.prepare_cached(&format!(
                "SELECT EXISTS (SELECT 1 FROM scan WHERE {SELECTED} AND scan_id = ?6)"
            ))?;
            let mut found = Vec::new();
            for id in ids {
                let id_bytes = &id.0[..];
                let values = [which, params![id_bytes]].concat();
                if found.len() < limit && known.query_row(&values[..], |row| row.get(0))? {
                    found.push(*id);
                }
            }
            found
        } else {
            let mut select = self.conn.prepare_cached(&format!(
                "SELECT scan_id FROM scan WHERE {SELECTED} AND scan_id > ?6 ORDER BY scan_id LIMIT ?7"
            ))?;
            let limit = limit as i64;
            let values = [which, params![after, limit]].concat();
            let rows = select.query_map(&values[..], |row| Ok(Pseudonym(row.get(0)?)))?;
            rows.collect::<std::result::Result<_, _>>()?
        };
        ids.into_iter()
            .map(|id| Ok((id, self.places(id)?)))
            .collect()
    }

    /// Marks scans to be classified again. Their outcomes stand until there are new ones. The files are found by the next walk.
    pub fn reprocess(&mut self, ids: &[ScanId]) -> Result<()> {
        let mut mark = self.conn.prepare_cached(
            "UPDATE scan SET again = 1, attempts = 0, session = 0 WHERE scan_id = ?1 AND done_at IS NOT NULL AND again = 0",
        )?;
        for id in ids {
            mark.execute([&id.0[..]])?;
        }
        Ok(())
    }

    /// As [`Ledger::reprocess`], from beside the thread that owns the database: in a transaction of its own.
    pub fn queue(&mut self, ids: &[ScanId]) -> Result<()> {
        self.alone(|ledger| ledger.reprocess(ids))
    }

    fn alone<R>(&mut self, call: impl FnOnce(&mut Self) -> Result<R>) -> Result<R> {
        self.begin()?;
        let done = self.in_savepoint(call);
        self.commit()?;
        done
    }

    /// How many scans are to be classified again: those whose files hold something else by now are not, those whose files left the folder
    /// after they were marked are, until they are forgotten.
    pub fn queued(&self) -> Result<u64> {
        let count = "SELECT count(*) FROM scan s WHERE again = 1 AND EXISTS (SELECT 1 FROM file f WHERE f.scan_id = s.scan_id)";
        Ok(self.conn.query_row(count, [], |row| row.get(0))?)
    }

    /// The rejected scans, the latest first.
    pub fn rejected(&self) -> Result<Vec<Rejected>> {
        let mut select = self.conn.prepare_cached(
            "SELECT scan_id, coalesce(reason, ''), message, claimed_at, again FROM scan
             WHERE outcome = 'rejected' ORDER BY claimed_at DESC, scan_id",
        )?;
        let rows = select.query_map([], |row| {
            Ok(Rejected {
                scan_id: Pseudonym(row.get(0)?),
                code: row.get(1)?,
                message: row.get(2)?,
                at: row.get(3)?,
                again: row.get(4)?,
                places: Vec::new(),
            })
        })?;
        let mut rejected: Vec<_> = rows.collect::<std::result::Result<_, _>>()?;
        for scan in &mut rejected {
            scan.places = self.places(scan.scan_id)?;
            scan.again &= !scan.places.is_empty();
        }
        Ok(rejected)
    }

    /// The answer that the command with this id has been given.
    pub fn answer_to(&self, id: &str) -> Result<Option<OutboxMessage>> {
        Ok(self
            .conn
            .prepare_cached("SELECT event_id, topic, payload FROM answer WHERE id = ?1")?
            .query_row([id], |row| {
                Ok(OutboxMessage {
                    seq: 0,
                    event_id: Pseudonym(row.get(0)?),
                    topic: row.get(1)?,
                    payload: row.get(2)?,
                    returned: false,
                })
            })
            .optional()?)
    }

    /// Queues the answer to a command and, if the command is given by its id, remembers it (the last 100).
    pub fn answer(&mut self, id: Option<&str>, answer: &OutboxMessage, now: i64) -> Result<()> {
        self.enqueue(answer, now)?;
        if let Some(id) = id {
            self.conn.execute(
                "INSERT OR IGNORE INTO answer (id, event_id, topic, payload) VALUES (?1, ?2, ?3, ?4)",
                params![id, &answer.event_id.0[..], answer.topic, answer.payload],
            )?;
            let old = "DELETE FROM answer WHERE seq <= (SELECT max(seq) FROM answer) - ?1";
            self.conn.execute(old, [ANSWERS])?;
        }
        Ok(())
    }

    /// What was noted under a name.
    pub fn note(&self, name: &str) -> Result<Option<String>> {
        let select = "SELECT value FROM note WHERE name = ?1";
        Ok(self
            .conn
            .query_row(select, [name], |row| row.get(0))
            .optional()?)
    }

    /// Notes a value under a name; `None` removes it. Writes nothing when it is noted already.
    pub fn set_note(&mut self, name: &str, value: Option<&str>) -> Result<()> {
        if self.note(name)?.as_deref() == value {
            return Ok(());
        }
        match value {
            Some(value) => self
                .conn
                .execute("INSERT OR REPLACE INTO note VALUES (?1, ?2)", [name, value])?,
            None => self
                .conn
                .execute("DELETE FROM note WHERE name = ?1", [name])?,
        };
        Ok(())
    }

    fn enqueue(&mut self, message: &OutboxMessage, now: i64) -> Result<()> {
        // An event that waits already is the same event: it is not said twice.
        let new = self
            .conn
            .prepare_cached(
                "INSERT INTO outbox (event_id, topic, payload, created_at) VALUES (?1, ?2, ?3, ?4)
                 ON CONFLICT (event_id) DO NOTHING",
            )?
            .execute(params![
                &message.event_id.0[..],
                message.topic,
                message.payload,
                now
            ])?;
        self.outbox += new as u64;
        Ok(())
    }

    /// The oldest messages after `after`, at most `limit`, in order.
    pub fn pending(&self, after: i64, limit: usize) -> Result<Vec<OutboxMessage>> {
        self.pending_behind(after, 0, limit)
    }

    /// As [`Ledger::pending`], without the first `skip` of them.
    pub fn pending_behind(
        &self,
        after: i64,
        skip: usize,
        limit: usize,
    ) -> Result<Vec<OutboxMessage>> {
        let mut select = self.conn.prepare_cached(
            "SELECT seq, event_id, topic, payload, returned FROM outbox WHERE seq > ?1 ORDER BY seq LIMIT ?3 OFFSET ?2",
        )?;
        let rows = select.query_map(params![after, skip as i64, limit as i64], |row| {
            Ok(OutboxMessage {
                seq: row.get(0)?,
                event_id: Pseudonym(row.get(1)?),
                topic: row.get(2)?,
                payload: row.get(3)?,
                returned: row.get(4)?,
            })
        })?;
        Ok(rows.collect::<std::result::Result<_, _>>()?)
    }

    /// The position of the newest message that waits; 0 when none does.
    pub fn newest_pending(&self) -> Result<i64> {
        let newest = "SELECT coalesce(max(seq), 0) FROM outbox";
        Ok(self.conn.query_row(newest, [], |row| row.get(0))?)
    }

    /// Takes acknowledged messages out of the outbox.
    pub fn confirm(&mut self, seqs: &[i64]) -> Result<()> {
        let mut gone = 0;
        {
            let mut delete = self
                .conn
                .prepare_cached("DELETE FROM outbox WHERE seq = ?1")?;
            for seq in seqs {
                gone += delete.execute([seq])?;
            }
        }
        self.outbox = self.outbox.saturating_sub(gone as u64);
        failpoint::hit("confirm", 0);
        self.count("delivered", gone as i64)
    }

    /// Sets a message of the outbox aside that the broker does not take while it takes others. Of more than 10,000 the oldest are dropped;
    /// returns how many. Their outcomes stay.
    pub fn park(&mut self, seq: i64, reason: &str, now: i64) -> Result<u64> {
        // The same event from before, if it was recorded once more meanwhile.
        let same = self.conn.execute(
            "DELETE FROM parked WHERE event_id = (SELECT event_id FROM outbox WHERE seq = ?1)",
            [seq],
        )?;
        let moved = self.conn.execute(
            "INSERT INTO parked (seq, event_id, topic, created_at, parked_at, reason, payload)
             SELECT seq, event_id, topic, created_at, ?2, ?3, payload FROM outbox WHERE seq = ?1",
            params![seq, now, reason],
        )?;
        self.conn
            .execute("DELETE FROM outbox WHERE seq = ?1", [seq])?;
        self.outbox = self.outbox.saturating_sub(moved as u64);
        self.parked = (self.parked + moved as u64).saturating_sub(same as u64);
        let too_many = self.parked.saturating_sub(PARKED as u64);
        if too_many > 0 {
            self.conn.execute(
                "DELETE FROM parked WHERE seq IN (SELECT seq FROM parked ORDER BY seq LIMIT ?1)",
                [too_many as i64],
            )?;
            self.parked = PARKED as u64;
            self.count("dropped", too_many as i64)?;
        }
        Ok(too_many)
    }

    /// The parked messages, the one that was parked first at first.
    pub fn parked(&self) -> Result<Vec<Parked>> {
        let mut select = self.conn.prepare_cached(
            "SELECT seq, topic, length(payload), created_at, parked_at, reason FROM parked ORDER BY seq",
        )?;
        let rows = select.query_map([], |row| {
            Ok(Parked {
                seq: row.get(0)?,
                topic: row.get(1)?,
                bytes: row.get(2)?,
                created_at: row.get(3)?,
                parked_at: row.get(4)?,
                reason: row.get(5)?,
            })
        })?;
        Ok(rows.collect::<std::result::Result<_, _>>()?)
    }

    /// Puts the `limit` messages that were parked first back at the end of the outbox, byte for byte. Returns how many.
    pub fn bring_back(&mut self, limit: usize) -> Result<u64> {
        let seqs: Vec<i64> = {
            let mut select = self
                .conn
                .prepare_cached("SELECT seq FROM parked ORDER BY seq LIMIT ?1")?;
            let rows = select.query_map([limit as i64], |row| row.get(0))?;
            rows.collect::<std::result::Result<_, _>>()?
        };
        self.bring_back_these(&seqs)
    }

    fn bring_back_these(&mut self, seqs: &[i64]) -> Result<u64> {
        let mut count = 0;
        for seq in seqs {
            self.conn
                .prepare_cached(
                    "INSERT INTO outbox (event_id, topic, payload, created_at, returned)
                     SELECT event_id, topic, payload, created_at, 1 FROM parked WHERE seq = ?1 ON CONFLICT (event_id) DO NOTHING",
                )?
                .execute([seq])?;
            count += self
                .conn
                .prepare_cached("DELETE FROM parked WHERE seq = ?1")?
                .execute([seq])?;
        }
        if count > 0 {
            self.count_outbox();
        }
        Ok(count as u64)
    }

    /// Puts parked messages back into the outbox, from beside the thread that owns the database: these, or all. Returns how many.
    pub fn retry(&mut self, seqs: Option<&[i64]>) -> Result<u64> {
        self.alone(|ledger| match seqs {
            Some(seqs) => ledger.bring_back_these(seqs),
            None => ledger.bring_back(PARKED),
        })
    }

    /// Parked messages; kept in memory, so it costs nothing.
    pub fn parked_len(&self) -> u64 {
        self.parked
    }

    /// Messages that wait; kept in memory, so it costs nothing.
    pub fn outbox_len(&self) -> u64 {
        self.outbox
    }

    fn count(&mut self, name: &str, by: i64) -> Result<()> {
        self.conn
            .prepare_cached("INSERT INTO counter VALUES (?1, ?2) ON CONFLICT (name) DO UPDATE SET value = value + ?2")?
            .execute(params![name, by])?;
        Ok(())
    }

    /// Totals. Cheap, however many messages wait.
    pub fn counts(&self) -> Result<Counts> {
        let mut counts = Counts::default();
        let mut select = self
            .conn
            .prepare_cached("SELECT name, value FROM counter")?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let (name, value): (String, u64) = (row.get(0)?, row.get(1)?);
            match name.as_str() {
                "classified" => counts.classified = value,
                "positive" => counts.positive = value,
                "indeterminate" => counts.indeterminate = value,
                "rejected" => counts.rejected = value,
                "skipped" => counts.skipped = value,
                "delivered" => counts.delivered = value,
                "dropped" => counts.dropped = value,
                _ => {}
            }
        }
        // One row: a column behind the payload costs the pages of every payload that is passed.
        counts.outbox = self.outbox;
        counts.parked = self.parked;
        counts.oldest_outbox = self
            .conn
            .prepare_cached("SELECT created_at FROM outbox ORDER BY seq LIMIT 1")?
            .query_row([], |row| row.get(0))
            .optional()?;
        Ok(counts)
    }

    /// Rejected scans by reason code, most frequent first.
    pub fn rejections(&self) -> Result<Vec<(String, u64)>> {
        let mut select = self.conn.prepare_cached(
            "SELECT reason, count(*) FROM scan WHERE outcome IN ('rejected', 'skipped') AND reason IS NOT NULL GROUP BY reason ORDER BY 2 DESC, 1",
        )?;
        let rows = select.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
        Ok(rows.collect::<std::result::Result<_, _>>()?)
    }

    /// Where a scan was seen, below the export folder, and its outcome; `None` for an id that the ledger does not know.
    pub fn lookup(&self, scan_id: ScanId) -> Result<Option<(Vec<PathBuf>, Option<String>)>> {
        let outcome: Option<Option<String>> = self
            .conn
            .query_row(
                "SELECT outcome FROM scan WHERE scan_id = ?1",
                [&scan_id.0[..]],
                |row| row.get(0),
            )
            .optional()?;
        let Some(outcome) = outcome else {
            return Ok(None);
        };
        Ok(Some((self.places(scan_id)?, outcome)))
    }

    /// Where a scan was seen, below the export folder.
    fn places(&self, scan_id: ScanId) -> Result<Vec<PathBuf>> {
        let mut select = self
            .conn
            .prepare_cached("SELECT path FROM file WHERE scan_id = ?1 ORDER BY path")?;
        let rows = select.query_map([&scan_id.0[..]], |row| Ok(path_from_bytes(row.get(0)?)))?;
        Ok(rows.collect::<std::result::Result<_, _>>()?)
    }

    /// Forgets what has left the folder: file rows last seen before `before_day`, then scans from before that day that no
    /// file row points to, then closed studies from before that day without such scans: a study that came back would begin its revisions
    /// anew. At most `limit` of each, so that one call stays short. Returns how many rows went.
    pub fn prune(&mut self, before_day: i64, limit: usize) -> Result<usize> {
        let before = before_day * 86_400;
        let limit = limit as i64;
        let files = self.conn.execute(
            "DELETE FROM file WHERE path IN (SELECT path FROM file WHERE seen_day < ?1 LIMIT ?2)",
            params![before_day, limit],
        )?;
        let gone = |old: &str| {
            format!(
                "DELETE FROM scan WHERE scan_id IN (SELECT scan_id FROM scan s WHERE {old}
               AND NOT EXISTS (SELECT 1 FROM file f WHERE f.scan_id = s.scan_id) LIMIT ?2)"
            )
        };
        let scans = self.conn.execute(&gone("done_at < ?1"), params![before, limit])?
            // Claimed once, and the file went away before there was an outcome.
            + self.conn.execute(&gone("done_at IS NULL AND claimed_at < ?1"), params![before, limit])?;
        // By the time of the outcomes, as in `find_top_again`. A scan from format 1 may be of any study of its time.
        let closed = "(SELECT study_id FROM study WHERE open = 0 AND active_at < ?1
               AND NOT EXISTS (SELECT 1 FROM scan s WHERE s.done_at BETWEEN study.opened_at AND study.last_at
                 AND (s.study_id = study.study_id OR s.study_id IS NULL))
             ORDER BY study_id LIMIT ?2)";
        self.conn.execute(
            &format!("DELETE FROM positive WHERE study_id IN {closed}"),
            params![before, limit],
        )?;
        let studies = self.conn.execute(
            &format!("DELETE FROM study WHERE study_id IN {closed}"),
            params![before, limit],
        )?;
        Ok(files + scans + studies)
    }
}

/// What a [`Selection`] asks of a scan, with its values as the first five.
const SELECTED: &str = "done_at >= ?1 AND done_at < ?2 AND (?3 IS NULL OR decision = ?3) AND (NOT ?4 OR outcome = 'rejected')
  AND (?5 IS NULL OR reason = ?5)";

/// Studies whose alert does not say how many positive pictures there are by now.
const ALERT_BEHIND: &str = "alert_open = 1 AND positives != alert_positives";

const STUDY_COLUMNS: &str = "SELECT study_id, opened_at, last_at, images, positives, rejected, max_probability, top_scan, alert_revision,
  open, alert_open, alert_positives, closings FROM study";

fn study_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<StudyState> {
    Ok(StudyState {
        study_id: Pseudonym(row.get(0)?),
        opened_at: row.get(1)?,
        last_at: row.get(2)?,
        images: row.get(3)?,
        positives: row.get(4)?,
        rejected: row.get(5)?,
        max_probability: row.get(6)?,
        top_scan: row.get::<_, Option<[u8; 16]>>(7)?.map(Pseudonym),
        alert_revision: row.get(8)?,
        open: row.get(9)?,
        alert_open: row.get(10)?,
        alert_positives: row.get(11)?,
        closings: row.get(12)?,
        positive_pictures: Vec::new(),
    })
}

/// Messages in the outbox, and parked ones.
fn count_messages(conn: &Connection) -> Result<(u64, u64)> {
    let counts = "SELECT (SELECT count(*) FROM outbox), (SELECT count(*) FROM parked)";
    Ok(conn.query_row(counts, [], |row| Ok((row.get(0)?, row.get(1)?)))?)
}

fn data_version(conn: &Connection) -> Result<i64> {
    Ok(conn.query_row("PRAGMA data_version", [], |row| row.get(0))?)
}

/// Reads every page once if the last run did not close the database in order. The cost grows with the ledger, so an orderly
/// restart does not pay it.
fn check_after_crash(conn: &Connection) -> Result<()> {
    let closed: i64 = conn.query_row(
        "SELECT value FROM counter WHERE name = 'closed'",
        [],
        |row| row.get(0),
    )?;
    if closed == 1 {
        return Ok(());
    }
    let answer: String = conn.query_row("PRAGMA quick_check(1)", [], |row| row.get(0))?;
    if answer == "ok" {
        Ok(())
    } else {
        Err(StoreError::Corrupt(answer))
    }
}
