//! One worker thread: read, claim, decode, classify, record.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self as std_mpsc, RecvTimeoutError};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use jiff::tz::{Offset, TimeZone};
use tokio::sync::{Notify, mpsc};

use super::read::{Content, read};
use super::{Candidate, Disposition, Report};
use crate::classifier::{BundleError, Classifier};
use crate::config::Config;
use crate::engine::AtWork;
use crate::failpoint;
use crate::health::{Condition, Health};
use crate::imaging::decode::Limits;
use crate::imaging::dicom::DicomHeader;
use crate::message::{ClassifiedPicture, Examined, Reporter, millis, outcome_word, rfc3339};
use crate::metrics::Metrics;
use crate::prediction::{Decision, RejectCode, RejectReason};
use crate::preview::Outlet;
use crate::progress::Stopwatch;
use crate::scan::{ScanFile, ScanId, Stamp, path_bytes, sha256};
use crate::store::{
    Claim, Ledger, NewOutcome, PictureOutcome, Recorded, Store, StoreError, StudyGroup, Survives,
};

/// Wait between two tries to write to a ledger that cannot be written.
const RETRY: Duration = Duration::from_millis(500);

/// A worker counts as at work until it has had nothing to do for this long: in a burst it waits only for its next file to be handed over.
const BETWEEN: Duration = Duration::from_millis(3);

/// A worker without work for this long lets go of what only a burst needs.
const QUIET: Duration = Duration::from_secs(5);

/// What all workers share.
#[derive(Clone)]
pub struct Context {
    /// The checked configuration.
    pub config: Arc<Config>,
    /// The ledger. Not kept open by a worker that hangs.
    pub store: Weak<Store>,
    /// The board of conditions.
    pub health: Health,
    /// Makes the messages; knows the appliance's key.
    pub reporter: Arc<Reporter>,
    /// Woken when there is something to publish.
    pub outbox: Arc<Notify>,
    /// Where previews go, if they are wanted.
    pub previews: Option<Outlet>,
    /// Set when the daemon stops: a worker that waits for a writable ledger gives up.
    pub stopping: Arc<AtomicBool>,
    /// Counts outcomes.
    pub metrics: Metrics,
}

/// A worker that has been started.
#[derive(Debug)]
pub struct Started {
    /// Where its files go, one at a time; closed, it ends after the file that it has.
    pub queue: std_mpsc::SyncSender<Candidate>,
    /// Started by whoever hands over a file.
    pub stopwatch: Stopwatch,
    /// Its thread.
    pub thread: JoinHandle<()>,
}

/// Starts worker number `index`, which makes its classifier first.
pub fn start(
    index: usize,
    context: Context,
    classifier: impl FnOnce() -> Result<Classifier, BundleError> + Send + 'static,
    reports: mpsc::UnboundedSender<Report>,
    stopwatch: Stopwatch,
) -> std::io::Result<Started> {
    let (queue, candidates) = std_mpsc::sync_channel::<Candidate>(1);
    let its_own = stopwatch.clone();
    let report = move |path, disposition| {
        reports
            .send(Report {
                worker: index,
                path,
                disposition,
            })
            .is_ok()
    };
    let work = move || {
        let classifier = match classifier() {
            Ok(classifier) => classifier,
            Err(error) => {
                tracing::error!("a worker cannot start: {error}");
                report(PathBuf::new(), Disposition::WorkerDied);
                return;
            }
        };
        let mut worker = Worker {
            context,
            classifier,
            stopwatch: its_own,
            at_work: None,
        };
        while let Some(candidate) = worker.next(&candidates) {
            if worker.at_work.is_none() {
                worker.at_work = worker.classifier.at_work();
            }
            worker.stopwatch.stop();
            let path = candidate.path.clone();
            let disposition = catch_unwind(AssertUnwindSafe(|| worker.process(&candidate)))
                .unwrap_or(Disposition::WorkerDied);
            let died = disposition == Disposition::WorkerDied;
            if !report(path, disposition) || died {
                return;
            }
        }
    };
    let thread = std::thread::Builder::new()
        .name(format!("worker-{index}"))
        .spawn(work)?;
    Ok(Started {
        queue,
        stopwatch,
        thread,
    })
}

struct Worker {
    context: Context,
    classifier: Classifier,
    /// Started by the intake when it hands over a file. Runs while a file can make this worker hang: not while it waits for the folder or the
    /// ledger, where starting again would not help; the health board and the answers of the ledger tell of those.
    stopwatch: Stopwatch,
    /// `None` while it has nothing to do, and where no other worker shares an engine with it.
    at_work: Option<AtWork>,
}

