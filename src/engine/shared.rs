//! One engine with several threads for all workers, beside an engine of one thread for each.
//!
//! A picture that is alone has its answer sooner from several threads; many pictures are done sooner, and with less processor time, by as many
//! workers with one thread each, because threads of one inference wait for each other. Both run the same operators on the same model and give
//! the same bytes.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use super::{Engine, EngineError, EngineInfo, TensorSpec};

/// An engine that workers share, and how many of them are at work.
pub struct Shared {
    engine: Mutex<Box<dyn Engine>>,
    info: EngineInfo,
    at_work: AtomicUsize,
}

/// A worker is at work until this is dropped.
pub struct AtWork(Arc<Shared>);

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.at_work.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// `engine` for all.
    pub fn new(engine: Box<dyn Engine>) -> Arc<Self> {
        Arc::new(Self {
            info: engine.info().clone(),
            engine: Mutex::new(engine),
            at_work: AtomicUsize::new(0),
        })
    }

    /// Counts a worker as at work.
    pub fn begin(self: &Arc<Self>) -> AtWork {
        self.at_work.fetch_add(1, Ordering::Relaxed);
        AtWork(self.clone())
    }
}

/// A worker's own engine, and the shared one for when no other worker is at work.
pub(super) struct Either {
    pub(super) own: Box<dyn Engine>,
    pub(super) shared: Arc<Shared>,
}

impl Engine for Either {
    fn info(&self) -> &EngineInfo {
        &self.shared.info
    }

    fn inputs(&self) -> &[TensorSpec] {
        self.own.inputs()
    }

    fn outputs(&self) -> &[TensorSpec] {
        self.own.outputs()
    }

    fn run(&mut self, input: &[u8], outputs: &mut Vec<Vec<u8>>) -> Result<(), EngineError> {
        // Never waited for: a worker that hangs in it, or died in it, keeps it.
        if self.shared.at_work.load(Ordering::Relaxed) <= 1
            && let Ok(mut engine) = self.shared.engine.try_lock()
        {
            return engine.run(input, outputs);
        }
        self.own.run(input, outputs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with the number of its threads.
    struct Fake(EngineInfo);

    impl Fake {
        fn of(threads: usize) -> Box<dyn Engine> {
            Box::new(Self(EngineInfo {
                runtime: "",
                version: String::new(),
                delegate: String::new(),
                threads,
            }))
        }
    }

    impl Engine for Fake {
        fn info(&self) -> &EngineInfo {
            &self.0
        }

        fn inputs(&self) -> &[TensorSpec] {
            &[]
        }

        fn outputs(&self) -> &[TensorSpec] {
            &[]
        }

        fn run(&mut self, _: &[u8], outputs: &mut Vec<Vec<u8>>) -> Result<(), EngineError> {
            *outputs = vec![vec![self.0.threads as u8]];
            Ok(())
        }
    }

    #[test]
    fn whoever_is_alone_has_the_shared_engine_and_nobody_waits_for_it() {
        let shared = Shared::new(Fake::of(2));
        let mut engine = Either {
            own: Fake::of(1),
            shared: shared.clone(),
        };
        assert_eq!(engine.info().threads, 2);
        let mut threads = || {
            let mut outputs = Vec::new();
            engine.run(&[], &mut outputs).unwrap();
            outputs[0][0]
        };
        assert_eq!(threads(), 2, "nobody counted, as for a single file");
        let first = shared.begin();
        assert_eq!(threads(), 2);
        let second = shared.begin();
        assert_eq!(threads(), 1);
        drop(first);
        assert_eq!(threads(), 2);
        drop(second);

        let hung = shared.engine.lock().unwrap();
        assert_eq!(threads(), 1);
        drop(hung);
        assert_eq!(threads(), 2);
        let dies = shared.clone();
        let died = std::thread::spawn(move || {
            let _engine = dies.engine.lock().unwrap();
            panic!("as a worker would");
        });
        assert!(died.join().is_err());
        assert_eq!(threads(), 1);
    }
}
