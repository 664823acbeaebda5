//! Build, spawn, supervise, stop in order.
//!
//! ```text
//! start: model (golden images) → state directory → store → workers → intake, watch, studies, commands, web server, publisher
//! stop:  watch, studies, commands → intake (files in a worker are finished) → workers → publisher (drains the outbox), web server → store
//! ```
//!
//! Every part runs until it is told to stop. A part that ends by itself is a defect: everything is stopped in order and
//! the process ends with an error, for systemd to start it again.

pub mod bundles;
mod probes;
mod standing;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::classifier::Classifier;
use crate::commands::{self, Commands};
use crate::config::{Config, Upload};
use crate::dashboard::{self, Dashboard, Inbox};
use crate::health::{Condition, Health};
use crate::http;
use crate::manifest::CropMethod;
use crate::message::{Reporter, Sender};
use crate::metrics::{DashboardMetrics, Metrics};
use crate::mqtt::Settings;
use crate::pipeline::intake::{Intake, Workers};
use crate::pipeline::worker::{self, Context};
use crate::preview;
use crate::progress::{Beat, Board, LOOK};
use crate::publisher::Publisher;
use crate::store::{Models, Opened, StateDir, Store};
use crate::studies::Studies;
use crate::{systemd, watch};
use bundles::{Candidate, Found};
use probes::Answers;
use standing::Standing;

/// Wait between tries to get the web server's port.
const BIND_AGAIN: Duration = Duration::from_secs(10);

/// How long the files in the workers may take at a stop.
const FINISH: Duration = Duration::from_secs(20);

/// How often systemd is told, at most.
const PULSE: Duration = LOOK.saturating_mul(5);

/// How long a loop may be silent where no watchdog says how long.
const SILENCE: Duration = Duration::from_mins(1);

/// Everything that can be refused before anything runs: a configuration, its files, and a model that works.
pub struct Prepared {
    config: Arc<Config>,
    settings: Settings,
    classifier: Classifier,
    http: Option<http::Settings>,
    candidate: Candidate,
    refused: Vec<String>,
    link: Option<PathBuf>,
}

impl Prepared {
    /// The configuration behind it.
    pub fn config(&self) -> &Arc<Config> {
        &self.config
    }

    /// Why it does not run the bundle that is installed, one line each; empty where it does.
    pub fn refused(&self) -> &[String] {
        &self.refused
    }

    /// What the link to the installed bundle held, see [`Models::link`](crate::store::Models::link).
    pub fn link(&self) -> Option<&PathBuf> {
        self.link.as_ref()
    }

    /// Under which topics this daemon will speak.
    pub fn topic_base(&self) -> String {
        Sender::new(&self.config).topic_base
    }

    /// One line for people.
    pub fn describe(&self) -> String {
        let model = &self.classifier.bundle().model_ref;
        format!(
            "model {} {} ({}) on {}; {}; {} worker(s)",
            model.name,
            model.version,
            self.candidate.place.as_str(),
            self.classifier.engine_info(),
            self.classifier.rule(),
            self.classifier.worker_count(&self.config)
        )
    }
}

/// What is read from the files that a configuration names, credentials above all; each error is one line.
#[derive(Debug)]
pub struct Files {
    /// For the broker.
    pub settings: Result<Settings, String>,
    /// For the web server; `None` where it is off.
    http: Result<Option<http::Settings>, String>,
}

impl Files {
    /// Reads what `config` names.
    pub fn of(config: &Config) -> Self {
        Self {
            settings: settings(config),
            http: web(config),
        }
    }
}

/// Checks and loads what `config` names; every problem is one line.
pub fn prepare(config: Config) -> Result<Prepared, Vec<String>> {
    let files = Files::of(&config);
    prepare_with(config, files)
}

/// [`prepare`], with the files read already.
pub fn prepare_with(config: Config, files: Files) -> Result<Prepared, Vec<String>> {
    let mut problems = Vec::new();
    let settings = files.settings.map_err(|line| problems.push(line));
    // Read first: should it change meanwhile, the daemon loads once more.
    let link = Models::of(&config.state.dir).link();
    let found = bundles::first(&config, |candidate| candidate.verify(&config));
    let found = found.map_err(|lines| problems.extend(lines));
    let http = files.http.map_err(|line| problems.push(line));
    let (Ok(settings), Ok(found), Ok(http)) = (settings, found, http) else {
        return Err(problems);
    };
    let Found {
        candidate,
        loaded: classifier,
        refused,
    } = found;
    Ok(Prepared {
        config: Arc::new(config),
        settings,
        classifier,
        http,
        candidate,
        refused,
        link,
    })
}