impl Worker {
    /// Waits for the next file; whoever waits longer than [`BETWEEN`] is not at work, and after [`QUIET`] keeps only what a lone file needs.
    fn next(&mut self, candidates: &std_mpsc::Receiver<Candidate>) -> Option<Candidate> {
        if self.at_work.is_some()
            && let Ok(candidate) = candidates.recv_timeout(BETWEEN)
        {
            return Some(candidate);
        }
        self.at_work = None;
        loop {
            match candidates.recv_timeout(QUIET) {
                Ok(candidate) => return Some(candidate),
                Err(RecvTimeoutError::Disconnected) => return None,
                Err(RecvTimeoutError::Timeout) if self.classifier.settle() => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        candidates.recv().ok()
    }

    fn process(&mut self, candidate: &Candidate) -> Disposition {
        let limits = &self.context.config.limits;
        // Canonical anew each time: the folder may be another mount by now.
        let Ok(root) = self.context.config.watch.folder.canonicalize() else {
            return Disposition::NotYet(None);
        };
        let (content, stamp) = match read(&root, &candidate.path, limits.file_bytes) {
            Content::Vanished => return Disposition::Vanished,
            Content::Changing => return Disposition::NotYet(None),
            Content::Trouble(stamp) => return Disposition::NotYet(stamp),
            Content::Rejected(reason, stamp) if may_grow(&reason) && !candidate.last_chance => {
                tracing::debug!(code = reason.code.as_str(), "not complete yet");
                return Disposition::NotYet(Some(stamp));
            }
            Content::Rejected(reason, stamp) => (Err(reason), stamp),
            Content::Bytes(bytes, stamp) => (Ok(bytes), stamp),
        };
        failpoint::hit("read", stamp.size);
        let scan_id = self.identity(&content, &candidate.path, stamp);
        let file = ScanFile {
            path: candidate.path.clone(),
            stamp,
        };
        let attempts = self.context.config.pipeline.attempts;
        let claim = self.call(Survives::Process, move |ledger| {
            ledger.claim(scan_id, &file, now(), attempts)
        });
        let attempt = match claim {
            Ok(Claim::Run { attempt }) => attempt,
            Ok(Claim::Known) => {
                tracing::debug!(%scan_id, "these bytes have their outcome already");
                return Disposition::Done;
            }
            // The other worker's outcome will be this file's; should it give the claim back, this one is next.
            Ok(Claim::InProgress) => return Disposition::NotYet(Some(stamp)),
            Ok(Claim::GiveUp { deaths }) => {
                tracing::error!(%scan_id, deaths, "rejected: the process died on it or hung each time");
                let reason = RejectReason::new(
                    RejectCode::Crashed,
                    format!("the process died or hung {deaths} times while it worked on this file"),
                );
                let (mut examined, group) = self.rejected(scan_id, reason, &candidate.path, stamp);
                examined.attempt = deaths + 1;
                return self.record(&Arc::new(examined), group);
            }
            Err(error) => {
                self.blocked(&error);
                return Disposition::Blocked;
            }
        };
        failpoint::hit("claimed", stamp.size);
        let start = Instant::now();
        self.stopwatch.start();
        let (mut examined, group) = match content {
            Ok(bytes) => self.examine(scan_id, &bytes, &candidate.path, stamp),
            Err(reason) => self.rejected(scan_id, reason, &candidate.path, stamp),
        };
        self.stopwatch.stop();
        examined.attempt = attempt;
        let incomplete = examined
            .pictures
            .iter()
            .any(|p| p.outcome.as_ref().is_err_and(may_grow));
        if incomplete && !candidate.last_chance {
            return match self.write(move || move |ledger| ledger.release(scan_id, attempt)) {
                Some(()) => Disposition::NotYet(Some(stamp)),
                None => Disposition::Blocked,
            };
        }
        failpoint::hit("inferred", stamp.size);
        let took = start.elapsed();
        let examined = Arc::new(examined);
        let disposition = self.record(&examined, group);
        // Not before: whoever reads the log would have the processor first.
        log(&examined, took);
        disposition
    }

    /// By content; a file whose content cannot be had is identified by its place and stamp instead.
    fn identity(
        &self,
        content: &Result<Vec<u8>, RejectReason>,
        path: &Path,
        stamp: Stamp,
    ) -> ScanId {
        match content {
            Ok(bytes) => self.context.reporter.key.scan_id(&sha256(bytes)),
            Err(_) => self.context.reporter.key.pseudonym(
                "place",
                &[
                    path_bytes(path),
                    &stamp.size.to_le_bytes(),
                    &stamp.ctime_ns.to_le_bytes(),
                    &stamp.inode.to_le_bytes(),
                ],
            ),
        }
    }

    fn rejected(
        &self,
        scan_id: ScanId,
        reason: RejectReason,
        path: &Path,
        stamp: Stamp,
    ) -> (Examined, StudyGroup) {
        let pictures = vec![ClassifiedPicture {
            frame: None,
            outcome: Err(reason),
        }];
        let examined = Examined {
            scan_id,
            attempt: 1,
            kind: None,
            series_id: None,
            modality: None,
            notes: Vec::new(),
            acquired_at: written_at(stamp),
            pictures,
        };
        (examined, self.group(scan_id, path, None))
    }

    /// Decodes and classifies every frame. A panic in a decoder is contained and becomes an outcome.
    fn examine(
        &mut self,
        scan_id: ScanId,
        bytes: &[u8],
        path: &Path,
        stamp: Stamp,
    ) -> (Examined, StudyGroup) {
        match catch_unwind(AssertUnwindSafe(|| {
            self.try_examine(scan_id, bytes, path, stamp)
        })) {
            Ok(Ok(examined)) => examined,
            Ok(Err(reason)) => self.rejected(scan_id, reason, path, stamp),
            Err(_) => {
                tracing::error!(%scan_id, "a defect in the program was contained; please report it");
                self.rejected(
                    scan_id,
                    RejectReason::new(
                        RejectCode::Internal,
                        "a defect in the program was contained",
                    ),
                    path,
                    stamp,
                )
            }
        }
    }

    fn try_examine(
        &mut self,
        scan_id: ScanId,
        bytes: &[u8],
        path: &Path,
        stamp: Stamp,
    ) -> Result<(Examined, StudyGroup), RejectReason> {
        failpoint::hit("infer", stamp.size);
        let limits = decode_limits(&self.context.config);
        let file = self.classifier.classify_file(bytes, &limits)?;
        let header = file.header.as_ref();
        let study_uid = header.and_then(|h| h.study_instance_uid.as_deref());
        let examined = Examined {
            scan_id,
            attempt: 1,
            kind: Some(file.kind),
            series_id: header
                .and_then(|h| h.series_instance_uid.as_deref())
                .map(|uid| {
                    self.context
                        .reporter
                        .key
                        .pseudonym("series", &[uid.as_bytes()])
                }),
            modality: header.and_then(DicomHeader::modality_term),
            acquired_at: header.and_then(acquired_at).or_else(|| written_at(stamp)),
            notes: file.notes,
            pictures: file.pictures,
        };
        Ok((examined, self.group(scan_id, path, study_uid)))
    }

    /// The study: by DICOM study, else by sub-folder, else "whatever came at the same time".
    fn group(&self, scan_id: ScanId, path: &Path, study_uid: Option<&str>) -> StudyGroup {
        let key = &self.context.reporter.key;
        let (group_id, fixed) = match (study_uid, path.parent()) {
            (Some(uid), _) => (key.pseudonym("study", &[uid.as_bytes()]), true),
            (None, Some(parent)) if !parent.as_os_str().is_empty() => {
                (key.pseudonym("folder", &[path_bytes(parent)]), false)
            }
            _ => (key.pseudonym("loose", &[]), false),
        };
        StudyGroup {
            group_id,
            fixed,
            fresh_id: key.pseudonym("study-of", &[&group_id.0, &scan_id.0]),
        }
    }

    /// Records the outcome and wakes the publisher.
    fn record(&self, examined: &Arc<Examined>, group: StudyGroup) -> Disposition {
        let alert = &self.context.config.alert;
        let (rule, quiet_s) = (alert.rule(), alert.quiet_s as i64);
        let recorded = self.write(|| {
            let (reporter, examined) = (self.context.reporter.clone(), examined.clone());
            move |ledger| {
                let new = outcome_of(&examined, group);
                let now = now();
                ledger.record(&new, now, now - quiet_s, rule, |study, alert, revision| {
                    let mut messages = reporter.results(&examined, study.study_id, revision);
                    messages.extend(alert.map(|change| reporter.alert(study, change)));
                    messages
                })
            }
        });
        // What puts it on the disk is woken on this processor as a rule, and would wait for what comes now.
        if self.at_work.as_ref().is_some_and(AtWork::alone) {
            std::thread::yield_now();
        }
        let Some(recorded) = recorded else {
            return Disposition::Blocked;
        };
        failpoint::hit("recorded", 0);
        if let Some(Recorded { study_id, revision }) = recorded {
            let context = &self.context;
            context.metrics.count(examined);
            if let Some(previews) = &context.previews {
                let connected = !context.health.holds(Condition::BrokerAway);
                previews.offer(&context.reporter, examined, study_id, revision, connected);
            }
            // After the previews: they are sent behind the results that this is about.
            context.outbox.notify_one();
        }
        Disposition::Done
    }

    /// Writes to the ledger; tries again as long as it cannot be written, because what it is about is in memory only. `None` when the daemon
    /// stops or the ledger is gone.
    fn write<R: Send + 'static, C>(&self, make_call: impl Fn() -> C) -> Option<R>
    where
        C: FnOnce(&mut Ledger) -> Result<R, StoreError> + Send + 'static,
    {
        loop {
            match self.call(Survives::PowerCutSoon, make_call()) {
                Ok(done) => {
                    self.context.health.clear(Condition::StateUnwritable);
                    return Some(done);
                }
                Err(StoreError::Closed) => return None,
                Err(error) => self.blocked(&error),
            }
            if self.context.stopping.load(Ordering::Relaxed) {
                return None;
            }
            #[allow(
                clippy::disallowed_methods,
                reason = "a worker thread that can do nothing else"
            )]
            std::thread::sleep(RETRY);
        }
    }

