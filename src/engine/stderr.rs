//! Keeps a runtime's own messages off stderr, and its errors for us.
//!
//! LiteRT 2.1.4 writes to stderr at the start and end of every model, and says the reason of a failure nowhere else; the
//! functions that would set its log level are not exported, and its option for it has no effect in this version. TensorFlow
//! Lite 1.15 has no such setting. So while they may write, file descriptor 2 is a file in memory. What other threads wrote meanwhile is passed on
//! afterwards, if it did not fall into one of the runtime's lines; so the log has a descriptor of its own.

use std::fs::File;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::{Mutex, PoisonError};

use rustix::fs::{MemfdFlags, memfd_create};
use rustix::io::fcntl_dupfd_cloexec;
use rustix::stdio::dup2_stderr;

use super::EngineError;

/// There is one stderr.
static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());

/// Loads a model quietly; the first error that the runtime wrote is the reason of its refusal.
pub(super) fn explained<T>(
    load: impl FnOnce() -> Result<T, EngineError>,
) -> Result<T, EngineError> {
    let (loaded, errors) = quietly(load);
    loaded.map_err(|error| match (error, errors.first()) {
        (EngineError::Load(what), Some(reason)) => EngineError::Load(format!("{what}: {reason}")),
        (error, _) => error,
    })
}

/// Runs `f`, which must not call this again, and returns with its result the errors that the runtime wrote.
fn quietly<T>(f: impl FnOnce() -> T) -> (T, Vec<String>) {
    let _guard = ONE_AT_A_TIME.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(caught) = Caught::start() else {
        return (f(), Vec::new());
    };
    let result = f();
    let text = caught.finish();

    let mut errors = Vec::new();
    for line in text.split_inclusive('\n') {
        match classify(line) {
            Line::Chatter => {}
            Line::Error(message) => errors.push(message.to_owned()),
            Line::NotOurs => _ = std::io::stderr().write_all(line.as_bytes()),
        }
    }
    (result, errors)
}

#[derive(Debug, PartialEq, Eq)]
enum Line<'a> {
    Chatter,
    Error(&'a str),
    NotOurs,
}

/// Tells the runtime's lines (`INFO: [file.cc:30] text`) from those of other threads of this program.
fn classify(line: &str) -> Line<'_> {
    // The last is the second line of an error about a custom operator; an empty one follows.
    const CHATTER: [&str; 4] = ["VERBOSE: ", "INFO: ", "WARNING: ", "See instructions: "];
    if line == "\n" || CHATTER.iter().any(|start| line.starts_with(start)) {
        return Line::Chatter;
    }
    let Some(message) = line.strip_prefix("ERROR: ") else {
        return Line::NotOurs;
    };
    let message = message.trim().trim_end_matches('.');
    // The place in the runtime's source means nothing to a reader.
    let without_place = message
        .strip_prefix('[')
        .and_then(|rest| rest.split_once("] "))
        .map_or(message, |(_, text)| text);
    Line::Error(without_place)
}

/// Stderr is a file in memory until this is dropped.
struct Caught {
    real: OwnedFd,
    file: File,
}

impl Caught {
    /// `None` where stderr cannot be caught (it is closed): then the runtime's messages go where they go.
    fn start() -> Option<Self> {
        let real = fcntl_dupfd_cloexec(rustix::stdio::stderr(), 3).ok()?;
        let file = File::from(memfd_create("stderr", MemfdFlags::CLOEXEC).ok()?);
        dup2_stderr(&file).ok()?;
        Some(Self { real, file })
    }

    /// Ends it, with what was written.
    fn finish(self) -> String {
        let mut text = Vec::new();
        let file = self.file.try_clone();
        drop(self);
        if let Ok(file) = file {
            // Not by seeking: another thread's line that is still being written would land on the beginning.
            let mut part = [0; 4096];
            while let Ok(count @ 1..) = file.read_at(&mut part, text.len() as u64) {
                text.extend_from_slice(&part[..count]);
            }
        }
        String::from_utf8_lossy(&text).into_owned()
    }
}

impl Drop for Caught {
    fn drop(&mut self) {
        let _ = dup2_stderr(&self.real);
    }
}

/// Drops what it holds [`quietly`].
#[cfg(litert)]
pub(super) struct DropQuietly<T>(Option<T>);

#[cfg(litert)]
impl<T> DropQuietly<T> {
    pub(super) fn new(inner: T) -> Self {
        Self(Some(inner))
    }
}

#[cfg(litert)]
impl<T> Drop for DropQuietly<T> {
    fn drop(&mut self) {
        quietly(|| drop(self.0.take()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_the_runtimes_lines_from_others() {
        assert_eq!(
            classify("INFO: [environment.cc:30] Creating LiteRT environment\n"),
            Line::Chatter
        );
        assert_eq!(
            classify("ERROR: [model.cc:12] no such thing\n"),
            Line::Error("no such thing")
        );
        assert_eq!(
            classify("ERROR: Encountered unresolved custom op: X.\n"),
            Line::Error("Encountered unresolved custom op: X")
        );
        assert_eq!(
            classify("2026-11-23T13:00:00Z  INFO scan done\n"),
            Line::NotOurs
        );
    }
}