/// The broker settings of `config`, with the files they name read.
pub fn settings(config: &Config) -> Result<Settings, String> {
    // Names hold no dot, so no two appliances have the same.
    let client_id = format!("scansentry-{}.{}", config.device.site, config.device.id);
    Settings::new(&config.mqtt, &client_id).map_err(|e| e.to_string())
}

/// The web server's settings, with the files they name read; `None` where it is off.
fn web(config: &Config) -> Result<Option<http::Settings>, String> {
    if !(config.http.enabled || config.dashboard.enabled) {
        return Ok(None);
    }
    let http = http::Settings::new(&config.http)?;
    if uploads(config, &http) {
        dashboard::check_upload(config)?;
    }
    Ok(Some(http))
}

/// Whether the page takes images.
fn uploads(config: &Config, http: &http::Settings) -> bool {
    config.dashboard.enabled
        && match config.dashboard.upload {
            // Behind a reverse proxy, loopback is reached from elsewhere.
            Upload::Auto => http.loopback() && config.http.allowed_hosts.is_empty(),
            Upload::On => true,
            Upload::Off => false,
        }
}

/// Tells a running daemon what to do.
#[derive(Debug, Clone, Default)]
pub struct Control {
    stop: CancellationToken,
    /// For good: what is in work gets little time.
    quit: CancellationToken,
    reload: Arc<AtomicBool>,
    health: Health,
    /// Threads of workers that hang, left behind in this process.
    lost: Arc<AtomicUsize>,
}

impl Control {
    /// For the next run in the same process.
    #[must_use]
    pub fn renewed(self) -> Self {
        Self {
            lost: self.lost,
            ..Self::default()
        }
    }

    /// Stop for good: drain, say goodbye.
    pub fn stop(&self) {
        self.reload.store(false, Ordering::Relaxed);
        self.quit.cancel();
        self.stop.cancel();
    }

    /// Stop to run again at once with another configuration; under the `same_topics` the status stays "online".
    pub fn stop_for_reload(&self, same_topics: bool) {
        self.reload.store(same_topics, Ordering::Relaxed);
        self.stop.cancel();
    }

    /// Goes on as it is: what it was to take over is refused. Its health says so until the next reload.
    pub fn reload_refused(&self) {
        self.health.raise(
            Condition::ReloadRefused,
            "a new configuration or model bundle was refused, the ones before it run on; the log has the reasons",
        );
    }
}

