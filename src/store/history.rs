//! The dashboard's own database: what it has heard, within bounds of age and number.
//!
//! One [`History`] writes, a batch of messages a transaction; any number of [`HistoryReader`]s read beside it. The database is in WAL
//! mode with `synchronous = NORMAL`: a crash of the process loses nothing, a power cut may lose the last moments of
//! a copy, not of a result (those are in the appliance's ledger until the broker has them). That spares the SD card a sync per batch.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use rusqlite::types::Value as Sql;
use rusqlite::{Connection, OpenFlags, OptionalExtension as _, params, params_from_iter};
use serde_json::{Value, json};

use super::state_dir::make_private;
use super::{Lock, StoreError, lock, set_aside};
use crate::history::{
    ApplianceKey, Body, Filter, Heatmap, PreviewSeen, Received, quantile, row, step_ms,
};
use crate::message::rfc3339;
use crate::scan::Pseudonym;

/// File name of the database inside the dashboard's folder.
pub(super) const DATABASE: &str = "history.sqlite3";

/// Format of the database, in `PRAGMA user_version`.
const FORMAT: i64 = 2;

/// Rows of a batch that are handed on to the pages; what is beyond is only counted.
const FRESH: usize = 40;

/// Most appliances that are remembered; messages of more are not taken.
const APPLIANCES: i64 = 2000;

/// Pictures of one study that a page gets.
const STUDY_PICTURES: usize = 1000;

/// Bytes of one preview: its picture and its activation map, which is ASCII.
const PREVIEW_BYTES: &str = "length(png) + coalesce(length(heatmap), 0)";

/// Rows that one chart looks at.
const CHART_ROWS: usize = 1_000_000;

const SCHEMA: &str = "
CREATE TABLE appliance (
  id        INTEGER PRIMARY KEY,
  site      TEXT NOT NULL,
  device    TEXT NOT NULL,
  status    TEXT,                          -- online | stopped | offline
  status_at INTEGER,                       -- ms since 1970, when it was heard
  health    TEXT,                          -- the last health payload
  health_at INTEGER,
  seen_at   INTEGER NOT NULL,              -- ms since 1970, last sign of life
  UNIQUE (site, device)
);
CREATE TABLE result (
  id        INTEGER PRIMARY KEY AUTOINCREMENT,
  appliance INTEGER NOT NULL,
  event_id  BLOB NOT NULL,
  scan_id   BLOB NOT NULL,
  frame     INTEGER NOT NULL,              -- 0: a single picture
  study_id  BLOB,
  at        INTEGER NOT NULL,              -- ms since 1970, processed
  stored_at INTEGER NOT NULL,              -- ms since 1970, arrived
  verdict   TEXT NOT NULL,
  total_ms  REAL,
  superseded INTEGER NOT NULL DEFAULT 0,   -- the same picture has a newer result
  payload   TEXT NOT NULL,
  UNIQUE (appliance, event_id)
);
CREATE INDEX result_at ON result(at, verdict, total_ms, superseded, appliance);
CREATE INDEX result_scan ON result(appliance, scan_id, frame);
CREATE INDEX result_study ON result(study_id);
CREATE TABLE alert (
  appliance INTEGER NOT NULL,
  alert_id  BLOB NOT NULL,
  study_id  BLOB NOT NULL,
  revision  INTEGER NOT NULL,
  closed    INTEGER NOT NULL,
  raised_at INTEGER NOT NULL,
  at        INTEGER NOT NULL,
  stored_at INTEGER NOT NULL,
  payload   TEXT NOT NULL,
  PRIMARY KEY (appliance, alert_id)
) WITHOUT ROWID;
CREATE INDEX alert_raised ON alert(raised_at);
CREATE TABLE ack (
  appliance INTEGER NOT NULL,
  alert_id  BLOB NOT NULL,
  at        INTEGER NOT NULL,
  by        TEXT NOT NULL,
  stored_at INTEGER NOT NULL,
  PRIMARY KEY (appliance, alert_id)
) WITHOUT ROWID;
CREATE TABLE study (
  appliance INTEGER NOT NULL,
  study_id  BLOB NOT NULL,
  stored_at INTEGER NOT NULL,
  payload   TEXT NOT NULL,
  PRIMARY KEY (appliance, study_id)
) WITHOUT ROWID;
CREATE TABLE preview (
  id        INTEGER PRIMARY KEY AUTOINCREMENT,
  appliance INTEGER NOT NULL,
  scan_id   BLOB NOT NULL,
  frame     INTEGER NOT NULL,
  png       BLOB NOT NULL,
  heatmap   TEXT,
  stored_at INTEGER NOT NULL DEFAULT 0,
  UNIQUE (appliance, scan_id, frame)
);
CREATE TABLE backlog (
  appliance INTEGER NOT NULL,
  minute    INTEGER NOT NULL,              -- minutes since 1970
  files     INTEGER NOT NULL,
  messages  INTEGER NOT NULL,
  PRIMARY KEY (appliance, minute)
) WITHOUT ROWID;
";

