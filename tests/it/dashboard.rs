//! The dashboard against a real Mosquitto: what appliances publish is shown, acknowledged and remembered; who may ask and who may not.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use base64::Engine as _;
use scansentry::history::{Body, Filter, Received, Verdict, parse};
use scansentry::store::{History, HistoryReader, Retention};
use serde_json::{Value, json};

use crate::contract::check_payload;
use crate::support::{
    Appliance, Mosquitto, Process, files_in, free_port, program, slices, wait_for,
};

/// 32 hex digits that are as good as any id.
fn id(kind: u64, number: u64) -> String {
    format!("{kind:016x}{number:016x}")
}

fn now() -> String {
    format!("{:.3}", jiff::Timestamp::now())
}

fn result(number: u64, decision: &str, study: u64) -> Value {
    let probability = if decision == "positive" { 0.93 } else { 0.07 };
    json!({
        "schema": "scansentry/result/1", "event_id": id(1, number), "scan_id": id(2, number), "study_id": id(3, study),
        "series_id": null, "modality": null, "frame": null, "device": "mri-1", "site": "ward", "acquired_at": now(), "processed_at": now(),
        "source": "png", "model": {"name": "braintumor", "version": "0.1.0", "sha256": "00"}, "outcome": "classified", "label": "tumor",
        "probability": probability, "scores": {"tumor": probability}, "threshold": 0.5, "decision": decision,
        "statement": "no tumour pattern found by this model", "rejected": null, "roi": {"x": 1, "y": 2, "width": 100, "height": 90},
        "misfit": null, "quality": {"flags": ["low_contrast"], "notes": []},
        "timings_ms": {"decode": 1.0, "roi": 1.0, "resize": 1.0, "infer": 5.0, "total": 8.0}, "replayed": false,
        "notice": "research use only, not for diagnosis", "a_key_of_tomorrow": {"x": 1}
    })
}

fn alert(number: u64, revision: u64, state: &str) -> Value {
    json!({
        "schema": "scansentry/alert/1", "event_id": id(4, revision), "alert_id": id(5, number), "revision": revision, "state": state,
        "study_id": id(3, number), "device": "mri-1", "site": "ward", "at": now(), "images": 3, "positives": revision, "max_probability": 0.93,
        "top_scan_id": id(2, 1), "threshold": 0.5, "model": {"name": "braintumor", "version": "0.1.0", "sha256": "00"},
        "statement": "tumour pattern found by this model", "notice": "research use only, not for diagnosis"
    })
}

fn publish(port: u16, topic: &str, payload: &str, more: &[&str]) {
    let port = port.to_string();
    let done = Command::new("mosquitto_pub")
        .args([
            "-h",
            "127.0.0.1",
            "-p",
            &port,
            "-V",
            "5",
            "-q",
            "1",
            "-t",
            topic,
            "-m",
            payload,
        ])
        .args(more)
        .status()
        .unwrap();
    assert!(done.success());
}

/// `scansentry dashboard` in a folder of its own.
pub struct Server {
    pub folder: tempfile::TempDir,
    pub process: Option<Process>,
    pub url: String,
}

impl Server {
    /// `more` begins with keys of `[dashboard]`.
    pub fn start(broker: &str, name: &str, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let text = format!(
            "[mqtt]\nurl = '{broker}'\nbackoff_min_ms = 50\nbackoff_max_s = 1\n[log]\nlevel = 'debug'\n[dashboard]\nname = '{name}'\ndir = '{}'\n{more}\n",
            folder.path().join("history").display(),
        );
        // On one port across restarts, as in real life.
        let listen = if more.contains("[http]") {
            String::new()
        } else {
            format!("[http]\nlisten = '127.0.0.1:{}'\n", free_port())
        };
        std::fs::write(folder.path().join("config.toml"), text + &listen).unwrap();
        let mut server = Self {
            folder,
            process: None,
            url: String::new(),
        };
        server.again();
        server
    }

    pub fn again(&mut self) {
        let log = std::fs::File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .unwrap();
        let mut process = Process::spawn(
            Command::new(program())
                .arg("dashboard")
                // Queues are what is measured, not what glibc keeps in an arena for each thread (docs/dashboard.md).
                .env("MALLOC_ARENA_MAX", "2")
                .env("SCANSENTRY_CONFIG", self.folder.path().join("config.toml"))
                .stdout(Stdio::piped())
                .stderr(log),
        );
        let mut line = String::new();
        let stdout = process.0.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let log = || std::fs::read_to_string(self.folder.path().join("log")).unwrap();
        assert!(line.starts_with("http://"), "{line}{}", log());
        line.trim().trim_end_matches('/').clone_into(&mut self.url);
        self.process = Some(process);
        wait_for("the dashboard's connection", || {
            self.get("/api/state")["broker"]["connected"] == true
        });
    }

