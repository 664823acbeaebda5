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
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc as std_mpsc;
use std::time::Duration;

use tokio::sync::{mpsc, watch as watch_channel};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::worker::Started;
use super::{Candidate, Disposition, Report};
use crate::config::Config;
use crate::failpoint;
use crate::health::{Condition, Health};
use crate::progress::{Beat, Stopwatch, stir};
use crate::scan::{ScanFile, Stamp};
use crate::store::{Store, Survives, free_bytes};
use crate::watch::{self, Hint};

/// Files that may be settling at the same time.
const SETTLING: usize = 4096;

/// Sub-folders that may wait for a walk of their own before a walk of everything takes their place.
const SUBFOLDERS: usize = 64;

/// When a new sub-folder is walked for the second time.
const LATE_WALK: Duration = Duration::from_secs(2);

/// Pause after the ledger could not be written.
const BLOCKED_PAUSE: Duration = Duration::from_secs(1);

/// How long workers may take to end when they are to do nothing more.
const ENDING: Duration = Duration::from_secs(20);

/// The intake stopped for a reason that is a defect.
#[derive(Debug, thiserror::Error)]
pub enum IntakeError {
    /// A worker's thread ended by itself.
    #[error("worker {0} ended unexpectedly")]
    WorkerDied(usize),
    /// A worker has been at one file for longer than `pipeline.deadline_s`, and no more of them may be left behind; the process has to start again
    /// to be rid of them.
    #[error("worker {worker} has been at one file for {seconds} s, more than pipeline.deadline_s")]
    WorkerHangs {
        /// Which worker.
        worker: usize,
        /// For how long.
        seconds: u64,
    },
    /// A worker that hangs could not be replaced.
    #[error("no worker can take the place of one that hangs: {0}")]
    NotReplaced(std::io::Error),
    /// Nobody sends hints or reports any more.
    #[error("a part of the daemon that the intake depends on has ended")]
    Orphaned,
}

/// The workers, and those that take the place of one that hangs on a file. A thread cannot be ended from outside: it is left behind with its
/// memory.
pub struct Workers {
    /// The first ones, by number.
    pub started: Vec<Started>,
    /// Starts the worker with this number.
    pub start: Box<dyn FnMut(usize) -> std::io::Result<Started> + Send>,
    /// Threads that this process has left behind, in this run of the daemon and the ones before it.
    pub lost: Arc<AtomicUsize>,
    /// Most of them; with one more the intake ends.
    pub most: usize,
}

/// A worker, and the file that it has in hand; without one it is free.
struct Hand {
    started: Started,
    file: Option<Candidate>,
}

