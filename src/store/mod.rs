//! The ledger and the outbox: the one place that remembers.
//!
//! ```text
//!            claim                record (one transaction)              confirm
//! unknown ────────▶ claimed ───────────────────────────▶ done + outbox ────────▶ done
//!                    │  ▲  the process dies                (pending)
//!                    └──┘  claim again, attempts + 1
//! ```
//!
//! Invariants, which the tests hold:
//!
//! - A scan (its bytes, by [`ScanId`](crate::scan::ScanId)) gets at most one outcome, and the outcome and its encoded messages appear in the
//!   same transaction. There is no moment with one but not the other.
//! - A scan that is to be classified again keeps its outcome until the new one replaces it, in one transaction that also moves its share
//!   in the study and in the totals: nothing is counted twice.
//! - A message leaves the outbox only when the broker has acknowledged it, or when it is parked: set aside, byte for byte, because the broker
//!   did not take it while it took others.
//! - A claim is written before a byte of the file is decoded, so a file that kills the process is counted. It need not reach the disk
//!   ([`Survives::Process`]): a power cut is not the file's fault.
//! - Nothing leaves the appliance that a power cut could undo: what the publisher reads is on the disk when it gets it.
//! - The `file` table is only a shortcut (path and stamp → scan); deleting it costs hashing, never a result.
//!
//! Every call is a closure over [`Ledger`] that runs while no other does: in the thread that calls, if it may block and nobody else is at the ledger, else in
//! the thread of the store ([`Store`]). All calls that wait for that thread at the same time share one transaction, and each gets its answer only after
//! the commit, and after the disk has it where it must survive a power cut ([`Survives`], `flush`). Another process may read, and may
//! mark scans to be classified again ([`Ledger::queue`]) and bring parked messages back ([`Ledger::retry`]): in a transaction of its own,
//! which the owner notices ([`Ledger::written_elsewhere`]).

mod flush;
mod history;
mod ledger;
mod models;
mod state_dir;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::oneshot;

pub use flush::FLUSHES_APART;
use flush::Flusher;
pub use history::{Changes, History, HistoryReader, Retention};
pub use ledger::{
    Claim, Ledger, NewOutcome, Parked, PictureOutcome, Recorded, Rejected, Selection, StudyGroup,
};
pub use models::{Change, Models, Source};
use state_dir::{Lock, lock};
pub use state_dir::{StateDir, free_bytes};

/// File name of the database inside the state directory.
pub const DATABASE: &str = "ledger.sqlite3";

/// The ledger's note of what the daemon last said of itself.
pub const STANDING: &str = "standing";

/// Left beside a database in which damage was found while it was in use; the next start sets it aside.
const DAMAGED: &str = "ledger.damaged";

/// Damaged databases that are kept, each.
const KEPT_ASIDE: usize = 3;

/// Most calls that share one transaction.
const BATCH: usize = 64;

/// Calls that may wait for the store thread; callers beyond that wait.
const QUEUE: usize = 256;

/// Why the store did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// No room, a read-only or failing disk: may pass.
    #[error("state directory cannot be written ({0}); free some space or remount it writable")]
    Unwritable(String),
    /// The file is not a database of ours, or is damaged.
    #[error("ledger is damaged ({0})")]
    Corrupt(String),
    /// Made by a newer version.
    #[error(
        "ledger has format {found}, this version knows {known}; install the newer version again"
    )]
    Newer {
        /// Format in the file.
        found: i64,
        /// Format of this version.
        known: i64,
    },
    /// Anything else that `SQLite` says.
    #[error("ledger: {0}")]
    Other(String),
    /// It is closed, or was in the middle of the call.
    #[error("ledger is closed")]
    Closed,
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> Self {
        use rusqlite::ErrorCode as Code;
        let text = error.to_string();
        match error.sqlite_error_code() {
            Some(
                Code::DiskFull
                | Code::ReadOnly
                | Code::SystemIoFailure
                | Code::CannotOpen
                | Code::PermissionDenied,
            ) => Self::Unwritable(text),
            Some(Code::DatabaseCorrupt | Code::NotADatabase) => Self::Corrupt(text),
            _ => Self::Other(text),
        }
    }
}

type Reply = Box<dyn FnOnce(Result<(), StoreError>) + Send>;

/// A call on its way to the ledger.
struct Job {
    run: Box<dyn FnOnce(&mut Ledger) -> Reply + Send>,
    survives: Survives,
}

/// What a call's effect outlives once it is answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Survives {
    /// The death of the process. A power cut may undo it until something else is put on the disk, which takes about a second at most.
    Process,
    /// The death of the process, and a power cut as soon as the disk has taken it; that begins at once.
    PowerCutSoon,
    /// A power cut, and so does everything that it could see.
    PowerCut,
}