/// By age, for what forgets: part of a new database, and what brings one of format 1 up to date.
const INDEXES: &str = "
CREATE INDEX result_stored ON result(stored_at);
CREATE INDEX alert_stored ON alert(stored_at);
CREATE INDEX study_stored ON study(stored_at);
CREATE INDEX ack_stored ON ack(stored_at);
CREATE INDEX preview_stored ON preview(stored_at);
";

/// Format 1 did not say when a preview came: those there are count from now.
const FROM_FORMAT_1: &str = "
ALTER TABLE preview ADD COLUMN stored_at INTEGER NOT NULL DEFAULT 0;
UPDATE preview SET stored_at = unixepoch() * 1000;
";

type Result<T> = std::result::Result<T, StoreError>;

/// The writing side.
#[derive(Debug)]
pub struct History {
    conn: Connection,
    held: Held,
    // Let go of with the connection.
    _lock: Lock,
}

/// How much is in it.
#[derive(Debug, Clone, Copy)]
struct Held {
    results: u64,
    previews: u64,
    /// Pictures and activation maps, bytes.
    preview_bytes: u64,
    appliances: i64,
}

/// What a batch changed.
#[derive(Debug, Default, PartialEq)]
pub struct Changes {
    /// New results as rows of a list, oldest first; the last [`FRESH`] of them.
    pub results: Vec<Value>,
    /// New results that are not among them.
    pub more: u64,
    /// Messages stored and messages known already, by kind.
    pub counted: Vec<(&'static str, bool)>,
    /// Messages of appliances beyond the most that are remembered, by kind: not stored.
    pub dropped: Vec<&'static str>,
    /// Appliances of which something is new.
    pub appliances: BTreeSet<ApplianceKey>,
    /// Alerts of which something is new.
    pub alerts: BTreeSet<(ApplianceKey, Pseudonym)>,
    /// New previews, without their pictures.
    pub previews: Vec<Value>,
}

/// What is to be kept.
#[derive(Debug, Clone, Copy)]
pub struct Retention {
    /// Forget what arrived before, milliseconds since 1970.
    pub before_ms: i64,
    /// Most results, and most alerts, studies and previews.
    pub max_rows: u64,
    /// Most bytes of previews.
    pub preview_bytes: u64,
}

impl History {
    /// Opens or makes the database in `dir` (made with mode 0700), for one process at a time. A damaged one is set aside under a name that
    /// says so, and a new one begun.
    pub fn open(dir: &Path) -> Result<Self> {
        let held = lock(dir)?;
        make_private(dir);
        let path = dir.join(DATABASE);
        let conn = match open(&path) {
            Err(StoreError::Corrupt(_)) => {
                let aside = set_aside(&path)?;
                tracing::error!(set_aside = %aside.display(), "the dashboard's history was damaged and set aside");
                open(&path)?
            }
            other => other?,
        };
        let count = |sql: &str| conn.query_row(sql, [], |r| r.get::<_, u64>(0));
        let sizes = Held {
            results: count("SELECT count(*) FROM result")?,
            previews: count("SELECT count(*) FROM preview")?,
            preview_bytes: count(&format!(
                "SELECT coalesce(sum({PREVIEW_BYTES}), 0) FROM preview"
            ))?,
            appliances: count("SELECT count(*) FROM appliance")? as i64,
        };
        Ok(Self {
            conn,
            held: sizes,
            _lock: held,
        })
    }

    /// Results in it.
    pub fn rows(&self) -> u64 {
        self.held.results
    }

    /// Stores a batch in one transaction.
    pub fn write(&mut self, batch: &[Received]) -> Result<Changes> {
        let mut changes = Changes::default();
        let held = self.held;
        self.conn.execute_batch("BEGIN IMMEDIATE")?;
        let written = batch
            .iter()
            .try_for_each(|message| self.write_one(message, &mut changes))
            .and_then(|()| Ok(self.conn.execute_batch("COMMIT")?));
        if let Err(error) = written {
            let _ = self.conn.execute_batch("ROLLBACK");
            self.held = held;
            return Err(error);
        }
        let more = changes.results.len().saturating_sub(FRESH);
        changes.results.drain(..more);
        changes.more = more as u64;
        Ok(changes)
    }