    fn call<R: Send + 'static>(
        &self,
        survives: Survives,
        call: impl FnOnce(&mut Ledger) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        let store = self.context.store.upgrade().ok_or(StoreError::Closed)?;
        store.call_blocking_that(survives, call)
    }

    fn blocked(&self, error: &StoreError) {
        self.context
            .health
            .raise(Condition::StateUnwritable, error.to_string());
    }
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// The time of the picture in UTC. A header without an offset is in the scanner's time, and the appliance stands beside it.
fn acquired_at(header: &DicomHeader) -> Option<String> {
    let local: jiff::civil::DateTime = header.acquired.as_ref()?.parse().ok()?;
    let zone = match header.utc_offset_minutes {
        Some(minutes) => TimeZone::fixed(Offset::from_seconds(i32::from(minutes) * 60).ok()?),
        None => TimeZone::system(),
    };
    Some(rfc3339(zone.to_timestamp(local).ok()?))
}

fn written_at(stamp: Stamp) -> Option<String> {
    jiff::Timestamp::from_nanosecond(i128::from(stamp.mtime_ns))
        .ok()
        .map(rfc3339)
}

/// Reasons that may pass when the file is still being written.
fn may_grow(reason: &RejectReason) -> bool {
    matches!(
        reason.code,
        RejectCode::Empty | RejectCode::Truncated | RejectCode::Corrupt | RejectCode::Unreadable
    )
}

