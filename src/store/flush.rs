//! The flusher: puts the write-ahead log on the disk beside the thread that writes it, so that a commit need not wait, and one wait serves all
//! commits that came before it.
//!
//! The database itself (`synchronous = NORMAL`) writes a commit to the log and leaves the disk to the system. A call whose effect must survive a
//! power cut is answered here, after `fdatasync` of the log: of whatever was committed before it, so nobody acts on what a power cut could
//! still undo.
//!
//! The log has its full length from the start ([`reserve`]). Where a commit makes a file longer, the file system has to put its own records on the
//! disk too, and wait for them.

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ledger::{CHECKPOINT, PAGE};
use super::{Reply, StoreError, Survives, free_bytes};

/// Flushes that follow one another are this far apart, so that one serves several commits when there are many. The first one does not wait, nor does
/// a second one: what is looked at on the beat begins one too, and the outcome of a lone picture would wait for it.
pub const FLUSHES_APART: Duration = Duration::from_millis(10);

/// Transactions that may wait for a flush. With more the disk does not keep up, and the thread that writes waits for it.
const WAITING: usize = 256;

/// Bytes that a log is given: as many pages as it gets before `SQLite` begins at its start again, and 300 for the transactions that reach beyond; each
/// with 24 bytes before it (`SQLite`'s file format, 4.2).
const LOG: u64 = (CHECKPOINT + 300) * (PAGE + 24);

/// A log is given nothing where less than this many times as much is free.
const ROOM: u64 = 16;

/// What has been committed up to `mark` is to be on the disk before `replies` are given.
struct Flush {
    mark: u64,
    replies: Vec<Reply>,
}

/// Makes a write-ahead log as long as it gets, while nobody else may write to it. `SQLite` takes what lies behind its own records for the rest of an
/// earlier round (zeros are a record of no page), as it does with a log that it has begun anew. Written, not only allocated: the file system would record
/// of each block that it is in use now.
fn reserve(mut log: &File, database: &Path) -> std::io::Result<()> {
    let length = log.metadata()?.len();
    if length < LOG && free_bytes(database)? >= ROOM * LOG {
        std::io::copy(&mut std::io::repeat(0).take(LOG - length), &mut log)?;
    }
    Ok(())
}

/// A handle to the flusher's thread.
#[derive(Debug)]
pub(super) struct Flusher {
    queue: SyncSender<Flush>,
    state: Arc<State>,
    thread: JoinHandle<()>,
}

#[derive(Debug, Default)]
struct State {
    /// What has been committed up to this mark is on the disk.
    flushed: AtomicU64,
    /// The disk did not take the log. What it holds of it is not known any more, and another try could succeed without having written it.
    failed: AtomicBool,
}

impl Flusher {
    /// Starts it for the write-ahead log of the open database at `database`, of which everything is on the disk up to `mark`, while nobody else may
    /// write to it.
    pub(super) fn start(database: &Path, mark: u64) -> std::io::Result<Self> {
        let mut log = database.as_os_str().to_owned();
        log.push("-wal");
        let log = OpenOptions::new().append(true).open(log)?;
        // Without it the log grows as it is written: slower, that is all.
        if let Err(error) = reserve(&log, database) {
            tracing::debug!("no room was made for the ledger's log: {error}");
        }
        Self::start_with(mark, move || log.sync_data())
    }

    fn start_with(
        mark: u64,
        sync: impl FnMut() -> std::io::Result<()> + Send + 'static,
    ) -> std::io::Result<Self> {
        let (queue, due) = sync_channel(WAITING);
        let state = Arc::new(State {
            flushed: AtomicU64::new(mark),
            failed: AtomicBool::new(false),
        });
        let its_own = state.clone();
        let thread = std::thread::Builder::new()
            .name("flusher".into())
            .spawn(move || run(&due, sync, &its_own))?;
        Ok(Self {
            queue,
            state,
            thread,
        })
    }

    /// Answers calls of a transaction that ended as `committed` says, after which everything up to `mark` was committed.
    pub(super) fn answer(
        &self,
        mark: u64,
        committed: &Result<(), StoreError>,
        replies: Vec<(Survives, Reply)>,
    ) {
        let safe = committed.is_err() || mark <= self.state.flushed.load(Ordering::Relaxed);
        let wanted = |survives| !safe && survives >= Survives::PowerCutSoon;
        let begin = replies.iter().any(|(survives, _)| wanted(*survives));
        let (later, now): (Vec<_>, Vec<_>) = replies
            .into_iter()
            .partition(|(survives, _)| !safe && *survives == Survives::PowerCut);
        if begin {
            let replies = later.into_iter().map(|(_, reply)| reply).collect();
            // If it has ended, the replies are dropped, which says that the store is closed.
            let _ = self.queue.send(Flush { mark, replies });
        }
        for (_, reply) in now {
            reply(committed.clone());
        }
    }

    /// Whether the disk did not take the log.
    pub(super) fn failed(&self) -> bool {
        self.state.failed.load(Ordering::Relaxed)
    }

    /// Flushes what waits, and ends.
    pub(super) fn end(self) {
        drop(self.queue);
        let _ = self.thread.join();
    }
}

