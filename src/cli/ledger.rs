//! `status` and `lookup`: what the ledger on this appliance says.

use std::collections::BTreeMap;

use clap::Args;
use serde_json::json;

use super::{Failure, Global, become_owner};
use crate::message::rfc3339_seconds;
use crate::scan::ScanId;
use crate::store::{DATABASE, Ledger};

#[derive(Debug, Args)]
pub(super) struct StatusArgs {
    /// One JSON object instead of lines for people
    #[arg(long)]
    json: bool,
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

/// The ledger, beside a daemon or without one, and the export folder.
pub(super) fn open(
    global: &Global,
    access: Access,
) -> Result<(Ledger, std::path::PathBuf), Failure> {
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
    Ok((ledger, config.watch.folder))
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

pub(super) fn status(global: &Global, args: &StatusArgs) -> Result<(), Failure> {
    let (ledger, _) = open(global, Access::Read)?;
    let counts = ledger.counts()?;
    let rejections = ledger.rejections()?;
    let queued = ledger.queued()?;
    let mut parked = BTreeMap::<String, u64>::new();
    for message in ledger.parked()? {
        *parked.entry(message.reason).or_default() += 1;
    }
    if args.json {
        let by_reason: serde_json::Map<_, _> = rejections
            .into_iter()
            .map(|(code, count)| (code, json!(count)))
            .collect();
        println!(
            "{}",
            json!({ "counts": counts, "rejections": by_reason, "queued_again": queued, "parked": parked })
        );
        return Ok(());
    }
    println!(
        "classified     {:>10}   of these positive {}, indeterminate {}",
        counts.classified, counts.positive, counts.indeterminate
    );
    println!("rejected       {:>10}", counts.rejected);
    for (code, count) in rejections {
        println!("  {code:<20} {count:>3}");
    }
    println!("skipped        {:>10}", counts.skipped);
    if queued > 0 {
        println!("queued again   {queued:>10}   their outcomes stand until there are new ones");
    }
    println!(
        "delivered      {:>10}   messages acknowledged by the broker",
        counts.delivered
    );
    let oldest = counts
        .oldest_outbox
        .map(|at| format!("   oldest from {}", rfc3339_seconds(at)));
    println!(
        "waiting        {:>10}{}",
        counts.outbox,
        oldest.unwrap_or_default()
    );
    if counts.parked + counts.dropped > 0 {
        println!(
            "parked         {:>10}   not taken by the broker, see scansentry outbox list; dropped {}",
            counts.parked, counts.dropped
        );
        for (reason, count) in parked {
            println!("  {count:>6} {reason}");
        }
    }
    Ok(())
}

pub(super) fn lookup(global: &Global, args: &LookupArgs) -> Result<(), Failure> {
    let scan_id: ScanId = args
        .scan_id
        .parse()
        .map_err(|e| Failure::Runtime(format!("scan id: {e}")))?;
    let (ledger, folder) = open(global, Access::Read)?;
    let found = ledger.lookup(scan_id)?;
    let Some((paths, outcome)) = found else {
        return Err(Failure::Runtime(format!(
            "scan id: {scan_id} is not in this ledger; ask the appliance that published it"
        )));
    };
    println!("{}", outcome.as_deref().unwrap_or("no outcome yet"));
    for path in paths {
        println!("{}", printable(&folder.join(path)));
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
