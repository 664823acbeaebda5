//! The ledger against a small model: any order of claims, outcomes, acknowledgements and crashes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use scansentry::config::AlertRule;
use scansentry::message::{AlertChange, Counts, OutboxMessage, PositivePicture};
use scansentry::prediction::{Decision, RejectCode};
use scansentry::scan::{Pseudonym, ScanFile, Stamp};
use scansentry::store::{
    Claim, DATABASE, Ledger, NewOutcome, Opened, PictureOutcome, Selection, StateDir, Store,
    StoreError, StudyGroup,
};

const ATTEMPTS: u32 = 3;

/// Seconds without a new picture that end a study.
const QUIET: i64 = 50;

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
        message: None,
        decision: Some("positive"),
        probability: Some(0.9),
        group: StudyGroup {
            group_id: id(200),
            fixed: false,
            fresh_id: id(201),
        },
        pictures: vec![PictureOutcome {
            frame: None,
            probability: Some(0.9),
            positive: true,
        }],
    }
}

/// An outcome with this probability, in the study of a DICOM study if `fixed`.
fn outcome_of(number: u8, probability: f64, fixed: bool) -> NewOutcome {
    let positive = probability >= 0.5;
    let mut new = outcome(number);
    new.decision = Some(if positive { "positive" } else { "negative" });
    new.probability = Some(probability);
    new.pictures[0].probability = Some(probability);
    new.pictures[0].positive = positive;
    new.group.fixed = fixed;
    new
}

fn message(number: u8) -> OutboxMessage {
    OutboxMessage {
        seq: 0,
        event_id: id(number),
        topic: "t".into(),
        payload: vec![number],
        returned: false,
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

    /// Closes it in order.
    fn close(self) -> tempfile::TempDir {
        drop(self.opened.store);
        self.opened.thread.join().unwrap();
        self.folder
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
                l.record(&outcome(number), 100, 0, None, |_, _, _| {
                    vec![message(number), message(number + 100)]
                })
            })
            .unwrap()
            .is_some()
    }

    /// What is said about the study when an outcome is recorded: change of the alert, images, positives, revisions of alert and result.
    fn record_of(
        &self,
        new: NewOutcome,
        now: i64,
        rule: AlertRule,
    ) -> (Option<AlertChange>, u64, u64, u64, u64) {
        let (tell, told) = std::sync::mpsc::channel();
        self.store()
            .call_blocking(move |l| {
                l.record(
                    &new,
                    now,
                    now - QUIET,
                    Some(rule),
                    |study, change, revision| {
                        let said = (
                            change,
                            study.images,
                            study.positives,
                            study.alert_revision,
                            revision,
                        );
                        tell.send(said).unwrap();
                        vec![]
                    },
                )
            })
            .unwrap();
        told.recv().unwrap()
    }

    /// What is said when studies are tended: change of the alert, whether open, images, positives, alert revision, closings.
    fn tend(&self, now: i64, quiet: i64) -> Vec<Tended> {
        let (tell, told) = std::sync::mpsc::channel();
        self.store()
            .call_blocking(move |l| {
                l.tend_studies(now, quiet, now, 10, |study, change| {
                    tell.send(Tended {
                        change,
                        open: study.open,
                        images: study.images,
                        positives: study.positives,
                        alert_revision: study.alert_revision,
                        closings: study.closings,
                        top: study.max_probability,
                        named: study.positive_pictures.clone(),
                    })
                    .unwrap();
                    vec![]
                })
            })
            .unwrap();
        told.try_iter().collect()
    }

    fn reprocess(&self, number: u8) {
        self.store()
            .call_blocking(move |l| l.reprocess(&[id(number)]))
            .unwrap();
    }

    fn pending(&self) -> Vec<u8> {
        let pending = self.store().call_blocking(|l| l.pending(0, 1000)).unwrap();
        pending.into_iter().map(|m| m.payload[0]).collect()
    }
}

#[derive(Debug, PartialEq)]
struct Tended {
    change: Option<AlertChange>,
    open: bool,
    images: u64,
    positives: u64,
    alert_revision: u64,
    closings: u64,
    top: Option<f64>,
    named: Vec<PositivePicture>,
}

#[derive(Debug, Clone)]
enum Op {
    Claim(u8),
    Release(u8),
    Record(u8),
    Reprocess(u8),
    ConfirmOldest,
    Crash,
}

