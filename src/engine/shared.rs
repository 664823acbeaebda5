//! One engine with several threads for all workers, or an engine of one thread for each while there are several files at a time.
//!
//! A picture that is alone has its answer sooner from several threads; many pictures are done sooner, and with less processor time, by as many
//! workers with one thread each, because threads of one inference wait for each other. Both run the same operators on the same model and give
//! the same bytes. An engine is some megabytes, so those that are not used are not kept: the shared one goes when a worker needs its own, and comes back in the
//! place of theirs when there has been nothing to do for a while. Where a worker's own engine cannot be loaded it waits for the shared one.

use std::cell::OnceCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::{Engine, EngineError, EngineInfo, TensorSpec};

type Load = Box<dyn Fn() -> Result<Box<dyn Engine>, EngineError> + Send + Sync>;

/// An engine that workers share, and how many of them are at work.
pub struct Shared {
    /// `None` while workers have their own.
    engine: Mutex<Option<Box<dyn Engine>>>,
    load: Load,
    info: EngineInfo,
    inputs: Vec<TensorSpec>,
    outputs: Vec<TensorSpec>,
    at_work: AtomicUsize,
}

/// A worker is at work until this is dropped.
pub struct AtWork(Arc<Shared>);

impl AtWork {
    /// Whether no other worker is.
    pub fn alone(&self) -> bool {
        self.0.alone()
    }
}

impl Drop for AtWork {
    fn drop(&mut self) {
        self.0.at_work.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Shared {
    /// `engine` for all; `load` makes another one like it.
    pub fn new(
        engine: Box<dyn Engine>,
        load: impl Fn() -> Result<Box<dyn Engine>, EngineError> + Send + Sync + 'static,
    ) -> Arc<Self> {
        Arc::new(Self {
            info: engine.info().clone(),
            inputs: engine.inputs().to_vec(),
            outputs: engine.outputs().to_vec(),
            engine: Mutex::new(Some(engine)),
            load: Box::new(load),
            at_work: AtomicUsize::new(0),
        })
    }

    /// The engine in `place`, loaded if there is none.
    fn loaded<'a>(
        &self,
        place: &'a mut Option<Box<dyn Engine>>,
    ) -> Result<&'a mut Box<dyn Engine>, EngineError> {
        match place {
            Some(engine) => Ok(engine),
            none => Ok(none.insert((self.load)()?)),
        }
    }

    /// Whether one worker is at work at most.
    fn alone(&self) -> bool {
        self.at_work.load(Ordering::Relaxed) <= 1
    }

    /// Counts a worker as at work.
    pub fn begin(self: &Arc<Self>) -> AtWork {
        self.at_work.fetch_add(1, Ordering::Relaxed);
        AtWork(self.clone())
    }
}

/// The shared engine for when no other worker is at work, and a worker's own for when others are.
pub(super) struct Either {
    shared: Arc<Shared>,
    load_own: Load,
    /// `None` in it: it cannot be loaded, which has been said.
    own: OnceCell<Option<Box<dyn Engine>>>,
}

impl Either {
    pub(super) fn new(shared: Arc<Shared>, load_own: Load) -> Self {
        Self {
            shared,
            load_own,
            own: OnceCell::new(),
        }
    }

    /// Loads this worker's own engine if it has none, after the shared one has made room for it.
    fn own(&mut self) -> Option<&mut Box<dyn Engine>> {
        let say = |error: &EngineError| {
            tracing::warn!(
                "no further engine can be loaded, workers wait for one another: {error}; pipeline.workers = 1 needs only one"
            );
        };
        self.own.get_or_init(|| {
            // Not where another worker is in it, hangs in it or has died in it.
            if let Ok(mut shared) = self.shared.engine.try_lock() {
                *shared = None;
            }
            (self.load_own)().inspect_err(say).ok()
        });
        self.own.get_mut()?.as_mut()
    }
}

impl Engine for Either {
    fn info(&self) -> &EngineInfo {
        &self.shared.info
    }

    fn inputs(&self) -> &[TensorSpec] {
        &self.shared.inputs
    }

    fn outputs(&self) -> &[TensorSpec] {
        &self.shared.outputs
    }

    fn run_filled(
        &mut self,
        fill: &mut dyn FnMut(&mut [u8]),
        outputs: &mut Vec<Vec<u8>>,
    ) -> Result<(), EngineError> {
        // Not waited for while there is another: a worker that hangs in it, or died in it, keeps it.
        if self.shared.alone()
            && let Ok(mut shared) = self.shared.engine.try_lock()
            && let Some(engine) = shared.as_mut()
        {
            return engine.run_filled(fill, outputs);
        }
        if let Some(own) = self.own() {
            return own.run_filled(fill, outputs);
        }
        let shared = self.shared.engine.lock();
        let mut shared = shared.unwrap_or_else(PoisonError::into_inner);
        self.shared.loaded(&mut shared)?.run_filled(fill, outputs)
    }