/// The decoder's limits out of the configuration.
pub fn decode_limits(config: &Config) -> Limits {
    let limits = &config.limits;
    Limits {
        file_bytes: limits.file_bytes,
        pixels: limits.pixels,
        decode_bytes: limits.decode_bytes,
        frames: limits.frames,
    }
}

fn outcome_of(examined: &Examined, group: StudyGroup) -> NewOutcome {
    let found = || {
        examined
            .pictures
            .iter()
            .filter_map(|p| p.outcome.as_ref().ok())
    };
    let reason = examined
        .pictures
        .iter()
        .find_map(|p| p.outcome.as_ref().err());
    let top = found().max_by(|a, b| {
        a.prediction
            .probability
            .total_cmp(&b.prediction.probability)
    });
    let pictures: Vec<_> = examined
        .pictures
        .iter()
        .map(|picture| {
            let prediction = picture.outcome.as_ref().ok().map(|c| &c.prediction);
            PictureOutcome {
                frame: picture.frame,
                probability: prediction.map(|p| p.probability),
                positive: prediction.is_some_and(|p| p.decision == Decision::Positive),
            }
        })
        .collect();
    let decision = if pictures.iter().any(|p| p.positive) {
        Some(Decision::Positive)
    } else {
        top.map(|c| c.prediction.decision)
    };
    NewOutcome {
        scan_id: examined.scan_id,
        outcome: outcome_word(top.is_some(), reason),
        reason: reason.map(|r| r.code.as_str()),
        message: reason.map(|r| r.message.clone()),
        decision: decision.map(Decision::as_str),
        probability: top.map(|c| c.prediction.probability),
        group,
        pictures,
    }
}

fn log(examined: &Examined, took: Duration) {
    let (scan_id, ms) = (examined.scan_id, millis(took));
    for ClassifiedPicture { frame, outcome } in &examined.pictures {
        match outcome {
            Ok(found) => tracing::info!(
                %scan_id,
                frame,
                decision = found.prediction.decision.as_str(),
                probability = found.prediction.probability,
                ms,
                "classified"
            ),
            Err(reason) => {
                tracing::warn!(%scan_id, frame, code = reason.code.as_str(), "{}: {}", outcome_word(false, Some(reason)), reason.message);
            }
        }
    }
}