#[derive(Debug, Default, Clone)]
struct Scan {
    attempts: u32,
    held: bool,
    done: bool,
    /// To be classified again.
    again: bool,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let op = prop_oneof![
        4 => (0..4_u8).prop_map(Op::Claim),
        1 => (0..4_u8).prop_map(Op::Release),
        3 => (0..4_u8).prop_map(Op::Record),
        2 => (0..4_u8).prop_map(Op::Reprocess),
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
                    let due = !scan.done || scan.again;
                    let expected = if !due {
                        Claim::Known
                    } else if scan.held {
                        Claim::InProgress
                    } else if scan.attempts >= ATTEMPTS {
                        Claim::GiveUp { deaths: scan.attempts }
                    } else {
                        Claim::Run { attempt: scan.attempts + 1 }
                    };
                    if due && !scan.held {
                        scan.attempts += 1;
                        scan.held = true;
                    }
                    prop_assert_eq!(running.claim(n), expected);
                }
                Op::Release(n) => {
                    let scan = scans.entry(n).or_default();
                    let attempt = scan.attempts;
                    running.store().call_blocking(move |l| l.release(id(n), attempt)).unwrap();
                    if scan.held && (!scan.done || scan.again) {
                        scan.attempts -= 1;
                        scan.held = false;
                    }
                }
                Op::Record(n) => {
                    let known = scans.entry(n).or_default();
                    // An outcome belongs to a claimed scan, and there is only one.
                    let expected = (known.attempts > 0 && !known.done) || known.again;
                    // A release without a claim leaves no row, so nothing can be recorded.
                    if known.attempts > 0 || known.done {
                        prop_assert_eq!(running.record(n), expected);
                    }
                    if expected {
                        known.done = true;
                        known.again = false;
                        // An event that waits already is not said twice.
                        for message in [n, n + 100] {
                            if !outbox.contains(&message) {
                                outbox.push(message);
                            }
                        }
                    }
                }
                Op::Reprocess(n) => {
                    running.reprocess(n);
                    let scan = scans.entry(n).or_default();
                    if scan.done && !scan.again {
                        *scan = Scan { done: true, again: true, ..Scan::default() };
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
                    let suspects = scans.values().any(|s| (!s.done || s.again) && s.attempts > 0);
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
        let done = scans.values().filter(|s| s.done).count() as u64;
        prop_assert_eq!((counts.classified, counts.positive), (done, done));
        let studies = running.tend(1000, 1000);
        prop_assert_eq!(studies.iter().map(|s| s.images).sum::<u64>(), done);
    }
}

#[test]
fn a_failed_call_leaves_no_trace_and_its_neighbours_alone() {
    let running = Running::new();
    running.claim(1);
    let failed: Result<(), _> = running.store().call_blocking(|l| {
        l.record(&outcome(1), 100, 0, None, |_, _, _| vec![message(1)])?;
        Err(StoreError::Other("no".into()))
    });
    assert!(failed.is_err());
    assert_eq!(running.pending(), Vec::<u8>::new());
    assert_eq!(running.store().outbox_len(), 0);
    assert!(running.record(1), "the outcome was not recorded either");
}

#[test]
fn of_damaged_ledgers_the_latest_three_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str| folder.path().join(name);
    for name in ["1", "1-wal", "7", "3", "3-wal", "5"] {
        std::fs::write(file(&format!("ledger.sqlite3.damaged-{name}")), "x").unwrap();
    }
    std::fs::write(file("ledger.sqlite3"), [7; 4096]).unwrap();
    let aside = Store::open(folder.path()).unwrap().set_aside.unwrap();
    let mut left: Vec<_> = std::fs::read_dir(folder.path())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.to_str().unwrap().contains(".damaged-"))
        .collect();
    left.sort();
    let kept = ["5", "7"].map(|name| file(&format!("ledger.sqlite3.damaged-{name}")));
    assert_eq!(left, [&[aside][..], &kept].concat());
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
fn a_call_that_panics_closes_the_ledger_and_nothing_of_it_stays() {
    let running = Running::new();
    let set = |value: &'static str| move |l: &mut Ledger| l.set_note("test", Some(value));
    running.store().call_blocking(set("before")).unwrap();
    let store = running.store().clone();
    let panicked = std::thread::spawn(move || {
        store.call_blocking(|l| -> Result<(), StoreError> {
            l.set_note("test", Some("half"))?;
            panic!("on purpose");
        })
    });
    assert!(panicked.join().is_err());
    for _ in 0..2 {
        let closed = running.store().call_blocking(set("after"));
        assert!(matches!(closed, Err(StoreError::Closed)), "{closed:?}");
    }
    let again = running.crash();
    let note = again.store().call_blocking(|l| l.note("test")).unwrap();
    assert_eq!(note.as_deref(), Some("before"));
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
fn a_claim_that_is_taken_away_counts_and_its_late_worker_changes_nothing() {
    let running = Running::new();
    let call = |path: PathBuf| {
        let taken = running.store().call_blocking(move |l| l.take_away(&path));
        taken.unwrap()
    };
    let path = || file(1).path;
    let release = |attempt| {
        let released = running
            .store()
            .call_blocking(move |l| l.release(id(1), attempt));
        released.unwrap();
    };
    assert_eq!(call(path()), None, "nobody has it");
    assert_eq!(running.claim(1), Claim::Run { attempt: 1 });
    assert_eq!(running.claim(1), Claim::InProgress);
    assert_eq!(call(path()), Some(id(1)));
    assert_eq!(call(path()), None, "it is nobody's any more");
    assert_eq!(running.claim(1), Claim::Run { attempt: 2 });
    // The first worker comes back and wants to give back what it does not hold.
    release(1);
    assert_eq!(running.claim(1), Claim::InProgress);
    release(2);
    assert_eq!(running.claim(1), Claim::Run { attempt: 2 });
    assert!(running.record(1));
    assert!(!running.record(1), "a late outcome is none");
    assert_eq!(call(path()), None, "it is done");
    assert_eq!(running.claim(1), Claim::Known);
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
    // Neither is one whose file went away while the process died on it.
    running.claim(2);
    let running = running.crash();
    let prune = |day| {
        running
            .store()
            .call_blocking(move |l| l.prune(day, 100))
            .unwrap()
    };
    assert_eq!(prune(0), 0);
    assert_eq!(prune(400), 2, "the second file and its scan");
    assert!(prune(501) >= 2);
    assert_eq!(running.claim(1), Claim::Run { attempt: 1 });
    assert_eq!(running.claim(2), Claim::Run { attempt: 1 });
}

const FIRST: AlertRule = AlertRule {
    min_positives: 1,
    window: 1,
};

#[test]
fn one_alert_a_study_updated_and_closed() {
    let running = Running::new();
    let mut said = Vec::new();
    for number in 1..=3 {
        running.claim(number);
        said.push(running.record_of(outcome(number), 100 + i64::from(number), FIRST));
    }
    let raised = Some(AlertChange::Raised);
    assert_eq!(
        said,
        [(raised, 1, 1, 1, 1), (None, 2, 2, 1, 1), (None, 3, 3, 1, 1)]
    );
    let tend = |now: i64, quiet: i64, update: i64| {
        let (tell, told) = std::sync::mpsc::channel();
        running
            .store()
            .call_blocking(move |l| {
                l.tend_studies(now, quiet, update, 10, |study, change| {
                    tell.send((change.unwrap(), study.positives, study.alert_revision))
                        .unwrap();
                    vec![]
                })
            })
            .unwrap();
        told.try_iter().collect::<Vec<_>>()
    };
    let due = |quiet_s, update_s| {
        let due = running
            .store()
            .call_blocking(move |l| l.studies_due(quiet_s, update_s));
        due.unwrap()
    };
    assert_eq!(due(None, 10), Some(111), "an update, of the alert at 101");
    assert_eq!(
        due(Some(5), 10),
        Some(108),
        "the end, after the outcome at 103"
    );
    assert_eq!(tend(105, 0, 95), [], "too early to update");
    assert_eq!(tend(111, 0, 101), [(AlertChange::Updated, 3, 2)]);
    assert_eq!(tend(112, 0, 111), [], "nothing new");
    assert_eq!((due(None, 10), due(Some(50), 10)), (None, Some(153)));
    assert_eq!(tend(200, 150, 190), [(AlertChange::Closed, 3, 3)]);
    assert_eq!(due(Some(50), 10), None);
    assert_eq!(tend(201, 150, 190), []);
    let open = running.store().call_blocking(|l| l.open_alerts());
    assert_eq!(open.unwrap(), 0);
}

#[test]
fn an_alert_follows_its_rule_and_is_raised_again_when_the_study_goes_on() {
    let running = Running::new();
    let rule = AlertRule {
        min_positives: 2,
        window: 3,
    };
    let mut number = 0;
    let mut record = |probability: f64, now: i64| {
        number += 1;
        running.claim(number);
        running
            .record_of(outcome_of(number, probability, true), now, rule)
            .0
    };
    let raised = Some(AlertChange::Raised);
    // Two positive pictures with two others between them are too far apart.
    let said: Vec<_> = [0.9, 0.1, 0.1, 0.8, 0.1, 0.7, 0.6]
        .into_iter()
        .map(|p| record(p, 100))
        .collect();
    assert_eq!(said, [None, None, None, None, None, raised, None]);
    let closed = running.tend(200, 150);
    assert_eq!(closed.len(), 1);
    assert_eq!(closed[0].change, Some(AlertChange::Closed));
    assert_eq!((closed[0].positives, closed[0].alert_revision), (4, 2));
    let named: Vec<_> = closed[0].named.iter().map(|p| p.probability).collect();
    assert_eq!(named, [0.9, 0.8, 0.7, 0.6]);

    // Going on with nothing positive, the study is closed again and the alert has nothing to say.
    assert_eq!(record(0.1, 300), None);
    let closed = running.tend(400, 350);
    assert_eq!((closed[0].change, closed[0].closings), (None, 2));
    // What was positive before does not count towards another alert; what is positive now does.
    assert_eq!(record(0.9, 500), None);
    assert_eq!(record(0.9, 501), raised);
    let open = running.store().call_blocking(|l| l.open_alerts());
    assert_eq!(open.unwrap(), 1);
    let closed = running.tend(600, 550);
    assert_eq!(
        (closed[0].change, closed[0].alert_revision),
        (Some(AlertChange::Closed), 4)
    );
}

#[test]
fn a_scan_that_is_classified_again_replaces_its_outcome_and_is_counted_once() {
    let running = Running::new();
    for (number, probability) in [(1, 0.9), (2, 0.1), (3, 0.7)] {
        running.claim(number);
        running.record_of(outcome_of(number, probability, false), 100, FIRST);
    }
    running.tend(200, 150);
    running.reprocess(1);
    running.reprocess(9);
    let unknown = |n: u8| {
        let unknown = running
            .store()
            .call_blocking(move |l| l.unknown(vec![file(n)], 0));
        !unknown.unwrap().is_empty()
    };
    assert!(unknown(1), "found by the next walk");
    assert!(!unknown(2));
    let counts = || running.store().call_blocking(|l| l.counts()).unwrap();
    assert_eq!(
        counts().classified,
        3,
        "the outcome stands until there is another"
    );
    assert_eq!(running.claim(1), Claim::Run { attempt: 1 });
    // The highest probability of the study falls, and it is in the same study although that was closed.
    let said = running.record_of(outcome_of(1, 0.2, false), 300, FIRST);
    assert_eq!(said, (None, 3, 1, 2, 2));
    assert_eq!(running.claim(1), Claim::Known);
    assert_eq!((counts().classified, counts().positive), (3, 1));
    let closed = running.tend(400, 350);
    assert_eq!(closed.len(), 1);
    assert_eq!(closed[0].change, Some(AlertChange::Closed), "corrected");
    assert_eq!((closed[0].top, closed[0].closings), (Some(0.7), 2));
    assert_eq!(closed[0].named.len(), 1);
    // Once more, and it is positive again: the alert of the study is raised again.
    running.reprocess(1);
    running.claim(1);
    let said = running.record_of(outcome_of(1, 0.8, false), 500, FIRST);
    assert_eq!(said, (Some(AlertChange::Raised), 3, 2, 4, 3));
}

#[test]
fn another_process_queues_scans_again_while_the_owner_works() {
    let running = Running::new();
    let scans = 40;
    for number in 1..=scans {
        running.claim(number);
        assert!(running.record(number));
    }
    let elsewhere = || {
        running
            .store()
            .call_blocking(Ledger::written_elsewhere)
            .unwrap()
    };
    assert!(!elsewhere(), "what the owner writes does not count");
    let path = running.folder.path().join(DATABASE);
    let mut other = Ledger::open_to_queue(&path).unwrap();
    other.queue(&[id(1), id(99)]).unwrap();
    assert_eq!(other.queued().unwrap(), 1);
    assert!(elsewhere() && !elsewhere(), "noticed once");

    // Both at the same time: each mark that is taken up ends in one new outcome, none is lost.
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut other = Ledger::open_to_queue(&path).unwrap();
            for _ in 0..20 {
                other
                    .queue(&(1..=scans).map(id).collect::<Vec<_>>())
                    .unwrap();
            }
        });
        for _ in 0..5 {
            for number in 1..=scans {
                if matches!(running.claim(number), Claim::Run { .. }) {
                    assert!(running.record(number));
                }
            }
        }
    });
    for number in 1..=scans {
        if matches!(running.claim(number), Claim::Run { .. }) {
            assert!(running.record(number));
        }
        assert_eq!(running.claim(number), Claim::Known);
    }
    assert_eq!(other.queued().unwrap(), 0);
    let counts = running.store().call_blocking(|l| l.counts()).unwrap();
    assert_eq!(
        (counts.classified, counts.positive),
        (u64::from(scans), u64::from(scans))
    );
}