fn run(queue: &Receiver<Flush>, mut sync: impl FnMut() -> std::io::Result<()>, state: &State) {
    // When the next one need not wait, were there no second one to be had.
    let mut due_at = Instant::now();
    // The first one is nobody's: it takes what was reserved.
    let nobody = Flush {
        mark: 0,
        replies: Vec::new(),
    };
    let mut reserved = true;
    for first in std::iter::once(nobody).chain(queue) {
        let on_the_disk = |mark| !reserved && mark <= state.flushed.load(Ordering::Relaxed);
        if !on_the_disk(first.mark) {
            #[allow(
                clippy::disallowed_methods,
                reason = "a thread of its own that can do nothing else"
            )]
            std::thread::sleep(due_at.saturating_duration_since(Instant::now() + FLUSHES_APART));
        }
        let due: Vec<_> = std::iter::once(first).chain(queue.try_iter()).collect();
        let mark = due.iter().map(|flush| flush.mark).max().unwrap_or(0);
        let mut done = Ok(());
        if !on_the_disk(mark) {
            let start = Instant::now();
            let synced = sync();
            due_at = due_at.max(start) + start.elapsed() + FLUSHES_APART;
            match synced {
                Ok(()) => _ = state.flushed.fetch_max(mark, Ordering::Relaxed),
                Err(error) => {
                    state.failed.store(true, Ordering::Relaxed);
                    tracing::error!(
                        "the disk does not take the ledger ({error}); stopping, the next start goes on with what it holds; check the medium"
                    );
                    done = Err(StoreError::Unwritable(error.to_string()));
                }
            }
        }
        reserved = false;
        let failed = done.is_err();
        for reply in due.into_iter().flat_map(|flush| flush.replies) {
            reply(done.clone());
        }
        if failed {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::mpsc;

    use super::*;

    /// A flusher, the disk's answers to it, and a word each time that it asks the disk.
    fn flusher() -> (Flusher, mpsc::Sender<io::Result<()>>, mpsc::Receiver<()>) {
        let (disk, taken) = mpsc::channel();
        let (asks, asked) = mpsc::channel();
        let sync = move || {
            let _ = asks.send(());
            taken.recv().expect("the test is still there")
        };
        let flusher = Flusher::start_with(0, sync).unwrap();
        // What was reserved.
        asked.recv_timeout(SOON).unwrap();
        disk.send(Ok(())).unwrap();
        (flusher, disk, asked)
    }

    fn ask(
        flusher: &Flusher,
        mark: u64,
        survives: &[Survives],
    ) -> mpsc::Receiver<Result<(), StoreError>> {
        let (answers, answered) = mpsc::channel();
        let reply = |survives: &Survives| {
            let answers = answers.clone();
            let reply: Reply = Box::new(move |answer| answers.send(answer).unwrap());
            (*survives, reply)
        };
        flusher.answer(mark, &Ok(()), survives.iter().map(reply).collect());
        answered
    }

    fn come(answers: &mpsc::Receiver<Result<(), StoreError>>) -> usize {
        answers
            .try_iter()
            .inspect(|answer| assert!(answer.is_ok()))
            .count()
    }

    const SOON: Duration = Duration::from_secs(10);

    #[test]
    fn who_waits_for_the_disk_is_answered_after_it_and_the_others_at_once() {
        use Survives::{PowerCut, PowerCutSoon, Process};
        let (flusher, disk, asked) = flusher();
        let first = ask(&flusher, 3, &[Process, PowerCut, PowerCutSoon]);
        asked.recv_timeout(SOON).unwrap();
        assert_eq!(come(&first), 2);
        // These were committed while the first flush was on its way, or nothing was written since.
        let second = ask(&flusher, 5, &[PowerCut]);
        let third = ask(&flusher, 5, &[PowerCut, Process]);
        assert_eq!((come(&second), come(&third)), (0, 1));
        disk.send(Ok(())).unwrap();
        assert!(first.recv_timeout(SOON).unwrap().is_ok());
        // One flush for both.
        asked.recv_timeout(SOON).unwrap();
        assert_eq!((come(&second), come(&third)), (0, 0));
        disk.send(Ok(())).unwrap();
        assert!(second.recv_timeout(SOON).unwrap().is_ok());
        assert!(third.recv_timeout(SOON).unwrap().is_ok());
        // Nothing was written: nothing to wait for.
        assert_eq!(come(&ask(&flusher, 5, &[PowerCut])), 1);
        // What need not survive a power cut begins no flush, and goes with the next one.
        assert_eq!(come(&ask(&flusher, 6, &[Process])), 1);
        let last = ask(&flusher, 6, &[PowerCut]);
        assert_eq!(come(&last), 0);
        disk.send(Ok(())).unwrap();
        assert!(last.recv_timeout(SOON).unwrap().is_ok());
        flusher.end();
        assert_eq!(asked.try_iter().count(), 1, "the last one");
    }

    #[test]
    fn a_disk_that_fails_once_is_not_believed_again() {
        let (flusher, disk, _asked) = flusher();
        disk.send(Err(io::Error::from_raw_os_error(5))).unwrap();
        let first = ask(&flusher, 1, &[Survives::PowerCut]);
        let answer = first.recv_timeout(SOON).unwrap();
        assert!(
            matches!(answer, Err(StoreError::Unwritable(_))),
            "{answer:?}"
        );
        assert!(flusher.failed());
        // It is dropped without an answer: the store is closed.
        let second = ask(&flusher, 2, &[Survives::PowerCut]);
        assert!(second.recv_timeout(SOON).is_err());
    }
}
