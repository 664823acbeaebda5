//! Who gets on: each loop has a stopwatch that it starts anew at every turn and stops while it is rightly idle.
//!
//! The systemd watchdog is fed from here: as long as no stopwatch has been running for longer than its loop is allowed to be
//! silent. A timer alone would go on feeding while the work hangs.
//!
//! And when they look at what nobody tells them of: every two seconds, all on one beat, and every half a minute once nothing has stirred for twenty.

use std::pin::pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tokio::time::sleep_until;

/// How often loops look at what nobody tells them of, while there is something to do.
pub const LOOK: Duration = Duration::from_millis(SLOT_MS / 2);

/// Tokio's timers keep what is more than 4 s ahead by slots of 4096 ms from the start of the runtime, the rest by slots of 64 ms, and wake the thread at the
/// begin of a slot, too. At whole slots that is one time instead of three; each finds cold memory.
const SLOT_MS: u64 = 4096;

/// Without anything to do for this long, milliseconds, they look seldom.
const QUIET_MS: u64 = 20_000;

/// How often that is, milliseconds: each look of an idle machine finds cold memory, and costs several times what it does in a busy one. Less where a
/// loop may not be silent for as long: one that looks shows that it turns.
static SELDOM_MS: AtomicU64 = AtomicU64::new(7 * SLOT_MS);

/// When the beat of this process began.
static BEGAN: LazyLock<Instant> = LazyLock::new(Instant::now);

/// The beat begins, if it has not yet: with the runtime, so that its times are those of slots.
pub fn begin() {
    LazyLock::force(&BEGAN);
}

static STIR: Stir = Stir::new();

/// When something has stirred last.
struct Stir {
    /// Milliseconds after the beat began.
    last: AtomicU64,
    woken: Notify,
}

impl Stir {
    const fn new() -> Self {
        Self {
            last: AtomicU64::new(0),
            woken: Notify::const_new(),
        }
    }

    /// Something stirs; if nothing had for long, whoever waits for the next look chooses its time anew.
    fn at(&self, now: u64) {
        let before = self.last.swap(now, Ordering::Relaxed);
        if now.saturating_sub(before) >= QUIET_MS {
            self.woken.notify_waiters();
        }
    }

    fn quiet_at(&self, now: u64) -> bool {
        now.saturating_sub(self.last.load(Ordering::Relaxed)) >= QUIET_MS
    }
}

fn now() -> u64 {
    BEGAN.elapsed().as_millis() as u64
}

/// Something happened, or is under way: looks are no longer seldom.
pub fn stir() {
    STIR.at(now());
}

/// The first whole multiple of `period` after `since`, counted from where the beat began. Who looks at such times does so together with all others, so
/// that a processor with nothing to do is woken once and not once for each of them.
fn next_beat(since: Instant, period: Duration) -> Instant {
    let beats = since.saturating_duration_since(*BEGAN).as_nanos() / period.as_nanos();
    *BEGAN + period * u32::try_from(beats + 1).unwrap_or(u32::MAX)
}

/// Waits for the first look after `since` of a loop that looks every `pace`, or seldom until `due`.
async fn until_next(since: Instant, pace: Duration, due: Option<Instant>) {
    loop {
        let mut stirred = pin!(STIR.woken.notified());
        stirred.as_mut().enable();
        let period = if STIR.quiet_at(now()) {
            pace.max(Duration::from_millis(SELDOM_MS.load(Ordering::Relaxed)))
        } else {
            pace
        };
        let next = next_beat(since, period);
        let next = due.map_or(next, |due| next.min(next_beat(due.max(since), pace)));
        tokio::select! {
            () = sleep_until(next.into()) => return,
            () = stirred => {}
        }
    }
}

/// Waits for the next look, after now.
pub async fn look() {
    look_by(None).await;
}

/// The same, of a loop that knows when there will be something to do, if it does: no later than [`LOOK`] after that.
pub async fn look_by(due: Option<Instant>) {
    until_next(Instant::now(), LOOK, due).await;
}

/// The beat of a loop that has other things to do between its looks.
#[derive(Debug)]
pub struct Beat {
    last: Option<Instant>,
    pace: Duration,
}

impl Beat {
    /// Every `pace`, while there is something to do, as there is where a loop begins.
    pub fn every(pace: Duration) -> Self {
        stir();
        Self { last: None, pace }
    }

    /// Waits for the next look: the first one is at once. May be dropped and called anew.
    pub async fn next(&mut self) {
        if let Some(last) = self.last {
            until_next(last, self.pace, None).await;
        }
        self.last = Some(Instant::now());
    }
}

impl Default for Beat {
    fn default() -> Self {
        Self::every(LOOK)
    }
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
    /// A stopwatch for the loop `name`, which may be silent for `allowed`; no looks are further apart than half of that, or than [`LOOK`].
    pub fn watch(&mut self, name: impl Into<String>, allowed: Duration) -> Stopwatch {
        SELDOM_MS.fetch_min((allowed / 2).as_millis() as u64, Ordering::Relaxed);
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
        let before = Instant::now().max(*BEGAN);
        let (next, every_other) = (next_beat(before, second), next_beat(before, two));
        assert!(next > before && next <= before + second);
        let beats = |at: Instant, period: Duration| {
            at.duration_since(*BEGAN)
                .as_nanos()
                .is_multiple_of(period.as_nanos())
        };
        assert!(beats(next, second) && beats(every_other, two) && beats(every_other, second));
        // Who was busy over a beat is late for it, and does not miss it.
        assert_eq!(next_beat(next, second), next + second);
        assert_eq!(next_beat(next + second / 2, second), next + second);
    }

    #[tokio::test]
    async fn looks_are_seldom_while_nothing_stirs_and_what_stirs_ends_that() {
        let stir = Stir::new();
        assert!(!stir.quiet_at(QUIET_MS - 1) && stir.quiet_at(QUIET_MS));
        let mut woken = pin!(stir.woken.notified());
        woken.as_mut().enable();
        stir.at(QUIET_MS);
        woken.await;
        assert!(!stir.quiet_at(2 * QUIET_MS - 1));
        // Nobody waits for seldom looks now: nobody has to be woken.
        let mut woken = pin!(stir.woken.notified());
        woken.as_mut().enable();
        stir.at(2 * QUIET_MS - 1);
        let at_once = tokio::time::timeout(Duration::ZERO, woken).await;
        assert!(at_once.is_err());
    }

    #[tokio::test]
    async fn the_first_look_is_at_once() {
        let mut beat = Beat::every(Duration::from_hours(1));
        beat.next().await;
        let second = tokio::time::timeout(Duration::ZERO, beat.next()).await;
        assert!(second.is_err());
        // One that is overdue is, too.
        let mut late = Beat {
            last: Some(*BEGAN),
            pace: Duration::from_millis(1),
        };
        late.next().await;
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
