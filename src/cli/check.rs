//! `check`: everything that can be wrong before the daemon runs, in one list.

use std::path::Path;
use std::time::Duration;

use clap::Args;

use super::{Failure, Global, become_owner, block_on, say};
use crate::config::Config;
use crate::daemon::{self, Files};
use crate::mqtt::{Event, Session};
use crate::store::{DATABASE, Ledger};

#[derive(Debug, Args)]
pub(super) struct CheckArgs {
    /// Do not connect to the broker
    #[arg(long)]
    offline: bool,
}

pub(super) fn check(global: &Global, args: &CheckArgs) -> Result<(), Failure> {
    let config = global.load()?;
    let files = Files::of(&config);
    // As the daemon sees the rest; and what its user put into the state directory is not root's to run.
    become_owner(&config.state.dir)?;
    for line in config.mqtt.warnings() {
        eprintln!("warning: {line}");
    }
    let mut problems = Vec::new();
    folder_problem(&config, &mut problems);
    state_problem(&config.state.dir, &mut problems);
    if !args.offline {
        // A setting that cannot be used is reported by `prepare` below.
        if let Ok(settings) = files.settings.clone() {
            let patience = Duration::from_secs(config.mqtt.connect_timeout_s);
            let broker = settings.broker();
            let settings =
                settings.with_client_id(format!("scansentry-check-{}", std::process::id()));
            let reached = block_on(async {
                let mut session = Session::open(&settings);
                let first = tokio::time::timeout(patience, session.next()).await;
                if matches!(first, Ok(Event::Connected)) {
                    session.close(Duration::from_secs(1)).await;
                }
                Ok(first)
            })?;
            match reached {
                Ok(Event::Lost(lost)) => {
                    let hint = lost.hint.unwrap_or("check address, login and certificates");
                    problems.push(format!(
                        "mqtt.url: {broker} does not accept us ({lost}); {hint}"
                    ));
                }
                Err(_) => problems.push(format!(
                    "mqtt.url: {broker} does not answer in {} s; check address and network",
                    patience.as_secs()
                )),
                Ok(_) => {}
            }
        }
    }
    match daemon::prepare_with(config, files) {
        Err(more) => problems.extend(more),
        Ok(prepared) => {
            problems.extend(prepared.refused().iter().cloned());
            if problems.is_empty() {
                say!("ok: {}", prepared.describe())?;
                return Ok(());
            }
        }
    }
    Err(Failure::Configuration(problems))
}

fn folder_problem(config: &Config, problems: &mut Vec<String>) {
    let folder = &config.watch.folder;
    if let Err(error) = std::fs::read_dir(folder) {
        problems.push(format!(
            "watch.folder: {} cannot be read ({error}); mount it or correct the path",
            folder.display()
        ));
    }
}

/// The state directory may be missing (it is made at first start), but then what holds it must be writable.
fn state_problem(dir: &Path, problems: &mut Vec<String>) {
    let mut existing = dir;
    while !existing.exists() {
        match existing.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => existing = parent,
            _ => break,
        }
    }
    if rustix::fs::access(existing, rustix::fs::Access::WRITE_OK).is_err() {
        problems.push(format!(
            "state.dir: {} cannot be written; check its owner, or set state.dir",
            existing.display()
        ));
    }
    let database = dir.join(DATABASE);
    if database.exists()
        && let Err(error) = Ledger::open_read_only(&database)
    {
        problems.push(format!("state.dir: {error}"));
    }
}
