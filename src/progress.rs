//! Who gets on: each loop has a stopwatch that it starts anew at every turn and stops while it is rightly idle.
//!
//! The systemd watchdog is fed from here: as long as no stopwatch has been running for longer than its loop is allowed to be
//! silent. A timer alone would go on feeding while the work hangs.
//!
//! And when they look: at what nobody tells them of they look every [`LOOK`], all on one beat.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use tokio::time::{Interval, MissedTickBehavior, interval_at, sleep_until};

/// How often loops look at what nobody tells them of. Seldom: on an idle machine each look finds cold memory, and costs several times what it does in a
/// busy one.
pub const LOOK: Duration = Duration::from_secs(2);

/// When the beat of this process began.
static BEAT: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The latest whole multiple of `period` since the beat began.
fn last_beat(period: Duration) -> Instant {
    let beats = BEAT.elapsed().as_nanos() / period.as_nanos();
    *BEAT + period * u32::try_from(beats).unwrap_or(u32::MAX)
}

/// Waits for the next whole multiple of `period` since the beat began. Loops that look at something now and then do it on the beat, all at once,
/// so that a processor with nothing to do is woken once and not once for each of them.
pub async fn beat(period: Duration) {
    sleep_until((last_beat(period) + period).into()).await;
}

/// Ticks at once, and then on the beat: for loops that have other things to do in between.
pub fn on_the_beat(period: Duration) -> Interval {
    let mut ticks = interval_at(last_beat(period).into(), period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Skip);
    ticks
}

/// No time in milliseconds.
const RETIRED: u64 = u64::MAX;

/// How long a loop has been at one thing. Cheap to clone; all clones are one stopwatch.
#[derive(Debug, Clone)]
pub struct Stopwatch {
    base: Instant,
    /// Milliseconds after `base`, plus 1; 0 while stopped; [`RETIRED`] for good.
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
        self.set(self.base.elapsed().as_millis() as u64 + 1);
    }

    /// Stops it.
    pub fn stop(&self) {
        self.set(0);
    }

    /// Stops it for good: nobody waits for its loop any more, and what the loop still does to it counts for nothing.
    pub fn retire(&self) {
        self.set(RETIRED);
    }

    fn set(&self, since: u64) {
        let _ = self
            .since
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |now| {
                (now != RETIRED).then_some(since)
            });
    }

    /// How long it has been running; zero while stopped.
    pub fn running(&self) -> Duration {
        match self.since.load(Ordering::Relaxed) {
            0 | RETIRED => Duration::ZERO,
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
    fn the_beat_is_the_same_for_all() {
        let (second, two) = (Duration::from_secs(1), Duration::from_secs(2));
        let before = Instant::now();
        let (next, every_other) = (last_beat(second) + second, last_beat(two) + two);
        assert!(next > before && next <= Instant::now() + second);
        let beats = |at: Instant, period: Duration| {
            at.duration_since(*BEAT)
                .as_nanos()
                .is_multiple_of(period.as_nanos())
        };
        assert!(beats(next, second) && beats(every_other, two) && beats(every_other, second));
    }

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
        quick.retire();
        quick.start();
        assert!(quick.running().is_zero(), "it counts for nothing any more");
    }
}