/// Runs until `control` says stop. `ready` is called once everything runs; `page` with the dashboard's address, as soon as it has one.
pub async fn run(
    prepared: Prepared,
    control: Control,
    ready: impl FnOnce(),
    page: impl FnOnce(&str) + Send + 'static,
) -> anyhow::Result<()> {
    let Prepared {
        config,
        settings,
        classifier,
        http,
        candidate,
        refused,
        link: _,
    } = prepared;
    let metrics = Metrics::default();
    let health = control.health.clone();
    // What this process writes, above all the ledger with its paths, is for its own user.
    systemd::starting();
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    for line in config.mqtt.warnings() {
        tracing::warn!("{line}");
    }
    let state = StateDir::open(&config.state.dir)
        .context(format!("state.dir: {}", config.state.dir.display()))?;
    let Opened {
        store,
        thread: store_thread,
        set_aside,
        suspects,
    } = Store::open(state.path()).context(format!("state.dir: {}", config.state.dir.display()))?;
    if suspects {
        tracing::warn!("an earlier run died with files in work; they are looked at one at a time");
    }
    if let Some(aside) = set_aside {
        tracing::error!(set_aside = %aside.display(), "the ledger was damaged and set aside; a new one is filled by scanning the folder again");
        health.raise(Condition::LedgerRebuilt, "a damaged ledger was set aside; results in the folder are made again with the same ids");
    }

    let engine = classifier.engine_info().to_string();
    let (recipe, classifiers) = classifier.for_workers(&config);
    let bundle = recipe.bundle.clone();
    let rule = recipe.rule;
    let model = &bundle.model_ref;
    tracing::info!(
        model = model.name,
        version = model.version,
        bundle = candidate.place.as_str(),
        engine,
        workers = classifiers.len(),
        %rule,
        "model loaded"
    );
    for problem in &refused {
        tracing::error!("not the installed model: {problem}");
    }
    if !refused.is_empty() {
        health.raise(
            Condition::ModelFallback,
            format!(
                "the installed model bundle cannot be used, {} {} runs ({}); the log has the reasons; install one again",
                model.name,
                model.version,
                candidate.place.as_str()
            ),
        );
    }
    let reporter = Arc::new(Reporter {
        sender: Sender::new(&config),
        key: state.key().clone(),
        model: model.clone(),
        labels: bundle.manifest.output.labels.clone(),
        rule,
    });
    let outbox = Arc::new(Notify::new());
    let backlog = Arc::new(AtomicU64::new(0));
    let stopping = Arc::new(AtomicBool::new(false));

    let (outlet, previews) = config
        .preview
        .enabled
        .then(|| preview::channel(config.preview.max_bytes))
        .unzip();
    if config.preview.enabled && bundle.manifest.preprocess.crop.method == CropMethod::None {
        tracing::warn!(
            "no previews: this model takes pictures uncropped, which could show anything"
        );
    }
    let paused = commands::was_paused(&store, config.command.enabled)
        .await
        .context("state.dir")?;
    let (pause, held) = tokio::sync::watch::channel(paused);

    let lent = Arc::new(store.clone());
    let context = Context {
        config: config.clone(),
        store: Arc::downgrade(&lent),
        health: health.clone(),
        reporter: reporter.clone(),
        outbox: outbox.clone(),
        previews: outlet,
        stopping: stopping.clone(),
        metrics: metrics.clone(),
    };
    let (reports_tx, reports) = mpsc::unbounded_channel();
    // Half of the watchdog's time for whatever loop, and on top what a loop may rightly wait for.
    let silence = systemd::watchdog().map_or(SILENCE, |time| time / 2);
    let mut board = Board::default();
    let deadline = Duration::from_secs(config.pipeline.deadline_s);
    // As many again as there are at first may hang, and the process goes on.
    let most = classifiers.len().max(2);
    let lost_before = control.lost.load(Ordering::Relaxed);
    let one_too_many = |lost: usize| lost > most && lost > lost_before;
    let stopwatches: Vec<_> = (0..classifiers.len() + most)
        .map(|index| board.watch(format!("worker {index}"), deadline + silence))
        .collect();
    let mut first = Vec::new();
    for (index, classifier) in classifiers.into_iter().enumerate() {
        let (context, reports) = (context.clone(), reports_tx.clone());
        let stopwatch = stopwatches[index].clone();
        let started = worker::start(index, context, classifier, reports, stopwatch);
        first.push(started.context("starting a worker")?);
    }
    let start_spare = move |index: usize| {
        let (recipe, config) = (recipe.clone(), context.config.clone());
        let stopwatch = stopwatches.get(index).cloned().unwrap_or_default();
        let classifier = move || Classifier::of(recipe, &config);
        worker::start(
            index,
            context.clone(),
            classifier,
            reports_tx.clone(),
            stopwatch,
        )
    };
    let workers = Workers {
        started: first,
        start: Box::new(start_spare),
        lost: control.lost.clone(),
        most,
    };

    let (stop_input, stop_output) = (CancellationToken::new(), CancellationToken::new());
    let (hints_tx, hints) = watch::channel();
    let mut watching = tokio::spawn(watch::follow(
        config.watch.clone(),
        hints_tx.clone(),
        health.clone(),
        stop_input.clone(),
    ));
    let walked = Arc::new(AtomicU64::new(0));
    let studies = Studies {
        config: config.alert.clone(),
        store: store.clone(),
        reporter: reporter.clone(),
        outbox: outbox.clone(),
        health: health.clone(),
        backlog: backlog.clone(),
        walked: walked.clone(),
        turn: board.watch("studies", silence),
    };
    let mut tending = tokio::spawn(studies.run(stop_input.clone()));
    let (commands_tx, received) = mpsc::channel(commands::QUEUE);
    let commands = Commands {
        store: store.clone(),
        health: health.clone(),
        reporter: reporter.clone(),
        outbox: outbox.clone(),
        folder: config.watch.folder.clone(),
        pause,
        hints: hints_tx.clone(),
        turn: board.watch("commands", silence),
    };
    let mut commanding = tokio::spawn(commands.run(received, stop_input.clone()));
    let intake = Intake::new(
        config.clone(),
        store.clone(),
        health.clone(),
        backlog.clone(),
        workers,
        suspects,
        held,
    )
    .counting_walks(walked)
    .watched_by(board.watch("intake", silence));
    let mut taking = tokio::spawn(intake.run(hints, reports, stop_input.clone()));
    let mut serving = tokio::spawn(serve(
        http,
        Web {
            probes: Answers {
                store: store.clone(),
                health: health.clone(),
                backlog: backlog.clone(),
                reporter: reporter.clone(),
                engine: engine.clone(),
                metrics,
                dashboard: config.dashboard.enabled.then(DashboardMetrics::default),
            },
            config: config.clone(),
            settings: settings.clone(),
            page,
        },
        stop_output.clone(),
    ));
    let patience = config.mqtt.connect_timeout_s.max(config.mqtt.ack_timeout_s);
    let turn = board.watch("publisher", Duration::from_secs(patience) + silence);
    let pulse = systemd::listens().then(|| {
        let (store, health, backlog) = (store.clone(), health.clone(), backlog.clone());
        tokio::spawn(pulse(board, silence, store, health, backlog))
    });
    let standing = Standing::begin(store.clone(), health.clone(), backlog.clone()).await;
    let stop_standing = CancellationToken::new();
    let noting = tokio::spawn(standing.keep(stop_standing.clone()));
    let publisher = Publisher {
        settings,
        mqtt: config.mqtt.clone(),
        health_config: config.health.clone(),
        store,
        outbox,
        health,
        reporter,
        previews,
        commands: config.command.enabled.then_some(commands_tx),
        home_assistant: config.home_assistant.clone(),
        backlog,
        engine,
        stay_online: control.reload.clone(),
        turn,
    };
    let mut publishing = tokio::spawn(publisher.run(stop_output.clone()));
    ready();

    let mut defect = tokio::select! {
        () = control.stop.cancelled() => None,
        end = &mut watching => Some(describe("watch", end.map(|()| Ok::<_, std::convert::Infallible>(())))),
        end = &mut tending => Some(describe("studies", end.map(|()| Ok::<_, std::convert::Infallible>(())))),
        end = &mut commanding => Some(describe("commands", end.map(|()| Ok::<_, std::convert::Infallible>(())))),
        end = &mut taking => Some(describe("intake", end)),
        end = &mut publishing => Some(describe("publisher", end)),
        end = &mut serving => Some(describe("web server", end)),
    };
    if let Some(defect) = &defect {
        tracing::error!("{defect}; stopping in order");
    }
    stopping.store(true, Ordering::Relaxed);
    stop_input.cancel();
    drop(hints_tx);
    // The intake gives up on a file in work after the deadline.
    let patience = if defect.is_some() {
        FINISH
    } else {
        deadline + FINISH
    };
    let finished = finish_unless(taking, patience, &control.quit).await;
    finish(watching, FINISH).await;
    finish(tending, FINISH).await;
    finish(commanding, FINISH).await;
    if !finished && (defect.is_some() || control.quit.is_cancelled()) {
        tracing::warn!("a file in work did not end in time; it is done again at the next start");
    } else if defect.is_none()
        && !control.quit.is_cancelled()
        && (!finished || one_too_many(control.lost.load(Ordering::Relaxed)))
    {
        // As without a reload: only another process is rid of that worker.
        let line = "a worker has been busy with one file for more than pipeline.deadline_s";
        tracing::error!("{line}; no reload, the process ends");
        control.reload.store(false, Ordering::Relaxed);
        defect = Some(line.to_owned());
    }
    stop_output.cancel();
    finish(
        publishing,
        Duration::from_secs(config.mqtt.drain_s) + FINISH,
    )
    .await;
    finish(serving, FINISH).await;
    stop_standing.cancel();
    finish(noting, FINISH).await;
    if let Some(pulse) = pulse {
        // It holds the store.
        pulse.abort();
        let _ = pulse.await;
    }
    // A worker that hangs does not keep it open.
    drop(lent);
    let closed = tokio::task::spawn_blocking(move || store_thread.join());
    if tokio::time::timeout(FINISH, closed).await.is_err() {
        tracing::warn!("the ledger was not closed in time; the next start checks it");
    }
    drop(state);
    defect.map_or(Ok(()), |defect| Err(anyhow::anyhow!(defect)))
}

