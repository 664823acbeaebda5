//! `run`: the daemon and its signals.

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Instant;

use rustix::process::Signal;
use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, Global, block_on};
use crate::config::Config;
use crate::daemon::{self, Control, Prepared};
use crate::progress::{look, stir};
use crate::store::Models;
use crate::{systemd, telemetry};

pub(super) fn run(global: &Global) -> Result<(), Failure> {
    let start = Instant::now();
    let config = global.load()?;
    telemetry::init(&config.log);
    telemetry::log_panics();
    systemd::starting();
    let prepared = daemon::prepare(config).map_err(Failure::Configuration)?;
    block_on(serve(global, prepared, start))
}

/// What comes from outside.
enum Order {
    Stop,
    /// Another process of ours has left something in the state directory ([`StateDir::nudge`](crate::store::StateDir::nudge)).
    Look,
    Reload {
        /// By a hangup; otherwise another model is installed.
        hangup: bool,
        config: Result<Box<Config>, Failure>,
        /// Whether another model than the installed one will do if that cannot be used.
        may_fall: bool,
    },
    /// What became of a reload.
    Loaded(Result<Box<Prepared>, Vec<String>>),
}

/// Runs the daemon again and again, with the configuration of the latest SIGHUP and the model that is installed, until SIGTERM or SIGINT.
async fn serve(global: &Global, mut prepared: Prepared, start: Instant) -> Result<(), Failure> {
    let listen =
        |kind| signal(kind).map_err(|e| Failure::Runtime(format!("signals: {e}; cannot listen")));
    let (mut nudged, mut hangup, mut terminate, mut interrupt) = (
        listen(SignalKind::from_raw(Signal::URG.as_raw()))?,
        listen(SignalKind::hangup())?,
        listen(SignalKind::terminate())?,
        listen(SignalKind::interrupt())?,
    );
    let mut control = Control::default();
    loop {
        let ready = || {
            tracing::info!(ms = start.elapsed().as_millis() as u64, "ready");
            systemd::ready();
        };
        let topic_base = prepared.topic_base();
        let config = prepared.config().clone();
        let models = Models::of(&config.state.dir);
        let mut link = prepared.link().cloned();
        let fallen = !prepared.refused().is_empty();
        let mut running = std::pin::pin!(daemon::run(prepared, control.clone(), ready, |_| {}));
        let mut next = None;
        let mut stopping = false;
        // A large model takes long, and signals do not wait for it. Dropped, it is left behind.
        let mut reloading = None;
        let mut hung_up = false;
        loop {
            let free = !stopping && next.is_none() && reloading.is_none();
            let order = tokio::select! {
                end = &mut running => {
                    end?;
                    break;
                }
                _ = terminate.recv() => Order::Stop,
                _ = interrupt.recv() => Order::Stop,
                _ = nudged.recv() => Order::Look,
                loaded = finished(&mut reloading), if reloading.is_some() => {
                    reloading = None;
                    Order::Loaded(loaded)
                }
                _ = hangup.recv(), if free => Order::Reload {
                    hangup: true,
                    config: global.load().map(Box::new),
                    may_fall: fallen,
                },
                another = another(&models, link.as_ref()), if free => {
                    link = another;
                    Order::Reload {
                        hangup: false,
                        config: Ok(Box::new(Config::clone(&config))),
                        may_fall: false,
                    }
                }
            };
            match order {
                Order::Look => stir(),
                Order::Stop => {
                    stopping = true;
                    next = None;
                    reloading = None;
                    stop(&control);
                }
                Order::Reload {
                    hangup: by_hangup,
                    config,
                    may_fall,
                } => {
                    systemd::reloading();
                    hung_up = by_hangup;
                    reloading = Some(Box::pin(reload(config, may_fall)));
                }
                Order::Loaded(Ok(prepared)) => {
                    if hung_up {
                        tracing::info!("configuration read again");
                    } else {
                        tracing::info!("another model is installed");
                    }
                    control.stop_for_reload(prepared.topic_base() == topic_base);
                    next = Some(*prepared);
                }
                Order::Loaded(Err(problems)) => {
                    // The next change may have taken it away under our hands; that one is looked at soon.
                    if hung_up || models.link() == link {
                        refuse(&control, &problems);
                    }
                    systemd::ready();
                }
            }
        }
        match next {
            Some(next) => {
                prepared = next;
                control = control.renewed();
            }
            None => return Ok(()),
        }
    }
}

fn stop(control: &Control) {
    tracing::info!("stopping");
    systemd::stopping();
    control.stop();
}

fn refuse(control: &Control, problems: &[String]) {
    for problem in problems {
        tracing::error!("not reloaded, configuration and model stay as they are: {problem}");
    }
    control.reload_refused();
}

/// Waits until the link to the installed model bundle holds something else than `known`.
async fn another(models: &Models, known: Option<&PathBuf>) -> Option<PathBuf> {
    loop {
        look().await;
        let models = models.clone();
        // A disk may hang.
        if let Ok(link) = tokio::task::spawn_blocking(move || models.link()).await
            && link.as_ref() != known
        {
            return link;
        }
    }
}

/// Waits for the end of a reload that has begun.
async fn finished<T>(reloading: &mut Option<Pin<Box<impl Future<Output = T>>>>) -> T {
    match reloading {
        Some(reloading) => reloading.await,
        None => std::future::pending().await,
    }
}

/// Loads what `config` names; every problem is one line. The installed model bundle has to be usable, unless the daemon runs another one already.
async fn reload(
    config: Result<Box<Config>, Failure>,
    may_fall: bool,
) -> Result<Box<Prepared>, Vec<String>> {
    let config = config.map_err(Failure::lines)?;
    let prepared = tokio::task::spawn_blocking(move || daemon::prepare(*config)).await;
    let prepared = prepared.map_err(|error| vec![error.to_string()])??;
    if !may_fall && !prepared.refused().is_empty() {
        return Err(prepared.refused().to_vec());
    }
    Ok(Box::new(prepared))
}