#[test]
fn a_selection_takes_what_meets_all_of_it() {
    let running = Running::new();
    for (number, now) in [(1, 100), (2, 200), (3, 300)] {
        running.claim(number);
        running.record_of(
            outcome_of(number, f64::from(number) / 4.0, true),
            now,
            FIRST,
        );
    }
    running.claim(4);
    let mut bad = outcome(4);
    bad.outcome = "rejected";
    bad.reason = Some("blank");
    bad.message = Some("no pixel is bright".into());
    (bad.decision, bad.probability) = (None, None);
    bad.pictures[0].probability = None;
    bad.pictures[0].positive = false;
    running.record_of(bad, 400, FIRST);
    let selected = |selection: Selection| -> Vec<u8> {
        let page = running
            .store()
            .call_blocking(move |l| l.selected(&selection, None, 10));
        page.unwrap().into_iter().map(|(id, _)| id.0[0]).collect()
    };
    let all = Selection::default;
    assert_eq!(selected(all()), [1, 2, 3, 4]);
    let times = Selection {
        since: Some(200),
        until: Some(400),
        ..all()
    };
    assert_eq!(selected(times.clone()), [2, 3]);
    let decision = Some(Decision::Negative);
    assert_eq!(selected(Selection { decision, ..all() }), [1]);
    assert_eq!(selected(Selection { decision, ..times }), Vec::<u8>::new());
    assert_eq!(
        selected(Selection {
            rejected: true,
            ..all()
        }),
        [4]
    );
    let code = |code| Selection {
        code: Some(code),
        ..all()
    };
    assert_eq!(selected(code(RejectCode::Blank)), [4]);
    assert_eq!(selected(code(RejectCode::Empty)), Vec::<u8>::new());
    let scan_ids = Some(vec![id(4), id(1), id(77)]);
    assert_eq!(
        selected(Selection {
            scan_ids: scan_ids.clone(),
            ..all()
        }),
        [1, 4]
    );
    assert_eq!(
        selected(Selection {
            scan_ids,
            rejected: true,
            ..all()
        }),
        [4]
    );

    let rejected = running.store().call_blocking(|l| l.rejected()).unwrap();
    let [bad] = &rejected[..] else {
        panic!("{rejected:?}")
    };
    assert_eq!((bad.scan_id, bad.code.as_str()), (id(4), "blank"));
    assert_eq!(bad.message.as_deref(), Some("no pixel is bright"));
    assert_eq!(bad.places, [Path::new("4")]);
}

