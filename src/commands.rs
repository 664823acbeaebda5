//! Commands from the broker: pause, resume, reprocess. Off by default.
//!
//! ```text
//! base/command ──publisher──▶ queue ──▶ checked, carried out, answered ──outbox──▶ base/command/result
//! ```
//!
//! What a command changes and its answer are one transaction, except for `reprocess`, which goes through the ledger in steps and is
//! answered at the end; a crash on the way leaves it without an answer, and sending it again does no harm. The same id is answered
//! again, out of the last 100 answers, and not carried out again.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, watch};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::health::{Condition, Health};
use crate::message::{
    COMMAND_SCHEMA, CommandMessage, CommandWord, Received, Refusal, Reporter, ReprocessMessage,
};
use crate::progress::Stopwatch;
use crate::scan::{Pseudonym, ScanId};
use crate::store::{Ledger, Selection, Store, StoreError};
use crate::watch::Hint;

/// Commands that may wait; more are dropped.
pub const QUEUE: usize = 8;

/// Longest command in bytes.
const MAX_BYTES: usize = 65_536;

/// Longest id of a command in characters.
const MAX_ID: usize = 64;

/// Most scans that one command may name.
const MAX_SCANS: usize = 1000;

/// Commands that may come at once; one more every [`REFILL`].
const BURST: u32 = 10;

/// See [`BURST`].
const REFILL: Duration = Duration::from_secs(6);

/// Scans looked at in one step of a reprocess.
pub const PAGE: usize = 500;

/// The ledger's note that the appliance is paused.
const PAUSED: &str = "paused";

/// A command that is to be carried out.
#[derive(Debug)]
struct Command {
    id: String,
    word: CommandWord,
    /// What a reprocess is about.
    selection: Option<Selection>,
}

/// What commands work with.
pub struct Commands {
    /// The ledger.
    pub store: Store,
    /// The board of conditions.
    pub health: Health,
    /// Makes the answers.
    pub reporter: Arc<Reporter>,
    /// Woken when there is something to publish.
    pub outbox: Arc<Notify>,
    /// The export folder.
    pub folder: PathBuf,
    /// Tells the intake whether to start new files.
    pub pause: watch::Sender<bool>,
    /// Tells the intake to walk the folder.
    pub hints: mpsc::Sender<Hint>,
    /// Of this loop; stopped while it waits for a command, the folder or the intake.
    pub turn: Stopwatch,
}

/// Whether the appliance was paused before this start. A pause that nobody could end, because commands are switched off, is ended here.
pub async fn was_paused(store: &Store, enabled: bool) -> Result<bool, StoreError> {
    let paused = store
        .call(move |ledger| {
            let paused = ledger.note(PAUSED)?.is_some();
            if paused && !enabled {
                ledger.set_note(PAUSED, None)?;
            }
            Ok(paused)
        })
        .await?;
    if paused && !enabled {
        tracing::warn!("the pause is over: commands are switched off, nobody could end it");
    }
    Ok(paused && enabled)
}

impl Commands {
    /// Carries out what comes, one at a time, until `stop`.
    pub async fn run(self, mut received: mpsc::Receiver<Received>, stop: CancellationToken) {
        self.show_pause();
        let mut bucket = Bucket::new();
        loop {
            self.turn.stop();
            let received = tokio::select! {
                () = stop.cancelled() => return,
                Some(received) = received.recv() => received,
            };
            if !bucket.take(Instant::now()) {
                continue;
            }
            self.turn.start();
            // A stop does not wait for a long reprocess: it is not answered then, and can be sent again.
            let handled = tokio::select! {
                () = stop.cancelled() => {
                    self.turn.stop();
                    return;
                }
                handled = self.handle(&received) => handled,
            };
            match handled {
                Ok(()) => self.outbox.notify_one(),
                Err(StoreError::Closed) => {
                    self.turn.stop();
                    return;
                }
                Err(error) => tracing::warn!("a command was not carried out: {error}"),
            }
        }
    }

    fn show_pause(&self) {
        if *self.pause.borrow() {
            self.health.raise(
                Condition::Paused,
                "paused by a command, no new file is started; send resume",
            );
        } else {
            self.health.clear(Condition::Paused);
        }
    }

    async fn handle(&self, received: &Received) -> Result<(), StoreError> {
        let away = |command: &Command| {
            command.word == CommandWord::Reprocess && self.health.holds(Condition::FolderAway)
        };
        let checked = check(received).and_then(|command| {
            if away(&command) {
                let message = "the export folder is not there; send it again when it is";
                return Err((Refusal::FolderAway, message.into()));
            }
            Ok(command)
        });
        match checked {
            Ok(command) => self.carry_out(command).await,
            Err((refusal, message)) => {
                // The code only: the message may quote what was sent.
                tracing::warn!(code = refusal.as_str(), "command refused");
                let answer = self.reporter.refusal(received, refusal, &message);
                self.store
                    .call(move |ledger| ledger.answer(None, &answer, now()))
                    .await
            }
        }
    }

