//! The intake: decides which file is looked at when. One task, owner of every list.
//!
//! ```text
//!             Changed, found young by a walk            quiet for settle_ms
//! (folder) ──────────────────────────────▶ settling ─────────────────────▶ ready ──▶ in a worker ──▶ (done)
//!     │     Complete (closed, renamed in), found old by a walk              ▲             │
//!     └─────────────────────────────────────────────────────────────────────┘             │ not complete yet
//!                                          settling (deferred) ◀──────────────────────────┘
//! ```
//!
//! Every list is bounded. What does not fit is forgotten on purpose, and a walk is due: the folder is the backlog.

use std::collections::{HashMap, HashSet, VecDeque};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc as std_mpsc;
use std::time::Duration;

use tokio::sync::{mpsc, watch as watch_channel};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Candidate, Disposition, Report};
use crate::config::Config;
use crate::failpoint;
use crate::health::{Condition, Health};
use crate::progress::Stopwatch;
use crate::scan::{ScanFile, Stamp};
use crate::store::{Ledger, Store, free_bytes};
use crate::watch::{self, Hint};

/// Files that may be settling at the same time.
const SETTLING: usize = 4096;

/// Sub-folders that may wait for a walk of their own before a walk of everything takes their place.
const SUBFOLDERS: usize = 64;

/// How often room on the disk and in the outbox is looked at, and whether another process has queued something.
const ROOM_CHECK: Duration = Duration::from_secs(1);

/// When a new sub-folder is walked for the second time.
const LATE_WALK: Duration = Duration::from_secs(2);

/// Pause after the ledger could not be written.
const BLOCKED_PAUSE: Duration = Duration::from_secs(1);

/// The intake stopped for a reason that is a defect.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// A worker's thread ended by itself.
    #[error("worker {0} ended unexpectedly")]
    WorkerDied(usize),
    /// A worker has been at one file for longer than `pipeline.deadline_s`; the process has to start again to get it back.
    #[error("worker {worker} has been at one file for {seconds} s, more than pipeline.deadline_s")]
    WorkerHangs {
        /// Which worker.
        worker: usize,
        /// For how long.
        seconds: u64,
    },
    /// Nobody sends hints or reports any more.
    #[error("a part of the daemon that the intake depends on has ended")]
    Orphaned,
}

/// What the intake works with.
pub struct Intake {
    config: Arc<Config>,
    store: Store,
    health: Health,
    backlog: Arc<AtomicU64>,
    workers: Vec<std_mpsc::SyncSender<Candidate>>,
    stopwatches: Vec<Stopwatch>,
    /// Of this loop.
    turn: Stopwatch,
    /// How often everything has been walked.
    walked: Arc<AtomicU64>,
    idle: Vec<usize>,
    ready: VecDeque<Candidate>,
    /// Paths in `ready` or in a worker.
    taken: HashSet<PathBuf>,
    /// Taken paths that changed meanwhile.
    again: HashSet<PathBuf>,
    settling: HashMap<PathBuf, Settling>,
    walks: Walks,
    polling: bool,
    paused_until: Instant,
    low_space: bool,
    no_room: bool,
    pruned_day: i64,
    care: Care,
    /// Whether no new file is to be started.
    held: watch_channel::Receiver<bool>,
}

/// Whether files are worked on one at a time, because an earlier run died with some in work.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Care {
    /// Until everything has been walked once.
    Walking,
    /// Until what was found is done.
    Draining,
    /// All workers.
    Off,
}

/// A file that may still be written.
#[derive(Debug, Clone, Copy)]
struct Settling {
    /// What was seen last; `None` before the first look.
    stamp: Option<Stamp>,
    /// Since when it has looked like that.
    since: Instant,
    /// Whether a worker has found it incomplete under `stamp`.
    deferred: bool,
}

#[derive(Default)]
struct Walks {
    running: Option<Walk>,
    full_due: bool,
    subfolders: VecDeque<PathBuf>,
    /// Sub-folders to walk again, and when.
    late: VecDeque<(Instant, PathBuf)>,
    next_full: Option<Instant>,
}

impl Walks {
    fn next_late(&self) -> Option<Instant> {
        self.late.front().map(|(at, _)| *at)
    }

    fn begin_late(&mut self) {
        if let Some((_, folder)) = self.late.pop_front() {
            self.subfolders.push_back(folder);
        }
    }
}

struct Walk {
    found: mpsc::Receiver<Found>,
    full: bool,
}