/// A handle to the ledger and its thread; cheap to clone. The thread ends when the last handle is gone.
#[derive(Clone, Debug)]
pub struct Store {
    jobs: std::sync::mpsc::SyncSender<Job>,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    /// `None` once it is closed.
    desk: Mutex<Option<Desk>>,
    /// As of the last commit.
    outbox: AtomicU64,
    parked: AtomicU64,
}

/// What whoever is at the ledger has before him.
#[derive(Debug)]
struct Desk {
    ledger: Ledger,
    flusher: Flusher,
    /// Where damage is noted.
    marker: PathBuf,
}

/// A store that has been opened.
#[derive(Debug)]
pub struct Opened {
    /// The handle.
    pub store: Store,
    /// The thread; join it after the last handle is dropped, so that the database is closed in order.
    pub thread: std::thread::JoinHandle<()>,
    /// Where a damaged ledger was set aside, if one was found.
    pub set_aside: Option<PathBuf>,
    /// Whether an earlier run died with files in work: one of them may be the cause.
    pub suspects: bool,
}

impl Store {
    /// Opens (or makes) the ledger in `dir` and starts its thread. A damaged ledger is set aside under a name that says
    /// so and a new one begun: the rescan of the folder then fills it again.
    pub fn open(dir: &Path) -> Result<Opened, StoreError> {
        let path = dir.join(DATABASE);
        let marker = dir.join(DAMAGED);
        let opened = if marker.exists() {
            Err(StoreError::Corrupt("found in an earlier run".into()))
        } else {
            Ledger::open(&path)
        };
        let (mut ledger, set_aside) = match opened {
            Err(StoreError::Corrupt(_)) => {
                let aside = set_aside(&path)?;
                let _ = std::fs::remove_file(&marker);
                (Ledger::open(&path)?, Some(aside))
            }
            other => (other?, None),
        };
        let suspects = ledger.suspects();
        ledger.begin()?;
        let flusher = Flusher::start(&path, ledger.written())
            .map_err(|e| StoreError::Other(format!("cannot start its flusher: {e}")))?;
        ledger.commit()?;
        let (jobs, queue) = std::sync::mpsc::sync_channel(QUEUE);
        let shared = Arc::new(Shared {
            outbox: AtomicU64::new(ledger.outbox_len()),
            parked: AtomicU64::new(ledger.parked_len()),
            desk: Mutex::new(Some(Desk {
                ledger,
                flusher,
                marker,
            })),
        });
        let its_own = shared.clone();
        let thread = std::thread::Builder::new()
            .name("store".into())
            .spawn(move || its_own.serve(&queue))
            .map_err(|e| StoreError::Other(format!("cannot start its thread: {e}")))?;
        Ok(Opened {
            store: Self { jobs, shared },
            thread,
            set_aside,
            suspects,
        })
    }

    /// Messages that wait for the broker, as of the last commit.
    pub fn outbox_len(&self) -> u64 {
        self.shared.outbox.load(Ordering::Relaxed)
    }

    /// Parked messages, as of the last commit.
    pub fn parked_len(&self) -> u64 {
        self.shared.parked.load(Ordering::Relaxed)
    }

    /// Runs `call`, from async code; answers when it and all that it could see is on the disk.
    pub async fn call<R: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Ledger) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        self.call_that(Survives::PowerCut, call).await
    }

    /// As [`Store::call`]; answers when it `survives` what it is to survive.
    pub async fn call_that<R: Send + 'static>(
        &self,
        survives: Survives,
        call: impl FnOnce(&mut Ledger) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        let (job, answer) = job(survives, call);
        match self.jobs.try_send(job) {
            Ok(()) => {}
            Err(std::sync::mpsc::TrySendError::Full(job)) => {
                let jobs = self.jobs.clone();
                tokio::task::spawn_blocking(move || jobs.send(job))
                    .await
                    .map_err(|_| StoreError::Closed)?
                    .map_err(|_| StoreError::Closed)?;
            }
            Err(std::sync::mpsc::TrySendError::Disconnected(_)) => return Err(StoreError::Closed),
        }
        answer.await.unwrap_or(Err(StoreError::Closed))
    }

    /// As [`Store::call`], from a worker thread.
    pub fn call_blocking<R: Send + 'static>(
        &self,
        call: impl FnOnce(&mut Ledger) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        self.call_blocking_that(Survives::PowerCut, call)
    }

    /// As [`Store::call_that`], from a worker thread.
    pub fn call_blocking_that<R: Send + 'static>(
        &self,
        survives: Survives,
        call: impl FnOnce(&mut Ledger) -> Result<R, StoreError> + Send + 'static,
    ) -> Result<R, StoreError> {
        let (job, answer) = job(survives, call);
        if let Err(job) = self.shared.serve_here(job) {
            self.jobs.send(job).map_err(|_| StoreError::Closed)?;
        }
        answer.blocking_recv().unwrap_or(Err(StoreError::Closed))
    }
}

