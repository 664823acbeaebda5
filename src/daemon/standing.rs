//! What the daemon says of itself in the ledger, so that `status` can tell it without asking the daemon, and after its death too.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::health::{self, Conditions, Health, LastError};
use crate::message::{self, ConditionMessage, ErrorMessage, StandingNote, rfc3339};
use crate::progress::Beat;
use crate::store::{STANDING, Store};

/// Shortest time between two notes that differ in the number of waiting files only.
const PACE_OF_FILES: Duration = Duration::from_secs(10);

/// Notes changes of conditions, of the latest error and of the number of waiting files.
pub(super) struct Standing {
    store: Store,
    health: Health,
    backlog: Arc<AtomicU64>,
    started_at: jiff::Timestamp,
    noted: Option<(Said, Instant)>,
}

/// What a change of is noted.
#[derive(PartialEq)]
struct Said {
    conditions: Conditions,
    last_error: Option<LastError>,
    files: u64,
}

impl Said {
    /// Whether this is to be noted `time` after `noted` was.
    fn is_news_after(&self, noted: &Self, time: Duration) -> bool {
        (&self.conditions, &self.last_error) != (&noted.conditions, &noted.last_error)
            || self.files != noted.files && time >= PACE_OF_FILES
    }
}

impl Standing {
    /// Takes the latest error over from the run before, and notes that this one has begun.
    pub(super) async fn begin(store: Store, health: Health, backlog: Arc<AtomicU64>) -> Self {
        let before = store.call(|ledger| ledger.note(STANDING)).await;
        if let Ok(Some(text)) = before
            && let Some(error) = last_error_of(&text)
        {
            health::recall_error(error);
        }
        let mut standing = Self {
            store,
            health,
            backlog,
            started_at: jiff::Timestamp::now(),
            noted: None,
        };
        standing.note(standing.now(), false).await;
        standing
    }

    /// Notes what changes until `stop`, and then that this was in order.
    pub(super) async fn keep(mut self, stop: CancellationToken) {
        // No oftener: SD cards wear.
        let mut beat = Beat::default();
        loop {
            tokio::select! {
                () = stop.cancelled() => break,
                () = beat.next() => {}
            }
            let now = self.now();
            let due = self.noted.as_ref();
            let due = due.is_none_or(|(noted, at)| now.is_news_after(noted, at.elapsed()));
            if due {
                self.note(now, false).await;
            }
        }
        let last = Said {
            conditions: Conditions::new(),
            ..self.now()
        };
        self.note(last, true).await;
    }

    fn now(&self) -> Said {
        Said {
            conditions: self.health.now(),
            last_error: health::last_error(),
            files: self.backlog.load(Ordering::Relaxed),
        }
    }

    async fn note(&mut self, said: Said, stopped: bool) {
        let at = rfc3339(jiff::Timestamp::now());
        let note = StandingNote {
            started_at: rfc3339(self.started_at),
            stopped_at: stopped.then(|| at.clone()),
            at,
            version: env!("CARGO_PKG_VERSION"),
            state: message::state_word(&said.conditions),
            conditions: ConditionMessage::list(&said.conditions),
            files: said.files,
            last_error: said.last_error.clone().map(ErrorMessage::from),
        };
        let text = String::from_utf8(message::encode(&note)).expect("JSON is UTF-8");
        let noted = self
            .store
            .call(move |ledger| ledger.set_note(STANDING, Some(&text)))
            .await;
        match noted {
            Ok(()) => self.noted = Some((said, Instant::now())),
            // Whoever has to write reports a ledger in trouble; this is tried again at the next turn.
            Err(error) => tracing::debug!("standing: {error}"),
        }
    }
}

fn last_error_of(note: &str) -> Option<LastError> {
    let note: Value = serde_json::from_str(note).ok()?;
    let error = &note["last_error"];
    Some(LastError {
        at: error["at"].as_str()?.parse().ok()?,
        message: error["message"].as_str()?.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::health::Condition;

    #[test]
    fn a_change_is_noted_at_once_and_the_number_of_files_seldom() {
        let said = |files, conditions: &[Condition], message: Option<&str>| {
            let at = jiff::Timestamp::UNIX_EPOCH;
            let condition = |&c: &Condition| (c, (at, String::new()));
            Said {
                conditions: conditions.iter().map(condition).collect(),
                last_error: message.map(|message| LastError {
                    at,
                    message: message.to_owned(),
                }),
                files,
            }
        };
        let noted = said(3, &[], None);
        for (now, seconds, news) in [
            (said(3, &[], None), 1000, false),
            (said(4, &[], None), 9, false),
            (said(4, &[], None), 10, true),
            (said(3, &[Condition::BrokerAway], None), 1, true),
            (said(3, &[], Some("worse")), 1, true),
        ] {
            let time = Duration::from_secs(seconds);
            assert_eq!(now.is_news_after(&noted, time), news);
        }
    }

    #[test]
    fn the_latest_error_is_read_back_from_a_note() {
        let note = r#"{"last_error":{"at":"2026-01-31T08:00:00.250Z","message":"why; hint"}}"#;
        let error = last_error_of(note).unwrap();
        assert_eq!(rfc3339(error.at), "2026-01-31T08:00:00.250Z");
        assert_eq!(error.message, "why; hint");
        for nothing in [
            "",
            "{}",
            r#"{"last_error":null}"#,
            r#"{"last_error":{"at":"x","message":"y"}}"#,
        ] {
            assert_eq!(last_error_of(nothing), None, "{nothing}");
        }
    }
}
