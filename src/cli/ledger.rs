//! `status` and `lookup`: what the ledger on this appliance says.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::{Value, json};

use super::{Failure, Global, become_owner, say};
use crate::config::Config;
use crate::message::{Backlog, Counts};
use crate::scan::ScanId;
use crate::store::{DATABASE, Ledger, STANDING, StateDir};

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// One JSON object instead of lines for people
    #[arg(long)]
    json: bool,
    /// Exit 1 unless the daemon runs and is not degraded
    #[arg(long)]
    check: bool,
}

#[derive(Debug, Args)]
pub(super) struct LookupArgs {
    /// The `scan_id` of a result: 32 hex digits
    scan_id: String,
}

/// What is done with the ledger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Access {
    /// Nothing is changed.
    Read,
    /// Scans or messages are queued again.
    Queue,
}

/// The ledger, beside a daemon or without one, and the configuration.
pub(super) fn open(global: &Global, access: Access) -> Result<(Ledger, Config), Failure> {
    let config = global.load()?;
    become_owner(&config.state.dir)?;
    let path = config.state.dir.join(DATABASE);
    if !path.exists() {
        let line = format!(
            "state.dir: {} holds no ledger; run the daemon first, or check --config",
            config.state.dir.display()
        );
        return Err(Failure::Runtime(line));
    }
    let opened = match access {
        Access::Read => Ledger::open_read_only(&path),
        Access::Queue => Ledger::open_to_queue(&path),
    };
    let ledger = opened.map_err(|e| {
        Failure::Runtime(format!(
            "state.dir: {}: {e}; run as the user of the daemon",
            config.state.dir.display()
        ))
    })?;
    Ok((ledger, config))
}

/// A path for people; a scanner chose it, so it could hold line ends and orders to a terminal.
pub(super) fn printable(path: &std::path::Path) -> String {
    let mut text = String::new();
    for c in path.to_string_lossy().chars() {
        if c.is_control() {
            text.extend(c.escape_default());
        } else {
            text.push(c);
        }
    }
    text
}

/// What the daemon noted of itself, and whether it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "lowercase")]
enum Daemon {
    /// It has the state directory, and what it noted of itself is still that of the run before, in order.
    Starting,
    Running,
    Stopped,
    /// It ended without a word: a crash, a power cut.
    Died,
    /// It has not written a word of itself yet.
    Unknown,
}

/// What the ledger and the lock say. The keys of the JSON form are those of the `health` message where they mean the same.
#[derive(serde::Serialize)]
struct Status {
    daemon: Daemon,
    at: Value,
    started_at: Value,
    stopped_at: Value,
    version: Value,
    state: Value,
    conditions: Value,
    warnings: Vec<String>,
    backlog: Backlog,
    last_error: Value,
    open_alerts: u64,
    counts: Counts,
    rejections: BTreeMap<String, u64>,
    queued_again: u64,
    /// Messages that the broker does not take, by reason.
    parked: BTreeMap<String, u64>,
}

impl Status {
    fn read(ledger: &Ledger, config: &Config) -> Result<Self, Failure> {
        let dir = &config.state.dir;
        let in_use = || {
            StateDir::in_use(dir).map_err(|e| {
                Failure::Runtime(format!(
                    "state.dir: {}: {e}; run as the user of the daemon",
                    dir.display()
                ))
            })
        };
        // The lock first: a daemon notes that it stops before it lets go.
        let running = in_use()?;
        let note = ledger.note(STANDING)?;
        let note: Value = note.map_or(Value::Null, |text| {
            serde_json::from_str(&text).unwrap_or_default()
        });
        let counts = ledger.counts()?;
        let in_order = note.is_null() || !note["stopped_at"].is_null();
        let daemon = match (running, in_order) {
            (true, true) => Daemon::Starting,
            (true, false) => Daemon::Running,
            (false, true) if note.is_null() => Daemon::Unknown,
            (false, true) => Daemon::Stopped,
            // It may have come up just now.
            (false, false) if in_use()? => Daemon::Running,
            (false, false) => Daemon::Died,
        };
        let files = note["files"].as_u64().unwrap_or(0);
        let mut parked = BTreeMap::new();
        for message in ledger.parked()? {
            *parked.entry(message.reason).or_default() += 1;
        }
        Ok(Self {
            daemon,
            at: note["at"].clone(),
            started_at: note["started_at"].clone(),
            stopped_at: note["stopped_at"].clone(),
            version: note["version"].clone(),
            state: note["state"].clone(),
            conditions: match &note["conditions"] {
                Value::Null => json!([]),
                conditions => conditions.clone(),
            },
            warnings: config.mqtt.warnings(),
            backlog: Backlog::new(files, &counts),
            last_error: note["last_error"].clone(),
            open_alerts: ledger.open_alerts()?,
            counts,
            rejections: ledger.rejections()?.into_iter().collect(),
            queued_again: ledger.queued()?,
            parked,
        })
    }

