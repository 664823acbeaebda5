//! The tables and every statement on them.

use std::path::{Path, PathBuf};

use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params};

use super::StoreError;
use crate::message::{AlertChange, Counts, OutboxMessage, StudyState};
use crate::scan::{Pseudonym, ScanFile, ScanId, Stamp, path_bytes, path_from_bytes};

/// Format of the database, in `PRAGMA user_version`.
const FORMAT: i64 = 1;

const SCHEMA: &str = "
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
    /// The decision; for several frames the gravest.
    pub decision: Option<&'static str>,
    /// The probability; for several frames the highest.
    pub probability: Option<f64>,
    /// The study to which the scan belongs.
    pub group: StudyGroup,
    /// Pictures in this scan (frames), rejected ones included.
    pub images: u32,
    /// Positive pictures among them.
    pub positives: u32,
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
    suspects: bool,
    damaged: bool,
}

type Result<T> = std::result::Result<T, StoreError>;

impl Ledger {
    /// Opens or makes the database and begins a new session.
    pub fn open(path: &Path) -> Result<Self> {
        let conn = Connection::open(path)?;
        conn.busy_timeout(std::time::Duration::from_secs(10))?;
        conn.set_prepared_statement_cache_capacity(64);
        // WAL with FULL: a commit is on the disk before it is answered, and a power cut loses only what was not answered.
        conn.execute_batch(
            "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL; PRAGMA temp_store = MEMORY;",
        )?;
        let found: i64 = conn.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        match found {
            0 => conn.execute_batch(&format!(
                "BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;"
            ))?,
            FORMAT => check_after_crash(&conn)?,
            _ => {
                return Err(StoreError::Newer {
                    found,
                    known: FORMAT,
                });
            }
        }
        conn.execute_batch(
            "UPDATE counter SET value = CASE name WHEN 'session' THEN value + 1 ELSE 0 END WHERE name IN ('session', 'closed')",
        )?;
        let session = conn.query_row(
            "SELECT value FROM counter WHERE name = 'session'",
            [],
            |row| row.get(0),
        )?;
        let outbox = conn.query_row("SELECT count(*) FROM outbox", [], |row| row.get(0))?;
        let suspects = conn.query_row(
            "SELECT EXISTS (SELECT 1 FROM scan WHERE done_at IS NULL AND attempts > 0)",
            [],
            |row| row.get(0),
        )?;
        Ok(Self {
            conn,
            session,
            outbox,
            suspects,
            damaged: false,
        })
    }

    /// Opens an existing database for reading, beside a running daemon. No session begins.
    pub fn open_read_only(path: &Path) -> Result<Self> {
        let conn = Connection::open_with_flags(
            path,
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )?;
        conn.busy_timeout(std::time::Duration::from_secs(2))?;
        let found: i64 = conn.query_row("PRAGMA user_version", [], |row| row.get(0))?;
        if found != FORMAT {
            return Err(StoreError::Newer {
                found,
                known: FORMAT,
            });
        }
        Ok(Self {
            conn,
            session: 0,
            outbox: 0,
            suspects: false,
            damaged: false,
        })
    }