    fn write_one(&mut self, message: &Received, changes: &mut Changes) -> Result<()> {
        let Some(appliance) = self.appliance(message)? else {
            changes.dropped.push(message.body.kind());
            return Ok(());
        };
        let key = &message.appliance;
        let now = message.at_ms;
        let new = match &message.body {
            Body::Status(presence) => {
                self.cached(
                    "UPDATE appliance SET status = ?2, status_at = ?3 WHERE id = ?1",
                    params![appliance, presence.as_str(), now],
                )?;
                changes.appliances.insert(key.clone());
                true
            }
            Body::Health(health) => {
                self.cached(
                    "UPDATE appliance SET health = ?2, health_at = ?3, seen_at = max(seen_at, ?3) WHERE id = ?1",
                    params![appliance, health.payload.to_string(), health.at_ms],
                )?;
                self.cached(
                    "INSERT INTO backlog VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET files = max(files, ?3), messages = max(messages, ?4)",
                    params![appliance, health.at_ms / 60_000, health.files as i64, health.messages as i64],
                )?;
                changes.appliances.insert(key.clone());
                true
            }
            Body::Result(seen) => {
                let frame = i64::from(seen.frame.unwrap_or(0));
                let scan = &seen.scan_id.0[..];
                let newest: Option<i64> = self
                    .conn
                    .prepare_cached("SELECT max(at) FROM result WHERE appliance = ?1 AND scan_id = ?2 AND frame = ?3")?
                    .query_row(params![appliance, scan, frame], |r| r.get(0))?;
                let superseded = newest.is_some_and(|at| at > seen.at_ms);
                let new = self.cached(
                    "INSERT INTO result (appliance, event_id, scan_id, frame, study_id, at, stored_at, verdict, total_ms, superseded, payload)
                     VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11) ON CONFLICT DO NOTHING",
                    params![
                        appliance,
                        &seen.event_id.0[..],
                        scan,
                        frame,
                        seen.study_id.map(|id| id.0.to_vec()),
                        seen.at_ms,
                        now,
                        seen.decision.as_str(),
                        seen.total_ms,
                        superseded,
                        seen.payload.to_string()
                    ],
                )? == 1;
                if new {
                    self.held.results += 1;
                    let id = self.conn.last_insert_rowid();
                    if newest.is_some() && !superseded {
                        self.cached(
                            "UPDATE result SET superseded = 1 WHERE appliance = ?1 AND scan_id = ?2 AND frame = ?3 AND id <> ?4",
                            params![appliance, scan, frame, id],
                        )?;
                    }
                    if !superseded {
                        let mut row = row(key, &seen.payload);
                        row["id"] = id.into();
                        changes.results.push(row);
                    }
                }
                new
            }
            Body::Alert(alert) => {
                let new = self.cached(
                    "INSERT INTO alert VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?6, ?7, ?8) ON CONFLICT DO UPDATE SET
                       revision = excluded.revision, closed = excluded.closed, at = excluded.at, stored_at = excluded.stored_at,
                       payload = excluded.payload WHERE excluded.revision > revision",
                    params![
                        appliance,
                        &alert.alert_id.0[..],
                        &alert.study_id.0[..],
                        alert.revision as i64,
                        alert.closed,
                        alert.at_ms,
                        now,
                        alert.payload.to_string()
                    ],
                )? == 1;
                if new {
                    changes.alerts.insert((key.clone(), alert.alert_id));
                }
                new
            }
            Body::Study(study) => {
                self.cached(
                    "INSERT INTO study VALUES (?1, ?2, ?3, ?4) ON CONFLICT DO UPDATE SET stored_at = ?3, payload = ?4",
                    params![appliance, &study.study_id.0[..], now, study.payload.to_string()],
                )?;
                true
            }
            Body::Preview(preview) => {
                self.write_preview(appliance, preview, now)?;
                changes.previews.push(json!({
                    "site": key.site, "device": key.device, "scan_id": preview.scan_id, "frame": preview.frame,
                    "preview": true, "heatmap": preview.heatmap,
                }));
                true
            }
            Body::Ack(alert, Some(ack)) => {
                let new = self.cached(
                    "INSERT INTO ack VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO UPDATE SET at = ?3, by = ?4, stored_at = ?5
                     WHERE at <> ?3 OR by <> ?4",
                    params![appliance, &alert.0[..], ack.at_ms, ack.by, now],
                )? == 1;
                if new {
                    changes.alerts.insert((key.clone(), *alert));
                }
                new
            }
            Body::Ack(alert, None) => {
                let gone = self.cached(
                    "DELETE FROM ack WHERE appliance = ?1 AND alert_id = ?2",
                    params![appliance, &alert.0[..]],
                )? == 1;
                if gone {
                    changes.alerts.insert((key.clone(), *alert));
                }
                gone
            }
        };
        changes.counted.push((message.body.kind(), new));
        Ok(())
    }

