//! The page's files, its questions, its live events.

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::StreamExt as _;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::guard::Guard;
use super::{Page, Part, Refusal};
use crate::history::{ApplianceKey, Filter, Question, Verdict};
use crate::scan::Pseudonym;

/// Rows of one page of a list, at most.
const MOST_ROWS: usize = 200;
/// A part of an upload must come within this time.
const PART_PATIENCE: Duration = Duration::from_secs(30);

/// The files of the page: path, kind, text.
const FILES: [(&str, &str, &str); 10] = [
    (
        "/",
        "text/html; charset=utf-8",
        include_str!("page/index.html"),
    ),
    (
        "/page/style.css",
        "text/css; charset=utf-8",
        include_str!("page/style.css"),
    ),
    ("/page/app.js", JS, include_str!("page/app.js")),
    ("/page/dom.js", JS, include_str!("page/dom.js")),
    ("/page/live.js", JS, include_str!("page/live.js")),
    ("/page/words.js", JS, include_str!("page/words.js")),
    ("/page/picture.js", JS, include_str!("page/picture.js")),
    ("/page/views.js", JS, include_str!("page/views.js")),
    ("/page/charts.js", JS, include_str!("page/charts.js")),
    (
        "/page/icon.svg",
        "image/svg+xml",
        include_str!("page/icon.svg"),
    ),
];
const JS: &str = "text/javascript; charset=utf-8";

#[derive(Clone)]
pub(super) struct Site {
    pub(super) page: Arc<dyn Page>,
    pub(super) guard: Arc<Guard>,
    pub(super) stop: CancellationToken,
}

pub(super) fn router(site: Site) -> Router {
    let mut router = Router::new();
    for (path, kind, text) in FILES {
        let file = move || async move {
            let headers = [
                (header::CONTENT_TYPE, kind),
                (header::CACHE_CONTROL, "no-cache"),
            ];
            (headers, text)
        };
        router = router.route(path, get(file));
    }
    router
        .route("/api/state", get(state))
        .route("/api/results", get(results))
        .route("/api/alerts", get(alerts))
        .route("/api/charts", get(charts))
        .route("/api/study/{site}/{device}/{id}", get(study))
        .route("/api/scan/{site}/{device}/{id}", get(scan))
        .route("/api/preview/{site}/{device}/{id}", get(preview))
        .route("/api/events", get(events))
        .route("/api/ack", post(acknowledge))
        .route("/api/upload", post(upload))
        .layer(axum::extract::DefaultBodyLimit::max(4096))
        .with_state(site)
}

pub(super) fn json(code: u16, text: String) -> Response {
    let code = StatusCode::from_u16(code).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    (code, [(header::CONTENT_TYPE, "application/json")], text).into_response()
}

impl IntoResponse for Refusal {
    fn into_response(self) -> Response {
        let (code, line) = match self {
            Self::NotFound => (
                404,
                "request: nothing here; it may be older than the history".to_owned(),
            ),
            Self::Bad(line) => (400, line),
            Self::Forbidden(line) => (403, line.to_owned()),
            Self::TooLarge(line) => (413, line),
            Self::Busy(line) => (429, line),
            Self::Full(line) => (507, line),
            Self::Away(line) => (503, line),
        };
        json(code, serde_json::json!({ "error": line }).to_string())
    }
}

type Answered = Result<Response, Refusal>;
type Words = Query<HashMap<String, String>>;

async fn ask(site: &Site, question: Question) -> Answered {
    Ok(json(200, site.page.answer(question).await?))
}

async fn state(State(site): State<Site>) -> Answered {
    let text = site.page.answer(Question::State).await?;
    // The token belongs to the server, not to what it serves.
    let mark = format!("{{\"token\":\"{}\",", site.guard.forgery);
    Ok(json(200, text.replacen('{', &mark, 1)))
}

fn number<T: std::str::FromStr>(words: &Words, name: &str) -> Result<Option<T>, Refusal> {
    let Some(text) = words.get(name).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let wrong = |_| {
        Refusal::Bad(format!(
            "{name}: is not a number; leave it out or correct it"
        ))
    };
    text.parse().map(Some).map_err(wrong)
}

fn moment(words: &Words, name: &str) -> Result<Option<i64>, Refusal> {
    let Some(text) = words.get(name).filter(|text| !text.is_empty()) else {
        return Ok(None);
    };
    let time: jiff::Timestamp = text.parse().map_err(|_| {
        Refusal::Bad(format!(
            "{name}: is not a time; write it as 2026-11-23T12:00:00Z"
        ))
    })?;
    Ok(Some(time.as_millisecond()))
}

fn appliance(words: &Words) -> Result<Option<ApplianceKey>, Refusal> {
    let text = words.get("appliance").filter(|text| !text.is_empty());
    text.map(|text| text.parse().map_err(Refusal::Bad))
        .transpose()
}

fn limit(words: &Words) -> Result<usize, Refusal> {
    Ok(number(words, "limit")?.unwrap_or(50).clamp(1, MOST_ROWS))
}

async fn results(State(site): State<Site>, words: Words) -> Answered {
    let verdict = match words.get("decision").map_or("", String::as_str) {
        "" => None,
        word => Some(
            serde_json::from_value::<Verdict>(word.into()).map_err(|_| {
                Refusal::Bad(
                    "decision: is not known; use positive, negative, indeterminate, rejected or skipped".into(),
                )
            })?,
        ),
    };
    let filter = Filter {
        appliance: appliance(&words)?,
        verdict,
        from_ms: moment(&words, "from")?,
        to_ms: moment(&words, "to")?,
        before: number(&words, "before")?,
        limit: limit(&words)?,
    };
    ask(&site, Question::Results(filter)).await
}