    /// Whether an earlier run died with files in work: one of them may be the cause.
    pub fn suspects(&self) -> bool {
        self.suspects
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

    pub(super) fn begin(&mut self) -> Result<()> {
        // Immediate: the write lock is taken here, not half-way through, where waiting for it is not possible.
        let begun = self.conn.execute_batch("BEGIN IMMEDIATE");
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
        let committed = self.conn.execute_batch("COMMIT");
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
        self.conn.execute_batch("SAVEPOINT call")?;
        let result = call(self);
        let result = self.note_damage(result);
        if result.is_err() && self.conn.execute_batch("ROLLBACK TO call").is_ok() {
            self.count_outbox();
        }
        if !self.conn.is_autocommit() {
            self.conn.execute_batch("RELEASE call")?;
        }
        result
    }

    pub(super) fn close(self) {
        let _ = self
            .conn
            .execute("UPDATE counter SET value = 1 WHERE name = 'closed'", []);
        // SQLite checkpoints the WAL when the last connection closes; a failure leaves the WAL for the next start.
        let _ = self.conn.close();
    }

    fn count_outbox(&mut self) {
        if let Ok(count) = self
            .conn
            .query_row("SELECT count(*) FROM outbox", [], |row| row.get(0))
        {
            self.outbox = count;
        }
    }

    /// Which of `files` have no outcome under their present stamp, in the same order. Files that have one are marked as seen on `day`.
    pub fn unknown(&mut self, files: Vec<ScanFile>, day: i64) -> Result<Vec<ScanFile>> {
        let mut find = self.conn.prepare_cached(
            "SELECT f.seen_day FROM file f JOIN scan s USING (scan_id)
             WHERE f.path = ?1 AND f.size = ?2 AND f.mtime_ns = ?3 AND f.ctime_ns = ?4 AND f.inode = ?5 AND s.done_at IS NOT NULL",
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
        let row: Option<(i64, u32, Option<i64>)> = self
            .conn
            .prepare_cached("SELECT session, attempts, done_at FROM scan WHERE scan_id = ?1")?
            .query_row([&scan_id.0[..]], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .optional()?;
        let attempts = match row {
            Some((_, _, Some(_))) => return Ok(Claim::Known),
            Some((session, attempts, None)) if session == self.session && attempts > 0 => {
                return Ok(Claim::InProgress);
            }
            Some((_, attempts, None)) => attempts,
            None => 0,
        };
        self.conn
            .prepare_cached(
                "INSERT INTO scan (scan_id, session, attempts, claimed_at) VALUES (?1, ?2, 1, ?3)
                 ON CONFLICT (scan_id) DO UPDATE SET session = ?2, attempts = attempts + 1, claimed_at = ?3",
            )?
            .execute(params![&scan_id.0[..], self.session, now])?;
        if attempts >= max_attempts {
            return Ok(Claim::GiveUp { deaths: attempts });
        }
        Ok(Claim::Run {
            attempt: attempts + 1,
        })
    }

    /// Gives a claim back without an outcome: the file was not complete, or the daemon stops. The attempt does not count.
    pub fn release(&mut self, scan_id: ScanId) -> Result<()> {
        // The first attempt leaves no trace, or every version of a file that grows slowly would leave a row.
        let first = "DELETE FROM scan WHERE scan_id = ?1 AND done_at IS NULL AND attempts <= 1";
        self.conn.prepare_cached(first)?.execute([&scan_id.0[..]])?;
        self.conn
            .prepare_cached("UPDATE scan SET session = 0, attempts = attempts - 1 WHERE scan_id = ?1 AND done_at IS NULL")?
            .execute([&scan_id.0[..]])?;
        Ok(())
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

    /// Records an outcome with its messages. `encode` is given the study (this scan counted in) and whether an alert is to
    /// be raised, and returns the messages. `false`, and nothing changed, if the scan already has an outcome.
    pub fn record(
        &mut self,
        new: &NewOutcome,
        now: i64,
        alerts: bool,
        encode: impl FnOnce(&StudyState, Option<AlertChange>) -> Vec<OutboxMessage>,
    ) -> Result<bool> {
        let changed = self
            .conn
            .prepare_cached(
                "UPDATE scan SET done_at = ?2, outcome = ?3, reason = ?4, decision = ?5, probability = ?6
                 WHERE scan_id = ?1 AND done_at IS NULL",
            )?
            .execute(params![&new.scan_id.0[..], now, new.outcome, new.reason, new.decision, new.probability])?;
        if changed == 0 {
            return Ok(false);
        }
        self.count(new.outcome, 1)?;
        if let Some(decision) = new.decision {
            self.count(decision, 1)?;
        }
        let study = self.add_to_study(new, now)?;
        let raise = alerts && study.positives > 0 && study.alert_revision == 0;
        let study = if raise {
            self.note_alert(study, now)?
        } else {
            study
        };
        for message in encode(&study, raise.then_some(AlertChange::Raised)) {
            self.enqueue(&message, now)?;
        }
        Ok(true)
    }

    fn add_to_study(&mut self, new: &NewOutcome, now: i64) -> Result<StudyState> {
        let group = &new.group;
        let open: Option<[u8; 16]> = self
            .conn
            .prepare_cached("SELECT study_id FROM study WHERE group_id = ?1 AND open = 1")?
            .query_row([&group.group_id.0[..]], |row| row.get(0))
            .optional()?;
        let study_id = match open {
            _ if group.fixed => group.group_id.0,
            Some(id) => id,
            None => group.fresh_id.0,
        };
        let rejected = if new.outcome == "rejected" {
            new.images.max(1)
        } else {
            0
        };
        self.conn
            .prepare_cached(
                "INSERT INTO study (study_id, group_id, open, opened_at, last_at, images, positives, rejected, max_probability, top_scan)
                 VALUES (?1, ?2, 1, ?3, ?3, ?4, ?5, ?6, ?7, CASE WHEN ?7 IS NULL THEN NULL ELSE ?8 END)
                 ON CONFLICT (study_id) DO UPDATE SET open = 1, last_at = ?3, images = images + ?4, positives = positives + ?5,
                   rejected = rejected + ?6,
                   top_scan = CASE WHEN ?7 > coalesce(max_probability, -1) THEN ?8 ELSE top_scan END,
                   max_probability = CASE WHEN ?7 > coalesce(max_probability, -1) THEN ?7 ELSE max_probability END",
            )?
            .execute(params![
                &study_id[..],
                &group.group_id.0[..],
                now,
                new.images,
                new.positives,
                rejected,
                new.probability,
                &new.scan_id.0[..]
            ])?;
        self.study(Pseudonym(study_id))
    }

    fn study(&self, study_id: Pseudonym) -> Result<StudyState> {
        Ok(self
            .conn
            .prepare_cached(&format!("{STUDY_COLUMNS} WHERE study_id = ?1"))?
            .query_row([&study_id.0[..]], study_row)?)
    }

    fn note_alert(&mut self, mut study: StudyState, now: i64) -> Result<StudyState> {
        study.alert_revision += 1;
        self.conn
            .prepare_cached("UPDATE study SET alert_revision = ?2, alert_positives = positives, alert_at = ?3 WHERE study_id = ?1")?
            .execute(params![&study.study_id.0[..], study.alert_revision as i64, now])?;
        Ok(study)
    }

    /// Closes the studies without a new image since `quiet_before` and updates the alerts that have new positives and whose last
    /// message is from `update_before` or earlier (at most `limit` of each). `encode` makes the messages; returns how many studies were touched.
    pub fn tend_studies(
        &mut self,
        now: i64,
        quiet_before: i64,
        update_before: i64,
        limit: usize,
        mut encode: impl FnMut(&StudyState, AlertChange) -> Vec<OutboxMessage>,
    ) -> Result<usize> {
        let due = |ledger: &Self, filter: &str, before: i64| -> Result<Vec<StudyState>> {
            let mut select = ledger.conn.prepare_cached(&format!(
                "{STUDY_COLUMNS} WHERE open = 1 AND {filter} LIMIT ?2"
            ))?;
            let rows = select.query_map(params![before, limit as i64], study_row)?;
            Ok(rows.collect::<std::result::Result<_, _>>()?)
        };
        let quiet = due(self, "last_at <= ?1", quiet_before)?;
        for study in &quiet {
            let study = if study.alert_revision > 0 {
                self.note_alert(study.clone(), now)?
            } else {
                study.clone()
            };
            self.conn
                .prepare_cached("UPDATE study SET open = 0 WHERE study_id = ?1")?
                .execute([&study.study_id.0[..]])?;
            for message in encode(&study, AlertChange::Closed) {
                self.enqueue(&message, now)?;
            }
        }
        let grown = due(
            self,
            "alert_revision > 0 AND positives > alert_positives AND alert_at <= ?1",
            update_before,
        )?;
        for study in &grown {
            let study = self.note_alert(study.clone(), now)?;
            for message in encode(&study, AlertChange::Updated) {
                self.enqueue(&message, now)?;
            }
        }
        Ok(quiet.len() + grown.len())
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
        let mut select = self.conn.prepare_cached(
            "SELECT seq, event_id, topic, payload FROM outbox WHERE seq > ?1 ORDER BY seq LIMIT ?2",
        )?;
        let rows = select.query_map(params![after, limit as i64], |row| {
            Ok(OutboxMessage {
                seq: row.get(0)?,
                event_id: Pseudonym(row.get(1)?),
                topic: row.get(2)?,
                payload: row.get(3)?,
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
        self.count("delivered", gone as i64)
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

    /// Totals.
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
                _ => {}
            }
        }
        (counts.outbox, counts.oldest_outbox) =
            self.conn
                .query_row("SELECT count(*), min(created_at) FROM outbox", [], |row| {
                    Ok((row.get(0)?, row.get(1)?))
                })?;
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
        let mut select = self
            .conn
            .prepare_cached("SELECT path FROM file WHERE scan_id = ?1 ORDER BY path")?;
        let rows = select.query_map([&scan_id.0[..]], |row| Ok(path_from_bytes(row.get(0)?)))?;
        Ok(Some((
            rows.collect::<std::result::Result<_, _>>()?,
            outcome,
        )))
    }

    /// Forgets what has left the folder: file rows last seen before `before_day`, then closed studies and scans with an outcome
    /// from before that day that no file row points to. At most `limit` of each, so that one call stays short. Returns how many rows went.
    pub fn prune(&mut self, before_day: i64, limit: usize) -> Result<usize> {
        let before = before_day * 86_400;
        let limit = limit as i64;
        let files = self.conn.execute(
            "DELETE FROM file WHERE path IN (SELECT path FROM file WHERE seen_day < ?1 LIMIT ?2)",
            params![before_day, limit],
        )?;
        let scans = self.conn.execute(
            "DELETE FROM scan WHERE scan_id IN (SELECT scan_id FROM scan s WHERE done_at < ?1
               AND NOT EXISTS (SELECT 1 FROM file f WHERE f.scan_id = s.scan_id) LIMIT ?2)",
            params![before, limit],
        )?;
        let studies = self.conn.execute(
            "DELETE FROM study WHERE study_id IN (SELECT study_id FROM study WHERE open = 0 AND last_at < ?1 LIMIT ?2)",
            params![before, limit],
        )?;
        Ok(files + scans + studies)
    }
}

const STUDY_COLUMNS: &str = "SELECT study_id, opened_at, last_at, images, positives, rejected, max_probability, top_scan, alert_revision FROM study";

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
    })
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
