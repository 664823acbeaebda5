//! `run`: the daemon and its signals.

use std::time::Instant;

use tokio::signal::unix::{SignalKind, signal};

use super::{Failure, Global, block_on};
use crate::daemon::{self, Control, Prepared};
use crate::{systemd, telemetry};

pub(super) fn run(global: &Global) -> Result<(), Failure> {
    let start = Instant::now();
    let config = global.load()?;
    telemetry::init(&config.log);
    telemetry::log_panics();
    let prepared = daemon::prepare(config).map_err(Failure::Configuration)?;
    block_on(serve(global, prepared, start))
}

/// Runs the daemon again and again, with the configuration of the latest SIGHUP, until SIGTERM or SIGINT.
async fn serve(global: &Global, mut prepared: Prepared, start: Instant) -> Result<(), Failure> {
    let listen =
        |kind| signal(kind).map_err(|e| Failure::Runtime(format!("signals: {e}; cannot listen")));
    let (mut hangup, mut terminate, mut interrupt) = (
        listen(SignalKind::hangup())?,
        listen(SignalKind::terminate())?,
        listen(SignalKind::interrupt())?,
    );
    loop {
        let control = Control::default();
        let ready = || {
            tracing::info!(ms = start.elapsed().as_millis() as u64, "ready");
            systemd::ready();
        };
        let topic_base = prepared.topic_base();
        let mut running = std::pin::pin!(daemon::run(prepared, control.clone(), ready, |_| {}));
        let mut next = None;
        let mut stopping = false;
        loop {
            tokio::select! {
                end = &mut running => {
                    end?;
                    break;
                }
                _ = terminate.recv() => stopping = true,
                _ = interrupt.recv() => stopping = true,
                _ = hangup.recv(), if !stopping && next.is_none() => {
                    systemd::reloading();
                    if let Some(prepared) = reload(global).await {
                        control.stop_for_reload(prepared.topic_base() == topic_base);
                        next = Some(prepared);
                    } else {
                        systemd::ready();
                    }
                }
            }
            if stopping {
                next = None;
                stop(&control);
            }
        }
        match next {
            Some(next) => prepared = next,
            None => return Ok(()),
        }
    }
}

fn stop(control: &Control) {
    tracing::info!("stopping");
    systemd::stopping();
    control.stop();
}

/// Reads the configuration and loads the model anew; with any problem the old ones keep running.
async fn reload(global: &Global) -> Option<Prepared> {
    let problems = match global.load() {
        Ok(config) => match tokio::task::spawn_blocking(move || daemon::prepare(config)).await {
            Ok(Ok(prepared)) => {
                tracing::info!("configuration read again");
                return Some(prepared);
            }
            Ok(Err(problems)) => problems,
            Err(error) => vec![error.to_string()],
        },
        Err(Failure::Configuration(problems)) => problems,
        Err(_) => Vec::new(),
    };
    for problem in problems {
        tracing::error!("not reloaded, the old configuration stays: {problem}");
    }
    None
}