/// What the web server is made of.
struct Web<F> {
    probes: Answers,
    config: Arc<Config>,
    settings: Settings,
    page: F,
}

/// The web server, if there is one, until `stop`.
async fn serve(
    http: Option<http::Settings>,
    web: Web<impl FnOnce(&str)>,
    stop: CancellationToken,
) -> Result<(), String> {
    let (config, counted) = (web.config, web.probes.dashboard.clone());
    match (http, counted) {
        (None, _) => stop.cancelled().await,
        (Some(http), Some(metrics)) => {
            let inbox = uploads(&config, &http).then(|| {
                Inbox::open(
                    &config,
                    web.probes.reporter.key.clone(),
                    web.probes.store.clone(),
                )
            });
            let id = format!(
                "scansentry-dashboard-{}-{}",
                config.device.site, config.device.id
            );
            let name = match config.dashboard.name.as_str() {
                "" => format!("{}-{}", config.device.site, config.device.id),
                name => name.to_owned(),
            };
            let dashboard = Dashboard {
                mqtt: Dashboard::broker(web.settings.with_client_id(id), &config),
                config,
                http,
                name,
                metrics,
                inbox,
            };
            dashboard
                .run(Some(Arc::new(web.probes)), stop, web.page)
                .await?;
        }
        (Some(http), None) => {
            let mut said = false;
            let server = loop {
                match http::Server::bind(&http).await {
                    Ok(server) => break server,
                    // The main job goes on without.
                    Err(line) if !said => tracing::error!("the web server does not run: {line}"),
                    Err(_) => {}
                }
                said = true;
                tokio::select! {
                    () = stop.cancelled() => return Ok(()),
                    () = tokio::time::sleep(BIND_AGAIN) => {}
                }
            };
            tracing::info!(url = server.url(), "web server");
            server.serve(Arc::new(web.probes), None, stop).await;
        }
    }
    Ok(())
}

