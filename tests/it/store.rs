//! The ledger against a small model: any order of claims, outcomes, acknowledgements and crashes.

use std::collections::BTreeMap;
use std::path::Path;

use proptest::prelude::*;
use scansentry::message::{AlertChange, OutboxMessage};
use scansentry::scan::{Pseudonym, ScanFile, Stamp};
use scansentry::store::{
    Claim, DATABASE, NewOutcome, Opened, StateDir, Store, StoreError, StudyGroup,
};

const ATTEMPTS: u32 = 3;

fn id(number: u8) -> Pseudonym {
    Pseudonym([number; 16])
}

fn file(number: u8) -> ScanFile {
    let stamp = Stamp {
        size: 1,
        mtime_ns: 2,
        ctime_ns: 3,
        inode: u64::from(number),
    };
    ScanFile {
        path: format!("{number}").into(),
        stamp,
    }
}

fn outcome(number: u8) -> NewOutcome {
    NewOutcome {
        scan_id: id(number),
        outcome: "classified",
        reason: None,
        decision: Some("positive"),
        probability: Some(0.9),
        group: StudyGroup {
            group_id: id(200),
            fixed: false,
            fresh_id: id(201),
        },
        images: 1,
        positives: 1,
    }
}

fn message(number: u8) -> OutboxMessage {
    OutboxMessage {
        seq: 0,
        event_id: id(number),
        topic: "t".into(),
        payload: vec![number],
    }
}

struct Running {
    folder: tempfile::TempDir,
    opened: Opened,
}

impl Running {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let opened = Store::open(folder.path()).unwrap();
        Self { folder, opened }
    }

    /// The process dies: what is on the disk at this moment is opened by another one.
    fn crash(self) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for suffix in ["", "-wal"] {
            let name = format!("{DATABASE}{suffix}");
            if self.folder.path().join(&name).exists() {
                std::fs::copy(self.folder.path().join(&name), folder.path().join(&name)).unwrap();
            }
        }
        let opened = Store::open(folder.path()).unwrap();
        assert_eq!(opened.set_aside, None);
        Self { folder, opened }
    }

    fn store(&self) -> &Store {
        &self.opened.store
    }

    fn claim(&self, number: u8) -> Claim {
        self.store()
            .call_blocking(move |l| l.claim(id(number), &file(number), 100, ATTEMPTS))
            .unwrap()
    }

    fn record(&self, number: u8) -> bool {
        self.store()
            .call_blocking(move |l| {
                l.record(&outcome(number), 100, false, |_, _| {
                    vec![message(number), message(number + 100)]
                })
            })
            .unwrap()
    }

    fn pending(&self) -> Vec<u8> {
        let pending = self.store().call_blocking(|l| l.pending(0, 1000)).unwrap();
        pending.into_iter().map(|m| m.payload[0]).collect()
    }
}

#[derive(Debug, Clone)]
enum Op {
    Claim(u8),
    Release(u8),
    Record(u8),
    ConfirmOldest,
    Crash,
}