/// What a walk reports.
enum Found {
    /// Some files.
    Files(Vec<ScanFile>),
    /// It has ended; whether it saw every sub-folder, and at least one file.
    End { complete: bool },
}

type Looks = Vec<(PathBuf, Option<Stamp>)>;

impl Intake {
    /// An intake in front of `workers`. It reports how many files it holds through `backlog`. `careful` at first works on one
    /// file at a time; while `held` no new file is started.
    pub fn new(
        config: Arc<Config>,
        store: Store,
        health: Health,
        backlog: Arc<AtomicU64>,
        workers: Vec<(std_mpsc::SyncSender<Candidate>, Stopwatch)>,
        careful: bool,
        held: watch_channel::Receiver<bool>,
    ) -> Self {
        let (workers, stopwatches): (Vec<_>, Vec<_>) = workers.into_iter().unzip();
        let idle = (0..workers.len()).rev().collect();
        Self {
            config,
            store,
            health,
            backlog,
            workers,
            stopwatches,
            turn: Stopwatch::default(),
            walked: Arc::default(),
            idle,
            ready: VecDeque::new(),
            taken: HashSet::new(),
            again: HashSet::new(),
            settling: HashMap::new(),
            walks: Walks::default(),
            polling: false,
            paused_until: Instant::now(),
            low_space: false,
            no_room: false,
            pruned_day: 0,
            care: if careful { Care::Walking } else { Care::Off },
            held,
        }
    }

    /// Starts `turn` anew at every turn, at least once in [`ROOM_CHECK`].
    #[must_use]
    pub fn watched_by(mut self, turn: Stopwatch) -> Self {
        self.turn = turn;
        self
    }

    /// Counts in `walked` how often everything has been walked.
    #[must_use]
    pub fn counting_walks(mut self, walked: Arc<AtomicU64>) -> Self {
        self.walked = walked;
        self
    }

    /// Runs until `stop`; then waits for the files that are in a worker, and ends, and the workers with it.
    pub async fn run(
        mut self,
        hints: mpsc::Receiver<Hint>,
        reports: mpsc::UnboundedReceiver<Report>,
        stop: CancellationToken,
    ) -> Result<(), IntakeError> {
        let end = self.take(hints, reports, stop).await;
        self.turn.stop();
        end
    }

