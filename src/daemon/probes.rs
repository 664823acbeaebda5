//! Answers supervisors: is the daemon alive, does it do its work, and the numbers.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::json;

use crate::health::{Condition, Health};
use crate::http::{Answer, Probes};
use crate::message::Reporter;
use crate::metrics::{self, DashboardMetrics, Metrics, Now};
use crate::store::Store;

/// How long the ledger may take to answer; its disk may be busy.
const LEDGER_PATIENCE: Duration = Duration::from_secs(10);

pub(super) struct Answers {
    pub(super) store: Store,
    pub(super) health: Health,
    pub(super) backlog: Arc<AtomicU64>,
    pub(super) reporter: Arc<Reporter>,
    pub(super) engine: String,
    pub(super) metrics: Metrics,
    /// Of a dashboard in this process.
    pub(super) dashboard: Option<DashboardMetrics>,
}

impl Probes for Answers {
    /// The ledger's thread answers, and with it whatever waits for it can go on. A worker that hangs ends the daemon by itself.
    fn alive(&self) -> Answer<(bool, String)> {
        let store = self.store.clone();
        Box::pin(async move {
            let answered = store.call(|_| Ok(()));
            let good = matches!(
                tokio::time::timeout(LEDGER_PATIENCE, answered).await,
                Ok(Ok(()))
            );
            let state = if good {
                "ok"
            } else {
                "the ledger does not answer"
            };
            Ok((good, json!({ "state": state }).to_string()))
        })
    }

    /// The model is loaded and the ledger open, or nobody could ask. Not ready: no new file would be started. A broker or a folder that is away
    /// does not count: the outbox and the folder keep what is to be done.
    fn ready(&self) -> Answer<(bool, String)> {
        let conditions = self.health.now();
        let stopped = [Condition::StateUnwritable, Condition::OutboxFull];
        let good = !stopped.iter().any(|c| conditions.contains_key(c));
        let codes: Vec<_> = conditions.keys().map(|c| c.code()).collect();
        let mqtt = if conditions.contains_key(&Condition::BrokerAway) {
            "away"
        } else {
            "connected"
        };
        let text = json!({ "ready": good, "mqtt": mqtt, "conditions": codes }).to_string();
        Box::pin(async move { Ok((good, text)) })
    }

    fn metrics(&self) -> Answer<String> {
        let conditions = self.health.now();
        let codes: Vec<_> = conditions.keys().map(|c| c.code()).collect();
        let now = Now {
            files: self.backlog.load(Ordering::Relaxed),
            messages: self.store.outbox_len(),
            parked: self.store.parked_len(),
            connected: !conditions.contains_key(&Condition::BrokerAway),
            conditions: &codes,
            model: &self.reporter.model,
            engine: &self.engine,
        };
        let text = metrics::text(|registry| {
            self.metrics.register(registry, &now);
            if let Some(dashboard) = &self.dashboard {
                dashboard.register(registry);
            }
        });
        Box::pin(async move { Ok(text) })
    }
}