#[derive(Debug, Default, Clone)]
struct Scan {
    attempts: u32,
    held: bool,
    done: bool,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0..4_u8).prop_map(Op::Claim),
        1 => (0..4_u8).prop_map(Op::Release),
        3 => (0..4_u8).prop_map(Op::Record),
        2 => Just(Op::ConfirmOldest),
        2 => Just(Op::Crash),
    ];
    prop::collection::vec(op, 1..40)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, ..ProptestConfig::default() })]

    #[test]
    fn the_ledger_does_what_the_model_says(ops in ops()) {
        let mut running = Running::new();
        let mut scans: BTreeMap<u8, Scan> = BTreeMap::new();
        let mut outbox: Vec<u8> = Vec::new();
        for op in ops {
            match op {
                Op::Claim(n) => {
                    let scan = scans.entry(n).or_default();
                    let expected = if scan.done {
                        Claim::Known
                    } else if scan.held {
                        Claim::InProgress
                    } else if scan.attempts >= ATTEMPTS {
                        Claim::GiveUp { deaths: scan.attempts }
                    } else {
                        Claim::Run { attempt: scan.attempts + 1 }
                    };
                    if !scan.done && !scan.held {
                        scan.attempts += 1;
                        scan.held = true;
                    }
                    prop_assert_eq!(running.claim(n), expected);
                }
                Op::Release(n) => {
                    running.store().call_blocking(move |l| l.release(id(n))).unwrap();
                    let scan = scans.entry(n).or_default();
                    if !scan.done {
                        scan.attempts = scan.attempts.saturating_sub(1);
                        scan.held = false;
                    }
                }
                Op::Record(n) => {
                    let known = scans.entry(n).or_default();
                    // An outcome belongs to a claimed scan, and there is only one.
                    let expected = known.attempts > 0 && !known.done;
                    // A release without a claim leaves no row, so nothing can be recorded.
                    if known.attempts > 0 || known.done {
                        prop_assert_eq!(running.record(n), expected);
                    }
                    if expected {
                        known.done = true;
                        outbox.extend([n, n + 100]);
                    }
                }
                Op::ConfirmOldest => {
                    let oldest = running.store().call_blocking(|l| l.pending(0, 1)).unwrap();
                    if let Some(oldest) = oldest.first() {
                        let seq = oldest.seq;
                        running.store().call_blocking(move |l| l.confirm(&[seq])).unwrap();
                        outbox.remove(0);
                    }
                }
                Op::Crash => {
                    running = running.crash();
                    let suspects = scans.values().any(|s| !s.done && s.attempts > 0);
                    prop_assert_eq!(running.opened.suspects, suspects);
                    for scan in scans.values_mut() {
                        scan.held = false;
                    }
                }
            }
            prop_assert_eq!(running.pending(), outbox.clone());
            prop_assert_eq!(running.store().outbox_len(), outbox.len() as u64);
        }
        let counts = running.store().call_blocking(|l| l.counts()).unwrap();
        prop_assert_eq!(counts.classified, scans.values().filter(|s| s.done).count() as u64);
    }
}

#[test]
fn a_failed_call_leaves_no_trace_and_its_neighbours_alone() {
    let running = Running::new();
    running.claim(1);
    let failed: Result<(), _> = running.store().call_blocking(|l| {
        l.record(&outcome(1), 100, false, |_, _| vec![message(1)])?;
        Err(StoreError::Other("no".into()))
    });
    assert!(failed.is_err());
    assert_eq!(running.pending(), Vec::<u8>::new());
    assert_eq!(running.store().outbox_len(), 0);
    assert!(running.record(1), "the outcome was not recorded either");
}

#[test]
fn a_damaged_ledger_is_set_aside_and_a_newer_one_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join(DATABASE), vec![0x5a; 8192]).unwrap();
    let opened = Store::open(folder.path()).unwrap();
    let aside = opened.set_aside.unwrap();
    assert_eq!(std::fs::read(&aside).unwrap(), vec![0x5a; 8192]);
    assert!(
        aside
            .file_name()
            .unwrap()
            .to_str()
            .unwrap()
            .contains("damaged")
    );

    drop(opened.store);
    opened.thread.join().unwrap();
    let database = folder.path().join(DATABASE);
    let sqlite = rusqlite::Connection::open(&database).unwrap();
    sqlite.pragma_update(None, "user_version", 99).unwrap();
    drop(sqlite);
    assert!(matches!(
        Store::open(folder.path()),
        Err(StoreError::Newer { found: 99, .. })
    ));
    assert!(database.exists());
}