    pub fn get(&self, path: &str) -> Value {
        let (status, text) = get(&self.url, path, &[]);
        assert_eq!(status, 200, "{path}: {text}");
        serde_json::from_str(&text).unwrap()
    }

    pub fn post(&self, path: &str, body: &Value) -> (u16, String) {
        let token = self.get("/api/state")["token"].as_str().unwrap().to_owned();
        let headers = [
            ("x-scansentry-token", token.as_str()),
            ("origin", self.url.as_str()),
            ("content-type", "application/json"),
        ];
        post(&self.url, path, &headers, body.to_string().as_bytes())
    }

    fn acknowledge(&self, alert: u64, take_back: bool) -> (u16, String) {
        let body = json!({"site": "ward", "device": "mri-1", "alert_id": id(5, alert), "take_back": take_back});
        self.post("/api/ack", &body)
    }

    /// Where its history lies.
    pub fn history(&self) -> PathBuf {
        self.folder.path().join("history")
    }

    fn open_alert(&self) -> Value {
        self.get("/api/state")["alerts"][0].clone()
    }

    pub fn metric(&self, name: &str) -> u64 {
        sum(&get(&self.url, "/metrics", &[]).1, name)
    }
}

fn agent() -> ureq::Agent {
    ureq::Agent::config_builder()
        .http_status_as_error(false)
        .max_redirects(0)
        .timeout_global(Some(Duration::from_mins(2)))
        .build()
        .into()
}

pub fn get(url: &str, path: &str, headers: &[(&str, &str)]) -> (u16, String) {
    let mut request = agent().get(format!("{url}{path}"));
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    match request.call() {
        Ok(mut response) => (
            response.status().as_u16(),
            response.body_mut().read_to_string().unwrap(),
        ),
        Err(error) => (0, error.to_string()),
    }
}

