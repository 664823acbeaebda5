//! The command line: arguments, verbs, exit codes. Standard output is written with [`say!`], which a closed pipe does not make panic.

#![deny(clippy::print_stdout)]

mod again;
mod bench;
mod check;
mod classify;
mod dashboard;
#[cfg(feature = "demo")]
mod demo;
mod ledger;
mod model;
mod outbox;
mod run;
mod simulate;

use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, CommandFactory as _, Parser, Subcommand};
use tokio::runtime::Builder;

use crate::config::{self, Config};
use crate::progress;
use crate::store::StoreError;

/// Exit code for a configuration or model that cannot be used; systemd does not restart on it (`EX_CONFIG` of sysexits.h).
const EX_CONFIG: u8 = 78;

#[derive(Debug, Parser)]
#[command(
    name = "scansentry",
    version,
    about = "Watches a scanner's export folder, runs a quantized image classifier and publishes results over MQTT.\nResearch use only, not for diagnosis."
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Args)]
struct Global {
    /// Configuration file
    #[arg(long, global = true, env = "SCANSENTRY_CONFIG", value_name = "FILE", default_value = config::DEFAULT_PATH)]
    config: PathBuf,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Run the daemon
    Run,
    /// Validate configuration, model, folder and broker; list every problem
    Check(check::CheckArgs),
    /// Classify files: one JSON line each
    Classify(classify::ClassifyArgs),
    /// Write what the model sees of a file
    Preprocess(classify::PreprocessArgs),
    /// Serve the dashboard for one appliance or a whole fleet
    Dashboard,
    /// Show, verify, install model bundles, and go back
    #[command(subcommand)]
    Model(model::ModelVerb),
    /// Everything in one process: broker, simulated scanner, daemon, dashboard
    #[cfg(feature = "demo")]
    Demo(demo::DemoArgs),
    /// Export synthetic slices into a folder
    Simulate(simulate::SimulateArgs),
    /// Whether the daemon runs and is well; backlog, latest error, counts
    Status(ledger::StatusArgs),
    /// Classify past scans again, for a new model or rule: results with the next revision and their own event ids
    Reprocess(again::ReprocessArgs),
    /// Rejected files on this appliance
    #[command(subcommand)]
    Quarantine(again::QuarantineVerb),
    /// Messages set aside because the broker does not take them
    #[command(subcommand)]
    Outbox(outbox::OutboxVerb),
    /// Time of each stage and images a second on this machine
    Bench(bench::BenchArgs),
    /// From a pseudonymous id back to the files on this appliance
    Lookup(ledger::LookupArgs),
}

/// Why a verb did not succeed; decides the exit code. Every line is `what: value; hint`.
#[derive(Debug)]
enum Failure {
    /// Exit 78.
    Configuration(Vec<String>),
    /// Exit 1.
    Runtime(String),
    /// Exit 1; everything has been said already.
    Said,
}

impl Failure {
    /// What has not been said yet, one line each.
    fn lines(self) -> Vec<String> {
        match self {
            Self::Configuration(problems) => problems,
            Self::Runtime(line) => vec![line],
            Self::Said => Vec::new(),
        }
    }
}

fn write_line(line: std::fmt::Arguments<'_>) -> Result<(), Failure> {
    writeln!(std::io::stdout(), "{line}").map_err(|error| match error.kind() {
        // A reader that has seen enough (`| head`) is no reason to say anything.
        ErrorKind::BrokenPipe => Failure::Said,
        _ => Failure::Runtime(format!("standard output: {error}; give it room")),
    })
}

/// A line on standard output, or why the verb ends.
macro_rules! say {
    ($($part:tt)*) => {
        $crate::cli::write_line(format_args!($($part)*))
    };
}
use say;

impl From<anyhow::Error> for Failure {
    fn from(error: anyhow::Error) -> Self {
        Self::Runtime(format!("{error:#}"))
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        Self::Runtime(format!("state.dir: {error}; try again"))
    }
}

/// The command line's definition, for man pages and completions.
pub fn command() -> clap::Command {
    Cli::command()
}