async fn alerts(State(site): State<Site>, words: Words) -> Answered {
    let before_ms = moment(&words, "before")?;
    let limit = limit(&words)?;
    ask(&site, Question::Alerts { before_ms, limit }).await
}

async fn charts(State(site): State<Site>, words: Words) -> Answered {
    let to_ms = match moment(&words, "to")? {
        Some(to) => to,
        None => jiff::Timestamp::now().as_millisecond(),
    };
    let from_ms = moment(&words, "from")?.unwrap_or(to_ms - 86_400_000);
    if from_ms >= to_ms {
        return Err(Refusal::Bad(
            "from: is not before to; correct one of them".into(),
        ));
    }
    let appliance = appliance(&words)?;
    ask(
        &site,
        Question::Charts {
            appliance,
            from_ms,
            to_ms,
        },
    )
    .await
}

type Place = Path<(String, String, String)>;

fn place(Path((site, device, id)): Place) -> Result<(ApplianceKey, Pseudonym), Refusal> {
    let key = format!("{site}/{device}").parse().map_err(Refusal::Bad)?;
    Ok((key, id.parse().map_err(Refusal::Bad)?))
}

async fn study(State(site): State<Site>, path: Place) -> Answered {
    let (key, id) = place(path)?;
    ask(&site, Question::Study(key, id)).await
}

async fn scan(State(site): State<Site>, path: Place) -> Answered {
    let (key, id) = place(path)?;
    ask(&site, Question::Scan(key, id)).await
}

async fn preview(State(site): State<Site>, path: Place, words: Words) -> Answered {
    let (key, id) = place(path)?;
    let png = site.page.picture(key, id, number(&words, "frame")?).await?;
    let headers = [
        (header::CONTENT_TYPE, "image/png"),
        (header::CACHE_CONTROL, "private, max-age=300"),
    ];
    Ok((headers, png).into_response())
}

#[derive(serde::Deserialize)]
struct Acknowledgement {
    site: String,
    device: String,
    alert_id: Pseudonym,
    #[serde(default)]
    take_back: bool,
}

async fn acknowledge(
    State(site): State<Site>,
    axum::Json(ack): axum::Json<Acknowledgement>,
) -> Answered {
    let key = format!("{}/{}", ack.site, ack.device)
        .parse()
        .map_err(Refusal::Bad)?;
    let text = site
        .page
        .acknowledge(key, ack.alert_id, ack.take_back)
        .await?;
    Ok(json(200, text))
}

async fn upload(
    State(site): State<Site>,
    words: Words,
    headers: HeaderMap,
    request: Request<Body>,
) -> Answered {
    let Some(limit) = site.page.upload_limit() else {
        return Err(Refusal::Forbidden(
            "upload: is off here; see dashboard.upload",
        ));
    };
    let too_large = || {
        Refusal::TooLarge(format!(
            "file: is larger than {limit} bytes; see limits.file_bytes"
        ))
    };
    let announced = headers
        .get(header::CONTENT_LENGTH)
        .and_then(|v| v.to_str().ok()?.parse::<u64>().ok());
    if announced.is_some_and(|length| length > limit) {
        return Err(too_large());
    }
    let (sender, parts) = mpsc::channel(4);
    let mut answer = site.page.upload(words.get("extension").cloned(), parts);
    let mut body = request.into_body().into_data_stream();
    let feed = async {
        let mut length = 0;
        loop {
            let bytes = match tokio::time::timeout(PART_PATIENCE, body.next()).await {
                Ok(Some(Ok(bytes))) => bytes,
                Ok(None) => {
                    let _ = sender.send(Part::End).await;
                    return Ok(());
                }
                Ok(Some(Err(_))) | Err(_) => {
                    return Err(Refusal::Bad(
                        "file: did not arrive whole; send it again".into(),
                    ));
                }
            };
            length += bytes.len() as u64;
            if length > limit {
                return Err(too_large());
            }
            if sender.send(Part::Bytes(bytes.to_vec())).await.is_err() {
                // Whoever takes it has an answer already.
                return Ok(());
            }
        }
    };
    let answered = tokio::select! {
        answered = &mut answer => answered,
        fed = feed => {
            drop(sender);
            match fed {
                Ok(()) => answer.await,
                Err(refusal) => {
                    let _ = answer.await;
                    Err(refusal)
                }
            }
        }
    };
    Ok(json(200, answered?))
}

/// Live events. A page that is too slow misses some and is told to ask again for everything; nothing is kept for it.
async fn events(State(site): State<Site>) -> Response {
    let updates = site.page.updates();
    let stop = site.stop.clone();
    let hello = futures_util::stream::once(async {
        Ok::<_, Infallible>(Event::default().event("hello").data("{}"))
    });
    let changes = futures_util::stream::unfold((updates, stop), |(mut updates, stop)| async move {
        let event = tokio::select! {
            () = stop.cancelled() => return None,
            update = updates.recv() => match update {
                Ok(update) => Event::default().event(update.event).data(&update.data),
                Err(RecvError::Lagged(_)) => Event::default().event("resync").data("{}"),
                Err(RecvError::Closed) => return None,
            },
        };
        Some((Ok::<_, Infallible>(event), (updates, stop)))
    });
    Sse::new(hello.chain(changes))
        .keep_alive(KeepAlive::default())
        .into_response()
}
