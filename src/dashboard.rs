//! The dashboard: listens to the appliances' messages, remembers them within bounds, and answers the page.
//!
//! ```text
//! broker ──QoS 1, persistent session──▶ follow ──batch, one transaction──▶ history ──▶ answers
//!                                        │  ▲ PUBACK after the commit         │
//!                 acknowledge ───────────┘  └─────────────────────────────────┘──changes──▶ live events (dropped for slow pages)
//! ```
//!
//! Nothing here is the only copy of anything: a result is the appliance's until the broker has it, and the broker's until it lies in the history.

mod follow;
mod page;
mod subscriptions;
mod upload;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio_util::sync::CancellationToken;

use crate::config::Config;
use crate::history::ApplianceKey;
use crate::http::{self, Answer, Page, Probes, Refusal, Server, Update};
use crate::metrics::{self, DashboardMetrics};
use crate::mqtt::Settings;
use crate::scan::Pseudonym;
use crate::store::{History, HistoryReader, StoreError};

pub use upload::{Inbox, check as check_upload};

/// Changes that a page may be behind.
const UPDATES: usize = 64;
/// Acknowledgements on their way.
const ORDERS: usize = 16;
/// Wait between tries to begin, beside a daemon that has better things to do than to end.
const RETRY: Duration = Duration::from_secs(10);
/// How long supervisors of a daemon wait for the history to open with the first answer.
const SHORT: Duration = Duration::from_secs(1);

/// A dashboard, ready to begin.
pub struct Dashboard {
    /// The checked configuration.
    pub config: Arc<Config>,
    /// How to reach the broker, with an id of the dashboard's own.
    pub mqtt: Settings,
    /// How to serve.
    pub http: http::Settings,
    /// Signs acknowledgements.
    pub name: String,
    /// What is counted.
    pub metrics: DashboardMetrics,
    /// Where uploaded files go.
    pub inbox: Option<Inbox>,
}

/// The connection to the broker, as pages show it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Broker {
    connected: bool,
    /// Since when, milliseconds since 1970.
    since_ms: i64,
    /// Why there is none; one line.
    reason: Option<String>,
    /// Why nothing can be stored; one line.
    storage: Option<String>,
}

/// The history, and what reads it: for answers and for changes.
type Opened = (Box<History>, HistoryReader, HistoryReader);

/// A page wants an alert's acknowledgement published.
struct Order {
    appliance: ApplianceKey,
    alert: Pseudonym,
    take_back: bool,
    done: oneshot::Sender<Result<(), Refusal>>,
}

impl Dashboard {
    /// The settings of the broker for a dashboard: a session that the broker keeps. The client id must be the dashboard's own.
    pub fn broker(settings: Settings, config: &Config) -> Settings {
        settings.with_persistent_session(config.dashboard.session_s)
    }

    /// Runs until `stop`. With `probes` it is part of a daemon: then what keeps it from beginning is logged and tried again. `ready` is called with
    /// the address.
    pub async fn run(
        self,
        probes: Option<Arc<dyn Probes>>,
        stop: CancellationToken,
        ready: impl FnOnce(&str),
    ) -> Result<(), String> {
        let (server, opened) = match &probes {
            None => (Server::bind(&self.http).await?, self.open().await?),
            Some(probes) => {
                let Some(begun) = self.begin(probes, &stop).await else {
                    return Ok(());
                };
                begun
            }
        };
        let (history, answers, changes) = opened;
        let (updates, _) = broadcast::channel::<Arc<Update>>(UPDATES);
        let (orders_tx, orders) = mpsc::channel(ORDERS);
        let (broker_tx, broker) = watch::channel(Broker {
            connected: false,
            since_ms: now_ms(),
            reason: Some("connecting".into()),
            storage: None,
        });
        let page = Arc::new(page::Answers {
            reader: answers.clone(),
            updates: updates.clone(),
            orders: orders_tx,
            broker: broker.clone(),
            name: self.name.clone(),
            share: self.config.dashboard.share.clone(),
            follow: self.config.dashboard.follow.clone(),
            inbox: self.inbox.map(Arc::new),
        });
        let url = server.url();
        tracing::info!(url, "dashboard");
        ready(&url);
        let alone = probes.is_none();
        let probes = probes.unwrap_or_else(|| {
            Arc::new(Standalone {
                reader: answers,
                broker,
                metrics: self.metrics.clone(),
            })
        });
        let page = Some(page as Arc<dyn Page>);
        let until = stop.clone();
        let mut serving = tokio::spawn(async move { server.serve(probes, page, until).await });
        let following = follow::Follow {
            config: self.config,
            settings: self.mqtt,
            name: self.name,
            reader: changes,
            updates,
            broker: broker_tx,
            metrics: self.metrics,
        };
        tokio::select! {
            () = following.run(history, orders, stop.clone()) => {}
            ended = &mut serving => {
                return ended.map_err(|e| format!("web server: {e}; see the log"));
            }
        }
        if alone && !stop.is_cancelled() {
            return Err("dashboard: its history has ended by a defect; see the log".into());
        }
        // Beside a daemon, supervisors get their answers, and the page what is known, until the end.
        serving
            .await
            .map_err(|e| format!("web server: {e}; see the log"))
    }