#[test]
fn damage_met_in_use_ends_the_store_and_the_next_start_sets_it_aside() {
    let running = Running::new();
    for number in 0..150 {
        running.claim(number);
        running.record(number);
    }
    let Running { folder, opened } = running;
    drop(opened.store);
    opened.thread.join().unwrap();
    // Closed in order, so the next start does not look at every page; damaged afterwards.
    let path = folder.path().join(DATABASE);
    let mut bytes = std::fs::read(&path).unwrap();
    let after_schema = 4096;
    bytes[after_schema..].fill(0xa5);
    std::fs::write(&path, &bytes).unwrap();
    let errors = match Store::open(folder.path()) {
        // Found at once: set aside at once.
        Ok(opened) if opened.set_aside.is_some() => return,
        Err(error) => panic!("{error}"),
        Ok(opened) => {
            let call = |n: u8| {
                opened
                    .store
                    .call_blocking(move |l| l.claim(id(n), &file(n), 100, ATTEMPTS))
            };
            let errors: Vec<_> = (0..3).filter_map(|n| call(n).err()).collect();
            drop(opened.store);
            opened.thread.join().unwrap();
            errors
        }
    };
    assert!(matches!(errors[0], StoreError::Corrupt(_)), "{errors:?}");
    assert!(
        matches!(errors.last(), Some(StoreError::Closed)),
        "{errors:?}"
    );
    let again = Store::open(folder.path()).unwrap();
    assert!(again.set_aside.is_some());
    drop(again.store);
    again.thread.join().unwrap();
    assert!(Store::open(folder.path()).unwrap().set_aside.is_none());
}

#[test]
fn known_files_are_skipped_until_their_stamp_changes_and_forgotten_when_long_gone() {
    let running = Running::new();
    running.claim(1);
    running.record(1);
    let unknown = |files: Vec<ScanFile>, day| {
        running
            .store()
            .call_blocking(move |l| l.unknown(files, day))
            .unwrap()
    };
    let mut changed = file(1);
    changed.stamp.ctime_ns += 1;
    assert_eq!(
        unknown(vec![file(1), file(2), changed.clone()], 0),
        [file(2), changed]
    );
    // Seen again on day 500, the file keeps its scan; not seen since, both go, but not while a message waits for nothing of it.
    unknown(vec![file(1)], 500);
    let prune = |day| {
        running
            .store()
            .call_blocking(move |l| l.prune(day, 100))
            .unwrap()
    };
    assert_eq!(prune(400), 0);
    assert!(prune(501) >= 2);
    assert_eq!(running.claim(1), Claim::Run { attempt: 1 });
}

#[test]
fn one_alert_a_study_updated_and_closed() {
    let running = Running::new();
    let mut said = Vec::new();
    for number in 1..=3 {
        running.claim(number);
        let (tell, told) = std::sync::mpsc::channel();
        running
            .store()
            .call_blocking(move |l| {
                l.record(
                    &outcome(number),
                    100 + i64::from(number),
                    true,
                    |study, change| {
                        tell.send((change, study.positives, study.alert_revision))
                            .unwrap();
                        vec![]
                    },
                )
            })
            .unwrap();
        said.extend(told.try_iter());
    }
    assert_eq!(
        said,
        [
            (Some(AlertChange::Raised), 1, 1),
            (None, 2, 1),
            (None, 3, 1)
        ]
    );
    let tend = |now: i64, quiet: i64, update: i64| {
        let (tell, told) = std::sync::mpsc::channel();
        running
            .store()
            .call_blocking(move |l| {
                l.tend_studies(now, quiet, update, 10, |study, change| {
                    tell.send((change, study.positives, study.alert_revision))
                        .unwrap();
                    vec![]
                })
            })
            .unwrap();
        told.try_iter().collect::<Vec<_>>()
    };
    assert_eq!(tend(105, 0, 95), [], "too early to update");
    assert_eq!(tend(111, 0, 101), [(AlertChange::Updated, 3, 2)]);
    assert_eq!(tend(112, 0, 111), [], "nothing new");
    assert_eq!(tend(200, 150, 190), [(AlertChange::Closed, 3, 3)]);
    assert_eq!(tend(201, 150, 190), []);
}

#[test]
fn the_state_directory_is_private_and_has_one_user() {
    use std::os::unix::fs::PermissionsExt as _;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let first = StateDir::open(&path).unwrap();
    assert!(StateDir::open(&path).is_err());
    let mode = |p: &Path| std::fs::metadata(p).unwrap().permissions().mode() & 0o777;
    assert_eq!(mode(&path), 0o700);
    assert_eq!(mode(&path.join("pseudonym.key")), 0o600);
    let id = first.key().pseudonym("scan", &[b"x"]);
    drop(first);
    assert_eq!(
        StateDir::open(&path)
            .unwrap()
            .key()
            .pseudonym("scan", &[b"x"]),
        id
    );
}
