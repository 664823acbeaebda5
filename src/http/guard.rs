//! Who may ask: host names, logins, origins, and the headers that tell a browser what it may do with the answers.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::rejection::FormRejection;
use axum::extract::{Request, State};
use axum::http::header::{self, HeaderMap, HeaderName, HeaderValue};
use axum::http::{Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Redirect, Response};
use axum::routing::{get, post};
use axum::{Form, Router};
use subtle::ConstantTimeEq as _;

use super::Refusal;
use crate::scan::PseudonymKey;

/// Name of the login's cookie.
const COOKIE: &str = "scansentry";
/// How long a login lasts, seconds.
const LOGIN_S: i64 = 30 * 86_400;
/// Answer to a wrong token comes after this, one at a time.
const WRONG_TOKEN_PAUSE: Duration = Duration::from_millis(500);
/// How long an answer may take. Live events begin within it and then go on.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long an upload may take.
const UPLOAD_PATIENCE: Duration = Duration::from_mins(15);
/// Carries the anti-forgery token of a POST.
pub(super) const FORGERY_HEADER: &str = "x-scansentry-token";

const LOGIN_PAGE: &str = include_str!("page/login.html");

/// What requests are checked against.
pub(super) struct Guard {
    pub(super) token: Option<String>,
    pub(super) sessions: Option<PseudonymKey>,
    pub(super) hosts: Vec<String>,
    pub(super) forgery: String,
    /// Held while the answer to a wrong token is held back.
    pub(super) wrong: tokio::sync::Mutex<()>,
}

fn same(a: &str, b: &str) -> bool {
    a.as_bytes().ct_eq(b.as_bytes()).into()
}

impl Guard {
    /// A name that anyone could point at this machine's address is refused: that is how DNS rebinding works.
    fn knows_host(&self, headers: &HeaderMap) -> bool {
        let Some(host) = text(headers, &header::HOST) else {
            return false;
        };
        let name = match host.rsplit_once(':') {
            Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
            _ => host,
        };
        let bare = name.trim_start_matches('[').trim_end_matches(']');
        name.eq_ignore_ascii_case("localhost")
            || bare.parse::<std::net::IpAddr>().is_ok()
            || self
                .hosts
                .iter()
                .any(|known| known.eq_ignore_ascii_case(name) || known.eq_ignore_ascii_case(host))
    }

    fn logged_in(&self, headers: &HeaderMap) -> bool {
        let (Some(token), Some(sessions)) = (&self.token, &self.sessions) else {
            return true;
        };
        let bearer = text(headers, &header::AUTHORIZATION).and_then(|v| v.strip_prefix("Bearer "));
        if bearer.is_some_and(|given| same(given, token)) {
            return true;
        }
        let cookies = headers.get_all(header::COOKIE).iter();
        cookies
            .filter_map(|value| value.to_str().ok())
            .flat_map(|line| line.split(';'))
            .any(|cookie| is_session(sessions, cookie.trim()).unwrap_or(false))
    }

    /// Holds the answer to a wrong token back, one after the other, so that tokens cannot be tried out quickly.
    async fn hold_back(&self) {
        let _turn = self.wrong.lock().await;
        tokio::time::sleep(WRONG_TOKEN_PAUSE).await;
    }

    /// A POST must come from this page: the browser says from where, and only this page knows the anti-forgery token.
    fn is_this_pages(&self, headers: &HeaderMap) -> bool {
        same_origin(headers)
            && headers
                .get(FORGERY_HEADER)
                .and_then(|v| v.to_str().ok())
                .is_some_and(|given| same(given, &self.forgery))
    }
}

fn now() -> i64 {
    jiff::Timestamp::now().as_second()
}

/// Whether a cookie `NAME=UNTIL.MARK` is one that [`login`] gave and still valid.
fn is_session(sessions: &PseudonymKey, cookie: &str) -> Option<bool> {
    let value = cookie.strip_prefix(COOKIE)?.strip_prefix('=')?;
    let (until, mark) = value.split_once('.')?;
    let valid = until.parse::<i64>().ok()? > now();
    Some(valid && same(mark, &session_mark(sessions, until)))
}

fn session_mark(sessions: &PseudonymKey, until: &str) -> String {
    sessions
        .pseudonym("session", &[until.as_bytes()])
        .to_string()
}

fn text<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether the request comes from a page of this server. Browsers send `Origin` with every POST; what sends none is no browser.
fn same_origin(headers: &HeaderMap) -> bool {
    let Some(origin) = text(headers, &header::ORIGIN) else {
        return true;
    };
    let host = text(headers, &header::HOST).unwrap_or_default();
    origin
        .split_once("://")
        .is_some_and(|(_, origin)| origin.eq_ignore_ascii_case(host))
}

