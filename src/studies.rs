//! Studies: closes the ones that have gone quiet and keeps their alerts up to date.
//!
//! A study begins with its first picture, in the transaction that records that picture's outcome, and its alert is raised there too
//! ([`Ledger::record`](crate::store::Ledger::record)). What depends on time happens here.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::Alert;
use crate::health::{Condition, Health};
use crate::message::{AlertChange, OutboxMessage, Reporter, StudyState};
use crate::progress::{Stopwatch, look_by};
use crate::store::{Store, StoreError};

/// Studies tended in one transaction.
const BATCH: usize = 100;

/// After a start or a standstill, how long to wait at most until everything has been looked at.
const PATIENCE: Duration = Duration::from_hours(1);

/// What tends studies.
pub struct Studies {
    /// When a study is over, and how often an alert is updated.
    pub config: Alert,
    /// The ledger.
    pub store: Store,
    /// Makes the messages.
    pub reporter: Arc<Reporter>,
    /// Woken when there is something to publish.
    pub outbox: Arc<Notify>,
    /// The board of conditions.
    pub health: Health,
    /// How many files wait.
    pub backlog: Arc<AtomicU64>,
    /// How often everything has been walked.
    pub walked: Arc<AtomicU64>,
    /// Of this loop.
    pub turn: Stopwatch,
}

impl Studies {
    /// Tends studies until `stop`.
    pub async fn run(self, stop: CancellationToken) {
        self.tend(stop).await;
        self.turn.stop();
    }

    async fn tend(&self, stop: CancellationToken) {
        let mut view = View::new(Instant::now());
        let mut due = None;
        loop {
            self.turn.start();
            tokio::select! {
                () = stop.cancelled() => return,
                () = look_by(due) => {}
            }
            let (close, complete) = view.look(
                &self.health,
                self.walked.load(Ordering::Relaxed),
                self.backlog.load(Ordering::Relaxed),
                Instant::now(),
            );
            let now = jiff::Timestamp::now().as_second();
            let (quiet_s, update_s) = (self.config.quiet_s as i64, self.config.update_s as i64);
            let quiet = if close { now - quiet_s } else { i64::MIN };
            let reporter = self.reporter.clone();
            let tended = self
                .store
                .call(move |ledger| {
                    let encode = |study: &_, change| messages(&reporter, study, change, complete);
                    let tended = ledger.tend_studies(now, quiet, now - update_s, BATCH, encode)?;
                    Ok((
                        tended,
                        ledger.studies_due(close.then_some(quiet_s), update_s)?,
                    ))
                })
                .await;
            due = match tended {
                Ok((tended, next)) => {
                    if tended > 0 {
                        self.outbox.notify_one();
                    }
                    next.map(|next| {
                        let ahead = u64::try_from(next - now).unwrap_or(0);
                        std::time::Instant::now() + Duration::from_secs(ahead)
                    })
                }
                // Ending is what tells the daemon.
                Err(StoreError::Closed) => return,
                // The workers report a ledger that cannot be written; here the next look tries again.
                Err(error) => {
                    tracing::debug!("studies: {error}");
                    None
                }
            };
        }
    }
}

/// Whether a quiet study is over, or pictures of it may only not have been seen: after a start, a pause, or while the folder is away.
struct View {
    /// Walks that ended before the folder was there.
    walked: u64,
    /// The start, or the end of the last standstill.
    since: Instant,
    /// Everything that is there has been looked at since then.
    caught_up: bool,
}

impl View {
    fn new(now: Instant) -> Self {
        Self {
            walked: 0,
            since: now,
            caught_up: false,
        }
    }

    /// Whether studies may be closed, and whether nothing of them waits as far as is known.
    fn look(&mut self, health: &Health, walked: u64, backlog: u64, now: Instant) -> (bool, bool) {
        let away = health.holds(Condition::FolderAway);
        if away {
            self.walked = walked;
        }
        if away || health.holds(Condition::Paused) {
            (self.since, self.caught_up) = (now, false);
            return (false, false);
        }
        self.caught_up |= walked > self.walked && backlog == 0;
        // A file that never comes to rest must not keep alerts open for ever.
        let close = self.caught_up || now - self.since >= PATIENCE;
        (close, self.caught_up && backlog == 0)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_study_is_closed_before_everything_has_been_looked_at() {
        let (health, start) = (Health::default(), Instant::now());
        let mut view = View::new(start);
        let mut look = |walked, backlog, after| view.look(&health, walked, backlog, start + after);
        let second = Duration::from_secs(1);
        assert_eq!(look(0, 0, second), (false, false), "not walked");
        assert_eq!(look(1, 3, second), (false, false), "walked, files wait");
        assert_eq!(look(1, 0, second), (true, true));
        assert_eq!(look(1, 2, second), (true, false), "more has come since");

        health.raise(Condition::Paused, "paused");
        assert_eq!(look(1, 0, second), (false, false));
        health.clear(Condition::Paused);
        assert_eq!(look(1, 2, second), (false, false), "what came meanwhile");
        assert_eq!(look(1, 0, second), (true, true));

        health.raise(Condition::FolderAway, "away");
        assert_eq!(look(1, 0, PATIENCE), (false, false));
        health.clear(Condition::FolderAway);
        assert_eq!(look(1, 0, PATIENCE), (false, false), "to be walked again");
        assert_eq!(look(2, 0, PATIENCE), (true, true));

        let mut view = View::new(start);
        assert_eq!(view.look(&health, 1, 1, start + PATIENCE), (true, false));
    }
}