#[test]
fn a_new_loose_picture_does_not_join_a_study_that_only_a_reprocess_keeps_open() {
    let running = Running::new();
    let loose = |number: u8, now: i64| {
        running.claim(number);
        let mut new = outcome_of(number, 0.9, false);
        new.group.fresh_id = id(200 + number);
        running.record_of(new, now, FIRST)
    };
    let raised = Some(AlertChange::Raised);
    assert_eq!(loose(1, 100), (raised, 1, 1, 1, 1));
    assert_eq!(running.tend(151, 101).len(), 1);
    // Somebody else's pictures, long after; the old one has been classified again just now.
    running.reprocess(1);
    assert_eq!(loose(1, 1000), (None, 1, 1, 2, 2));
    assert_eq!(loose(2, 1001), (raised, 1, 1, 1, 1), "a study of its own");
    assert_eq!(loose(3, 1002), (None, 2, 2, 1, 1), "which goes on");
    // The same while the study has not been closed yet: a reprocess does not make its last picture later.
    running.reprocess(2);
    assert_eq!(loose(2, 1040), (None, 2, 2, 1, 2));
    let tended = running.tend(1052, 1002);
    let closed = tended.iter().filter(|s| !s.open);
    assert_eq!(closed.count(), 1, "the first one");
    assert_eq!(loose(4, 1060), (raised, 1, 1, 1, 1));
    // A study that nothing but new pictures kept open goes on, even when it could not be closed for long.
    assert_eq!(loose(5, 2000), (None, 2, 2, 1, 1));
}

