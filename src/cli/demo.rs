//! `demo`: broker, simulated scanner, daemon, dashboard and a subscriber in one process, a line for each result.

use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use clap::Args;
use serde_json::Value;

use super::{Failure, block_on_two, say};
use crate::broker::EmbeddedBroker;
use crate::config::{Config, LogFormat};
use crate::daemon::{self, Control};
use crate::mqtt::{Event, Session};
use crate::simulate::{ExportFormat, Simulator, Writing};
use crate::telemetry;

/// How long the last results may take.
const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Debug, Args)]
pub(super) struct DemoArgs {
    /// Stop after this many images; 0 goes on until Ctrl-C (with --images: every file once)
    #[arg(long, default_value_t = 0)]
    count: u64,
    /// Images a second
    #[arg(long, default_value_t = 1.0)]
    rate: f64,
    /// Seed of the phantoms
    #[arg(long, default_value_t = 1)]
    seed: u64,
    /// Classify the image files below this folder instead of phantoms
    #[arg(long, value_name = "DIR")]
    images: Option<PathBuf>,
    /// Model bundle
    #[arg(long, value_name = "DIR", default_value = "models/braintumor")]
    bundle: PathBuf,
    /// Port of the embedded broker, on 127.0.0.1; default: any free one
    #[arg(long)]
    port: Option<u16>,
    /// Port of the dashboard, on 127.0.0.1; default: any free one
    #[arg(long, value_name = "PORT", default_value_t = 0)]
    http_port: u16,
    /// Open the dashboard in a browser
    #[arg(long)]
    open: bool,
}

pub(super) fn demo(args: &DemoArgs) -> Result<(), Failure> {
    let scratch = Scratch::new()?;
    let broker = EmbeddedBroker::start(args.port)
        .map_err(|e| Failure::Runtime(format!("{e}; choose another --port")))?;
    let mut config = Config::defaults();
    config.device.id = "demo".into();
    config.device.site = "demo".into();
    config.watch.folder = scratch.0.join("export");
    config.state.dir = scratch.0.join("state");
    config.model.bundle.clone_from(&args.bundle);
    config.mqtt.url = broker.url();
    config.alert.quiet_s = 5;
    config.dashboard.enabled = true;
    config.http.listen = format!("127.0.0.1:{}", args.http_port);
    config.preview.enabled = true;
    config.log.level = "warn".into();
    config.log.format = LogFormat::Text;
    telemetry::init(&config.log);
    std::fs::create_dir_all(&config.watch.folder)
        .map_err(|e| Failure::Runtime(format!("{}: {e}", config.watch.folder.display())))?;
    let watched = config.watch.folder.clone();
    let listener = daemon::settings(&config)
        .map_err(Failure::Runtime)?
        .with_client_id("scansentry-demo-listener".into());
    let prepared = daemon::prepare(config).map_err(Failure::Configuration)?;

    say!("ScanSentry demo - research use only, not for diagnosis")?;
    say!("  {}", prepared.describe())?;
    say!("  export folder  {}", watched.display())?;
    say!(
        "  broker         {} (topics scansentry/demo/demo/#)",
        broker.url()
    )?;
    match &args.images {
        Some(folder) => say!("  images         {}", folder.display())?,
        None => {
            say!("  images         generated phantoms, every second one with a bright lesion")?;
        }
    }
    say!("  Ctrl-C stops")?;

    let simulator = Simulator {
        to: watched,
        rate: args.rate,
        count: args.count,
        seed: args.seed,
        lesion_share: 0.5,
        format: ExportFormat::Png,
        writing: Writing::Rename,
        images: args.images.clone(),
    };
    let stopping = Arc::new(AtomicBool::new(false));
    let open = args.open;
    let page = move |url: &str| {
        // Should nobody read it, the first result ends the demo.
        let _ = say!("  dashboard      {url}\n");
        if open {
            // Without a desktop the address above has to do.
            let _ = std::process::Command::new("xdg-open")
                .arg(url)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn();
        }
    };
    block_on_two(async {
        let control = Control::default();
        let mut running = tokio::spawn(daemon::run(prepared, control.clone(), || {}, page));
        let mut session = Session::open(&listener);
        session
            .subscribe("scansentry/#", true)
            .await
            .map_err(|e| gone(&e))?;
        let stop = stopping.clone();
        let mut exporting = tokio::task::spawn_blocking(move || {
            simulator.run(|| stop.load(Ordering::Relaxed), |_| {})
        });
        let mut tally = Tally::default();
        let mut expected = None;
        let interrupted = tokio::signal::ctrl_c();
        tokio::pin!(interrupted);
        let end = loop {
            if expected.is_some_and(|count| tally.results >= count) {
                break Ok(());
            }
            tokio::select! {
                _ = &mut interrupted => break Ok(()),
                end = &mut running => break Err(ended(end)),
                exported = &mut exporting, if expected.is_none() => match exported {
                    Ok(Ok(count)) => expected = Some(count),
                    Ok(Err(error)) => break Err(super::simulate::failure(&error)),
                    Err(error) => break Err(Failure::Runtime(format!("simulate: {error}"))),
                },
                event = session.next() => match event {
                    Event::Message { topic, payload, .. } => if let Err(unread) = tally.show(&topic, &payload) {
                        break Err(unread);
                    },
                    Event::Lost(reason) => break Err(Failure::Runtime(format!("broker: {reason}"))),
                    _ => {}
                },
                // The same picture twice has one result, so fewer results than files are possible.
                () = tokio::time::sleep(PATIENCE), if expected.is_some() => break Ok(()),
            }
        };
        stopping.store(true, Ordering::Relaxed);
        control.stop();
        if !running.is_finished() {
            let _ = (&mut running).await;
        }
        end.and(tally.summary())
    })
}