    async fn carry_out(&self, command: Command) -> Result<(), StoreError> {
        let id = command.id.clone();
        let before = self.store.call(move |ledger| {
            let before = ledger.answer_to(&id)?;
            if let Some(answer) = &before {
                ledger.answer(None, answer, now())?;
            }
            Ok(before)
        });
        if before.await?.is_some() {
            return Ok(());
        }
        let found = match &command.selection {
            None => None,
            Some(selection) => Some(self.reprocess(selection).await?),
        };
        let word = command.word;
        let answer = self.reporter.answer(&command.id, word, found);
        self.store
            .call(move |ledger: &mut Ledger| {
                match word {
                    CommandWord::Pause => ledger.set_note(PAUSED, Some("1"))?,
                    CommandWord::Resume => ledger.set_note(PAUSED, None)?,
                    CommandWord::Reprocess => {}
                }
                ledger.answer(Some(&command.id), &answer, now())
            })
            .await?;
        tracing::info!(command = word.as_str(), "command carried out");
        self.turn.stop();
        match word {
            CommandWord::Pause => _ = self.pause.send_replace(true),
            CommandWord::Resume => _ = self.pause.send_replace(false),
            // The intake is gone only when the daemon stops.
            CommandWord::Reprocess => _ = self.hints.send(Hint::Overflow).await,
        }
        self.show_pause();
        Ok(())
    }

    /// Marks the selected scans whose files are still there.
    async fn reprocess(&self, selection: &Selection) -> Result<ReprocessMessage, StoreError> {
        let mut found = ReprocessMessage::default();
        let mut after: Option<ScanId> = None;
        loop {
            let wanted = selection.clone();
            let page = self
                .store
                .call(move |ledger| ledger.selected(&wanted, after, PAGE))
                .await?;
            let (last, count) = (page.last().map(|(id, _)| *id), page.len());
            let folder = self.folder.clone();
            // A share may hang.
            self.turn.stop();
            let there = tokio::task::spawn_blocking(move || still_there(&folder, page)).await;
            self.turn.start();
            let there = there.map_err(|e| StoreError::Other(format!("looking for files: {e}")))?;
            found.queued += there.len() as u64;
            found.gone += (count - there.len()) as u64;
            self.store
                .call(move |ledger| ledger.reprocess(&there))
                .await?;
            after = last;
            if count < PAGE {
                break;
            }
        }
        if let Some(ids) = &selection.scan_ids {
            found.unknown = (ids.len() as u64).saturating_sub(found.queued + found.gone);
        }
        Ok(found)
    }
}

