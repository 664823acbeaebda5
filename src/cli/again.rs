//! `reprocess` and `quarantine`: past scans are classified again. The ledger is marked, whether the daemon runs or not; its owner finds the
//! files by a walk, at once where it runs and at its start otherwise. What is marked stays so until there is a new outcome.

use clap::builder::{PossibleValuesParser, TypedValueParser as _};
use clap::{ArgGroup, Args, Subcommand};
use serde::de::{DeserializeOwned, IntoDeserializer as _, value::Error};
use serde_json::json;

use super::ledger::{Access, open, printable};
use super::{Failure, Global, say};
use crate::commands::{PAGE, still_there};
use crate::message::{ReprocessMessage, rfc3339_seconds};
use crate::prediction::{Decision, RejectCode};
use crate::scan::ScanId;
use crate::store::{Selection, StateDir};

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which").required(true).multiple(true).args(["all", "since", "until", "decision", "rejected"])))]
pub(super) struct ReprocessArgs {
    /// All that the ledger remembers
    #[arg(long, conflicts_with_all = ["since", "until", "decision", "rejected"])]
    all: bool,
    /// Scans first recorded then or later: 2026-01-31T08:00:00Z, or in this machine's time 2026-01-31T08:00 or 2026-01-31
    #[arg(long, value_name = "TIME", value_parser = time)]
    since: Option<i64>,
    /// Scans first recorded before then
    #[arg(long, value_name = "TIME", value_parser = time)]
    until: Option<i64>,
    /// Scans with this decision
    #[arg(long, value_parser = PossibleValuesParser::new(["positive", "negative", "indeterminate"]).try_map(|text| word::<Decision>(&text)))]
    decision: Option<Decision>,
    /// Rejected scans
    #[arg(long, conflicts_with = "decision")]
    rejected: bool,
    #[command(flatten)]
    how: How,
}