/// Parses the arguments, runs the verb, says what went wrong. Wrong usage ends the process with 2 inside clap.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let global = &cli.global;
    let done = match cli.verb {
        Verb::Run => run::run(global),
        Verb::Check(args) => check::check(global, &args),
        Verb::Classify(args) => classify::classify(global, &args),
        Verb::Preprocess(args) => classify::preprocess(global, &args),
        Verb::Model(verb) => model::model(global, &verb),
        Verb::Dashboard => dashboard::dashboard(global),
        #[cfg(feature = "demo")]
        Verb::Demo(args) => demo::demo(&args),
        Verb::Simulate(args) => simulate::simulate(&args),
        Verb::Status(args) => ledger::status(global, &args),
        Verb::Reprocess(args) => again::reprocess(global, &args),
        Verb::Quarantine(verb) => again::quarantine(global, &verb),
        Verb::Outbox(verb) => outbox::outbox(global, &verb),
        Verb::Bench(args) => bench::bench(global, &args),
        Verb::Lookup(args) => ledger::lookup(global, &args),
    };
    let Err(failure) = done else {
        return ExitCode::SUCCESS;
    };
    let code = match failure {
        Failure::Configuration(_) => ExitCode::from(EX_CONFIG),
        Failure::Runtime(_) | Failure::Said => ExitCode::FAILURE,
    };
    for line in failure.lines() {
        eprintln!("{line}");
    }
    code
}

impl Global {
    /// The configuration, checked. A file that was asked for must exist; the default one need not.
    fn load(&self) -> Result<Config, Failure> {
        let required = self.config.as_os_str() != config::DEFAULT_PATH;
        let environment = std::env::vars_os().filter_map(|(key, value)| {
            Some((
                key.into_string().ok()?,
                value.to_string_lossy().into_owned(),
            ))
        });
        config::load(&self.config, required, environment)
            .map_err(|problems| Failure::Configuration(problems.0))
    }
}

/// Runs `future` and all that it begins in this one thread: where the work is done by threads of its own, nothing is handed from one that waits to
/// another.
fn block_on<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    run_on(&mut Builder::new_current_thread(), future)
}

/// As [`block_on`], with two threads, for what has many to answer.
fn block_on_two<T>(future: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    run_on(Builder::new_multi_thread().worker_threads(2), future)
}

/// What still hangs at the end, such as a look at a share that does not answer, is left behind.
fn run_on<T>(
    runtime: &mut Builder,
    future: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let runtime = runtime
        .max_blocking_threads(8)
        // Longer than between two looks (`progress`), so that those who look need not be made anew.
        .thread_keep_alive(Duration::from_mins(1))
        .enable_all()
        .build()
        .map_err(|e| Failure::Runtime(format!("runtime: {e}; check the limits on threads")))?;
    progress::begin();
    let done = runtime.block_on(future);
    runtime.shutdown_timeout(Duration::from_secs(2));
    done
}

/// From here on this process is the owner of the state directory, if it was root: what it writes belongs to the daemon's user, and nothing
/// that this user can put there leads root astray. There is one thread yet; those that come are the owner's, too.
fn become_owner(state_dir: &Path) -> Result<(), Failure> {
    let Some((user, group)) = other_owner(state_dir) else {
        return Ok(());
    };
    rustix::thread::set_thread_groups(&[])
        .and_then(|()| rustix::thread::set_thread_res_gid(group, group, group))
        .and_then(|()| rustix::thread::set_thread_res_uid(user, user, user))
        .map_err(|e| {
            Failure::Runtime(format!(
                "state.dir: {}: cannot become its owner, user {} ({e}); run as that user",
                state_dir.display(),
                user.as_raw()
            ))
        })
}

/// The owner of the state directory and its group, if this process is root and the owner is not.
fn other_owner(state_dir: &Path) -> Option<(rustix::fs::Uid, rustix::fs::Gid)> {
    let metadata = std::fs::metadata(state_dir).ok()?;
    let other = rustix::process::geteuid().is_root() && metadata.uid() != 0;
    let owner = || {
        (
            rustix::fs::Uid::from_raw(metadata.uid()),
            rustix::fs::Gid::from_raw(metadata.gid()),
        )
    };
    other.then(owner)
}
