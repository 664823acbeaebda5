//! The pipeline: from a hint to a recorded outcome.
//!
//! ```text
//! hints, walks ──▶ intake ──▶ worker threads ──▶ store (outcome + messages) ──▶ publisher
//!                   │  ▲           │
//!                   │  └───────────┘ done / not complete yet / cannot be recorded now
//!                   └ settling: files that may still be written
//! ```
//!
//! The intake is one task and owns every list; the workers own an interpreter each and nothing else.

pub mod intake;
mod read;
pub mod worker;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::scan::Stamp;

/// A file for a worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Path below the export folder.
    pub path: PathBuf,
    /// Whether the time in which an incomplete file may still grow is over.
    pub last_chance: bool,
}

/// What became of a candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Disposition {
    /// It has its outcome, or had it before.
    Done,
    /// It is not there any more.
    Vanished,
    /// It looks incomplete, under this stamp.
    NotYet(Option<Stamp>),
    /// The ledger cannot be written; nothing was done.
    Blocked,
    /// The worker's thread is gone; a defect.
    WorkerDied,
}

/// Sent by a worker when it is free again.
#[derive(Debug)]
pub struct Report {
    /// Which worker.
    pub worker: usize,
    /// Which file.
    pub path: PathBuf,
    /// What became of it.
    pub disposition: Disposition,
}

/// Since when a worker has been decoding or classifying: started and stopped by the worker, read by the intake.
#[derive(Debug, Clone)]
pub struct Stopwatch {
    base: Instant,
    /// Milliseconds after `base`, plus 1; 0 while stopped.
    since: Arc<AtomicU64>,
}

impl Default for Stopwatch {
    fn default() -> Self {
        Self {
            base: Instant::now(),
            since: Arc::new(AtomicU64::new(0)),
        }
    }
}

impl Stopwatch {
    /// Starts it.
    pub fn start(&self) {
        let since = self.base.elapsed().as_millis() as u64 + 1;
        self.since.store(since, Ordering::Relaxed);
    }

    /// Stops it.
    pub fn stop(&self) {
        self.since.store(0, Ordering::Relaxed);
    }

    /// How long it has been running; zero while stopped.
    pub fn running(&self) -> Duration {
        match self.since.load(Ordering::Relaxed) {
            0 => Duration::ZERO,
            since => self
                .base
                .elapsed()
                .saturating_sub(Duration::from_millis(since - 1)),
        }
    }
}