#[test]
fn a_clock_that_is_set_back_keeps_no_alert_open() {
    let running = Running::new();
    for number in 1..=2 {
        running.claim(number);
        running.record_of(outcome(number), 10_000, FIRST);
    }
    let updated = running.tend(100, 50);
    assert_eq!(updated.len(), 1);
    assert_eq!(updated[0].change, Some(AlertChange::Updated));
    assert!(running.tend(149, 99).is_empty());
    let closed = running.tend(150, 100);
    assert_eq!(closed[0].change, Some(AlertChange::Closed));
}

#[test]
fn scans_of_format_1_are_counted_once_when_they_are_classified_again() {
    let folder = tempfile::tempdir().unwrap();
    let sqlite = rusqlite::Connection::open(folder.path().join(DATABASE)).unwrap();
    sqlite
        .execute_batch(include_str!("../golden/ledger-format-1.sql"))
        .unwrap();
    drop(sqlite);
    let opened = Store::open(folder.path()).unwrap();
    let running = Running { folder, opened };
    // Two frames, which format 1 counted as two pictures and remembers as one.
    let mut frames = outcome_of(2, 0.3, true);
    frames.group.group_id = id(201);
    frames.pictures.push(frames.pictures[0]);
    running.reprocess(2);
    running.claim(2);
    assert_eq!(running.record_of(frames, 110, FIRST), (None, 3, 1, 1, 2));
    // A loose picture is live; an old one, whose study nobody knows, is not counted there.
    running.claim(9);
    let mut live = outcome(9);
    live.group.fresh_id = id(209);
    running.record_of(live, 1000, FIRST);
    running.reprocess(1);
    running.claim(1);
    let mut old = outcome(1);
    old.group.fresh_id = id(211);
    let raised = Some(AlertChange::Raised);
    assert_eq!(running.record_of(old, 1001, FIRST), (raised, 1, 1, 1, 2));
    let closed = running.tend(2000, 1950);
    let tops: Vec<_> = closed.iter().map(|s| (s.images, s.top)).collect();
    assert_eq!(tops.len(), 3);
    assert!(tops.contains(&(3, Some(0.9))) && tops.contains(&(1, Some(0.9))));
}