#[derive(Debug, Args)]
struct How {
    /// Only say how many they are
    #[arg(long)]
    dry_run: bool,
    /// One JSON object instead of a line for people
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Subcommand)]
pub(super) enum QuarantineVerb {
    /// The rejected files on this appliance, the latest first: id, code, time, message, path
    List {
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Look at rejected files again
    Retry(RetryArgs),
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which").required(true).args(["ids", "code", "all"])))]
pub(super) struct RetryArgs {
    /// The `scan_id` of rejected files
    #[arg(value_name = "ID")]
    ids: Vec<ScanId>,
    /// Those rejected with this code, such as `too_many_pixels`
    #[arg(long, value_parser = word::<RejectCode>)]
    code: Option<RejectCode>,
    /// All rejected files
    #[arg(long)]
    all: bool,
    #[command(flatten)]
    how: How,
}

/// A word of the published contract.
fn word<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    T::deserialize(text.into_deserializer()).map_err(|e: Error| e.to_string())
}

/// Seconds since 1970.
fn time(text: &str) -> Result<i64, String> {
    let local = || -> Result<jiff::Timestamp, jiff::Error> {
        let time: jiff::civil::DateTime = text.parse()?;
        jiff::tz::TimeZone::system().to_timestamp(time)
    };
    let time = text.parse::<jiff::Timestamp>().or_else(|_| local());
    time.map(jiff::Timestamp::as_second).map_err(|_| {
        "is no time; expected one such as 2026-01-31T08:00:00Z or 2026-01-31".to_owned()
    })
}

pub(super) fn reprocess(global: &Global, args: &ReprocessArgs) -> Result<(), Failure> {
    let selection = Selection {
        since: args.since,
        until: args.until,
        decision: args.decision,
        rejected: args.rejected,
        ..Selection::default()
    };
    queue(global, &selection, &args.how)
}

pub(super) fn quarantine(global: &Global, verb: &QuarantineVerb) -> Result<(), Failure> {
    match verb {
        QuarantineVerb::List { json } => list(global, *json),
        QuarantineVerb::Retry(args) => {
            let selection = Selection {
                rejected: true,
                code: args.code,
                scan_ids: (!args.ids.is_empty()).then(|| args.ids.clone()),
                ..Selection::default()
            };
            queue(global, &selection, &args.how)
        }
    }
}

fn list(global: &Global, json: bool) -> Result<(), Failure> {
    let (ledger, config) = open(global, Access::Read)?;
    let folder = config.watch.folder;
    for scan in ledger.rejected()? {
        let at = rfc3339_seconds(scan.at);
        let files: Vec<_> = scan.places.iter().map(|p| folder.join(p)).collect();
        if json {
            let files: Vec<_> = files.iter().map(|f| f.display().to_string()).collect();
            let line = json!({
                "scan_id": scan.scan_id, "code": scan.code, "message": scan.message, "at": at, "queued": scan.again, "files": files,
            });
            say!("{line}")?;
            continue;
        }
        let queued = if scan.again { " (queued again)" } else { "" };
        let (id, code) = (scan.scan_id, scan.code);
        let message = scan.message.unwrap_or_default();
        let files = match &files[..] {
            [] => "the file has gone or holds something else by now".to_owned(),
            files => {
                let files: Vec<_> = files.iter().map(|f| printable(f)).collect();
                files.join("\n    ")
            }
        };
        say!("{id} {at} {code:<16} {message}{queued}\n    {files}")?;
    }
    Ok(())
}

/// Marks the selected scans whose files are still there, and says how many.
fn queue(global: &Global, selection: &Selection, how: &How) -> Result<(), Failure> {
    let access = if how.dry_run {
        Access::Read
    } else {
        Access::Queue
    };
    let (mut ledger, config) = open(global, access)?;
    let folder = &config.watch.folder;
    // Without it every file would count as gone.
    std::fs::read_dir(folder).map_err(|e| {
        Failure::Runtime(format!(
            "watch.folder: {} cannot be read ({e}); say it again when it is there",
            folder.display()
        ))
    })?;
    let (mut there, mut gone) = (Vec::new(), 0);
    let mut after = None;
    loop {
        let page = ledger.selected(selection, after, PAGE)?;
        let count = page.len();
        after = page.last().map(|(id, _)| *id);
        let before = there.len();
        there.extend(still_there(folder, page));
        gone += before + count - there.len();
        if count < PAGE {
            break;
        }
    }
    // A page at a time, so that a daemon never waits long for the ledger. What is left out when this process dies on the way is marked by
    // the next try; what was marked is worked on, once.
    if !how.dry_run {
        for page in there.chunks(PAGE) {
            ledger.queue(page)?;
        }
        StateDir::nudge(&config.state.dir);
    }
    let (queued, gone) = (there.len() as u64, gone as u64);
    let named = selection.scan_ids.as_ref().map_or(0, |ids| {
        let ids: std::collections::HashSet<_> = ids.iter().collect();
        ids.len() as u64
    });
    let found = ReprocessMessage {
        queued,
        gone,
        unknown: named.saturating_sub(queued + gone),
    };
    answer(&found, how)?;
    if found.unknown > 0 {
        Err(Failure::Said)
    } else {
        Ok(())
    }
}

fn answer(found: &ReprocessMessage, how: &How) -> Result<(), Failure> {
    if how.json {
        return say!("{}", json!(found));
    }
    let scans = |count| {
        if count == 1 {
            "1 scan".to_owned()
        } else {
            format!("{count} scans")
        }
    };
    if how.dry_run {
        say!(
            "{} would be queued; nothing was changed",
            scans(found.queued)
        )?;
    } else {
        say!(
            "{} queued; the daemon begins at once, or at its next start",
            scans(found.queued)
        )?;
    }
    if found.gone > 0 {
        say!(
            "{} left out: the file has gone or holds something else by now",
            scans(found.gone)
        )?;
    }
    if found.unknown > 0 {
        eprintln!(
            "scan id: {} not among the rejected of this ledger; see scansentry quarantine list",
            found.unknown
        );
    }
    Ok(())
}
