//! What is wrong right now, and what went wrong last. Every loop reports here; the publisher and `status` read here.
//!
//! A condition has one log line when it begins and one when it ends, however often it is reported in between. `docs/degraded.md` has
//! a section for each.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use crate::progress::stir;

/// A degraded state, each with its published code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Condition {
    /// The export folder is not there or not readable.
    FolderAway,
    /// File events do not come here; polling instead.
    EventsUnavailable,
    /// No connection to the broker.
    BrokerAway,
    /// The broker refuses messages.
    BrokerRefuses,
    /// Messages are set aside that the broker does not take while it takes others.
    MessagesParked,
    /// The state directory cannot be written.
    StateUnwritable,
    /// The outbox is at its limit.
    OutboxFull,
    /// A damaged ledger was set aside.
    LedgerRebuilt,
    /// A command says that no new file is to be started.
    Paused,
    /// The installed model bundle cannot be used; an older one runs.
    ModelFallback,
    /// A new configuration or model bundle was refused; the ones before it run on.
    ReloadRefused,
    /// A worker hung on a file and another one took its place; until the next start its thread keeps its memory.
    WorkerReplaced,
}

impl Condition {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::FolderAway,
        Self::EventsUnavailable,
        Self::BrokerAway,
        Self::BrokerRefuses,
        Self::MessagesParked,
        Self::StateUnwritable,
        Self::OutboxFull,
        Self::LedgerRebuilt,
        Self::Paused,
        Self::ModelFallback,
        Self::ReloadRefused,
        Self::WorkerReplaced,
    ];

    /// The published code.
    pub fn code(self) -> &'static str {
        match self {
            Self::FolderAway => "folder_away",
            Self::EventsUnavailable => "events_unavailable",
            Self::BrokerAway => "broker_away",
            Self::BrokerRefuses => "broker_refuses",
            Self::MessagesParked => "messages_parked",
            Self::StateUnwritable => "state_unwritable",
            Self::OutboxFull => "outbox_full",
            Self::LedgerRebuilt => "ledger_rebuilt",
            Self::Paused => "paused",
            Self::ModelFallback => "model_fallback",
            Self::ReloadRefused => "reload_refused",
            Self::WorkerReplaced => "worker_replaced",
        }
    }
}

/// The conditions that hold, with since when and a line for people.
pub type Conditions = BTreeMap<Condition, (jiff::Timestamp, String)>;

/// The latest line that told of an error or of a condition that began.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LastError {
    /// When.
    pub at: jiff::Timestamp,
    /// The line, as in the log.
    pub message: String,
}

/// Longest message of a [`LastError`], characters.
const LONGEST: usize = 300;

/// One for the process, as the log is: whatever is logged comes by here (`telemetry`), also from what knows no board.
static LAST_ERROR: Mutex<Option<LastError>> = Mutex::new(None);

/// Notes an error, now.
pub fn note_error(message: &str) {
    let error = LastError {
        at: jiff::Timestamp::now(),
        message: message.chars().take(LONGEST).collect(),
    };
    *LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
}

/// Brings back what an earlier run noted, unless there is something later.
pub fn recall_error(error: LastError) {
    let mut last = LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner);
    last.get_or_insert(error);
}

/// The latest error of this run or, until there is one, of the run before.
pub fn last_error() -> Option<LastError> {
    let last = LAST_ERROR.lock().unwrap_or_else(PoisonError::into_inner);
    last.clone()
}

/// The board that all loops share.
#[derive(Debug, Clone)]
pub struct Health {
    conditions: Arc<watch::Sender<Conditions>>,
}

impl Default for Health {
    fn default() -> Self {
        Self {
            conditions: Arc::new(watch::Sender::new(Conditions::new())),
        }
    }
}

impl Health {
    /// Reports that `condition` holds; `message` is one line without file names.
    pub fn raise(&self, condition: Condition, message: impl Into<String>) {
        self.conditions.send_if_modified(|conditions| {
            if conditions.contains_key(&condition) {
                return false;
            }
            let message = message.into();
            tracing::warn!(condition = condition.code(), "degraded: {message}");
            conditions.insert(condition, (jiff::Timestamp::now(), message));
            stir();
            true
        });
    }

    /// Reports that `condition` does not hold (any more).
    pub fn clear(&self, condition: Condition) {
        self.conditions.send_if_modified(|conditions| {
            let Some((since, _)) = conditions.remove(&condition) else {
                return false;
            };
            let seconds = jiff::Timestamp::now().duration_since(since).as_secs();
            tracing::info!(condition = condition.code(), after_s = seconds, "recovered");
            stir();
            true
        });
    }

    /// Whether a condition holds now.
    pub fn holds(&self, condition: Condition) -> bool {
        self.conditions.borrow().contains_key(&condition)
    }

    /// The conditions that hold now.
    pub fn now(&self) -> Conditions {
        self.conditions.borrow().clone()
    }

    /// Told of every change.
    pub fn subscribe(&self) -> watch::Receiver<Conditions> {
        self.conditions.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Lines {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn a_condition_has_one_line_when_it_begins_and_one_when_it_ends() {
        for condition in Condition::ALL {
            let lines = Lines::default();
            let log = tracing_subscriber::fmt()
                .with_writer(lines.clone())
                .without_time()
                .with_ansi(false)
                .finish();
            tracing::subscriber::with_default(log, || {
                let health = Health::default();
                health.clear(condition);
                for _ in 0..2 {
                    for _ in 0..3 {
                        health.raise(condition, "why; what to do");
                        assert!(health.holds(condition));
                    }
                    for _ in 0..3 {
                        health.clear(condition);
                        assert!(health.now().is_empty());
                    }
                }
            });
            let text = String::from_utf8(lines.0.lock().unwrap().clone()).unwrap();
            let code = condition.code();
            let begun =
                format!(" WARN scansentry::health: degraded: why; what to do condition=\"{code}\"");
            let ended =
                format!(" INFO scansentry::health: recovered condition=\"{code}\" after_s=0");
            let expected = [&begun, &ended, &begun, &ended];
            assert_eq!(text.lines().collect::<Vec<_>>(), expected, "{code}");
        }
    }

    #[test]
    fn every_condition_has_its_section() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/degraded.md");
        let codes: Vec<_> = Condition::ALL.map(Condition::code).into();
        let page = std::fs::read_to_string(path).unwrap();
        let title = |line: &str| {
            line.strip_prefix("## `")?
                .strip_suffix('`')
                .map(str::to_owned)
        };
        let sections: Vec<_> = page.lines().filter_map(title).collect();
        assert_eq!(sections, codes, "docs/degraded.md");
        for section in page.split("\n## `").skip(1) {
            for part in ["**Means:**", "**Meanwhile:**", "**Do:**", "**Ends:**"] {
                assert_eq!(section.matches(part).count(), 1, "{part} in {section}");
            }
        }
    }
}