fn job<R: Send + 'static>(
    survives: Survives,
    call: impl FnOnce(&mut Ledger) -> Result<R, StoreError> + Send + 'static,
) -> (Job, oneshot::Receiver<Result<R, StoreError>>) {
    let (reply, answer) = oneshot::channel();
    let run = Box::new(move |ledger: &mut Ledger| {
        let result = ledger.in_savepoint(call);
        let reply: Reply = Box::new(move |committed| {
            // A caller that has gone away does not need its answer.
            let _ = reply.send(committed.and(result));
        });
        reply
    });
    (Job { run, survives }, answer)
}

impl Shared {
    /// The store thread: takes whatever waits, and has it run.
    fn serve(&self, queue: &std::sync::mpsc::Receiver<Job>) {
        while let Ok(first) = queue.recv() {
            // Poisoned by a call that panicked in the middle of a transaction: closed.
            let Ok(mut desk) = self.desk.lock() else {
                return;
            };
            if !self.run(&mut desk, first, || queue.try_recv().ok()) {
                return;
            }
        }
        if let Some(desk) = self.desk.lock().ok().and_then(|mut desk| desk.take()) {
            desk.flusher.end();
            desk.ledger.close();
        }
    }

    /// Runs `job` in this thread, if nobody is at the ledger; else gives it back.
    fn serve_here(&self, job: Job) -> Result<(), Job> {
        match self.desk.try_lock() {
            Ok(mut desk) => {
                self.run(&mut desk, job, || None);
                Ok(())
            }
            Err(_) => Err(job),
        }
    }

    /// Runs `first`, and what `more` has, in one transaction, commits, has them answered. `false` when there can be no more.
    ///
    /// Damage, or a disk that fails, closes the ledger: every later call is answered with [`StoreError::Closed`], the daemon stops, and the next start
    /// sets a damaged database aside.
    fn run(
        &self,
        open: &mut Option<Desk>,
        first: Job,
        mut more: impl FnMut() -> Option<Job>,
    ) -> bool {
        let Some(Desk {
            ledger,
            flusher,
            marker,
        }) = open
        else {
            return false;
        };
        if let Err(error) = ledger.begin() {
            (first.run)(ledger)(Err(error));
        } else {
            let mut replies = vec![(first.survives, (first.run)(ledger))];
            while replies.len() < BATCH
                && let Some(job) = more()
            {
                replies.push((job.survives, (job.run)(ledger)));
            }
            let committed = ledger.commit();
            self.outbox.store(ledger.outbox_len(), Ordering::Relaxed);
            self.parked.store(ledger.parked_len(), Ordering::Relaxed);
            flusher.answer(ledger.written(), &committed, replies);
        }
        if ledger.damaged() {
            tracing::error!("the ledger is damaged; stopping, the next start sets it aside");
            let _ = std::fs::write(marker, b"");
        } else if !flusher.failed() {
            return true;
        }
        *open = None;
        false
    }
}

/// Gives a damaged database a name that says so, and deletes all but the latest [`KEPT_ASIDE`] of these.
fn set_aside(path: &Path) -> Result<PathBuf, StoreError> {
    let stamp = jiff::Timestamp::now().as_second();
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let aside = path.with_file_name(format!("{name}.damaged-{stamp}"));
    match std::fs::rename(path, &aside) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(StoreError::Unwritable(error.to_string()));
        }
        _ => {}
    }
    for suffix in ["-wal", "-shm"] {
        let from = path.with_file_name(format!("{name}{suffix}"));
        let to = path.with_file_name(format!("{name}.damaged-{stamp}{suffix}"));
        match std::fs::rename(&from, &to) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(StoreError::Unwritable(error.to_string()));
            }
            _ => {}
        }
    }
    let marked = format!("{name}.damaged-");
    forget_older(path.parent().unwrap_or(Path::new(".")), &marked);
    Ok(aside)
}

/// A medium that fails damages one ledger after the other. What cannot be deleted stays.
fn forget_older(folder: &Path, marked: &str) {
    let mut aside: Vec<(i64, PathBuf)> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let name = entry.file_name();
            let stamp = name.to_str()?.strip_prefix(marked)?;
            let stamp = stamp.split('-').next()?.parse().ok()?;
            Some((stamp, entry.path()))
        })
        .collect();
    let mut stamps: Vec<i64> = aside.iter().map(|(stamp, _)| *stamp).collect();
    stamps.sort_unstable();
    stamps.dedup();
    let Some(oldest) = stamps.iter().rev().nth(KEPT_ASIDE - 1) else {
        return;
    };
    aside.retain(|(stamp, _)| stamp < oldest);
    for (_, path) in aside {
        let _ = std::fs::remove_file(path);
    }
}