    async fn take(
        &mut self,
        mut hints: mpsc::Receiver<Hint>,
        mut reports: mpsc::UnboundedReceiver<Report>,
        stop: CancellationToken,
    ) -> Result<(), IntakeError> {
        let mut looking: Option<JoinHandle<Looks>> = None;
        let mut look_at = tokio::time::interval(self.look_interval());
        look_at.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut room_check = tokio::time::interval(ROOM_CHECK);
        room_check.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.turn.start();
            self.dispatch();
            self.begin_walk();
            self.backlog.store(
                (self.taken.len() + self.settling.len()) as u64,
                Ordering::Relaxed,
            );
            let walk_wanted = !self.paused() && self.ready.len() < self.config.limits.queue;
            let next_late = self.walks.next_late();
            tokio::select! {
                () = stop.cancelled() => break,
                Ok(()) = self.held.changed() => {}
                hint = hints.recv() => self.hint(hint.ok_or(IntakeError::Orphaned)?),
                report = reports.recv() => self.report(report.ok_or(IntakeError::Orphaned)?)?,
                found = next_found(&mut self.walks.running), if walk_wanted => self.walked(found).await,
                looks = async { looking.as_mut().expect("guarded").await }, if looking.is_some() => {
                    looking = None;
                    self.looked(looks.unwrap_or_default());
                }
                _ = look_at.tick(), if looking.is_none() && !self.settling.is_empty() => looking = Some(self.look()),
                _ = room_check.tick() => {
                    self.check_deadlines()?;
                    self.check_room().await;
                    self.check_ledger().await;
                }
                () = tokio::time::sleep_until(self.paused_until), if self.paused_until > Instant::now() => {}
                () = sleep_until_some(self.walks.next_full) => {
                    self.walks.next_full = None;
                    self.walks.full_due = true;
                }
                () = sleep_until_some(next_late) => self.walks.begin_late(),
            }
        }
        // The workers have stopwatches of their own.
        self.turn.stop();
        let busy = self.workers.len() - self.idle.len();
        for _ in 0..busy {
            let report = reports.recv().await.ok_or(IntakeError::Orphaned)?;
            self.report(report)?;
        }
        Ok(())
    }

    fn look_interval(&self) -> Duration {
        (self.config.watch.settle() / 4)
            .clamp(Duration::from_millis(20), Duration::from_millis(500))
    }

    fn paused(&self) -> bool {
        self.paused_until > Instant::now()
    }

    fn dispatch(&mut self) {
        if self.no_room || self.paused() || *self.held.borrow() {
            return;
        }
        // One at a time, so that only the file that kills the process is counted as its cause.
        if self.care != Care::Off && self.idle.len() < self.workers.len() {
            return;
        }
        while let Some(&worker) = self.idle.last()
            && let Some(candidate) = self.ready.pop_front()
        {
            // From here on, so that a worker that never begins is noticed too.
            self.stopwatches[worker].start();
            if let Err(error) = self.workers[worker].try_send(candidate) {
                self.stopwatches[worker].stop();
                let (std_mpsc::TrySendError::Full(candidate)
                | std_mpsc::TrySendError::Disconnected(candidate)) = error;
                // An idle worker takes at once; if it does not, it is about to report that it died.
                self.ready.push_front(candidate);
                return;
            }
            self.idle.pop();
            if self.care != Care::Off {
                return;
            }
        }
    }

    fn hint(&mut self, hint: Hint) {
        failpoint::hit("hint", 0);
        match hint {
            Hint::Complete(path) => self.ready(path, false),
            Hint::Changed(path) => self.settle(path, None, false),
            Hint::Folder(path) => {
                if self.walks.subfolders.len() + self.walks.late.len() < SUBFOLDERS {
                    // Once more a little later: the folder is watched only some time after it was made, and what is closed in it
                    // until then gives no event.
                    let late = Instant::now() + LATE_WALK;
                    self.walks.late.push_back((late, path.clone()));
                    self.walks.subfolders.push_back(path);
                } else {
                    self.walks.full_due = true;
                }
            }
            Hint::Present { polling } => {
                self.polling = polling;
                self.walks.full_due = true;
            }
            Hint::Overflow => self.walks.full_due = true,
        }
    }

    /// Queues a file for the workers.
    fn ready(&mut self, path: PathBuf, last_chance: bool) {
        if self.taken.contains(&path) {
            self.look_again(path);
            return;
        }
        // Room for hints beyond what walks may fill.
        if self.ready.len() >= 2 * self.config.limits.queue {
            self.walks.full_due = true;
            return;
        }
        failpoint::hit("complete", 0);
        self.settling.remove(&path);
        self.taken.insert(path.clone());
        self.ready.push_back(Candidate { path, last_chance });
    }

    /// Notes that a file changed while it was queued or in work.
    fn look_again(&mut self, path: PathBuf) {
        if self.again.len() < SETTLING {
            self.again.insert(path);
        } else {
            self.walks.full_due = true;
        }
    }

    /// Watches a file until it is quiet.
    fn settle(&mut self, path: PathBuf, stamp: Option<Stamp>, deferred: bool) {
        if self.taken.contains(&path) {
            self.look_again(path);
            return;
        }
        if self.settling.len() >= SETTLING && !self.settling.contains_key(&path) {
            self.walks.full_due = true;
            return;
        }
        let entry = Settling {
            stamp,
            since: Instant::now(),
            deferred,
        };
        self.settling
            .entry(path)
            .and_modify(|old| old.deferred |= deferred)
            .or_insert(entry);
    }

    fn report(&mut self, report: Report) -> Result<(), IntakeError> {
        let Report {
            worker,
            path,
            disposition,
        } = report;
        if disposition == Disposition::WorkerDied {
            return Err(IntakeError::WorkerDied(worker));
        }
        self.idle.push(worker);
        if self.care == Care::Draining && self.ready.is_empty() {
            tracing::info!("no file of the run that died has ended this one; back to all workers");
            self.care = Care::Off;
        }
        self.taken.remove(&path);
        let changed = self.again.remove(&path);
        match disposition {
            Disposition::NotYet(stamp) => self.settle(path, stamp, true),
            Disposition::Blocked => {
                self.paused_until = Instant::now() + BLOCKED_PAUSE;
                self.taken.insert(path.clone());
                self.ready.push_front(Candidate {
                    path,
                    last_chance: false,
                });
            }
            _ if changed => self.settle(path, None, false),
            _ => {}
        }
        Ok(())
    }

    /// Begins a walk if one is due and none runs.
    fn begin_walk(&mut self) {
        if self.walks.running.is_some() || self.paused() {
            return;
        }
        let (below, full) = if std::mem::take(&mut self.walks.full_due) {
            self.walks.subfolders.clear();
            self.walks.next_full = None;
            (PathBuf::new(), true)
        } else if let Some(folder) = self.walks.subfolders.pop_front() {
            (folder, false)
        } else {
            return;
        };
        let (found_tx, found) = mpsc::channel(1);
        let config = self.config.watch.clone();
        tokio::task::spawn_blocking(move || {
            let mut any = false;
            let walked = watch::walk(&config.folder, &below, &config, &mut |files| {
                any = true;
                found_tx.blocking_send(Found::Files(files)).is_ok()
            });
            if let Err(error) = &walked {
                tracing::debug!(kind = %error.kind(), "a folder could not be walked");
            }
            let complete = any && walked.unwrap_or(false);
            let _ = found_tx.blocking_send(Found::End { complete });
        });
        self.walks.running = Some(Walk { found, full });
    }

    /// Takes files of a walk, or its end.
    async fn walked(&mut self, found: Option<Found>) {
        let mut files = match found {
            Some(Found::Files(files)) => files,
            end => {
                let full = self.walks.running.take().is_some_and(|walk| walk.full);
                let complete = matches!(end, Some(Found::End { complete: true }));
                if full {
                    let watch = &self.config.watch;
                    let pace = if self.polling {
                        watch.poll_s
                    } else {
                        watch.rescan_s
                    };
                    self.walks.next_full = Some(Instant::now() + Duration::from_secs(pace));
                    // Where another one is due already, this one is not known to have seen everything.
                    if !self.walks.full_due {
                        self.walked.fetch_add(1, Ordering::Relaxed);
                    }
                    if self.care == Care::Walking {
                        self.care = Care::Draining;
                    }
                }
                if full && complete {
                    self.prune().await;
                }
                return;
            }
        };
        files.retain(|file| {
            !self.taken.contains(&file.path) && !self.settling.contains_key(&file.path)
        });
        if files.is_empty() {
            return;
        }
        let unknown = match self
            .store
            .call(move |ledger| ledger.unknown(files, today()))
            .await
        {
            Ok(unknown) => unknown,
            Err(error) => {
                self.health
                    .raise(Condition::StateUnwritable, error.to_string());
                self.paused_until = Instant::now() + BLOCKED_PAUSE;
                self.walks.full_due = true;
                return;
            }
        };
        let settle = self.config.watch.settle();
        let patience = Duration::from_secs(self.config.watch.incomplete_s);
        for file in unknown {
            // A time in the future (a clock that was set back) counts as just now.
            match age(&file.stamp) {
                Some(age) if age > settle => self.ready(file.path, age > patience),
                _ => self.settle(file.path, Some(file.stamp), false),
            }
        }
    }

    /// Forgets, once a day and right after a walk of everything, what left the folder long ago. Files that are there were marked by the walk.
    async fn prune(&mut self) {
        let day = today();
        if self.pruned_day == day {
            return;
        }
        let before = day - i64::from(self.config.state.retention_days);
        match self
            .store
            .call(move |ledger| ledger.prune(before, 1000))
            .await
        {
            Ok(0) => self.pruned_day = day,
            Ok(rows) => tracing::info!(rows, "forgot scans that left the folder long ago"),
            Err(error) => tracing::warn!("the ledger could not be pruned: {error}"),
        }
    }

    /// Looks at the settling files, outside this task: a file system may hang.
    fn look(&self) -> JoinHandle<Looks> {
        let folder = self.config.watch.folder.clone();
        let paths: Vec<_> = self.settling.keys().cloned().collect();
        tokio::task::spawn_blocking(move || {
            paths
                .into_iter()
                .map(|path| (path.clone(), look_at(&folder, &path)))
                .collect()
        })
    }

    fn looked(&mut self, looks: Looks) {
        let settle = self.config.watch.settle();
        let patience = Duration::from_secs(self.config.watch.incomplete_s);
        for (path, now) in looks {
            let Some(entry) = self.settling.get_mut(&path) else {
                continue;
            };
            let Some(now) = now else {
                self.settling.remove(&path);
                continue;
            };
            if entry.stamp != Some(now) {
                *entry = Settling {
                    stamp: Some(now),
                    since: Instant::now(),
                    deferred: false,
                };
                continue;
            }
            let quiet = entry.since.elapsed();
            let deferred = entry.deferred;
            if quiet >= patience.max(settle) {
                self.ready(path, true);
            } else if quiet >= settle && !deferred {
                self.ready(path, false);
            }
        }
    }

    /// A file that hangs a worker is treated like one that kills it: the daemon stops and is started again, and the attempt counts.
    fn check_deadlines(&self) -> Result<(), IntakeError> {
        let deadline = Duration::from_secs(self.config.pipeline.deadline_s);
        for (worker, stopwatch) in self.stopwatches.iter().enumerate() {
            let running = stopwatch.running();
            if running > deadline {
                let seconds = running.as_secs();
                return Err(IntakeError::WorkerHangs { worker, seconds });
            }
        }
        Ok(())
    }

    /// Walks when another process has queued scans again.
    async fn check_ledger(&mut self) {
        let written = self.store.call(Ledger::written_elsewhere).await;
        // A ledger that cannot be asked is noticed where it matters; the next walk finds what was queued in any case.
        self.walks.full_due |= written.unwrap_or(false);
    }

    /// Stops the flow while there is no room for outcomes, and starts it again.
    async fn check_room(&mut self) {
        let state = &self.config.state;
        let (dir, min_free) = (state.dir.clone(), state.min_free_bytes);
        let free = tokio::task::spawn_blocking(move || free_bytes(&dir)).await;
        let low = match free {
            Ok(Ok(free)) if free < min_free => {
                let message = format!(
                    "{free} bytes free for the state directory, {min_free} wanted; free some space"
                );
                self.health.raise(Condition::StateUnwritable, message);
                true
            }
            Ok(Ok(_)) if self.low_space => {
                self.health.clear(Condition::StateUnwritable);
                false
            }
            _ => false,
        };
        let (waiting, limit) = (self.store.outbox_len(), state.outbox_messages);
        let full = waiting >= limit;
        if full {
            let message = format!(
                "{waiting} messages wait for the broker, the limit is {limit}; no new file is started"
            );
            self.health.raise(Condition::OutboxFull, message);
        } else {
            self.health.clear(Condition::OutboxFull);
        }
        self.low_space = low;
        self.no_room = low || full;
    }
}