/// For every request: a known host, an answer in time, the headers.
pub(super) async fn everyone(
    State(guard): State<Arc<Guard>>,
    request: Request,
    next: Next,
) -> Response {
    let mut response = if guard.knows_host(request.headers()) {
        let patience = if request.uri().path() == "/api/upload" {
            UPLOAD_PATIENCE
        } else {
            PATIENCE
        };
        match tokio::time::timeout(patience, next.run(request)).await {
            Ok(response) => response,
            Err(_) => Refusal::Away("server: took too long; try again".into()).into_response(),
        }
    } else {
        let hint = "host: is not one that this server answers to; use its address or add the name to http.allowed_hosts\n";
        (StatusCode::MISDIRECTED_REQUEST, hint).into_response()
    };
    let headers = response.headers_mut();
    for (name, value) in [
        (
            header::CONTENT_SECURITY_POLICY,
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
        ),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (header::REFERRER_POLICY, "no-referrer"),
        (
            HeaderName::from_static("cross-origin-opener-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("cross-origin-resource-policy"),
            "same-origin",
        ),
        (
            HeaderName::from_static("permissions-policy"),
            "camera=(), microphone=(), geolocation=()",
        ),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    headers
        .entry(header::CACHE_CONTROL)
        .or_insert(HeaderValue::from_static("no-store"));
    response
}

/// For everything but health and login: logged in, and a POST from this page.
pub(super) async fn private(
    State(guard): State<Arc<Guard>>,
    request: Request,
    next: Next,
) -> Response {
    if !guard.logged_in(request.headers()) {
        if request.headers().contains_key(header::AUTHORIZATION) {
            guard.hold_back().await;
        }
        return if request.uri().path() == "/" {
            Redirect::to("/login").into_response()
        } else {
            let line = "login: is needed; open /login, or send the token as a bearer token\n";
            (StatusCode::UNAUTHORIZED, line).into_response()
        };
    }
    if request.method() != Method::GET
        && request.method() != Method::HEAD
        && !guard.is_this_pages(request.headers())
    {
        return Refusal::Forbidden("request: does not come from this page; reload it")
            .into_response();
    }
    next.run(request).await
}

#[derive(serde::Deserialize)]
struct Login {
    token: String,
}

/// The login form and its answers.
pub(super) fn login(guard: Arc<Guard>) -> Router {
    let form = |wrong: bool| {
        let hint = if wrong { "" } else { " hidden" };
        let html = LOGIN_PAGE.replace(" data-wrong", hint);
        let code = if wrong {
            StatusCode::UNAUTHORIZED
        } else {
            StatusCode::OK
        };
        (
            code,
            [(header::CONTENT_TYPE, "text/html; charset=utf-8")],
            html,
        )
            .into_response()
    };
    let style = || async {
        let kind = [(header::CONTENT_TYPE, "text/css; charset=utf-8")];
        (kind, include_str!("page/style.css"))
    };
    let enter = move |headers: HeaderMap, form_data: Result<Form<Login>, FormRejection>| async move {
        if !same_origin(&headers) {
            return Refusal::Forbidden("login: does not come from this page; open /login")
                .into_response();
        }
        let given = form_data.map_or_else(|_| String::new(), |Form(login)| login.token);
        let (Some(token), Some(sessions)) = (&guard.token, &guard.sessions) else {
            return Redirect::to("/").into_response();
        };
        if !same(given.trim(), token) {
            guard.hold_back().await;
            return form(true);
        }
        let until = (now() + LOGIN_S).to_string();
        let secure = match text(&headers, &header::ORIGIN) {
            Some(origin) if origin.starts_with("https://") => "; Secure",
            _ => "",
        };
        let cookie = format!(
            "{COOKIE}={until}.{}; HttpOnly; SameSite=Strict; Path=/; Max-Age={LOGIN_S}{secure}",
            session_mark(sessions, &until)
        );
        ([(header::SET_COOKIE, cookie)], Redirect::to("/")).into_response()
    };
    Router::new()
        .route("/login", get(move || async move { form(false) }))
        .route("/login", post(enter))
        .route("/login.css", get(style))
        .layer(axum::extract::DefaultBodyLimit::max(4096))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn guard(token: Option<&str>) -> Guard {
        Guard {
            token: token.map(str::to_owned),
            sessions: token.map(|_| PseudonymKey::new([7; 32])),
            hosts: vec!["dashboard.example".into()],
            forgery: "mark".into(),
            wrong: tokio::sync::Mutex::default(),
        }
    }

    fn headers(pairs: &[(&'static str, &str)]) -> HeaderMap {
        pairs
            .iter()
            .map(|(name, value)| (HeaderName::from_static(name), value.parse().unwrap()))
            .collect()
    }

    #[test]
    fn only_addresses_and_listed_names_are_hosts() {
        for (host, known) in [
            ("localhost:8420", true),
            ("127.0.0.1", true),
            ("[::1]:8420", true),
            ("192.0.2.7:80", true),
            ("dashboard.example", true),
            ("Dashboard.Example:443", true),
            ("evil.example", false),
            ("127.0.0.1.evil.example", false),
            ("", false),
        ] {
            assert_eq!(
                guard(None).knows_host(&headers(&[("host", host)])),
                known,
                "{host}"
            );
        }
    }

    #[test]
    fn a_login_needs_the_token_or_a_valid_cookie() {
        let guard = guard(Some("a very secret token"));
        let key = PseudonymKey::new([7; 32]);
        let cookie = |until: i64| {
            let until = until.to_string();
            format!("other=1; scansentry={until}.{}", session_mark(&key, &until))
        };
        assert!(!guard.logged_in(&headers(&[])));
        assert!(guard.logged_in(&headers(&[("authorization", "Bearer a very secret token")])));
        assert!(!guard.logged_in(&headers(&[("authorization", "Bearer a very secret toke")])));
        assert!(guard.logged_in(&headers(&[("cookie", &cookie(now() + 60))])));
        assert!(!guard.logged_in(&headers(&[("cookie", &cookie(now() - 60))])));
        let forged = format!("scansentry={}.{}", now() + 60, "0".repeat(32));
        assert!(!guard.logged_in(&headers(&[("cookie", &forged)])));
    }

    #[test]
    fn a_post_needs_origin_and_mark() {
        let guard = guard(None);
        let with = |origin: &str, mark: &str| {
            guard.is_this_pages(&headers(&[
                ("host", "localhost:8420"),
                ("origin", origin),
                (FORGERY_HEADER, mark),
            ]))
        };
        assert!(with("http://localhost:8420", "mark"));
        assert!(!with("http://evil.example", "mark"));
        assert!(!with("null", "mark"));
        assert!(!with("http://localhost:8420", "other"));
    }
}
