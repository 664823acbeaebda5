//! The threads that a runtime makes for itself, and which processor they run on.
//!
//! Linux under KVM takes a virtual processor with nothing to do for one that the host has taken away (`vcpu_is_preempted`), and so wakes a thread on
//! the processor of whoever wakes it: a helper beside the thread that is about to wait for it, or that thread beside its helper. With 30 ms between two
//! pictures, an inference with two threads took as long as with one (12 ms); with pictures one after the other, half of that. So during an
//! inference its thread stays on its processor, and the helpers keep off it. Which of the others they run on, the kernel decides.

use std::ffi::CString;
use std::sync::atomic::{AtomicUsize, Ordering};

use rustix::thread::{CpuSet, Pid};
use rustix::thread::{gettid, name, sched_getaffinity, sched_getcpu, sched_setaffinity, set_name};

use super::heap::GivenBack;
use super::{Engine, EngineError, EngineInfo, TensorSpec};

/// The threads that a runtime made while it loaded a model.
#[derive(Debug, Default)]
pub(super) struct Helpers {
    threads: Vec<Pid>,
    /// The processor that they keep off.
    off: Option<usize>,
}

impl Helpers {
    /// Runs `load`, and finds the threads that it leaves behind: a thread has the name of the one that made it.
    pub(super) fn of<T>(load: impl FnOnce() -> T) -> (T, Self) {
        static NUMBER: AtomicUsize = AtomicUsize::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // At most 15 bytes are kept.
        let theirs = CString::new(format!("infer-{number}")).expect("no NUL in digits");
        let Ok(ours) = name() else {
            return (load(), Self::default());
        };
        let _ = set_name(&theirs);
        let loaded = load();
        let _ = set_name(&ours);
        let threads = named(&theirs.to_string_lossy());
        (loaded, Self { threads, off: None })
    }

    /// Until the answer is dropped, this thread stays on its processor and the helpers on others, where there are any. The service manager may
    /// forbid that; then they are where the kernel puts them.
    fn apart(&mut self) -> Option<Held> {
        if self.threads.is_empty() {
            return None;
        }
        let before = sched_getaffinity(None).ok()?;
        let here = sched_getcpu();
        if here >= CpuSet::MAX_CPU || !before.is_set(here) || before.count() < 2 {
            return None;
        }
        let mut only_here = CpuSet::new();
        only_here.set(here);
        let mut elsewhere = before;
        elsewhere.unset(here);
        let held = Held { before };
        let moved = sched_setaffinity(None, &only_here).and_then(|()| {
            if self.off == Some(here) {
                return Ok(());
            }
            let mut threads = self.threads.iter();
            threads.try_for_each(|&thread| sched_setaffinity(Some(thread), &elsewhere))
        });
        if let Err(error) = moved {
            tracing::debug!("the threads of the runtime cannot be told where to run: {error}");
            self.threads.clear();
            return None;
        }
        self.off = Some(here);
        Some(held)
    }
}

/// This thread stays on one processor until this is dropped.
struct Held {
    before: CpuSet,
}

impl Drop for Held {
    fn drop(&mut self) {
        let _ = sched_setaffinity(None, &self.before);
    }
}

/// The threads of this process with that name, but for the calling one.
fn named(name: &str) -> Vec<Pid> {
    let entries = std::fs::read_dir("/proc/self/task").into_iter().flatten();
    entries
        .filter_map(|entry| {
            let entry = entry.ok()?;
            let thread = Pid::from_raw(entry.file_name().to_str()?.parse().ok()?)?;
            let its_name = std::fs::read_to_string(entry.path().join("comm")).ok()?;
            (its_name.trim_end() == name && thread != gettid()).then_some(thread)
        })
        .collect()
}

/// An engine with its helpers.
pub(super) struct Helped {
    pub(super) engine: Box<dyn Engine>,
    pub(super) helpers: Helpers,
    pub(super) _memory: GivenBack,
}

impl Engine for Helped {
    fn info(&self) -> &EngineInfo {
        self.engine.info()
    }

    fn inputs(&self) -> &[TensorSpec] {
        self.engine.inputs()
    }

    fn outputs(&self) -> &[TensorSpec] {
        self.engine.outputs()
    }

    fn run_filled(
        &mut self,
        fill: &mut dyn FnMut(&mut [u8]),
        outputs: &mut Vec<Vec<u8>>,
    ) -> Result<(), EngineError> {
        let _held = self.helpers.apart();
        self.engine.run_filled(fill, outputs)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::thread::spawn;

    use super::*;

    #[test]
    fn helpers_are_found_by_their_name_and_run_elsewhere() {
        let (end, ended) = channel::<()>();
        let (started, starting) = channel();
        let other = spawn(|| std::thread::park_timeout(std::time::Duration::from_millis(1)));
        let ((helper, thread), mut helpers) = Helpers::of(|| {
            let helper = spawn(move || {
                let _ = started.send(gettid());
                let _ = ended.recv();
            });
            (helper, starting.recv().unwrap())
        });
        assert_eq!(helpers.threads, [thread]);
        let before = name().unwrap();
        assert!(!before.to_string_lossy().starts_with("infer-"));

        let allowed = |thread| sched_getaffinity(thread).unwrap();
        let before = allowed(None);
        let held = helpers.apart();
        assert_eq!(held.is_some(), before.count() > 1);
        if held.is_some() {
            let (ours, theirs) = (allowed(None), allowed(Some(thread)));
            assert_eq!((ours.count(), theirs.count()), (1, before.count() - 1));
            assert!(!theirs.is_set(helpers.off.unwrap()));
        }
        drop(held);
        assert_eq!(allowed(None), before);
        drop(end);
        helper.join().unwrap();
        other.join().unwrap();
    }
}