/// What the intake works with.
pub struct Intake {
    config: Arc<Config>,
    store: Store,
    health: Health,
    backlog: Arc<AtomicU64>,
    /// By number; `None` for one that hung and was replaced.
    workers: Vec<Option<Hand>>,
    start_worker: Box<dyn FnMut(usize) -> std::io::Result<Started> + Send>,
    /// Of [`Workers::lost`], at most [`Workers::most`].
    lost: Arc<AtomicUsize>,
    most_lost: usize,
    /// Of this loop.
    turn: Stopwatch,
    /// How often everything has been walked.
    walked: Arc<AtomicU64>,
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
        workers: Workers,
        careful: bool,
        held: watch_channel::Receiver<bool>,
    ) -> Self {
        let hand = |started| {
            Some(Hand {
                started,
                file: None,
            })
        };
        let hands: Vec<_> = workers.started.into_iter().map(hand).collect();
        Self {
            config,
            store,
            health,
            backlog,
            workers: hands,
            start_worker: workers.start,
            lost: workers.lost,
            most_lost: workers.most,
            turn: Stopwatch::default(),
            walked: Arc::default(),
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

    /// Starts `turn` anew at every turn, at least once a [`Beat`].
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
        self.say_lost();
        let end = self.take(hints, reports, stop).await;
        self.turn.stop();
        // This closes their queues.
        let threads: Vec<_> = (self.workers.drain(..).flatten())
            .map(|hand| hand.started.thread)
            .collect();
        let joined = tokio::task::spawn_blocking(|| {
            for thread in threads {
                let _ = thread.join();
            }
        });
        if tokio::time::timeout(ENDING, joined).await.is_err() {
            tracing::warn!("a worker did not end in time");
        }
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
        // Room on the disk and in the outbox, files that hang, and whether another process has queued something.
        let mut beat = Beat::default();
        loop {
            self.turn.start();
            self.dispatch();
            self.begin_walk();
            self.backlog.store(
                (self.taken.len() + self.settling.len()) as u64,
                Ordering::Relaxed,
            );
            if !self.taken.is_empty() || !self.settling.is_empty() {
                stir();
            }
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
                () = beat.next() => {
                    self.check_deadlines(true).await?;
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
        while self.busy() {
            stir();
            tokio::select! {
                report = reports.recv() => self.report(report.ok_or(IntakeError::Orphaned)?)?,
                () = beat.next() => self.check_deadlines(false).await?,
            }
        }
        Ok(())
    }

    /// Whether a file is in a worker.
    fn busy(&self) -> bool {
        self.workers.iter().flatten().any(|w| w.file.is_some())
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
        if self.care != Care::Off && self.busy() {
            return;
        }
        let mut hands = self.workers.iter_mut().flatten();
        while let Some(hand) = hands.find(|hand| hand.file.is_none())
            && let Some(candidate) = self.ready.pop_front()
        {
            // From here on, so that a worker that never begins is noticed too.
            hand.started.stopwatch.start();
            hand.file = Some(candidate.clone());
            if let Err(error) = hand.started.queue.try_send(candidate) {
                hand.started.stopwatch.stop();
                hand.file = None;
                let (std_mpsc::TrySendError::Full(candidate)
                | std_mpsc::TrySendError::Disconnected(candidate)) = error;
                // An idle worker takes at once; if it does not, it is about to report that it died.
                self.ready.push_front(candidate);
                return;
            }
            if self.care != Care::Off {
                return;
            }
        }
    }

    fn hint(&mut self, hint: Hint) {
        failpoint::hit("hint", 0);
        match hint {
            Hint::Complete(path) => self.ready(path, false, self.room_for_hints()),
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

    /// Files that may be ready: twice as many as walks wait for.
    fn room(&self) -> usize {
        2 * self.config.limits.queue
    }

    /// As [`Self::room`], for what events tell of. While a walk waits for its turn they give way, or it and the files that settle would wait for
    /// as long as others come as fast as they are worked on.
    fn room_for_hints(&self) -> usize {
        let walk_waits = self.walks.full_due || self.walks.running.is_some();
        self.room() / if walk_waits { 2 } else { 1 }
    }

    /// Queues a file for the workers, if fewer than `room` are ready.
    fn ready(&mut self, path: PathBuf, last_chance: bool, room: usize) {
        if self.taken.contains(&path) {
            self.look_again(path);
            return;
        }
        if self.ready.len() >= room {
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
        let Some(hand) = &mut self.workers[worker] else {
            // Its file is somebody else's by now, and its thread ends.
            tracing::info!(worker, "a worker that was given up came to an end");
            return Ok(());
        };
        if disposition == Disposition::WorkerDied {
            return Err(IntakeError::WorkerDied(worker));
        }
        hand.file = None;
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
        // Nothing is told of it, so it waits for no disk.
        let unknown = match self
            .store
            .call_that(Survives::Process, move |ledger| {
                ledger.unknown(files, today())
            })
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
        for file in unknown {
            // A time in the future (a clock that was set back) counts as just now. However old it looks (a server's clock may be behind), it is
            // not the last chance: that takes a while of quiet before our own eyes.
            match age(&file.stamp) {
                Some(age) if age > settle => {
                    self.ready(file.path, false, self.room());
                }
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
                self.ready(path, true, self.room());
            } else if quiet >= settle && !deferred {
                self.ready(path, false, self.room());
            }
        }
    }

    /// A file that hangs a worker is treated like one that kills the process: the attempt counts, and it is tried again, by another worker if
    /// `replace`.
    async fn check_deadlines(&mut self, replace: bool) -> Result<(), IntakeError> {
        let deadline = Duration::from_secs(self.config.pipeline.deadline_s);
        for worker in 0..self.workers.len() {
            let Some(hand) = &self.workers[worker] else {
                continue;
            };
            let (stopwatch, file) = (hand.started.stopwatch.clone(), hand.file.clone());
            let running = stopwatch.running();
            let Some(file) = file.filter(|_| running > deadline) else {
                continue;
            };
            let seconds = running.as_secs();
            let path = file.path.clone();
            let claim = self.store.call(move |l| l.take_away(&path)).await;
            if stopwatch.running() < deadline {
                // It came back just now.
                continue;
            }
            let lost = self.lost.fetch_add(1, Ordering::Relaxed) + 1;
            if lost > self.most_lost {
                self.workers[worker] = None;
                return Err(IntakeError::WorkerHangs { worker, seconds });
            }
            // If the ledger cannot be written, the claim holds until the next start and the file waits for it.
            let scan_id = claim.ok().flatten().map(tracing::field::display);
            tracing::warn!(
                scan_id,
                worker,
                seconds,
                "a worker hangs on a file and is given up; the file is tried again"
            );
            stopwatch.retire();
            self.workers[worker] = None;
            self.say_lost();
            self.ready.push_back(file);
            if replace {
                let next = self.workers.len();
                let started = (self.start_worker)(next).map_err(IntakeError::NotReplaced)?;
                self.workers.push(Some(Hand {
                    started,
                    file: None,
                }));
            }
        }
        Ok(())
    }

    fn say_lost(&self) {
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > 0 {
            self.health.raise(
                Condition::WorkerReplaced,
                "a worker hung on a file and another one took its place; it keeps its memory until the daemon starts again",
            );
        }
    }

    /// Walks when another process has queued scans again; stops the flow while there is no room for outcomes, and starts it again.
    async fn check_ledger(&mut self) {
        let state = &self.config.state;
        let dir = state.dir.clone();
        let looked = self
            .store
            .call_that(Survives::Process, move |ledger| {
                Ok((ledger.written_elsewhere()?, free_bytes(&dir)))
            })
            .await;
        // A ledger that cannot be asked is noticed where it matters; the next walk finds what was queued in any case.
        if let Ok((written, free)) = looked {
            self.walks.full_due |= written;
            self.check_space(free.ok());
        }
        let (waiting, limit) = (self.store.outbox_len(), self.config.state.outbox_messages);
        let full = waiting >= limit;
        if full {
            let message = format!(
                "{waiting} messages wait for the broker, the limit is {limit}; no new file is started"
            );
            self.health.raise(Condition::OutboxFull, message);
        } else {
            self.health.clear(Condition::OutboxFull);
        }
        self.no_room = self.low_space || full;
    }

    /// `free`: bytes that are left for the state directory, if that is known.
    fn check_space(&mut self, free: Option<u64>) {
        let min_free = self.config.state.min_free_bytes;
        self.low_space = match free {
            Some(free) if free < min_free => {
                let message = format!(
                    "{free} bytes free for the state directory, {min_free} wanted; free some space"
                );
                self.health.raise(Condition::StateUnwritable, message);
                true
            }
            Some(_) if self.low_space => {
                self.health.clear(Condition::StateUnwritable);
                false
            }
            _ => false,
        };
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

/// The stamp that a walk would give; `None` for what is not there, and for folders.
fn look_at(folder: &Path, path: &Path) -> Option<Stamp> {
    let full = folder.join(path);
    let link = std::fs::symlink_metadata(&full).ok()?;
    (!link.is_dir()).then(|| Stamp::of(&std::fs::metadata(&full).unwrap_or(link)))
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
    async fn workers_that_hang_are_replaced_as_often_as_is_allowed() {
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

        // Workers that take a file and never say a word again, until they are let go; then they say one too late.
        let (reports_tx, reports) = mpsc::unbounded_channel();
        let (taken_tx, taken) = std_mpsc::channel();
        let start = move |index: usize| {
            let (queue, candidates) = std_mpsc::sync_channel::<Candidate>(1);
            let (reports, taken) = (reports_tx.clone(), taken_tx.clone());
            let thread = std::thread::spawn(move || {
                let path = candidates.recv().unwrap().path;
                taken.send((index, path.clone())).unwrap();
                let closed = candidates.recv();
                assert!(closed.is_err(), "it is given no other file");
                let _ = reports.send(Report {
                    worker: index,
                    path,
                    disposition: Disposition::Done,
                });
            });
            Ok(Started {
                queue,
                stopwatch: Stopwatch::default(),
                thread,
            })
        };
        let (hints_tx, hints) = watch::channel();
        hints_tx
            .send(Hint::Present { polling: false })
            .await
            .unwrap();
        let (health, lost) = (Health::default(), Arc::new(AtomicUsize::new(0)));
        let intake = Intake::new(
            Arc::new(config),
            store,
            health.clone(),
            Arc::new(AtomicU64::new(0)),
            Workers {
                started: vec![start(0).unwrap()],
                start: Box::new(start),
                lost: lost.clone(),
                most: 2,
            },
            false,
            watch_channel::Sender::new(false).subscribe(),
        );
        let end = intake.run(hints, reports, CancellationToken::new()).await;
        assert!(
            matches!(end, Err(IntakeError::WorkerHangs { worker: 2, .. })),
            "{end:?}"
        );
        assert_eq!(lost.load(Ordering::Relaxed), 3);
        assert!(health.holds(Condition::WorkerReplaced));
        let a = PathBuf::from("a.png");
        let tries: Vec<_> = taken.try_iter().collect();
        assert_eq!(tries, [(0, a.clone()), (1, a.clone()), (2, a)]);
    }
}