fn gone(error: &crate::mqtt::Gone) -> Failure {
    Failure::Runtime(format!("broker: {error}"))
}

fn ended(end: Result<anyhow::Result<()>, tokio::task::JoinError>) -> Failure {
    match end {
        Ok(Ok(())) => Failure::Runtime("daemon: ended by itself".into()),
        Ok(Err(error)) => error.into(),
        Err(error) => Failure::Runtime(format!("daemon: {error}")),
    }
}

/// What was seen so far.
#[derive(Default)]
struct Tally {
    results: u64,
    positive: u64,
    negative: u64,
    other: u64,
}

impl Tally {
    fn show(&mut self, topic: &str, payload: &[u8]) -> Result<(), Failure> {
        let Ok(message) = serde_json::from_slice::<Value>(payload) else {
            return Ok(());
        };
        let text = |key: &str| message[key].as_str().unwrap_or("-").to_owned();
        match topic.rsplit('/').next() {
            Some("result") => {
                self.results += 1;
                match message["decision"].as_str() {
                    Some("positive") => self.positive += 1,
                    Some("negative") => self.negative += 1,
                    _ => self.other += 1,
                }
                let scan = text("scan_id");
                let scan = scan.get(..8).unwrap_or(&scan);
                if message["outcome"] == "classified" {
                    let probability = message["probability"].as_f64().unwrap_or_default();
                    let total = message["timings_ms"]["total"].as_f64().unwrap_or_default();
                    say!(
                        "{:>5}  {scan}  {:<13}  p {probability:.3}  {}  {:<47}  {total:.1} ms",
                        self.results,
                        text("decision"),
                        bar(probability),
                        text("statement")
                    )?;
                } else {
                    let reason = message["rejected"]["message"].as_str().unwrap_or("-");
                    say!(
                        "{:>5}  {scan}  {:<13}  {reason}",
                        self.results,
                        text("outcome")
                    )?;
                }
            }
            Some("alert") => say!(
                "       ALERT {}: {} of {} images in this study positive",
                text("state"),
                message["positives"],
                message["images"]
            )?,
            _ => {}
        }
        Ok(())
    }

    fn summary(&self) -> Result<(), Failure> {
        say!(
            "\n{} results: {} positive, {} negative, {} other. Research use only, not for diagnosis.",
            self.results,
            self.positive,
            self.negative,
            self.other
        )
    }
}

/// A probability as a bar of ten cells with the threshold in its middle.
fn bar(probability: f64) -> String {
    let filled = (probability * 10.0).round() as usize;
    let cells: Vec<_> = (0..10)
        .map(|i| if i < filled { '#' } else { '.' })
        .collect();
    let text = |part: &[char]| part.iter().collect::<String>();
    format!("{}|{}", text(&cells[..5]), text(&cells[5..]))
}

/// A folder of this process's own, private, gone when the demo ends.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Result<Self, Failure> {
        use std::os::unix::fs::DirBuilderExt as _;
        let path = std::env::temp_dir().join(format!("scansentry-demo-{}", std::process::id()));
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .map_err(|e| {
                Failure::Runtime(format!(
                    "{}: cannot be made ({e}); set TMPDIR",
                    path.display()
                ))
            })?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
