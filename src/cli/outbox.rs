//! `outbox`: the messages that were set aside because the broker does not take them. They are brought back in the ledger, whether the daemon
//! runs or not; one that runs notices within seconds.

use clap::{ArgGroup, Args, Subcommand};
use serde_json::json;

use super::ledger::{Access, open};
use super::{Failure, Global, say};
use crate::message::{Kind, rfc3339_seconds};
use crate::store::StateDir;

#[derive(Debug, Subcommand)]
pub(super) enum OutboxVerb {
    /// Messages that the broker did not take while it took others: number, kind, bytes, times, reason; never what is in them
    List {
        /// One JSON object a line
        #[arg(long)]
        json: bool,
    },
    /// Send them again, byte for byte, after the broker has been mended
    Retry(RetryArgs),
}

#[derive(Debug, Args)]
#[command(group(ArgGroup::new("which").required(true).args(["numbers", "all"])))]
pub(super) struct RetryArgs {
    /// Numbers of `outbox list`
    #[arg(value_name = "NUMBER")]
    numbers: Vec<i64>,
    /// All that are set aside
    #[arg(long)]
    all: bool,
    /// One JSON object instead of a line for people
    #[arg(long)]
    json: bool,
}

pub(super) fn outbox(global: &Global, verb: &OutboxVerb) -> Result<(), Failure> {
    match verb {
        OutboxVerb::List { json } => list(global, *json),
        OutboxVerb::Retry(args) => retry(global, args),
    }
}

fn list(global: &Global, json: bool) -> Result<(), Failure> {
    let (ledger, _) = open(global, Access::Read)?;
    for message in ledger.parked()? {
        let kind = Kind::of_topic(&message.topic).map_or("other", Kind::suffix);
        let (seq, bytes, reason) = (message.seq, message.bytes, message.reason);
        let recorded = rfc3339_seconds(message.created_at);
        let parked = rfc3339_seconds(message.parked_at);
        let line = if json {
            json!({
                "number": seq, "kind": kind, "bytes": bytes, "recorded_at": recorded, "parked_at": parked, "reason": reason,
            })
            .to_string()
        } else {
            format!(
                "{seq:>8} {kind:<14} {bytes:>7} bytes, of {recorded}, set aside {parked}: {reason}"
            )
        };
        say!("{line}")?;
    }
    Ok(())
}

fn retry(global: &Global, args: &RetryArgs) -> Result<(), Failure> {
    let (mut ledger, config) = open(global, Access::Queue)?;
    let mut numbers = args.numbers.clone();
    numbers.sort_unstable();
    numbers.dedup();
    let queued = ledger.retry((!args.all).then_some(&numbers[..]))?;
    StateDir::nudge(&config.state.dir);
    let unknown = (numbers.len() as u64).saturating_sub(queued);
    if args.json {
        say!("{}", json!({ "queued": queued, "unknown": unknown }))?;
    } else {
        let messages = if queued == 1 { "message" } else { "messages" };
        say!("{queued} {messages} queued; the daemon sends at once, or at its next start")?;
    }
    if unknown == 0 {
        return Ok(());
    }
    if !args.json {
        eprintln!("number: {unknown} not among the messages set aside; see scansentry outbox list");
    }
    Err(Failure::Said)
}