    /// The appliance's number; `None` where there are too many.
    fn appliance(&mut self, message: &Received) -> Result<Option<i64>> {
        let key = &message.appliance;
        // What the broker had kept is no sign of life; a health report has its own time.
        let live = !message.retained && !matches!(message.body, Body::Ack(..) | Body::Status(_));
        let found = self
            .conn
            .prepare_cached(
                "UPDATE appliance SET seen_at = iif(?3, max(seen_at, ?4), seen_at) WHERE site = ?1 AND device = ?2 RETURNING id",
            )?
            .query_row(params![key.site, key.device, live, message.at_ms], |r| {
                r.get(0)
            })
            .optional()?;
        if found.is_some() {
            return Ok(found);
        }
        if self.held.appliances >= APPLIANCES {
            return Ok(None);
        }
        self.cached(
            "INSERT INTO appliance (site, device, seen_at) VALUES (?1, ?2, ?3)",
            params![key.site, key.device, if live { message.at_ms } else { 0 }],
        )?;
        self.held.appliances += 1;
        Ok(Some(self.conn.last_insert_rowid()))
    }

    fn write_preview(&mut self, appliance: i64, preview: &PreviewSeen, now: i64) -> Result<()> {
        let frame = i64::from(preview.frame.unwrap_or(0));
        let old: Option<u64> = self
            .conn
            .prepare_cached(&format!("DELETE FROM preview WHERE appliance = ?1 AND scan_id = ?2 AND frame = ?3 RETURNING {PREVIEW_BYTES}"))?
            .query_row(params![appliance, &preview.scan_id.0[..], frame], |r| r.get(0))
            .optional()?;
        let heatmap = preview
            .heatmap
            .as_ref()
            .and_then(|map| serde_json::to_string(map).ok());
        self.cached(
            "INSERT INTO preview (appliance, scan_id, frame, png, heatmap, stored_at) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
            params![appliance, &preview.scan_id.0[..], frame, preview.png, heatmap, now],
        )?;
        let bytes = preview.png.len() + heatmap.map_or(0, |text| text.len());
        let held = &mut self.held;
        held.previews += u64::from(old.is_none());
        held.preview_bytes =
            (held.preview_bytes + bytes as u64).saturating_sub(old.unwrap_or_default());
        Ok(())
    }

    fn cached(&self, sql: &str, values: impl rusqlite::Params) -> Result<usize> {
        Ok(self.conn.prepare_cached(sql)?.execute(values)?)
    }

