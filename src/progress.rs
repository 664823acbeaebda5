//! Who gets on: each loop has a stopwatch that it starts anew at every turn and stops while it is rightly idle.
//!
//! The systemd watchdog is fed from here: as long as no stopwatch has been running for longer than its loop is allowed to be
//! silent. A timer alone would go on feeding while the work hangs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// How long a loop has been at one thing. Cheap to clone; all clones are one stopwatch.
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
    /// Starts it, at zero.
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

/// The stopwatches of all loops, and how long each may run.
#[derive(Debug, Default)]
pub struct Board {
    watched: Vec<(String, Stopwatch, Duration)>,
}

impl Board {
    /// A stopwatch for the loop `name`, which may be silent for `allowed`.
    pub fn watch(&mut self, name: impl Into<String>, allowed: Duration) -> Stopwatch {
        let stopwatch = Stopwatch::default();
        self.watched.push((name.into(), stopwatch.clone(), allowed));
        stopwatch
    }

    /// The first loop that stands still, and for how long.
    pub fn standstill(&self) -> Option<(&str, Duration)> {
        self.watched
            .iter()
            .map(|(name, stopwatch, allowed)| (name.as_str(), stopwatch.running(), allowed))
            .find(|(_, running, allowed)| running > allowed)
            .map(|(name, running, _)| (name, running))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_loop_stands_still_when_it_runs_on_and_not_when_it_rests() {
        let mut board = Board::default();
        let (quick, slow) = (
            board.watch("quick", Duration::ZERO),
            board.watch("slow", Duration::from_mins(1)),
        );
        assert_eq!(board.standstill(), None, "stopped at first");
        slow.start();
        quick.start();
        while quick.running().is_zero() {
            std::hint::spin_loop();
        }
        assert_eq!(board.standstill().map(|(name, _)| name), Some("quick"));
        quick.stop();
        assert_eq!(board.standstill(), None);
    }
}
