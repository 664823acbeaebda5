//! The web server: serves the embedded page, its questions and its live events, and the endpoints for supervisors. It knows nothing
//! of MQTT or of the database: [`Page`] and [`Probes`] answer.
//!
//! ```text
//! connection (bounded) → Host known? → logged in? → same origin and anti-forgery token (POST) → answer, within a time
//! ```
//!
//! | path | who may | what |
//! |---|---|---|
//! | `/healthz`, `/readyz` | anyone | 200 or 503, JSON without details of images |
//! | `/metrics` | with the token, where one is set | Prometheus text |
//! | `/login` | anyone | the form; sets a cookie (`HttpOnly`, `SameSite=Strict`) |
//! | `/`, `/page/*` | anyone logged in | the embedded page |
//! | `/api/*` | anyone logged in | JSON; POST with the anti-forgery token that `/api/state` gives |
//!
//! HTTP/1.1 in the clear: TLS is the business of a reverse proxy in front of it.

mod api;
mod guard;

use std::future::Future;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::response::{IntoResponse as _, Response};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::{Semaphore, broadcast, mpsc};
use tokio_util::sync::CancellationToken;

use crate::config::Http;
use crate::history::{ApplianceKey, Question};
use crate::scan::{Pseudonym, PseudonymKey, sha256};

/// How long a request's header may take.
const HEADER_PATIENCE: Duration = Duration::from_secs(10);

/// How long a client may leave what was sent to it unread: the system drops its connection then.
const WRITE_PATIENCE: Duration = Duration::from_secs(30);

/// Shortest access token, characters.
const SHORTEST_TOKEN: usize = 16;

/// An answer that is being worked out.
pub type Answer<T> = Pin<Box<dyn Future<Output = Result<T, Refusal>> + Send>>;

/// Why there is no answer; each with a line for people.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Refusal {
    /// There is no such thing.
    NotFound,
    /// The request makes no sense.
    Bad(String),
    /// Not allowed here.
    Forbidden(&'static str),
    /// Larger than is taken.
    TooLarge(String),
    /// Enough of these for now.
    Busy(String),
    /// No room.
    Full(String),
    /// Cannot be done now.
    Away(String),
}

/// A change, for all pages that are open: the name and the JSON text of a server-sent event.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Update {
    /// Event name.
    pub event: &'static str,
    /// JSON.
    pub data: String,
}

/// A part of an uploaded file on its way. The channel closed without [`Part::End`] means that the sender has gone.
#[derive(Debug)]
pub enum Part {
    /// The next bytes.
    Bytes(Vec<u8>),
    /// That was all.
    End,
}

/// What answers the page.
pub trait Page: Send + Sync {
    /// Answers a question with JSON text.
    fn answer(&self, question: Question) -> Answer<String>;
    /// The picture of a scan, PNG.
    fn picture(
        &self,
        appliance: ApplianceKey,
        scan: Pseudonym,
        frame: Option<u32>,
    ) -> Answer<Vec<u8>>;
    /// Acknowledges an alert, or takes that back; answers when the broker has it.
    fn acknowledge(
        &self,
        appliance: ApplianceKey,
        alert: Pseudonym,
        take_back: bool,
    ) -> Answer<String>;
    /// Takes a file; `extension` is what its name ended with. Answers with JSON text once it is in the export folder.
    fn upload(&self, extension: Option<String>, parts: mpsc::Receiver<Part>) -> Answer<String>;
    /// Largest file that is taken, bytes; `None` where nothing is.
    fn upload_limit(&self) -> Option<u64>;
    /// Changes from now on.
    fn updates(&self) -> broadcast::Receiver<Arc<Update>>;
}

/// What answers supervisors.
pub trait Probes: Send + Sync {
    /// Whether the process makes progress, and JSON text that says more.
    fn alive(&self) -> Answer<(bool, String)>;
    /// Whether it does its work, and JSON text that says more.
    fn ready(&self) -> Answer<(bool, String)>;
    /// Prometheus text.
    fn metrics(&self) -> Answer<String>;
}

/// How to serve: the checked configuration with its files read.
#[derive(Clone)]
pub struct Settings {
    listen: SocketAddr,
    connections: usize,
    guard: Arc<guard::Guard>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Settings({})", self.listen)
    }
}

