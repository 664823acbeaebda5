//! The power goes: the write-ahead log ends anywhere, its last write torn; a checkpoint stops half-way. Each time the ledger must hold exactly
//! what the last commit that reached the disk had made, and that is at least everything that was answered by then.

use std::collections::BTreeMap;
use std::path::Path;

use rusqlite::Connection;
use rusqlite::types::Value;
use scansentry::config::AlertRule;
use scansentry::message::OutboxMessage;
use scansentry::scan::{Pseudonym, ScanFile, Stamp};
use scansentry::store::{DATABASE, Ledger, NewOutcome, Opened, PictureOutcome, Store, StudyGroup};

/// Every row of every table, without what each opening counts.
type Content = BTreeMap<String, Vec<Vec<Value>>>;

fn content(database: &Path) -> Content {
    let conn = Connection::open(database).unwrap();
    let tables = "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite_%'";
    let tables: Vec<String> = conn
        .prepare(tables)
        .unwrap()
        .query_map([], |row| row.get(0))
        .unwrap()
        .map(Result::unwrap)
        .collect();
    let rows = |table: &String| {
        let which = if table == "counter" {
            "WHERE name NOT IN ('session', 'closed')"
        } else {
            ""
        };
        let mut select = conn
            .prepare(&format!("SELECT * FROM {table} {which}"))
            .unwrap();
        let columns = select.column_count();
        let mut rows: Vec<Vec<Value>> = select
            .query_map([], |row| (0..columns).map(|i| row.get(i)).collect())
            .unwrap()
            .map(Result::unwrap)
            .collect();
        rows.sort_by_key(|row| format!("{row:?}"));
        rows
    };
    tables.iter().map(|t| (t.clone(), rows(t))).collect()
}

fn id(kind: u8, number: u64) -> Pseudonym {
    let mut bytes = [kind; 16];
    bytes[8..].copy_from_slice(&number.to_be_bytes());
    Pseudonym(bytes)
}

/// The steps of one image, each a commit of its own: claim, outcome with messages, confirmation of the message before.
fn step(store: &Store, number: u64) {
    let (image, part) = (number / 3, number % 3);
    let done = match part {
        0 => store.call_blocking(move |l| {
            let stamp = Stamp {
                size: 1,
                mtime_ns: 2,
                ctime_ns: 3,
                inode: image,
            };
            let path = format!("{image}.dcm").into();
            l.claim(id(1, image), &ScanFile { path, stamp }, 100, 3)?;
            Ok(())
        }),
        1 => store.call_blocking(move |l| {
            let probability = (image % 10) as f64 / 10.0;
            let positive = probability >= 0.5;
            let new = NewOutcome {
                scan_id: id(1, image),
                outcome: "classified",
                reason: None,
                message: None,
                decision: Some(if positive { "positive" } else { "negative" }),
                probability: Some(probability),
                group: StudyGroup {
                    group_id: id(2, image / 7),
                    fixed: true,
                    fresh_id: id(3, image),
                },
                pictures: vec![PictureOutcome {
                    frame: None,
                    probability: Some(probability),
                    positive,
                }],
            };
            let message = OutboxMessage {
                seq: 0,
                event_id: id(4, image),
                topic: "scansentry/a/b/result".into(),
                payload: vec![b'x'; 300 + 40 * (image as usize % 20)],
                returned: false,
            };
            let rule = AlertRule {
                min_positives: 1,
                window: 1,
            };
            l.record(&new, 100, 0, Some(rule), |_, _, _| vec![message])?;
            Ok(())
        }),
        _ => store.call_blocking(|l| {
            let oldest = l.pending(0, 1)?;
            l.confirm(&oldest.iter().map(|m| m.seq).collect::<Vec<_>>())
        }),
    };
    done.unwrap();
}

/// What lay on the disk after each answered step.
struct Recording {
    /// The database as it was all along: nothing has been moved into it.
    database: Vec<u8>,
    /// As far as it is written.
    wal: Vec<u8>,
    /// Its length: the rest is zeros.
    reserved: usize,
    /// After each step: how long the log was, and what the ledger held.
    answered: Vec<(usize, Content)>,
}

impl Recording {
    fn make(steps: u64) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let Opened { store, thread, .. } = Store::open(folder.path()).unwrap();
        let path = folder.path().join(DATABASE);
        let wal_path = folder.path().join(format!("{DATABASE}-wal"));
        // In a copy: a reader beside would be one more connection, which could move the log into the database.
        let look = || {
            let copy = tempfile::tempdir().unwrap();
            let (database, wal) = (std::fs::read(&path).unwrap(), std::fs::read(&wal_path));
            let wal = wal.unwrap();
            let content = content(&lay(copy.path(), &database, &wal));
            (written(&wal), content)
        };
        let mut answered = vec![look()];
        for number in 0..steps {
            step(&store, number);
            answered.push(look());
        }
        let mut wal = std::fs::read(&wal_path).unwrap();
        let reserved = wal.len();
        wal.truncate(written(&wal));
        assert!(reserved > wal.len(), "its length was there from the start");
        assert!(answered[0].0 < wal.len(), "and each step is seen in it");
        let recording = Self {
            database: std::fs::read(&path).unwrap(),
            wal,
            reserved,
            answered,
        };
        // It closes the database in this folder, in its own time.
        drop(store);
        thread.join().unwrap();
        recording
    }

    /// What must be there when the first `length` bytes of the log are.
    fn expected(&self, length: usize) -> &Content {
        let reached = self.answered.iter().rev().find(|(end, _)| *end <= length);
        &reached.expect("the database was made before").1
    }
}