    fn good(&self) -> bool {
        self.daemon == Daemon::Running && self.state == "ok"
    }

    fn print(&self) -> Result<(), Failure> {
        let text = |value: &Value| value.as_str().unwrap_or("?").to_owned();
        let at = text(&self.at);
        let daemon = match self.daemon {
            Daemon::Starting => "starting".to_owned(),
            Daemon::Running => format!("running since {}", text(&self.started_at)),
            Daemon::Stopped => format!("stopped at {}", text(&self.stopped_at)),
            Daemon::Died => {
                format!("not running; it ended without a word, the state below is from {at}")
            }
            Daemon::Unknown => "has not said anything of itself yet".to_owned(),
        };
        say!("daemon         {daemon}")?;
        let conditions = self.conditions.as_array().into_iter().flatten();
        if matches!(self.daemon, Daemon::Running | Daemon::Died) {
            say!("state          {}", text(&self.state))?;
        }
        for condition in conditions {
            let (code, since, message) = (
                text(&condition["code"]),
                text(&condition["since"]),
                text(&condition["message"]),
            );
            say!("  {code} since {since}: {message}")?;
        }
        for warning in &self.warnings {
            say!("warning        {warning}")?;
        }
        if !self.last_error.is_null() {
            say!(
                "last error     {}   {}",
                text(&self.last_error["at"]),
                text(&self.last_error["message"])
            )?;
        }
        let counts = &self.counts;
        say!(
            "classified     {:>10}   of these positive {}, indeterminate {}",
            counts.classified,
            counts.positive,
            counts.indeterminate
        )?;
        say!("rejected       {:>10}", counts.rejected)?;
        for (code, count) in &self.rejections {
            say!("  {code:<20} {count:>3}")?;
        }
        say!("skipped        {:>10}", counts.skipped)?;
        if self.queued_again > 0 {
            say!(
                "queued again   {:>10}   their outcomes stand until there are new ones",
                self.queued_again
            )?;
        }
        say!("open alerts    {:>10}", self.open_alerts)?;
        say!(
            "delivered      {:>10}   messages acknowledged by the broker",
            counts.delivered
        )?;
        let Backlog {
            files,
            messages,
            oldest,
        } = &self.backlog;
        if self.daemon != Daemon::Unknown {
            say!("waiting        {files:>10}   files, as of {at}")?;
        }
        let oldest = oldest.as_ref().map(|at| format!(", the oldest from {at}"));
        say!(
            "               {messages:>10}   messages{}",
            oldest.unwrap_or_default()
        )?;
        if counts.parked + counts.dropped > 0 {
            say!(
                "parked         {:>10}   not taken by the broker, see scansentry outbox list; dropped {}",
                counts.parked,
                counts.dropped
            )?;
            for (reason, count) in &self.parked {
                say!("  {count:>6} {reason}")?;
            }
        }
        Ok(())
    }
}

pub(super) fn status(global: &Global, args: &StatusArgs) -> Result<(), Failure> {
    let (ledger, config) = open(global, Access::Read)?;
    let status = Status::read(&ledger, &config)?;
    if args.json {
        say!("{}", json!(status))?;
    } else {
        status.print()?;
    }
    if args.check && !status.good() {
        return Err(Failure::Said);
    }
    Ok(())
}

pub(super) fn lookup(global: &Global, args: &LookupArgs) -> Result<(), Failure> {
    let scan_id: ScanId = args
        .scan_id
        .parse()
        .map_err(|e| Failure::Runtime(format!("scan id: {e}")))?;
    let (ledger, config) = open(global, Access::Read)?;
    let found = ledger.lookup(scan_id)?;
    let Some((paths, outcome)) = found else {
        return Err(Failure::Runtime(format!(
            "scan id: {scan_id} is not in this ledger; ask the appliance that published it"
        )));
    };
    say!("{}", outcome.as_deref().unwrap_or("no outcome yet"))?;
    for path in paths {
        say!("{}", printable(&config.watch.folder.join(path)))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::printable;

    #[test]
    fn a_path_for_people_is_one_line_without_orders_to_the_terminal() {
        for (path, expected) in [
            ("/export/Ärzte 1/a.dcm", "/export/Ärzte 1/a.dcm"),
            ("a\nb\u{1b}[2J\u{9b}", "a\\nb\\u{1b}[2J\\u{9b}"),
        ] {
            assert_eq!(printable(Path::new(path)), expected);
        }
    }
}
