//! Where a test lets the process die, panic or hang. In builds with debug assertions only; in others nothing of it is left.
//!
//! `SCANSENTRY_FAIL` names points and what happens there: `POINT[@DETAIL][#N]:ACTION`, several with commas between them.
//!
//! - `POINT`: one of [`POINTS`]; `DETAIL`: only there where the point has this number (see each);
//! - `N`: at the N-th time only, from 1; without it every time;
//! - `ACTION`: `kill` (SIGKILL), `abort` (SIGABRT, as a runtime that gives up), `segv` (SIGSEGV), `panic`, `hang` (for ever).

/// The points, in the order of the table of steps in ARCHITECTURE.md. `infer` and those before it that know the file have its size in bytes as
/// their detail, the others 0.
pub const POINTS: [&str; 13] = [
    "hint",         // a file event has come
    "complete",     // the file counts as complete
    "read",         // its bytes are read, nothing is claimed
    "claim",        // claimed, not yet committed
    "claimed",      // claimed
    "infer",        // before decoding and inference
    "inferred",     // the outcome is in memory
    "record",       // outcome and messages written, not yet committed
    "recorded",     // outcome and messages recorded
    "sent",         // a message of the outbox handed to the connection
    "acknowledged", // its PUBACK has come, the ledger does not know
    "confirm",      // taken out of the outbox, not yet committed
    "confirmed",    // taken out of the outbox
];

#[cfg(debug_assertions)]
pub use active::hit;

/// Nothing.
#[cfg(not(debug_assertions))]
#[inline]
pub fn hit(_point: &str, _detail: u64) {}

#[cfg(debug_assertions)]
mod active {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    use rustix::process::{Signal, getpid, kill_process};

    use super::POINTS;

    /// Environment variable with the points and actions.
    const VARIABLE: &str = "SCANSENTRY_FAIL";

    #[derive(Debug)]
    struct Fault {
        point: String,
        detail: Option<u64>,
        nth: Option<u64>,
        action: Action,
        met: AtomicU64,
    }

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    enum Action {
        Signal(Signal),
        Panic,
        Hang,
    }

    /// Does what the environment asks for at `point`.
    ///
    /// # Panics
    ///
    /// If that is asked for, or if the variable cannot be understood.
    pub fn hit(point: &str, detail: u64) {
        static FAULTS: OnceLock<Vec<Fault>> = OnceLock::new();
        debug_assert!(POINTS.contains(&point), "{point}: no such fail point");
        let faults = FAULTS.get_or_init(|| {
            let text = std::env::var(VARIABLE).unwrap_or_default();
            let parts = text.split(',').filter(|part| !part.is_empty());
            parts
                .map(|part| {
                    parse(part).unwrap_or_else(|| {
                        panic!("{VARIABLE}: {part}: not POINT[@DETAIL][#N]:ACTION")
                    })
                })
                .collect()
        });
        for fault in faults {
            if fault.point == point && fault.detail.is_none_or(|wanted| wanted == detail) {
                let times = fault.met.fetch_add(1, Ordering::Relaxed) + 1;
                if fault.nth.is_none_or(|nth| nth == times) {
                    act(point, fault.action);
                }
            }
        }
    }

    fn act(point: &str, action: Action) {
        // Not to stderr, which is a file in memory while a runtime loads a model.
        tracing::warn!("fail point {point}: {action:?}");
        match action {
            // Again and again: Rust's own handler takes the first SIGSEGV for a fault that comes again if it lets it pass.
            Action::Signal(signal) => loop {
                let _ = kill_process(getpid(), signal);
                std::thread::park_timeout(Duration::from_millis(10));
            },
            Action::Panic => panic!("fail point {point}"),
            Action::Hang => park(),
        }
    }

    fn park() -> ! {
        loop {
            std::thread::park();
        }
    }

    fn parse(text: &str) -> Option<Fault> {
        let (place, action) = text.split_once(':')?;
        let (place, nth) = match place.split_once('#') {
            Some((place, nth)) => (place, Some(nth.parse().ok()?)),
            None => (place, None),
        };
        let (point, detail) = match place.split_once('@') {
            Some((point, detail)) => (point, Some(detail.parse().ok()?)),
            None => (place, None),
        };
        let action = match action {
            "kill" => Action::Signal(Signal::KILL),
            "abort" => Action::Signal(Signal::ABORT),
            "segv" => Action::Signal(Signal::SEGV),
            "panic" => Action::Panic,
            "hang" => Action::Hang,
            _ => return None,
        };
        POINTS.contains(&point).then(|| Fault {
            point: point.to_owned(),
            detail,
            nth,
            action,
            met: AtomicU64::new(0),
        })
    }

    #[cfg(test)]
    mod tests {
        use super::*;

        #[test]
        fn points_are_named_with_detail_count_and_action() {
            let fault = parse("infer@1234#2:segv").unwrap();
            assert_eq!(
                (fault.point.as_str(), fault.detail, fault.nth),
                ("infer", Some(1234), Some(2))
            );
            assert_eq!(fault.action, Action::Signal(Signal::SEGV));
            assert_eq!(parse("record:hang").unwrap().nth, None);
            for wrong in [
                "record",
                "nowhere:kill",
                "record:explode",
                "record#x:kill",
                "infer@:kill",
            ] {
                assert!(parse(wrong).is_none(), "{wrong}");
            }
        }
    }
}
