//! `dashboard`: the page for one appliance or a whole fleet, as a process of its own.

use std::sync::Arc;

use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::{Failure, Global, block_on_two, say};
use crate::config::Config;
use crate::dashboard::Dashboard;
use crate::metrics::DashboardMetrics;
use crate::{http, mqtt, systemd, telemetry};

pub(super) fn dashboard(global: &Global) -> Result<(), Failure> {
    let config = global.load()?;
    telemetry::init(&config.log);
    telemetry::log_panics();
    for line in config.mqtt.warnings() {
        tracing::warn!("{line}");
    }
    let name = name(&config);
    let mqtt = mqtt::Settings::new(&config.mqtt, &format!("scansentry-dashboard-{name}"));
    let web = http::Settings::new(&config.http);
    let (mqtt, http) = match (mqtt, web) {
        (Ok(mqtt), Ok(web)) => (mqtt, web),
        (mqtt, web) => {
            let problems = [mqtt.err().map(|e| e.to_string()), web.err()];
            return Err(Failure::Configuration(
                problems.into_iter().flatten().collect(),
            ));
        }
    };
    // What this process writes holds the results of many appliances.
    rustix::process::umask(rustix::fs::Mode::from_bits_truncate(0o077));
    block_on_two(async {
        let stop = CancellationToken::new();
        let listen = |kind| {
            signal(kind).map_err(|e| Failure::Runtime(format!("signals: {e}; cannot listen")))
        };
        let (mut terminate, mut interrupt) = (
            listen(SignalKind::terminate())?,
            listen(SignalKind::interrupt())?,
        );
        let dashboard = Dashboard {
            mqtt: Dashboard::broker(mqtt, &config),
            config: Arc::new(config),
            http,
            name,
            metrics: DashboardMetrics::default(),
            inbox: None,
        };
        let ready = |url: &str| {
            // Served all the same to those who know the address.
            let _ = say!("{url}");
            systemd::ready();
        };
        let mut running = std::pin::pin!(dashboard.run(None, stop.clone(), ready));
        let ended = loop {
            tokio::select! {
                ended = &mut running => break ended,
                _ = terminate.recv() => stop.cancel(),
                _ = interrupt.recv() => stop.cancel(),
            }
        };
        match ended {
            Ok(()) if stop.is_cancelled() => Ok(()),
            Ok(()) => Err(Failure::Runtime(
                "dashboard: ended by itself; see the log".into(),
            )),
            Err(line) => Err(Failure::Runtime(line)),
        }
    })
}

/// The configured name, or the machine's.
fn name(config: &Config) -> String {
    if !config.dashboard.name.is_empty() {
        return config.dashboard.name.clone();
    }
    let system = rustix::system::uname();
    let name: String = system
        .nodename()
        .to_string_lossy()
        .chars()
        .filter(|c| c.is_ascii_alphanumeric() || "-_.".contains(*c))
        .take(64)
        .collect();
    if name.is_empty() {
        "dashboard".into()
    } else {
        name
    }
}
