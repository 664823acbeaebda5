//! Studies: closes the ones that have gone quiet and keeps their alerts up to date.
//!
//! A study begins with its first picture, in the transaction that records that picture's outcome, and its alert is raised there too
//! ([`Ledger::record`](crate::store::Ledger::record)). What depends on time happens here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::config::Alert;
use crate::message::{AlertChange, OutboxMessage, Reporter, StudyState};
use crate::store::{Store, StoreError};

/// How often studies are looked at.
const TICK: Duration = Duration::from_secs(1);

/// Studies tended in one transaction.
const BATCH: usize = 100;

/// Tends studies until `stop`; wakes `outbox` when there is something to publish. `backlog` is how many files wait.
pub async fn run(
    config: Alert,
    store: Store,
    reporter: Arc<Reporter>,
    outbox: Arc<Notify>,
    backlog: Arc<AtomicU64>,
    stop: CancellationToken,
) {
    loop {
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(TICK) => {}
        }
        let now = jiff::Timestamp::now().as_second();
        let (quiet, update) = (now - config.quiet_s as i64, now - config.update_s as i64);
        let reporter = reporter.clone();
        let complete = backlog.load(Ordering::Relaxed) == 0;
        let tended = store
            .call(move |ledger| {
                ledger.tend_studies(now, quiet, update, BATCH, |study, change| {
                    messages(&reporter, study, change, complete)
                })
            })
            .await;
        match tended {
            Ok(0) => {}
            Ok(_) => outbox.notify_one(),
            // Ending is what tells the daemon.
            Err(StoreError::Closed) => return,
            // The workers report a ledger that cannot be written; here the next tick tries again.
            Err(error) => tracing::debug!("studies: {error}"),
        }
    }
}

fn messages(
    reporter: &Reporter,
    study: &StudyState,
    change: Option<AlertChange>,
    complete: bool,
) -> Vec<OutboxMessage> {
    let alert = change.map(|change| reporter.alert(study, change));
    let summary = (!study.open).then(|| reporter.study(study, complete));
    alert.into_iter().chain(summary).collect()
}