/// Tells systemd that work gets on, as long as it does: every loop turns, and the ledger answers.
async fn pulse(
    board: Board,
    silence: Duration,
    store: Store,
    health: Health,
    backlog: Arc<AtomicU64>,
) {
    let mut beat = Beat::every(PULSE.min(silence / 2));
    let mut said = false;
    loop {
        beat.next().await;
        let counts = tokio::time::timeout(silence, store.call(|ledger| ledger.counts())).await;
        let standstill = match (&counts, board.standstill()) {
            (Err(_), _) => Some(("ledger".to_owned(), silence)),
            (_, Some((name, time))) => Some((name.to_owned(), time)),
            _ => None,
        };
        if let Some((name, time)) = standstill {
            if !said {
                let line = format!("{name}: stands still for {} s", time.as_secs());
                tracing::error!("{line}; the watchdog is not fed any more");
                systemd::status(&line);
            }
            said = true;
            continue;
        }
        said = false;
        systemd::alive();
        if let Ok(Ok(counts)) = counts {
            let files = backlog.load(Ordering::Relaxed);
            let conditions: Vec<_> = health.now().into_keys().map(Condition::code).collect();
            let mut line = format!(
                "{}; {} classified, {} rejected; waiting: {files} files, {} messages",
                if files == 0 { "idle" } else { "working" },
                counts.classified,
                counts.rejected,
                counts.outbox
            );
            if !conditions.is_empty() {
                line = format!("{line}; degraded: {}", conditions.join(", "));
            }
            systemd::status(&line);
        }
    }
}

fn describe<E: std::fmt::Display>(
    part: &str,
    end: Result<Result<(), E>, tokio::task::JoinError>,
) -> String {
    match end {
        Ok(Ok(())) => format!("{part}: ended by itself"),
        Ok(Err(error)) => format!("{part}: {error}"),
        Err(error) => format!("{part}: {error}"),
    }
}

/// As [`finish`], but once `quit` is cancelled it has only [`FINISH`] left. A reload can wait for a file that takes long: cut off, it would
/// count as one that killed the process.
async fn finish_unless<T>(
    task: JoinHandle<T>,
    patience: Duration,
    quit: &CancellationToken,
) -> bool {
    let abort = task.abort_handle();
    let hurried = async {
        quit.cancelled().await;
        tokio::time::sleep(FINISH).await;
    };
    tokio::select! {
        finished = finish(task, patience) => finished,
        () = hurried => {
            abort.abort();
            false
        }
    }
}

/// Waits for a task to end by itself; `false` if it did not in time (it is aborted then).
async fn finish<T>(mut task: JoinHandle<T>, patience: Duration) -> bool {
    if task.is_finished() {
        return true;
    }
    if tokio::time::timeout(patience, &mut task).await.is_ok() {
        return true;
    }
    task.abort();
    false
}