#[test]
fn a_study_is_remembered_as_long_as_its_scans() {
    let running = Running::new();
    running.claim(1);
    running.record_of(outcome_of(1, 0.9, true), 100, FIRST);
    assert_eq!(running.tend(200, 150)[0].closings, 1);
    let unknown = |l: &mut Ledger| l.unknown(vec![file(1)], 500);
    assert!(running.store().call_blocking(unknown).unwrap().is_empty());
    let prune = |day| {
        let gone = running.store().call_blocking(move |l| l.prune(day, 100));
        gone.unwrap()
    };
    assert_eq!(prune(400), 0, "the file is still there");
    running.claim(2);
    let said = running.record_of(outcome_of(2, 0.9, true), 400 * 86_400, FIRST);
    assert_eq!(
        said,
        (Some(AlertChange::Raised), 2, 2, 3, 1),
        "revisions go on"
    );
    running.tend(401 * 86_400, 400 * 86_400);
    assert_eq!(prune(900), 5, "two files, two scans, the study");
}

#[test]
fn what_waits_is_counted_after_a_restart_and_from_beside() {
    let running = Running::new();
    let waiting = |counts: Counts| (counts.outbox, counts.oldest_outbox);
    let counts = |running: &Running| running.store().call_blocking(|l| l.counts()).unwrap();
    assert_eq!(waiting(counts(&running)), (0, None));
    running.claim(1);
    running.record(1);
    let running = running.crash();
    assert_eq!(waiting(counts(&running)), (2, Some(100)));
    let beside = Ledger::open_read_only(&running.folder.path().join(DATABASE)).unwrap();
    assert_eq!(waiting(beside.counts().unwrap()), (2, Some(100)));
}

#[test]
fn a_study_names_its_highest_positives_only() {
    let running = Running::new();
    for number in 1..=40 {
        running.claim(number);
        let probability = 0.5 + f64::from(number) / 100.0;
        running.record_of(outcome_of(number, probability, true), 100, FIRST);
    }
    let closed = running.tend(200, 150);
    assert_eq!((closed[0].positives, closed[0].named.len()), (40, 32));
    assert_eq!(closed[0].named[0].scan_id, id(40));
    assert_eq!(closed[0].named[31].scan_id, id(9));
}