async fn next_found(walk: &mut Option<Walk>) -> Option<Found> {
    match walk {
        Some(walk) => walk.found.recv().await,
        None => std::future::pending().await,
    }
}

async fn sleep_until_some(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}

fn look_at(folder: &Path, path: &Path) -> Option<Stamp> {
    let full = folder.join(path);
    let metadata = std::fs::metadata(&full)
        .or_else(|_| std::fs::symlink_metadata(&full))
        .ok()?;
    (!metadata.is_dir()).then(|| Stamp::of(&metadata))
}

fn today() -> i64 {
    jiff::Timestamp::now().as_second().div_euclid(86_400)
}

/// Time since the last change by the file's own times; `None` if that lies in the future.
fn age(stamp: &Stamp) -> Option<Duration> {
    let changed = i128::from(stamp.mtime_ns.max(stamp.ctime_ns));
    u64::try_from(jiff::Timestamp::now().as_nanosecond() - changed)
        .ok()
        .map(Duration::from_nanos)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::Opened;

    #[tokio::test]
    async fn a_worker_that_hangs_on_a_file_ends_the_intake() {
        let folder = tempfile::tempdir().unwrap();
        let mut config = Config::defaults();
        config.watch.folder = folder.path().join("export");
        config.watch.settle_ms = 50;
        config.state.dir = folder.path().to_owned();
        config.state.min_free_bytes = 0;
        config.pipeline.deadline_s = 1;
        std::fs::create_dir(&config.watch.folder).unwrap();
        std::fs::write(config.watch.folder.join("a.png"), b"x").unwrap();
        let Opened { store, .. } = Store::open(folder.path()).unwrap();

        // A worker that takes the file and never says a word again.
        let (queue, candidates) = std_mpsc::sync_channel::<Candidate>(1);
        let (reports_tx, reports) = mpsc::unbounded_channel();
        let stopwatch = Stopwatch::default();
        let its_own = stopwatch.clone();
        let worker = std::thread::spawn(move || {
            let taken = candidates.recv().unwrap();
            its_own.start();
            (taken, reports_tx, candidates)
        });
        let (hints_tx, hints) = watch::channel();
        hints_tx
            .send(Hint::Present { polling: false })
            .await
            .unwrap();
        let intake = Intake::new(
            Arc::new(config),
            store,
            Health::default(),
            Arc::new(AtomicU64::new(0)),
            vec![(queue, stopwatch)],
            false,
            watch_channel::Sender::new(false).subscribe(),
        );
        let end = intake.run(hints, reports, CancellationToken::new()).await;
        assert!(
            matches!(end, Err(IntakeError::WorkerHangs { worker: 0, .. })),
            "{end:?}"
        );
        assert_eq!(worker.join().unwrap().0.path, Path::new("a.png"));
    }
}