    /// Forgets what is beyond `keep`, at most `limit` rows of each table for each reason, in one transaction. Returns whether there may be more
    /// to forget.
    pub fn prune(&mut self, keep: Retention, limit: usize) -> Result<bool> {
        let limit = limit as i64;
        let transaction = self.conn.transaction()?;
        let mut gone = 0;
        let mut held = self.held;
        let surplus = (held.results.saturating_sub(keep.max_rows) as i64).min(limit);
        let results = transaction.execute(
            "DELETE FROM result WHERE id IN (SELECT id FROM result WHERE stored_at < ?1 LIMIT ?2)
             OR id IN (SELECT id FROM result ORDER BY id LIMIT ?3)",
            params![keep.before_ms, limit, surplus],
        )?;
        held.results = held.results.saturating_sub(results as u64);
        gone += results;
        {
            let mut old = transaction.prepare(&format!(
                "DELETE FROM preview WHERE id IN (SELECT id FROM preview WHERE stored_at < ?1 LIMIT ?2) RETURNING {PREVIEW_BYTES}"
            ))?;
            let mut rows = old.query(params![keep.before_ms, limit])?;
            while let Some(row) = rows.next()? {
                held.forget_preview(row.get(0)?);
                gone += 1;
            }
            let mut oldest = transaction.prepare(&format!(
                "SELECT id, {PREVIEW_BYTES} FROM preview ORDER BY id LIMIT ?1"
            ))?;
            let mut delete = transaction.prepare("DELETE FROM preview WHERE id = ?1")?;
            let mut rows = oldest.query([limit])?;
            while (held.preview_bytes > keep.preview_bytes || held.previews > keep.max_rows)
                && let Some(row) = rows.next()?
            {
                delete.execute([row.get::<_, i64>(0)?])?;
                held.forget_preview(row.get(1)?);
                gone += 1;
            }
        }
        gone += transaction.execute(
            "DELETE FROM alert WHERE (appliance, alert_id) IN (SELECT appliance, alert_id FROM alert WHERE stored_at < ?1
               OR stored_at < (SELECT stored_at FROM alert ORDER BY stored_at DESC LIMIT 1 OFFSET ?2) LIMIT ?3)",
            params![keep.before_ms, keep.max_rows as i64, limit],
        )?;
        gone += transaction.execute(
            "DELETE FROM study WHERE (appliance, study_id) IN (SELECT appliance, study_id FROM study WHERE stored_at < ?1
               OR stored_at < (SELECT stored_at FROM study ORDER BY stored_at DESC LIMIT 1 OFFSET ?2) LIMIT ?3)",
            params![keep.before_ms, keep.max_rows as i64, limit],
        )?;
        gone += transaction.execute(
            "DELETE FROM ack WHERE (appliance, alert_id) IN (SELECT appliance, alert_id FROM ack k WHERE (stored_at < ?1
               OR stored_at < (SELECT stored_at FROM ack ORDER BY stored_at DESC LIMIT 1 OFFSET ?2))
               AND NOT EXISTS (SELECT 1 FROM alert a WHERE a.appliance = k.appliance AND a.alert_id = k.alert_id) LIMIT ?3)",
            params![keep.before_ms, keep.max_rows as i64, limit],
        )?;
        gone += transaction.execute(
            "DELETE FROM backlog WHERE (appliance, minute) IN (SELECT appliance, minute FROM backlog WHERE minute < ?1 LIMIT ?2)",
            params![keep.before_ms / 60_000, limit],
        )?;
        let appliances = transaction.execute(
            "DELETE FROM appliance WHERE id IN (SELECT id FROM appliance p WHERE seen_at < ?1 AND coalesce(status_at, 0) < ?1
               AND NOT EXISTS (SELECT 1 FROM result r WHERE r.appliance = p.id)
               AND NOT EXISTS (SELECT 1 FROM alert a WHERE a.appliance = p.id) LIMIT ?2)",
            params![keep.before_ms, limit],
        )?;
        held.appliances -= appliances as i64;
        gone += appliances;
        transaction.commit()?;
        self.held = held;
        Ok(gone as i64 >= limit)
    }
}

impl Held {
    fn forget_preview(&mut self, bytes: u64) {
        self.previews = self.previews.saturating_sub(1);
        self.preview_bytes = self.preview_bytes.saturating_sub(bytes);
    }
}

fn open(path: &Path) -> Result<Connection> {
    let conn = Connection::open(path)?;
    conn.busy_timeout(std::time::Duration::from_secs(10))?;
    conn.set_prepared_statement_cache_capacity(64);
    conn.execute_batch(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = NORMAL; PRAGMA temp_store = MEMORY;",
    )?;
    match conn.query_row("PRAGMA user_version", [], |r| r.get(0))? {
        0 => conn.execute_batch(&format!(
            "BEGIN; {SCHEMA} {INDEXES} PRAGMA user_version = {FORMAT}; COMMIT;"
        ))?,
        1 => conn.execute_batch(&format!(
            "BEGIN; {FROM_FORMAT_1} {INDEXES} PRAGMA user_version = {FORMAT}; COMMIT;"
        ))?,
        FORMAT => {}
        found => {
            return Err(StoreError::Newer {
                found,
                known: FORMAT,
            });
        }
    }
    let answer: String = conn.query_row("PRAGMA quick_check(1)", [], |r| r.get(0))?;
    if answer == "ok" {
        Ok(conn)
    } else {
        Err(StoreError::Corrupt(answer))
    }
}

/// The reading side; cheap to clone. Its calls block, and one runs at a time.
#[derive(Debug, Clone)]
pub struct HistoryReader(Arc<Mutex<Connection>>);

const ALERT_COLUMNS: &str = "SELECT p.site, p.device, a.payload, a.closed, a.raised_at, a.at, k.at, k.by FROM alert a
  JOIN appliance p ON p.id = a.appliance LEFT JOIN ack k ON k.appliance = a.appliance AND k.alert_id = a.alert_id";