#[test]
fn a_ledger_of_format_1_is_brought_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(DATABASE);
    let sqlite = rusqlite::Connection::open(&path).unwrap();
    sqlite
        .execute_batch(include_str!("../golden/ledger-format-1.sql"))
        .unwrap();
    drop(sqlite);
    let error = Ledger::open_read_only(&path).unwrap_err().to_string();
    assert!(error.contains("start the daemon once"), "{error}");
    let opened = Store::open(folder.path()).unwrap();
    assert_eq!(opened.set_aside, None);
    let running = Running { folder, opened };
    let counts = running.store().call_blocking(|l| l.counts()).unwrap();
    assert_eq!(
        (counts.classified, counts.rejected, counts.outbox),
        (2, 1, 1)
    );
    assert_eq!(running.pending(), [7]);
    assert_eq!(running.claim(2), Claim::Known);
    let open = running.store().call_blocking(|l| l.open_alerts());
    assert_eq!(open.unwrap(), 1);
    // Its study, which was open, goes on with its counts and its alert; a scan of it is not counted twice.
    running.reprocess(2);
    assert_eq!(running.claim(2), Claim::Run { attempt: 1 });
    let mut new = outcome_of(2, 0.3, true);
    new.group.group_id = id(201);
    assert_eq!(running.record_of(new, 110, FIRST), (None, 3, 1, 1, 2));
    let closed = running.tend(300, 200);
    assert_eq!((closed[0].images, closed[0].alert_revision), (3, 2));
    let again = running.crash();
    assert_eq!(again.claim(2), Claim::Known);
    assert!(Ledger::open_read_only(&again.folder.path().join(DATABASE)).is_ok());
}

#[test]
fn a_rejection_of_format_2_has_no_message_until_it_is_made_again() {
    let running = Running::new();
    let mut bad = outcome(1);
    bad.outcome = "rejected";
    bad.reason = Some("blank");
    (bad.decision, bad.probability) = (None, None);
    bad.pictures[0].probability = None;
    bad.pictures[0].positive = false;
    bad.message = Some("no pixel is bright".into());
    running.claim(1);
    running.record_of(bad.clone(), 100, FIRST);
    let folder = running.crash().close();
    let sqlite = rusqlite::Connection::open(folder.path().join(DATABASE)).unwrap();
    sqlite
        .execute_batch("ALTER TABLE scan DROP COLUMN message; ALTER TABLE outbox DROP COLUMN returned; DROP TABLE parked; PRAGMA user_version = 2;")
        .unwrap();
    drop(sqlite);
    let opened = Store::open(folder.path()).unwrap();
    assert_eq!(opened.set_aside, None);
    let running = Running { folder, opened };
    let message = || {
        let rejected = running.store().call_blocking(|l| l.rejected()).unwrap();
        assert_eq!((rejected.len(), rejected[0].code.as_str()), (1, "blank"));
        rejected[0].message.clone()
    };
    assert_eq!(message(), None);
    running.reprocess(1);
    running.claim(1);
    running.record_of(bad, 110, FIRST);
    assert_eq!(message().as_deref(), Some("no pixel is bright"));
}