/// Those of `scans` of which a file still lies in `folder`. Blocks as long as the folder does not answer.
pub fn still_there(folder: &Path, scans: Vec<(ScanId, Vec<PathBuf>)>) -> Vec<ScanId> {
    let is_there = |path: &PathBuf| folder.join(path).symlink_metadata().is_ok();
    let there = scans
        .into_iter()
        .filter(|(_, paths)| paths.iter().any(is_there));
    there.map(|(id, _)| id).collect()
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// Reads a command; what is wrong with it otherwise.
fn check(received: &Received) -> Result<Command, (Refusal, String)> {
    let invalid = |message: String| (Refusal::Invalid, message);
    if received.retained {
        let message =
            "retained commands are ignored, they would come again with every connection; clear it";
        return Err((Refusal::Retained, message.into()));
    }
    if received.payload.len() > MAX_BYTES {
        let message = format!(
            "{} bytes; a command has at most {MAX_BYTES}",
            received.payload.len()
        );
        return Err((Refusal::TooLarge, message));
    }
    let message: CommandMessage = serde_json::from_slice(&received.payload)
        .map_err(|e| invalid(format!("not a command ({e}); see command.schema.json")))?;
    if message.schema != COMMAND_SCHEMA {
        return Err(invalid(format!("schema: expected {COMMAND_SCHEMA}")));
    }
    let characters = message.id.chars().count();
    if !(1..=MAX_ID).contains(&characters) || message.id.chars().any(char::is_control) {
        return Err(invalid(format!("id: expected 1-{MAX_ID} characters")));
    }
    let filtered = message.since.is_some() || message.scan_ids.is_some();
    let selection = match message.command {
        CommandWord::Reprocess if !filtered => {
            return Err(invalid("since, scan_ids: give at least one of them".into()));
        }
        CommandWord::Reprocess => Some(selection(&message).map_err(invalid)?),
        _ if filtered => return Err(invalid("since, scan_ids: only for reprocess".into())),
        _ => None,
    };
    Ok(Command {
        id: message.id,
        word: message.command,
        selection,
    })
}

fn selection(message: &CommandMessage) -> Result<Selection, String> {
    let since = match &message.since {
        None => None,
        Some(text) => {
            let time: jiff::Timestamp = text.parse().map_err(|_| {
                "since: is no time; expected RFC 3339 such as 2026-01-31T08:00:00Z".to_owned()
            })?;
            Some(time.as_second())
        }
    };
    let scan_ids = match &message.scan_ids {
        None => None,
        Some(ids) if ids.is_empty() || ids.len() > MAX_SCANS => {
            return Err(format!(
                "scan_ids: {} ids; expected 1-{MAX_SCANS}",
                ids.len()
            ));
        }
        Some(ids) => {
            let ids: Result<Vec<Pseudonym>, _> = ids.iter().map(|id| id.parse()).collect();
            let mut ids = ids
                .map_err(|_| "scan_ids: not all are ids; expected 32 hex digits each".to_owned())?;
            ids.sort_unstable();
            ids.dedup();
            Some(ids)
        }
    };
    Ok(Selection {
        since,
        scan_ids,
        ..Selection::default()
    })
}

/// So many commands at once, then one every [`REFILL`].
struct Bucket {
    tokens: u32,
    filled: Instant,
}

impl Bucket {
    fn new() -> Self {
        Self {
            tokens: BURST,
            filled: Instant::now(),
        }
    }

    /// Whether one more may come now. Answers cost a write each, so what comes too fast is not even answered.
    fn take(&mut self, now: Instant) -> bool {
        let new = ((now - self.filled).as_millis() / REFILL.as_millis()) as u32;
        if new > 0 {
            self.tokens = self.tokens.saturating_add(new).min(BURST);
            self.filled = now;
        }
        if self.tokens == 0 {
            tracing::debug!("a command was dropped: they come too fast");
            return false;
        }
        self.tokens -= 1;
        if self.tokens == 0 {
            let seconds = REFILL.as_secs();
            tracing::warn!(
                "commands come too fast: more than one every {seconds} s are dropped without an answer"
            );
        }
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(payload: &str) -> (Refusal, String) {
        let received = Received {
            payload: payload.into(),
            retained: false,
        };
        check(&received).unwrap_err()
    }

    #[test]
    fn what_is_no_command_is_refused_with_the_reason() {
        let command =
            |rest: &str| format!(r#"{{"schema":"scansentry/command/1","id":"a",{rest}}}"#);
        let zeros = "\"00000000000000000000000000000000\",".repeat(1001);
        for (payload, expected) in [
            ("pause".to_owned(), "not a command"),
            (command(r#""command":"format""#), "unknown variant"),
            (command(r#""command":"pause","now":true"#), "unknown field"),
            (
                command(r#""command":"pause","since":"2026-01-01T00:00:00Z""#),
                "only for reprocess",
            ),
            (command(r#""command":"reprocess""#), "at least one"),
            (
                command(r#""command":"reprocess","since":"yesterday""#),
                "since: is no time",
            ),
            (
                command(r#""command":"reprocess","scan_ids":[]"#),
                "scan_ids: 0 ids",
            ),
            (
                command(r#""command":"reprocess","scan_ids":["x"]"#),
                "32 hex digits",
            ),
            (
                command(&format!(
                    r#""command":"reprocess","scan_ids":[{}]"#,
                    zeros.trim_end_matches(',')
                )),
                "scan_ids: 1001 ids",
            ),
            (
                r#"{"schema":"scansentry/command/2","id":"a","command":"pause"}"#.to_owned(),
                "schema: expected",
            ),
            (
                r#"{"schema":"scansentry/command/1","id":"","command":"pause"}"#.to_owned(),
                "id: expected",
            ),
        ] {
            let (refusal, message) = refused(&payload);
            assert_eq!(refusal, Refusal::Invalid);
            assert!(message.contains(expected), "{message}");
        }
        assert_eq!(refused(&" ".repeat(MAX_BYTES + 1)).0, Refusal::TooLarge);
        let kept = Received {
            payload: command(r#""command":"pause""#).into(),
            retained: true,
        };
        assert_eq!(check(&kept).unwrap_err().0, Refusal::Retained);
    }

    #[test]
    fn a_selection_is_read() {
        let received = Received {
            payload: br#"{"schema":"scansentry/command/1","id":"a","command":"reprocess","since":"1970-01-01T00:01:00Z",
                "scan_ids":["000102030405060708090a0b0c0d0e0f"]}"#
                .to_vec(),
            retained: false,
        };
        let command = check(&received).unwrap();
        let selection = command.selection.unwrap();
        assert_eq!(selection.since, Some(60));
        assert_eq!(selection.scan_ids.unwrap().len(), 1);
    }

    #[test]
    fn commands_come_at_a_bounded_rate() {
        let mut bucket = Bucket::new();
        let mut taken = |now| (0..100).filter(|_| bucket.take(now)).count();
        let start = Instant::now();
        assert_eq!(taken(start), BURST as usize);
        assert_eq!(taken(start + REFILL * 2), 2);
        assert_eq!(taken(start + REFILL * 1000), BURST as usize);
    }
}