/// A server that refuses a request answers without reading its body and closes; a client that is still writing then may miss the answer, so
/// it asks again.
pub fn post(url: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> (u16, String) {
    for _ in 0..20 {
        let mut request = agent().post(format!("{url}{path}"));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        match request.send(body) {
            Ok(mut response) => {
                let status = response.status().as_u16();
                return (status, response.body_mut().read_to_string().unwrap());
            }
            Err(ureq::Error::Io(_)) => {}
            Err(error) => panic!("{path}: {error}"),
        }
    }
    panic!("{path}: no answer");
}

/// The sum of a metric over its labels, whole numbers only.
pub fn sum(text: &str, name: &str) -> u64 {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .filter_map(|line| line.rsplit_once(' '))
        .filter(|(key, _)| key.split('{').next() == Some(name))
        .map(|(_, value)| value.parse::<f64>().unwrap() as u64)
        .sum()
}

/// What `/api/events` says, gathered in a thread.
pub fn events(url: &str) -> Arc<Mutex<String>> {
    let heard = Arc::new(Mutex::new(String::new()));
    let (gathered, url) = (heard.clone(), format!("{url}/api/events"));
    std::thread::spawn(move || {
        let Ok(response) = agent().get(url).call() else {
            return;
        };
        let mut body = response.into_body().into_reader();
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = body.read(&mut bytes) {
            let text = String::from_utf8_lossy(&bytes[..count]).into_owned();
            gathered.lock().unwrap().push_str(&text);
        }
    });
    wait_for("the first event", || {
        heard.lock().unwrap().contains("event: hello")
    });
    heard
}

#[test]
fn two_dashboards_agree_and_outlive_broker_and_themselves() {
    let mut broker = Mosquitto::start();
    let first = Server::start(&broker.url(), "ward-desk", "");
    let mut second = Server::start(&broker.url(), "office", "");
    let live = events(&first.url);
    let base = "scansentry/ward/mri-1";
    publish(broker.port, &format!("{base}/status"), "online", &["-r"]);
    for number in 0..3 {
        let decision = if number == 1 { "positive" } else { "negative" };
        let payload = result(number, decision, 1).to_string();
        publish(broker.port, &format!("{base}/result"), &payload, &[]);
        // A resend is the same event.
        publish(broker.port, &format!("{base}/result"), &payload, &[]);
    }
    publish(
        broker.port,
        &format!("{base}/alert"),
        &alert(1, 1, "raised").to_string(),
        &[],
    );
    publish(broker.port, &format!("{base}/result"), "{not json", &[]);
    for server in [&first, &second] {
        wait_for("three results and an alert", || {
            server.get("/api/results")["rows"].as_array().unwrap().len() == 3
                && server.open_alert()["revision"] == 1
        });
        assert_eq!(server.metric("scansentry_dashboard_history_rows"), 3);
        assert_eq!(
            server.get("/api/state")["appliances"][0]["status"],
            "online"
        );
    }
    wait_for("live events", || {
        let heard = live.lock().unwrap();
        ["event: results", "event: alerts", "event: appliances"]
            .iter()
            .all(|event| heard.contains(event))
    });
    let positive = first.get("/api/results?decision=positive");
    assert_eq!(positive["rows"][0]["scan_id"], id(2, 1));
    assert_eq!(positive["rows"][0]["flags"], json!(["low_contrast"]));
    assert_eq!(
        first.get("/api/results?appliance=ward/other")["rows"],
        json!([])
    );
    let scan = first.get(&format!("/api/scan/ward/mri-1/{}", id(2, 1)));
    assert_eq!(scan["frames"][0]["message"]["a_key_of_tomorrow"]["x"], 1);
    let study = first.get(&format!("/api/study/ward/mri-1/{}", id(3, 1)));
    assert_eq!(study["pictures"].as_array().unwrap().len(), 3);
    let charts = first.get("/api/charts");
    let counted: u64 = charts["steps"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| s["negative"].as_u64().unwrap())
        .sum();
    assert_eq!(counted, 2);

    // A preview: its picture as it came, its activation map with the row.
    let mut png = std::io::Cursor::new(Vec::new());
    image::GrayImage::from_pixel(4, 4, image::Luma([99]))
        .write_to(&mut png, image::ImageFormat::Png)
        .unwrap();
    let png = png.into_inner();
    let preview = json!({
        "schema": "scansentry/preview/1", "event_id": id(6, 1), "scan_id": id(2, 1), "study_id": id(3, 1), "frame": null, "device": "mri-1", "site": "ward",
        "at": now(), "width": 4, "height": 4, "image": {"type": "image/png", "base64": base64::engine::general_purpose::STANDARD.encode(&png)},
        "heatmap": {"rows": 2, "columns": 2, "values": [[0, 255], [10, 20]]}, "decision": "positive", "probability": 0.93, "notice": "n"
    });
    publish(
        broker.port,
        &format!("{base}/preview"),
        &preview.to_string(),
        &[],
    );
    let picture = format!("{}/api/preview/ward/mri-1/{}", first.url, id(2, 1));
    wait_for("the preview", || {
        agent().get(&picture).call().unwrap().status() == 200
    });
    assert_eq!(
        agent()
            .get(&picture)
            .call()
            .unwrap()
            .body_mut()
            .read_to_vec()
            .unwrap(),
        png
    );
    let row = &first.get("/api/results?decision=positive")["rows"][0];
    assert_eq!(
        (&row["preview"], &row["heatmap"]["values"][0][1]),
        (&json!(true), &json!(255))
    );

    // Acknowledged at one, seen at both, as the schema has it; taken back at the other, gone at both.
    assert_eq!(first.acknowledge(1, false).0, 200);
    let topic = format!("{base}/ack/{}", id(5, 1));
    let kept = Command::new("mosquitto_sub")
        .args([
            "-h",
            "127.0.0.1",
            "-p",
            &broker.port.to_string(),
            "-V",
            "5",
            "-t",
            &topic,
            "-C",
            "1",
            "-W",
            "30",
        ])
        .output()
        .unwrap();
    check_payload("ack", &serde_json::from_slice(&kept.stdout).unwrap());
    for server in [&first, &second] {
        wait_for("the acknowledgement", || {
            server.open_alert()["acknowledged_by"] == "ward-desk"
        });
    }
    assert_eq!(second.acknowledge(1, true).0, 200);
    wait_for("its end", || {
        first.open_alert()["acknowledged_by"] == Value::Null
    });
    assert_eq!(first.acknowledge(9, false).0, 404);

    // The broker dies: said so, and not acknowledged in secret. It comes back: on it goes.
    broker.kill();
    wait_for("the loss to be noticed", || {
        first.get("/api/state")["broker"]["connected"] == false
    });
    let (status, line) = first.acknowledge(1, false);
    assert_eq!(
        (status, line.contains("broker: is away")),
        (503, true),
        "{line}"
    );
    broker.restart();
    for server in [&first, &second] {
        wait_for("the reconnection", || {
            server.get("/api/state")["broker"]["connected"] == true
        });
    }
    publish(
        broker.port,
        &format!("{base}/result"),
        &result(7, "negative", 1).to_string(),
        &[],
    );
    wait_for("a result after the restart", || {
        first.get("/api/results")["rows"].as_array().unwrap().len() == 4
    });

    // A dashboard is killed: the broker keeps what it misses.
    second.process = None;
    for number in 20..60 {
        publish(
            broker.port,
            &format!("{base}/result"),
            &result(number, "negative", 2).to_string(),
            &[],
        );
    }
    second.again();
    wait_for("what was missed", || {
        second.metric("scansentry_dashboard_history_rows") == 44
    });
    // Closed and acknowledged alerts move to the history.
    assert_eq!(second.acknowledge(1, false).0, 200);
    publish(
        broker.port,
        &format!("{base}/alert"),
        &alert(1, 2, "closed").to_string(),
        &[],
    );
    for server in [&first, &second] {
        wait_for("the alert in the history", || {
            server.open_alert() == Value::Null
                && server.get("/api/alerts")["alerts"][0]["acknowledged_by"] == "office"
        });
    }
}

#[test]
fn twenty_thousand_messages_at_once_arrive() {
    const COUNT: u64 = 20_000;
    // Without the test broker's habit of saving all its messages at each change.
    let broker = Mosquitto::start_with(
        "allow_anonymous true\nautosave_on_changes false\nautosave_interval 1800\n",
        |_| {},
    );
    let server = Server::start(&broker.url(), "load", "");
    // A page that never reads must not stop anything.
    let mut idle = std::net::TcpStream::connect(server.url.trim_start_matches("http://")).unwrap();
    idle.write_all(b"GET /api/events HTTP/1.1\r\nhost: localhost\r\n\r\n")
        .unwrap();
    let start = Instant::now();
    let mut publisher = Command::new("mosquitto_pub")
        .args([
            "-h",
            "127.0.0.1",
            "-p",
            &broker.port.to_string(),
            "-V",
            "5",
            "-q",
            "1",
            "-t",
            "scansentry/ward/mri-1/result",
            "-l",
        ])
        .stdin(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = String::new();
    for number in 0..COUNT {
        writeln!(lines, "{}", result(number, "negative", number / 50)).unwrap();
    }
    publisher
        .stdin
        .take()
        .unwrap()
        .write_all(lines.as_bytes())
        .unwrap();
    assert!(publisher.wait().unwrap().success());
    wait_for("all messages", || {
        server.metric("scansentry_dashboard_history_rows") == COUNT
    });
    let seconds = start.elapsed().as_secs_f64();
    println!(
        "{COUNT} results in {seconds:.1} s: {:.0} a minute",
        COUNT as f64 * 60.0 / seconds
    );
    assert!(COUNT as f64 * 60.0 / seconds > 1000.0);
    assert_eq!(
        server.get("/api/results?limit=1")["rows"][0]["decision"],
        "negative"
    );
    let resident = server.metric("process_resident_memory_bytes");
    assert!(resident < 400_000_000, "{resident} bytes resident");
    drop(idle);
}

#[test]
fn strangers_are_refused() {
    let broker = Mosquitto::start();
    let folder = tempfile::tempdir().unwrap();
    let token = "correct-horse-battery-staple";
    let token_file = folder.path().join("token");
    std::fs::write(&token_file, format!("{token}\n")).unwrap();
    let http = format!(
        "[http]\nlisten = '127.0.0.1:{}'\ntoken_file = '{}'\nallowed_hosts = ['dashboard.example']",
        free_port(),
        token_file.display()
    );
    let server = {
        // `start` asks without a token, so the connection is not waited for here.
        let dir = folder.path().join("config.toml");
        std::fs::write(
            &dir,
            format!(
                "[mqtt]\nurl = '{}'\n[dashboard]\nname = 'x'\ndir = '{}'\n{http}\n",
                broker.url(),
                folder.path().join("h").display()
            ),
        )
        .unwrap();
        let mut process = Process::spawn(
            Command::new(env!("CARGO_BIN_EXE_scansentry"))
                .args(["dashboard", "--config"])
                .arg(&dir)
                .stdout(Stdio::piped())
                .stderr(Stdio::null()),
        );
        let mut line = String::new();
        BufReader::new(process.0.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        (line.trim().trim_end_matches('/').to_owned(), process)
    };
    let url = &server.0;
    assert_eq!(get(url, "/api/state", &[]).0, 401);
    assert_eq!(get(url, "/metrics", &[]).0, 401);
    assert_eq!(get(url, "/page/app.js", &[]).0, 401);
    assert_eq!(get(url, "/", &[]).0, 303);
    assert_eq!(get(url, "/healthz", &[]).0, 200);
    assert!(
        get(url, "/login", &[])
            .1
            .contains("Research use only, not for diagnosis")
    );

    let bearer = format!("Bearer {token}");
    assert_eq!(get(url, "/metrics", &[("authorization", &bearer)]).0, 200);
    assert_eq!(
        get(url, "/metrics", &[("authorization", "Bearer wrong")]).0,
        401
    );

    let form = [
        ("content-type", "application/x-www-form-urlencoded"),
        ("origin", url.as_str()),
    ];
    assert_eq!(post(url, "/login", &form, b"token=wrong").0, 401);
    let foreign = [form[0], ("origin", "http://evil.example")];
    assert_eq!(
        post(url, "/login", &foreign, format!("token={token}").as_bytes()).0,
        403
    );
    let response = agent()
        .post(format!("{url}/login"))
        .header("content-type", form[0].1)
        .send(format!("token={token}").as_bytes())
        .unwrap();
    let cookie = response.headers()["set-cookie"]
        .to_str()
        .unwrap()
        .to_owned();
    assert!(
        cookie.contains("HttpOnly")
            && cookie.contains("SameSite=Strict")
            && !cookie.contains(token),
        "{cookie}"
    );
    let cookie = cookie.split(';').next().unwrap();
    let (status, text) = get(url, "/api/state", &[("cookie", cookie)]);
    assert_eq!(status, 200);
    let mark = serde_json::from_str::<Value>(&text).unwrap()["token"]
        .as_str()
        .unwrap()
        .to_owned();

    // DNS rebinding: a name that is not ours, pointed at our address.
    assert_eq!(
        get(
            url,
            "/api/state",
            &[("cookie", cookie), ("host", "evil.example")]
        )
        .0,
        421
    );
    assert_eq!(get(url, "/healthz", &[("host", "evil.example")]).0, 421);
    assert_eq!(
        get(
            url,
            "/api/state",
            &[("cookie", cookie), ("host", "dashboard.example")]
        )
        .0,
        200
    );

    // Forgery: another origin, or no token, or a wrong one.
    let body = json!({"site": "ward", "device": "mri-1", "alert_id": id(5, 1)}).to_string();
    let json_kind = ("content-type", "application/json");
    for (origin, given, status) in [
        ("http://evil.example", mark.as_str(), 403),
        ("null", &mark, 403),
        (url, "", 403),
        (url, "0123", 403),
        (url, &mark, 404),
    ] {
        let headers = [
            ("cookie", cookie),
            ("origin", origin),
            ("x-scansentry-token", given),
            json_kind,
        ];
        assert_eq!(
            post(url, "/api/ack", &headers, body.as_bytes()).0,
            status,
            "{origin} {given}"
        );
    }
    let headers = [
        ("cookie", cookie),
        ("origin", url.as_str()),
        ("x-scansentry-token", &mark),
        json_kind,
    ];
    assert_eq!(
        post(url, "/api/upload", &headers, b"x").0,
        403,
        "no uploads to a dashboard of a fleet"
    );
    let much = vec![b' '; 10_000];
    assert_eq!(post(url, "/api/ack", &headers, &much).0, 413);

    let response = agent().get(format!("{url}/login")).call().unwrap();
    let policy = response.headers()["content-security-policy"]
        .to_str()
        .unwrap();
    assert!(
        policy.contains("default-src 'none'") && !policy.contains("unsafe"),
        "{policy}"
    );
    for (path, text) in [
        ("/login", get(url, "/login", &[]).1),
        ("/", get(url, "/", &[("cookie", cookie)]).1),
    ] {
        assert!(
            !text.contains("style=") && !text.contains("<style") && !text.contains("<script>"),
            "{path} has inline code"
        );
    }
}

#[test]
fn a_dashboard_that_others_can_reach_needs_a_token() {
    let folder = tempfile::tempdir().unwrap();
    let run = |listen: &str, token: &str| {
        std::fs::write(folder.path().join("token"), token).unwrap();
        let token_file = if token.is_empty() {
            String::new()
        } else {
            folder.path().join("token").display().to_string()
        };
        let output = Command::new(env!("CARGO_BIN_EXE_scansentry"))
            .arg("dashboard")
            .env("SCANSENTRY_CONFIG", "/etc/scansentry/config.toml")
            .env("SCANSENTRY__HTTP__LISTEN", listen)
            .env("SCANSENTRY__HTTP__TOKEN_FILE", token_file)
            .env("SCANSENTRY__STATE__DIR", folder.path())
            .output()
            .unwrap();
        (
            output.status.code(),
            String::from_utf8(output.stderr).unwrap(),
        )
    };
    let (code, line) = run("0.0.0.0:0", "");
    assert_eq!(code, Some(78));
    assert!(
        line.starts_with("http.token_file: is not set, but"),
        "{line}"
    );
    let (code, line) = run("0.0.0.0:0", "short");
    assert_eq!(code, Some(78));
    assert!(line.contains("shorter than 16 characters"), "{line}");
    let (code, line) = run("nowhere", "");
    assert_eq!(code, Some(78));
    assert!(line.starts_with("http.listen:"), "{line}");
}

pub fn daemon_url(appliance: &Appliance) -> String {
    let find = || {
        let log = appliance.latest_log();
        let start = log.rfind("url=\"http://")? + 5;
        Some(
            log[start..]
                .split('"')
                .next()?
                .trim_end_matches('/')
                .to_owned(),
        )
    };
    wait_for("the web server", || find().is_some());
    find().unwrap()
}

#[test]
fn an_uploaded_image_takes_the_normal_way_and_its_name_stays_out() {
    let broker = Mosquitto::start();
    let mut appliance = Appliance::with(
        &broker.url(),
        "[dashboard]\nenabled = true\nupload_files = 3\n[http]\nlisten = '127.0.0.1:0'\n[limits]\nfile_bytes = 200000",
    );
    appliance.start();
    let url = daemon_url(&appliance);
    let state: Value = serde_json::from_str(&get(&url, "/api/state", &[]).1).unwrap();
    assert_eq!(state["upload"]["bytes"], 200_000);
    let mark = state["token"].as_str().unwrap();
    let headers = [
        ("origin", url.as_str()),
        ("x-scansentry-token", mark),
        ("content-type", "application/octet-stream"),
    ];
    let send = |bytes: &[u8], extension: &str| {
        let (status, text) = post(
            &url,
            &format!("/api/upload?extension={extension}"),
            &headers,
            bytes,
        );
        (status, serde_json::from_str::<Value>(&text).unwrap())
    };
    let slices = slices(4);
    let (status, answer) = send(&slices[1], "png");
    assert_eq!((status, &answer["known"]), (200, &json!(false)), "{answer}");
    let scan = format!(
        "/api/scan/{}/{}/{}",
        answer["site"].as_str().unwrap(),
        answer["device"].as_str().unwrap(),
        answer["scan_id"].as_str().unwrap()
    );
    wait_for("the result", || get(&url, &scan, &[]).0 == 200);
    let frame: Value = serde_json::from_str(&get(&url, &scan, &[]).1).unwrap();
    assert_eq!(frame["frames"][0]["outcome"], "classified");

    // The same bytes are the same scan: nothing new is written.
    let (status, answer) = send(&slices[1], "png");
    assert_eq!(
        (status, &answer["known"], &answer["shown"]),
        (200, &json!(true), &json!(true))
    );
    // An ending that is not known, and one that would lead elsewhere, are left out; the content decides.
    assert_eq!(send(&slices[0], "..%2F..%2Fx").0, 200);
    let names: Vec<_> = files_in(&appliance.export().join("uploads"))
        .unwrap()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    for name in &names {
        let rest = name.strip_prefix("upload-").unwrap();
        let (random, ending) = rest.split_at(32);
        assert!(
            random.bytes().all(|b| b.is_ascii_hexdigit()) && ["", ".png"].contains(&ending),
            "{name}"
        );
    }
    // Refusals: empty, too large, too many, half a file.
    assert_eq!(send(b"", "png").0, 400);
    assert_eq!(send(&vec![0; 200_001], "png").0, 413);
    let mut half = std::net::TcpStream::connect(url.trim_start_matches("http://")).unwrap();
    write!(half, "POST /api/upload HTTP/1.1\r\nhost: localhost\r\nx-scansentry-token: {mark}\r\ncontent-length: 1000\r\n\r\nhalf").unwrap();
    wait_for("the half file", || {
        files_in(&appliance.export().join("uploads")).unwrap().len() == 3
    });
    drop(half);
    wait_for("the half file to go", || {
        files_in(&appliance.export().join("uploads")).unwrap().len() == 2
    });
    assert_eq!(send(&slices[2], "jpg").0, 200);
    let (status, answer) = send(&slices[3], "jpg");
    assert_eq!(status, 507, "{answer}");
    assert_eq!(post(&url, "/api/upload", &headers[..1], &slices[3]).0, 403);
    // Not asked for, so not there: the name of a file is in no log.
    assert!(!appliance.log().contains("upload-"));
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn supervisors_get_health_and_numbers_without_the_page() {
    let mut broker = Mosquitto::start();
    let mut appliance = Appliance::with(
        &broker.url(),
        "[http]\nenabled = true\nlisten = '127.0.0.1:0'",
    );
    appliance.start();
    let url = daemon_url(&appliance);
    for (number, slice) in slices(4).iter().enumerate() {
        appliance.rename_in(&format!("secret-name-{number}.png"), slice);
    }
    appliance.rename_in("secret-letter.txt", b"Dear colleague");
    let metrics = || get(&url, "/metrics", &[]).1;
    wait_for("five outcomes", || {
        sum(&metrics(), "scansentry_pictures_total") == 5
    });
    wait_for("delivery", || {
        sum(&metrics(), "scansentry_backlog_messages") == 0
    });
    let text = metrics();
    assert!(
        text.contains("scansentry_pictures_total{outcome=\"rejected\",reason=\"not_an_image\"} 1"),
        "{text}"
    );
    assert_eq!(sum(&text, "scansentry_stage_seconds_count"), 4 * 5);
    assert_eq!(sum(&text, "scansentry_mqtt_connected"), 1);
    assert!(
        text.contains("scansentry_model_info{name=\"braintumor\""),
        "{text}"
    );
    assert!(sum(&text, "process_resident_memory_bytes") > 1_000_000);
    assert!(!text.contains("secret"), "{text}");
    assert_eq!(get(&url, "/healthz", &[]).0, 200);
    assert_eq!(get(&url, "/", &[]).0, 404, "no page without the dashboard");
    assert_eq!(get(&url, "/api/state", &[]).0, 404);
    // A broker that is away is said, and no reason to be taken out of service.
    broker.kill();
    wait_for("the loss", || {
        get(&url, "/readyz", &[]).1.contains("\"mqtt\":\"away\"")
    });
    let (status, text) = get(&url, "/readyz", &[]);
    assert_eq!(status, 200, "{text}");
    assert!(text.contains("broker_away"), "{text}");
    assert_eq!(sum(&metrics(), "scansentry_mqtt_connected"), 0);
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn every_metric_that_the_grafana_dashboard_names_is_exported() {
    let broker = Mosquitto::start();
    let mut appliance = Appliance::with(
        &broker.url(),
        "[dashboard]\nenabled = true\n[http]\nlisten = '127.0.0.1:0'",
    );
    appliance.start();
    let url = daemon_url(&appliance);
    // Something of each kind, so that each metric has a value.
    appliance.rename_in("slice.png", &slices(1)[0]);
    wait_for("a result", || {
        sum(&get(&url, "/metrics", &[]).1, "scansentry_pictures_total") > 0
    });
    std::fs::rename(
        appliance.export(),
        appliance.folder.path().join("elsewhere"),
    )
    .unwrap();
    wait_for("a condition", || {
        sum(&get(&url, "/metrics", &[]).1, "scansentry_condition") > 0
    });
    let exported = || -> HashSet<String> {
        let text = get(&url, "/metrics", &[]).1;
        let names = text.lines().filter(|l| !l.starts_with('#'));
        names
            .filter_map(|l| l.split(['{', ' ']).next())
            .map(str::to_owned)
            .collect()
    };
    wait_for("the dashboard's numbers", || {
        exported().contains("scansentry_dashboard_appliances")
    });
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/grafana/scansentry.json");
    let board: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let mut expressions = Vec::new();
    for panel in board["panels"].as_array().unwrap() {
        for target in panel["targets"].as_array().into_iter().flatten() {
            expressions.push(target["expr"].as_str().unwrap().to_owned());
        }
    }
    assert!(expressions.len() >= 10);
    let text = get(&url, "/metrics", &[]).1;
    let described: HashSet<&str> = text
        .lines()
        .filter_map(|l| l.strip_prefix("# TYPE ")?.split(' ').next())
        .collect();
    for expression in expressions {
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for name in words.filter(|w| w.starts_with("scansentry_") || w.starts_with("process_")) {
            let bare = ["_total", "_bucket", "_count", "_sum", "_info"]
                .iter()
                .find_map(|end| name.strip_suffix(end));
            assert!(
                described.contains(name) || bare.is_some_and(|bare| described.contains(bare)),
                "{name} in {expression} is not exported"
            );
        }
    }
}

fn received(number: u64, at_ms: i64, event: u64, decision: &str) -> Received {
    let mut payload = result(number, decision, 1);
    payload["event_id"] = id(1, event).into();
    payload["processed_at"] = jiff::Timestamp::from_millisecond(at_ms)
        .unwrap()
        .to_string()
        .into();
    parse(
        "scansentry",
        "scansentry/ward/mri-1/result",
        payload.to_string().as_bytes(),
        false,
        at_ms,
    )
    .unwrap()
}

const HOUR: i64 = 3_600_000;

#[test]
fn the_history_drops_duplicates_shows_the_newest_and_forgets_within_bounds() {
    let folder = tempfile::tempdir().unwrap();
    let mut history = History::open(folder.path()).unwrap();
    assert!(
        History::open(folder.path()).is_err(),
        "one process at a time"
    );
    let reader = HistoryReader::open(folder.path()).unwrap();
    let filter = Filter {
        limit: 10_000,
        ..Filter::default()
    };

    // Reprocessed: another event of the same scan; the newest counts, even if the older one comes late.
    let batch = [
        received(1, 2 * HOUR, 11, "negative"),
        received(1, 3 * HOUR, 12, "positive"),
        received(1, HOUR, 10, "negative"),
        received(1, 3 * HOUR, 12, "positive"),
    ];
    let changes = history.write(&batch).unwrap();
    assert_eq!(changes.counted.iter().filter(|(_, new)| *new).count(), 3);
    let rows = reader.results(&filter).unwrap();
    assert_eq!((rows.len(), &rows[0]["decision"]), (1, &json!("positive")));

    let many: Vec<_> = (2..3002)
        .map(|n| received(n, 4 * HOUR + n as i64, 1000 + n, "negative"))
        .collect();
    let changes = history.write(&many).unwrap();
    assert_eq!((changes.results.len(), changes.more), (40, 2960));
    let negative = Filter {
        verdict: Some(Verdict::Negative),
        from_ms: Some(4 * HOUR),
        to_ms: Some(4 * HOUR + 12),
        ..filter.clone()
    };
    assert_eq!(reader.results(&negative).unwrap().len(), 10);
    let page = Filter {
        limit: 100,
        ..filter.clone()
    };
    let first = reader.results(&page).unwrap();
    let next = reader
        .results(&Filter {
            before: first.last().unwrap()["id"].as_i64(),
            ..page
        })
        .unwrap();
    assert_ne!(first.last().unwrap()["scan_id"], next[0]["scan_id"]);

    // By number, in steps; then by age.
    let alerts = parse(
        "scansentry",
        "scansentry/ward/mri-1/alert",
        alert(1, 1, "raised").to_string().as_bytes(),
        false,
        HOUR,
    )
    .unwrap();
    let ack = json!({"at": "2026-11-23T12:00:00Z", "by": "desk"}).to_string();
    let ack = parse(
        "scansentry",
        &format!("scansentry/ward/mri-1/ack/{}", id(5, 1)),
        ack.as_bytes(),
        false,
        HOUR,
    )
    .unwrap();
    assert!(matches!(ack.body, Body::Ack(_, Some(_))));
    history.write(&[alerts, ack]).unwrap();
    let keep = |before_ms, max_rows| Retention {
        before_ms,
        max_rows,
        preview_bytes: 0,
    };
    while history.prune(keep(0, 1000), 500).unwrap() {}
    assert_eq!(history.rows(), 1000);
    assert_eq!(reader.open_alerts(9).unwrap().1, 1);
    history.prune(keep(2 * HOUR, 1000), 500).unwrap();
    assert_eq!(reader.open_alerts(9).unwrap().1, 0);
    while history.prune(keep(100 * HOUR, 1000), 500).unwrap() {}
    assert_eq!(
        (history.rows(), reader.results(&filter).unwrap().len()),
        (0, 0)
    );
}

#[test]
fn previews_are_forgotten_by_age_bytes_and_number() {
    let folder = tempfile::tempdir().unwrap();
    let mut history = History::open(folder.path()).unwrap();
    let reader = HistoryReader::open(folder.path()).unwrap();
    let key = "ward/mri-1".parse().unwrap();
    let png = base64::engine::general_purpose::STANDARD.encode(b"\x89PNG\r\n\x1a\n");
    let preview = |number: u64, at_ms| {
        let payload = json!({"scan_id": id(2, number), "image": {"base64": png}, "heatmap": {"rows": 1, "columns": 1, "values": [[7]]}});
        let text = payload.to_string();
        parse(
            "scansentry",
            "scansentry/ward/mri-1/preview",
            text.as_bytes(),
            false,
            at_ms,
        )
        .unwrap()
    };
    let left = || {
        let there = |n: &u64| {
            let found = reader.preview(&key, id(2, *n).parse().unwrap(), None);
            found.unwrap().is_some()
        };
        (1..=4).filter(there).collect::<Vec<_>>()
    };
    let batch: Vec<_> = (1..=4).map(|n| preview(n, n as i64 * HOUR)).collect();
    history.write(&batch).unwrap();
    // One that comes again is as old as its last coming, and counts once.
    history.write(&[preview(1, 5 * HOUR)]).unwrap();
    let mut keep = Retention {
        before_ms: 3 * HOUR,
        max_rows: 1000,
        preview_bytes: 1 << 20,
    };
    history.prune(keep, 500).unwrap();
    assert_eq!(left(), [1, 3, 4]);
    keep.max_rows = 2;
    history.prune(keep, 500).unwrap();
    assert_eq!(left(), [1, 4]);
    // The activation map counts: 8 bytes of picture alone would fit twice.
    keep.preview_bytes = 20;
    history.prune(keep, 500).unwrap();
    assert_eq!(left(), [] as [u64; 0]);
}

#[test]
fn a_history_of_the_first_format_is_brought_up_to_date() {
    let folder = tempfile::tempdir().unwrap();
    drop(History::open(folder.path()).unwrap());
    let sql = "DROP INDEX result_stored; DROP INDEX alert_stored; DROP INDEX study_stored; DROP INDEX ack_stored; DROP INDEX preview_stored;
      ALTER TABLE preview DROP COLUMN stored_at; PRAGMA user_version = 1;
      INSERT INTO preview (appliance, scan_id, frame, png) VALUES (1, x'00', 0, x'89');";
    let database = folder.path().join("history.sqlite3");
    let sqlite = rusqlite::Connection::open(&database).unwrap();
    sqlite.execute_batch(sql).unwrap();
    let mut history = History::open(folder.path()).unwrap();
    let keep = Retention {
        before_ms: jiff::Timestamp::now().as_millisecond() - HOUR,
        max_rows: 1000,
        preview_bytes: 1,
    };
    assert!(!history.prune(keep, 500).unwrap());
    let left: i64 = sqlite
        .query_row("SELECT count(*) FROM preview", [], |row| row.get(0))
        .unwrap();
    assert_eq!(left, 1);
}