impl Settings {
    /// Reads the token file that `http` names; the error is one line `key: value; hint`.
    pub fn new(http: &Http) -> Result<Self, String> {
        let listen = http.address()?;
        let token = if http.token_file.is_empty() {
            None
        } else {
            let path = &http.token_file;
            let text = std::fs::read_to_string(path).map_err(|e| {
                format!(
                    "http.token_file: {path} cannot be read ({e}); check the path and its owner"
                )
            })?;
            let token = text.trim().to_owned();
            if token.len() < SHORTEST_TOKEN {
                return Err(format!(
                    "http.token_file: the token in {path} is shorter than {SHORTEST_TOKEN} characters; make one with: openssl rand -hex 32"
                ));
            }
            Some(token)
        };
        let mut secret = [0; 32];
        getrandom::fill(&mut secret)
            .map_err(|e| format!("http: no random numbers ({e}); check the system"))?;
        Ok(Self {
            listen,
            connections: http.connections,
            guard: Arc::new(guard::Guard {
                // A login outlives a restart, and ends when the token changes.
                sessions: token
                    .as_ref()
                    .map(|token| PseudonymKey::new(sha256(token.as_bytes()))),
                token,
                hosts: http.allowed_hosts.clone(),
                forgery: PseudonymKey::new(secret)
                    .pseudonym("forgery", &[])
                    .to_string(),
                wrong: tokio::sync::Mutex::default(),
            }),
        })
    }

    /// Whether only this machine can reach the server.
    pub fn loopback(&self) -> bool {
        self.listen.ip().is_loopback()
    }
}

/// A server that has its port.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    settings: Settings,
}

impl Server {
    /// Takes the port.
    pub async fn bind(settings: &Settings) -> Result<Self, String> {
        let listener = TcpListener::bind(settings.listen).await.map_err(|e| {
            format!(
                "http.listen: {} cannot be had ({e}); choose another address or port",
                settings.listen
            )
        })?;
        Ok(Self {
            listener,
            settings: settings.clone(),
        })
    }

    /// Where a browser on this machine finds it.
    pub fn url(&self) -> String {
        let address = self.listener.local_addr().unwrap_or(self.settings.listen);
        if address.ip().is_unspecified() {
            format!("http://localhost:{}/", address.port())
        } else {
            format!("http://{address}/")
        }
    }

    /// Serves until `stop`.
    pub async fn serve(
        &self,
        probes: Arc<dyn Probes>,
        page: Option<Arc<dyn Page>>,
        stop: CancellationToken,
    ) {
        let router = router(&self.settings, probes, page, &stop);
        let room = Arc::new(Semaphore::new(self.settings.connections));
        loop {
            // A connection beyond the limit waits in the system's queue.
            let accepted = tokio::select! {
                () = stop.cancelled() => return,
                accepted = async {
                    let place = room.clone().acquire_owned().await;
                    (self.listener.accept().await, place)
                } => accepted,
            };
            let (Ok((stream, _)), Ok(place)) = accepted else {
                // Out of descriptors, most likely: others will end.
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let _ = stream.set_nodelay(true);
            let patience = WRITE_PATIENCE.as_millis() as u32;
            let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, patience);
            let (router, stop) = (router.clone(), stop.clone());
            tokio::spawn(async move {
                let service = TowerToHyperService::new(router);
                let mut builder = hyper::server::conn::http1::Builder::new();
                builder
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEADER_PATIENCE)
                    .max_buf_size(64 << 10);
                let serving = builder.serve_connection(TokioIo::new(stream), service);
                tokio::select! {
                    _ = serving => {}
                    () = async { stop.cancelled().await; tokio::time::sleep(Duration::from_millis(500)).await } => {}
                }
                drop(place);
            });
        }
    }
}

fn router(
    settings: &Settings,
    probes: Arc<dyn Probes>,
    page: Option<Arc<dyn Page>>,
    stop: &CancellationToken,
) -> Router {
    let guard = settings.guard.clone();
    let (alive, ready, metrics) = (probes.clone(), probes.clone(), probes);
    let state = |(good, text): (bool, String)| {
        let code = if good { 200 } else { 503 };
        api::json(code, text)
    };
    let mut private = Router::new().route(
        "/metrics",
        get(move || async move {
            let text = metrics.metrics().await?;
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            Ok::<_, Refusal>(([("content-type", kind)], text).into_response())
        }),
    );
    if let Some(page) = page {
        private = private.merge(api::router(api::Site {
            page,
            guard: guard.clone(),
            stop: stop.clone(),
        }));
    }
    let private = private.layer(axum::middleware::from_fn_with_state(
        guard.clone(),
        guard::private,
    ));
    Router::new()
        .route(
            "/healthz",
            get(move || async move { Ok::<Response, Refusal>(state(alive.alive().await?)) }),
        )
        .route(
            "/readyz",
            get(move || async move { Ok::<Response, Refusal>(state(ready.ready().await?)) }),
        )
        .merge(guard::login(guard.clone()))
        .merge(private)
        .fallback(|| async { Refusal::NotFound })
        .layer(axum::middleware::from_fn_with_state(guard, guard::everyone))
}