#[test]
fn a_parked_message_comes_back_behind_the_others_byte_for_byte() {
    let running = Running::new();
    let queue = |number: u8| {
        let message = message(number);
        let queued = running
            .store()
            .call_blocking(move |l| l.answer(None, &message, 100));
        queued.unwrap();
    };
    let state = || {
        let lengths = (running.store().outbox_len(), running.store().parked_len());
        let counts = running.store().call_blocking(|l| l.counts()).unwrap();
        assert_eq!(lengths, (counts.outbox, counts.parked));
        lengths
    };
    (1..=4).for_each(queue);
    let oldest = running.store().call_blocking(|l| l.pending(0, 1)).unwrap();
    let seq = oldest[0].seq;
    assert!(!oldest[0].returned);
    let park = move |l: &mut Ledger| l.park(seq, "too large", 200);
    assert_eq!(running.store().call_blocking(park).unwrap(), 0);
    assert_eq!((running.pending(), state()), (vec![2, 3, 4], (3, 1)));
    let parked = running.store().call_blocking(|l| l.parked()).unwrap();
    let is = (parked[0].seq, &parked[0].topic[..], parked[0].bytes);
    assert_eq!(is, (seq, "t", 1));
    let is = (
        parked[0].created_at,
        parked[0].parked_at,
        &parked[0].reason[..],
    );
    assert_eq!(is, (100, 200, "too large"));

    let running = running.crash();
    assert_eq!(running.store().parked_len(), 1);
    let back = running.store().call_blocking(|l| l.bring_back(8)).unwrap();
    assert_eq!((back, running.pending()), (1, vec![2, 3, 4, 1]));
    let last = running.store().call_blocking(|l| l.pending(0, 9)).unwrap();
    let last = last.last().unwrap();
    assert!(last.returned && last.seq > seq);
    assert_eq!((&last.payload, last.event_id), (&vec![1], id(1)));

    // By another process; the owner notices.
    let seq = last.seq;
    let park = move |l: &mut Ledger| l.park(seq, "too large", 300);
    running.store().call_blocking(park).unwrap();
    running
        .store()
        .call_blocking(Ledger::written_elsewhere)
        .unwrap();
    let mut beside = Ledger::open_to_queue(&running.folder.path().join(DATABASE)).unwrap();
    assert_eq!(beside.retry(Some(&[12_345])).unwrap(), 0);
    assert_eq!(beside.retry(Some(&[seq])).unwrap(), 1);
    assert_eq!(running.store().parked_len(), 1, "not noticed yet");
    assert!(
        running
            .store()
            .call_blocking(Ledger::written_elsewhere)
            .unwrap()
    );
    let lengths = (running.store().outbox_len(), running.store().parked_len());
    assert_eq!((lengths, running.pending()), ((4, 0), vec![2, 3, 4, 1]));
}

#[test]
fn of_too_many_parked_messages_the_oldest_are_dropped_and_counted() {
    let running = Running::new();
    let dropped = running.store().call_blocking(|ledger| {
        let mut dropped = 0;
        for number in 0..10_003_u32 {
            let mut message = message(0);
            message.event_id.0[..4].copy_from_slice(&number.to_be_bytes());
            ledger.answer(None, &message, 100)?;
            let seq = ledger.pending(0, 1)?[0].seq;
            dropped += ledger.park(seq, "refused", 200)?;
        }
        Ok(dropped)
    });
    assert_eq!(dropped.unwrap(), 3);
    let counts = running.store().call_blocking(|l| l.counts()).unwrap();
    assert_eq!(
        (counts.outbox, counts.parked, counts.dropped),
        (0, 10_000, 3)
    );
}

#[test]
fn messages_of_format_3_are_kept_and_can_be_parked() {
    let running = Running::new();
    running.claim(1);
    assert!(running.record(1));
    let waiting = running.pending();
    let folder = running.crash().close();
    let sqlite = rusqlite::Connection::open(folder.path().join(DATABASE)).unwrap();
    sqlite
        .execute_batch(
            "ALTER TABLE outbox DROP COLUMN returned; DROP TABLE parked; PRAGMA user_version = 3;",
        )
        .unwrap();
    drop(sqlite);
    let opened = Store::open(folder.path()).unwrap();
    assert_eq!(opened.set_aside, None);
    let running = Running { folder, opened };
    assert_eq!(running.pending(), waiting);
    let park = |l: &mut Ledger| {
        let oldest = l.pending(0, 1)?.remove(0);
        assert!(!oldest.returned);
        l.park(oldest.seq, "too large", 200)
    };
    running.store().call_blocking(park).unwrap();
    assert_eq!(running.store().parked_len(), 1);
    assert_eq!(running.store().outbox_len(), waiting.len() as u64 - 1);
}

#[test]
fn answers_and_notes_are_remembered_within_bounds() {
    let running = Running::new();
    let answer = |n: u8| {
        running
            .store()
            .call_blocking(move |l| l.answer(Some(&n.to_string()), &message(n), 100))
            .unwrap();
    };
    (1..=105).for_each(answer);
    let known = |n: u8| {
        let known = running
            .store()
            .call_blocking(move |l| l.answer_to(&n.to_string()));
        known.unwrap().map(|m| m.payload)
    };
    assert_eq!(
        (known(5), known(6), known(105)),
        (None, Some(vec![6]), Some(vec![105]))
    );
    let note = |value: Option<&'static str>| {
        let noted = running.store().call_blocking(move |l| {
            l.set_note("paused", value)?;
            l.note("paused")
        });
        noted.unwrap()
    };
    assert_eq!(note(Some("1")).as_deref(), Some("1"));
    assert_eq!(note(None), None);
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