/// How far a log is written that has not begun anew: its header, and frames (`SQLite`'s file format, 4.1 and 4.2) up to one for no page.
fn written(wal: &[u8]) -> usize {
    const HEADER: usize = 32;
    const FRAME: usize = 24 + 1024;
    let frames = wal[HEADER..].chunks_exact(FRAME);
    HEADER + FRAME * frames.take_while(|frame| frame[..4] != [0; 4]).count()
}

fn lay(folder: &Path, database: &[u8], wal: &[u8]) -> std::path::PathBuf {
    let path = folder.join(DATABASE);
    std::fs::write(&path, database).unwrap();
    std::fs::write(folder.join(format!("{DATABASE}-wal")), wal).unwrap();
    path
}

/// Opens what is on the disk as the daemon does, and compares.
#[track_caller]
fn assert_holds(database: &[u8], wal: &[u8], expected: &Content, what: &str) {
    let folder = tempfile::tempdir().unwrap();
    let path = lay(folder.path(), database, wal);
    let ledger = Ledger::open(&path).unwrap_or_else(|e| panic!("{what}: {e}"));
    drop(ledger);
    assert!(&content(&path) == expected, "{what}: another content");
}

/// A generator with a fixed seed: xorshift64* (Vigna 2016).
struct Random(u64);

impl Random {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        (self.0.wrapping_mul(0x2545_F491_4F6C_DD1D) >> 33) as usize % bound
    }
}

fn cut_anywhere(steps: u64, cuts: usize) {
    let recording = Recording::make(steps);
    let (wal, first) = (&recording.wal, recording.answered[0].0);
    let mut random = Random(7);
    // Where a commit ends and one byte to each side, then anywhere.
    let ends = recording.answered.iter().map(|(end, _)| *end);
    let mut lengths: Vec<usize> = ends.flat_map(|end| [end - 1, end, end + 1]).collect();
    lengths.extend((0..cuts).map(|_| first + random.below(wal.len() - first + 1)));
    lengths.retain(|length| (first..=wal.len()).contains(length));
    for length in lengths {
        let expected = recording.expected(length);
        let database = &recording.database;
        assert_holds(
            database,
            &wal[..length],
            expected,
            &format!("cut at {length}"),
        );
        // The last write did not get there whole: zeros as before, what was in those sectors before, or a gap with later sectors behind it.
        let mut torn = wal[..length].to_vec();
        let rest = (wal.len() - length).min(4096);
        match random.below(3) {
            0 => torn.resize(recording.reserved, 0),
            1 => torn.extend((0..rest).map(|_| random.below(256) as u8)),
            _ => {
                torn.resize(length + rest.min(512), 0);
                torn.extend(&wal[torn.len()..]);
            }
        }
        // Where those bytes are by chance what would have been written, it counts as written.
        let same = torn.iter().zip(wal).take_while(|(t, w)| t == w).count();
        let expected = recording.expected(same);
        assert_holds(database, &torn, expected, &format!("torn at {length}"));
    }
}

#[test]
fn the_log_cut_or_torn_anywhere_holds_what_was_answered_until_there() {
    cut_anywhere(45, 60);
}

/// `make faults`.
#[test]
#[ignore = "long: make faults"]
fn the_log_cut_or_torn_at_thousands_of_places_holds_what_was_answered_until_there() {
    cut_anywhere(150, 3000);
}

#[test]
fn a_checkpoint_cut_half_way_loses_nothing() {
    const PAGE: usize = 1024;
    let recording = Recording::make(60);
    let (database, wal) = (&recording.database, &recording.wal);
    let expected = &recording.answered.last().unwrap().1;
    // What the finished checkpoint leaves.
    let folder = tempfile::tempdir().unwrap();
    let path = lay(folder.path(), database, wal);
    let conn = Connection::open(&path).unwrap();
    conn.query_row("PRAGMA wal_checkpoint(FULL)", [], |_| Ok(()))
        .unwrap();
    let after = std::fs::read(&path).unwrap();
    drop(conn);
    assert_ne!(&after, database, "something was moved");
    let mut random = Random(11);
    for round in 0..40 {
        // The log is synced before the first page is moved, and emptied only after the last is synced.
        let mut half = database.clone();
        half.resize(after.len(), 0);
        for page in 0..after.len() / PAGE {
            let written = match random.below(3) {
                0 => 0,
                1 => PAGE,
                _ => random.below(PAGE),
            };
            let from = page * PAGE;
            half[from..from + written].copy_from_slice(&after[from..from + written]);
        }
        assert_holds(&half, wal, expected, &format!("checkpoint {round}"));
    }
}