const RESULT_COLUMNS: &str =
    "SELECT r.id, p.site, p.device, r.payload, v.id IS NOT NULL, v.heatmap FROM result r
  JOIN appliance p ON p.id = r.appliance
  LEFT JOIN preview v ON v.appliance = r.appliance AND v.scan_id = r.scan_id AND v.frame = r.frame";

impl HistoryReader {
    /// Opens the database that a [`History`] has opened in `dir`.
    pub fn open(dir: &Path) -> Result<Self> {
        let conn = Connection::open_with_flags(
            dir.join(DATABASE),
            OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX,
        )?;
        conn.busy_timeout(std::time::Duration::from_secs(10))?;
        conn.set_prepared_statement_cache_capacity(64);
        Ok(Self(Arc::new(Mutex::new(conn))))
    }

    fn rows<T>(
        &self,
        sql: &str,
        values: &[Sql],
        read: impl FnMut(&rusqlite::Row<'_>) -> rusqlite::Result<T>,
    ) -> Result<Vec<T>> {
        let conn = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut select = conn.prepare_cached(sql)?;
        let rows = select.query_map(params_from_iter(values), read)?;
        Ok(rows.collect::<rusqlite::Result<_>>()?)
    }

    /// All appliances by name, or one of them.
    pub fn appliances(&self, only: Option<&ApplianceKey>) -> Result<Vec<Value>> {
        let (restriction, values) = match only {
            None => ("", vec![]),
            Some(key) => (
                "WHERE site = ?1 AND device = ?2",
                vec![text(&key.site), text(&key.device)],
            ),
        };
        let sql = format!(
            "SELECT site, device, status, status_at, health, seen_at FROM appliance {restriction} ORDER BY site, device"
        );
        self.rows(&sql, &values, |row| {
            let seen: i64 = row.get(5)?;
            Ok(json!({
                "site": row.get::<_, String>(0)?,
                "device": row.get::<_, String>(1)?,
                "status": row.get::<_, Option<String>>(2)?,
                "status_at": row.get::<_, Option<i64>>(3)?.map(time),
                "health": row.get::<_, Option<String>>(4)?.map(payload),
                "seen_at": (seen > 0).then(|| time(seen)),
            }))
        })
    }

    /// How many appliances are in a state: `online`, `degraded`, `stopped`, `offline` or `unknown`.
    pub fn states(&self) -> Result<Vec<(String, u64)>> {
        let sql = "SELECT iif(status = 'online' AND json_extract(health, '$.state') = 'degraded', 'degraded', coalesce(status, 'unknown')) AS state,
          count(*) FROM appliance GROUP BY state";
        self.rows(sql, &[], |row| Ok((row.get(0)?, row.get(1)?)))
    }

    /// Alerts that nobody has acknowledged or whose study goes on, newest first, at most `limit`, and how many there are.
    pub fn open_alerts(&self, limit: usize) -> Result<(Vec<Value>, u64)> {
        let open = "WHERE a.closed = 0 OR k.by IS NULL";
        let sql = format!("{ALERT_COLUMNS} {open} ORDER BY a.raised_at DESC LIMIT ?1");
        let alerts = self.rows(&sql, &[integer(limit)], alert_row)?;
        let count = format!("SELECT count(*) FROM ({ALERT_COLUMNS} {open})");
        let count = self.rows(&count, &[], |row| row.get(0))?;
        Ok((alerts, count[0]))
    }

    /// Alerts that are over and acknowledged, newest first.
    pub fn closed_alerts(&self, before_ms: Option<i64>, limit: usize) -> Result<Vec<Value>> {
        let sql = format!(
            "{ALERT_COLUMNS} WHERE a.closed = 1 AND k.by IS NOT NULL AND a.raised_at < ?1 ORDER BY a.raised_at DESC LIMIT ?2"
        );
        let before = Sql::Integer(before_ms.unwrap_or(i64::MAX));
        self.rows(&sql, &[before, integer(limit)], alert_row)
    }

    /// One alert.
    pub fn alert(&self, key: &ApplianceKey, alert_id: Pseudonym) -> Result<Option<Value>> {
        let sql =
            format!("{ALERT_COLUMNS} WHERE p.site = ?1 AND p.device = ?2 AND a.alert_id = ?3");
        let values = [text(&key.site), text(&key.device), blob(alert_id)];
        Ok(self.rows(&sql, &values, alert_row)?.pop())
    }

    /// A page of results, newest first.
    pub fn results(&self, filter: &Filter) -> Result<Vec<Value>> {
        let mut sql = format!("{RESULT_COLUMNS} WHERE r.superseded = 0");
        let mut values = Vec::new();
        let mut and = |clause: &str, value: Sql| {
            sql.push_str(" AND ");
            sql.push_str(clause);
            values.push(value);
        };
        if let Some(key) = &filter.appliance {
            and("p.site = ?", text(&key.site));
            and("p.device = ?", text(&key.device));
        }
        if let Some(verdict) = filter.verdict {
            and("r.verdict = ?", text(verdict.as_str()));
        }
        if let Some(from) = filter.from_ms {
            and("r.at >= ?", Sql::Integer(from));
        }
        if let Some(to) = filter.to_ms {
            and("r.at < ?", Sql::Integer(to));
        }
        if let Some(before) = filter.before {
            and("r.id < ?", Sql::Integer(before));
        }
        sql.push_str(" ORDER BY r.id DESC LIMIT ?");
        values.push(integer(filter.limit));
        self.rows(&sql, &values, |row| result_row(row, false))
    }

    /// A study's summary, its alert and the first 1000 of its pictures in the order in which they were taken.
    pub fn study(&self, key: &ApplianceKey, study_id: Pseudonym) -> Result<Option<Value>> {
        let values = [text(&key.site), text(&key.device), blob(study_id)];
        let place = "p.site = ?1 AND p.device = ?2";
        let sql = format!(
            "{RESULT_COLUMNS} WHERE {place} AND r.study_id = ?3 AND r.superseded = 0
             ORDER BY coalesce(json_extract(r.payload, '$.acquired_at'), ''), r.at, r.frame LIMIT {STUDY_PICTURES}"
        );
        let pictures = self.rows(&sql, &values, |row| result_row(row, false))?;
        let sql = format!(
            "SELECT s.payload FROM study s JOIN appliance p ON p.id = s.appliance WHERE {place} AND s.study_id = ?3"
        );
        let summary = self
            .rows(&sql, &values, |row| row.get(0))?
            .pop()
            .map(payload);
        let sql = format!("{ALERT_COLUMNS} WHERE {place} AND a.study_id = ?3 ORDER BY a.at DESC");
        let alert = self.rows(&sql, &values, alert_row)?.into_iter().next();
        if pictures.is_empty() && summary.is_none() && alert.is_none() {
            return Ok(None);
        }
        let (site, device) = (&key.site, &key.device);
        Ok(Some(
            json!({ "site": site, "device": device, "study_id": study_id, "summary": summary, "alert": alert, "pictures": pictures }),
        ))
    }

    /// The latest results of a scan with all that was published, by frame; empty for one that is not known.
    pub fn scan(&self, key: &ApplianceKey, scan_id: Pseudonym) -> Result<Vec<Value>> {
        let sql = format!(
            "{RESULT_COLUMNS} WHERE p.site = ?1 AND p.device = ?2 AND r.scan_id = ?3 AND r.superseded = 0 ORDER BY r.frame"
        );
        let values = [text(&key.site), text(&key.device), blob(scan_id)];
        self.rows(&sql, &values, |row| result_row(row, true))
    }

    /// The picture of a scan, PNG.
    pub fn preview(
        &self,
        key: &ApplianceKey,
        scan_id: Pseudonym,
        frame: Option<u32>,
    ) -> Result<Option<Vec<u8>>> {
        let values = [
            text(&key.site),
            text(&key.device),
            blob(scan_id),
            Sql::Integer(i64::from(frame.unwrap_or(0))),
        ];
        let sql = "SELECT v.png FROM preview v JOIN appliance p ON p.id = v.appliance
          WHERE p.site = ?1 AND p.device = ?2 AND v.scan_id = ?3 AND v.frame = ?4";
        Ok(self.rows(sql, &values, |row| row.get(0))?.pop())
    }

    /// Numbers for each step of time from `from_ms` to `to_ms`: pictures by decision, median and 95th percentile of the total time, greatest backlog.
    /// Steps without anything are left out.
    pub fn charts(
        &self,
        appliance: Option<&ApplianceKey>,
        from_ms: i64,
        to_ms: i64,
    ) -> Result<Value> {
        let step = step_ms(from_ms, to_ms);
        let (restriction, mut values) = match appliance {
            None => ("", vec![]),
            Some(key) => (
                "AND p.site = ?1 AND p.device = ?2",
                vec![text(&key.site), text(&key.device)],
            ),
        };
        values.extend([from_ms, to_ms].map(Sql::Integer));
        let sql = format!(
            "SELECT r.at, r.verdict, r.total_ms FROM result r JOIN appliance p ON p.id = r.appliance
             WHERE r.superseded = 0 {restriction} AND r.at >= ? AND r.at < ? LIMIT {CHART_ROWS}"
        );
        let mut steps = std::collections::BTreeMap::<i64, Step>::new();
        let results: Vec<(i64, String, Option<f64>)> = self.rows(&sql, &values, |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
        for (at, verdict, total_ms) in results {
            let step = steps.entry(at / step).or_default();
            *step.count(&verdict) += 1;
            step.total_ms.extend(total_ms);
        }
        let sql = format!(
            "SELECT b.minute * 60000 / {step}, max(b.files), max(b.messages) FROM backlog b JOIN appliance p ON p.id = b.appliance
             WHERE 1 {restriction} AND b.minute * 60000 >= ? AND b.minute * 60000 < ? GROUP BY 1"
        );
        let waiting: Vec<(i64, i64, i64)> = self.rows(&sql, &values, |row| {
            Ok((row.get(0)?, row.get(1)?, row.get(2)?))
        })?;
        for (number, files, messages) in waiting {
            steps.entry(number).or_default().backlog = Some((files, messages));
        }
        let steps: Vec<_> = steps
            .into_iter()
            .map(|(number, step_of)| step_of.into_json(number * step))
            .collect();
        Ok(json!({ "from": time(from_ms), "to": time(to_ms), "step_ms": step, "steps": steps }))
    }
}

/// One step of a chart.
#[derive(Default)]
struct Step {
    positive: u64,
    negative: u64,
    indeterminate: u64,
    rejected: u64,
    skipped: u64,
    total_ms: Vec<f64>,
    backlog: Option<(i64, i64)>,
}

impl Step {
    fn count(&mut self, verdict: &str) -> &mut u64 {
        match verdict {
            "positive" => &mut self.positive,
            "negative" => &mut self.negative,
            "indeterminate" => &mut self.indeterminate,
            "rejected" => &mut self.rejected,
            _ => &mut self.skipped,
        }
    }

    fn into_json(mut self, at_ms: i64) -> Value {
        self.total_ms.sort_by(f64::total_cmp);
        json!({
            "at": time(at_ms),
            "positive": self.positive, "negative": self.negative, "indeterminate": self.indeterminate,
            "rejected": self.rejected, "skipped": self.skipped,
            "p50_ms": quantile(&self.total_ms, 0.5), "p95_ms": quantile(&self.total_ms, 0.95),
            "files": self.backlog.map(|b| b.0), "messages": self.backlog.map(|b| b.1),
        })
    }
}

fn text(value: &str) -> Sql {
    Sql::Text(value.into())
}

fn blob(id: Pseudonym) -> Sql {
    Sql::Blob(id.0.to_vec())
}

fn integer(value: usize) -> Sql {
    Sql::Integer(value as i64)
}

fn time(ms: i64) -> String {
    jiff::Timestamp::from_millisecond(ms).map_or_else(|_| String::new(), rfc3339)
}

/// A payload as it was stored.
fn payload(text: String) -> Value {
    serde_json::from_str(&text).unwrap_or(Value::String(text))
}

fn alert_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Value> {
    let mut alert = payload(row.get(2)?);
    if !alert.is_object() {
        alert = json!({});
    }
    alert["site"] = row.get::<_, String>(0)?.into();
    alert["device"] = row.get::<_, String>(1)?.into();
    alert["closed"] = row.get::<_, bool>(3)?.into();
    alert["raised_at"] = time(row.get(4)?).into();
    alert["updated_at"] = time(row.get(5)?).into();
    alert["acknowledged_at"] = row.get::<_, Option<i64>>(6)?.map(time).into();
    alert["acknowledged_by"] = row.get::<_, Option<String>>(7)?.into();
    Ok(alert)
}

fn result_row(line: &rusqlite::Row<'_>, all: bool) -> rusqlite::Result<Value> {
    let (site, device) = (line.get(1)?, line.get(2)?);
    let stored = payload(line.get(3)?);
    let mut result = row(&ApplianceKey { site, device }, &stored);
    result["id"] = line.get::<_, i64>(0)?.into();
    result["preview"] = line.get::<_, bool>(4)?.into();
    let heatmap: Option<String> = line.get(5)?;
    let heatmap = heatmap.and_then(|text| serde_json::from_str::<Heatmap>(&text).ok());
    result["heatmap"] = serde_json::to_value(heatmap).unwrap_or_default();
    if all {
        result["message"] = stored;
    }
    Ok(result)
}