    /// Beside a daemon: tries until port and history are there, and answers supervisors as soon as there is a port. `None` at `stop`.
    async fn begin(
        &self,
        probes: &Arc<dyn Probes>,
        stop: &CancellationToken,
    ) -> Option<(Server, Opened)> {
        let begin = async {
            let server = persist(|| Server::bind(&self.http)).await;
            let opening = persist(|| self.open());
            tokio::pin!(opening);
            if let Ok(opened) = tokio::time::timeout(SHORT, &mut opening).await {
                return (server, opened);
            }
            let interim = stop.child_token();
            let _ends_with_it = interim.clone().drop_guard();
            let opened = tokio::select! {
                opened = &mut opening => opened,
                () = server.serve(probes.clone(), None, interim) => opening.await,
            };
            (server, opened)
        };
        stop.run_until_cancelled(begin).await
    }

    async fn open(&self) -> Result<Opened, String> {
        let folder = self.config.dashboard.folder(&self.config.state);
        let open = move || {
            let history = History::open(&folder)?;
            let reader = || HistoryReader::open(&folder);
            Ok::<_, StoreError>((Box::new(history), reader()?, reader()?))
        };
        tokio::task::spawn_blocking(open)
            .await
            .map_err(|e| e.to_string())?
            .map_err(|e| format!("dashboard.dir: {e}"))
    }
}

/// Tries until it succeeds. What is in the way is logged once.
async fn persist<T, F>(mut attempt: impl FnMut() -> F) -> T
where
    F: Future<Output = Result<T, String>>,
{
    let mut said = false;
    loop {
        match attempt().await {
            Ok(done) => return done,
            Err(problem) if !said => {
                tracing::error!("the dashboard does not run, the daemon does: {problem}");
                said = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

/// Answers supervisors of a dashboard that is a process of its own.
struct Standalone {
    reader: HistoryReader,
    broker: watch::Receiver<Broker>,
    metrics: DashboardMetrics,
}

impl Probes for Standalone {
    fn alive(&self) -> Answer<(bool, String)> {
        let reader = self.reader.clone();
        Box::pin(async move {
            let answered = tokio::task::spawn_blocking(move || reader.open_alerts(1)).await;
            let good = matches!(answered, Ok(Ok(_)));
            let state = if good { "ok" } else { "history cannot be read" };
            Ok((good, serde_json::json!({ "state": state }).to_string()))
        })
    }

    fn ready(&self) -> Answer<(bool, String)> {
        let broker = self.broker.borrow().clone();
        Box::pin(async move {
            // Without the broker the page still shows what is known, and says since when.
            let text = serde_json::json!({ "ready": broker.storage.is_none(), "mqtt": if broker.connected { "connected" } else { "away" } });
            Ok((broker.storage.is_none(), text.to_string()))
        })
    }

    fn metrics(&self) -> Answer<String> {
        let own = self.metrics.clone();
        Box::pin(async move { Ok(metrics::text(|registry| own.register(registry))) })
    }
}
