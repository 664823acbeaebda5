//! What is wrong right now. Every loop reports here; the publisher and `status` read here.
//!
//! A condition has one log line when it begins and one when it ends, however often it is reported in between.

use std::collections::BTreeMap;
use std::sync::Arc;

use tokio::sync::watch;

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
