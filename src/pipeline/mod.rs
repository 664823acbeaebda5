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