    fn settle(&mut self) -> bool {
        if self.own.get().is_none() {
            return true;
        }
        if self.shared.at_work.load(Ordering::Relaxed) > 0 {
            return false;
        }
        self.own.take();
        if let Ok(mut shared) = self.shared.engine.try_lock()
            && let Err(error) = self.shared.loaded(&mut shared)
        {
            tracing::warn!(
                "the engine for pictures that come alone cannot be loaded: {error}; they wait longer"
            );
        }
        true
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

        fn run_filled(
            &mut self,
            _: &mut dyn FnMut(&mut [u8]),
            outputs: &mut Vec<Vec<u8>>,
        ) -> Result<(), EngineError> {
            *outputs = vec![vec![self.0.threads as u8]];
            Ok(())
        }
    }

    #[test]
    fn whoever_is_alone_has_the_shared_engine_and_nobody_waits_for_it() {
        let (loads, returns) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
        let counting = |count: &Arc<AtomicUsize>, threads| {
            let count = count.clone();
            move || {
                count.fetch_add(1, Ordering::Relaxed);
                Ok(Fake::of(threads))
            }
        };
        let shared = Shared::new(Fake::of(2), counting(&returns, 2));
        let load_own = counting(&loads, 1);
        let mut engine = Either::new(shared.clone(), Box::new(load_own));
        assert_eq!(engine.info().threads, 2);
        let threads = |engine: &mut Either| {
            let mut outputs = Vec::new();
            engine.run_filled(&mut |_| (), &mut outputs).unwrap();
            outputs[0][0]
        };
        let count = |of: &Arc<AtomicUsize>| of.load(Ordering::Relaxed);
        let there = || shared.engine.try_lock().unwrap().is_some();
        assert_eq!(
            threads(&mut engine),
            2,
            "nobody counted, as for a single file"
        );
        let first = shared.begin();
        assert_eq!(threads(&mut engine), 2);
        assert!(engine.settle(), "there is nothing to let go of");
        assert_eq!((count(&loads), there()), (0, true), "not needed yet");
        let second = shared.begin();
        assert_eq!((threads(&mut engine), threads(&mut engine)), (1, 1));
        assert_eq!(
            (count(&loads), there()),
            (1, false),
            "one in the place of the other"
        );
        drop(first);
        assert_eq!(threads(&mut engine), 1);
        assert!(!engine.settle(), "another is at work");
        assert_eq!((there(), threads(&mut engine)), (false, 1));
        drop(second);
        assert!(engine.settle());
        assert_eq!((count(&returns), there()), (1, true));
        assert_eq!(threads(&mut engine), 2);

        let hung = shared.engine.lock().unwrap();
        assert_eq!(threads(&mut engine), 1);
        drop(hung);
        assert!(there(), "not taken from whoever is in it");
        assert_eq!(threads(&mut engine), 2);
        assert!(engine.settle());
        assert_eq!((count(&loads), count(&returns)), (2, 1));
        let dies = shared.clone();
        let died = std::thread::spawn(move || {
            let _engine = dies.engine.lock().unwrap();
            panic!("as a worker would");
        });
        assert!(died.join().is_err());
        assert_eq!(threads(&mut engine), 1);
    }

    #[test]
    fn workers_without_an_engine_of_their_own_wait_for_one_another() {
        let shared = Shared::new(Fake::of(2), || Ok(Fake::of(3)));
        let load_own = || Err(EngineError::Load("no memory".to_owned()));
        let mut engine = Either::new(shared.clone(), Box::new(load_own));
        let _at_work = (shared.begin(), shared.begin());
        let busy = shared.clone();
        let (held, holding) = std::sync::mpsc::channel();
        let other = std::thread::spawn(move || {
            let _engine = busy.engine.lock().unwrap();
            held.send(()).unwrap();
            std::thread::park_timeout(std::time::Duration::from_millis(20));
        });
        holding.recv().unwrap();
        let mut outputs = Vec::new();
        engine.run_filled(&mut |_| (), &mut outputs).unwrap();
        assert_eq!(outputs, [[2]]);
        other.join().unwrap();

        let load_own = || Err(EngineError::Load("no memory".to_owned()));
        let mut engine = Either::new(shared.clone(), Box::new(load_own));
        engine.run_filled(&mut |_| (), &mut outputs).unwrap();
        assert_eq!(outputs, [[3]], "it went for one that did not load");
    }
}
