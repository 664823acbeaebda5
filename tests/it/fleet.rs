//! Many appliances at one broker: nothing is lost on the way into a dashboard, groups share results, brokers that are bridged pass on everything.
//! `make fleet` measures it with a thousand.

mod simulated;

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use scansentry::config::Config;
use scansentry::history::quantile;
use scansentry::mqtt::{Event, Session, Settings};
use scansentry::scan::Pseudonym;
use serde_json::{Value, json};

use crate::dashboard::{Server, events, get};
use crate::support::{Arrived, Mosquitto, Process, Subscriber, pause, wait_for};
use simulated::{Fleet, Plan, Sent};

/// Without the test broker's habit of saving all its messages at each change.
const QUIET: &str = "allow_anonymous true\nautosave_on_changes false\nautosave_interval 1800\n";

impl Plan {
    /// A few seconds of `appliances` at two sites.
    fn short(broker: &Mosquitto, appliances: usize, round: u64) -> Self {
        Self {
            port: broker.port,
            appliances,
            sites: 2,
            burst: 5,
            every: Duration::from_millis(500),
            bursts: 4,
            in_step: false,
            round,
        }
    }
}

/// Results in the history of `server`, by event.
fn stored(server: &Server) -> HashSet<Pseudonym> {
    let history = rusqlite::Connection::open(server.history().join("history.sqlite3")).unwrap();
    let mut select = history.prepare("SELECT event_id FROM result").unwrap();
    let rows = select.query_map([], |row| Ok(Pseudonym(row.get(0)?)));
    rows.unwrap().map(Result::unwrap).collect()
}

/// Alerts in the history of `server`, and how many of them are closed.
fn alerts(server: &Server) -> (u64, u64) {
    let history = rusqlite::Connection::open(server.history().join("history.sqlite3")).unwrap();
    let count = "SELECT count(*), coalesce(sum(closed), 0) FROM alert";
    let read = |row: &rusqlite::Row<'_>| Ok((row.get(0)?, row.get(1)?));
    history.query_row(count, [], read).unwrap()
}

fn states(server: &Server) -> BTreeMap<String, usize> {
    let mut states = BTreeMap::new();
    let state = server.get("/api/state");
    for appliance in state["appliances"].as_array().unwrap() {
        let status = appliance["status"].as_str().unwrap_or("none");
        *states.entry(status.to_owned()).or_default() += 1;
    }
    states
}

fn ids(sent: &Sent) -> HashSet<Pseudonym> {
    sent.results.keys().copied().collect()
}

#[test]
fn everything_that_fifty_appliances_say_is_stored() {
    raise_limits();
    let broker = Mosquitto::start_with(QUIET, |_| {});
    let report = measure(&broker, &Plan::short(&broker, 50, 0), 100_000);
    assert_eq!(report["results"]["published"], 50 * 20);
    assert_eq!(report["lost_connections"], 0);
}

#[test]
#[ignore = "a minute and more, with a release build: make fleet"]
fn a_thousand_appliances() {
    let number = |name: &str, default: u64| {
        let text = std::env::var(name);
        text.map_or(default, |text| text.parse().unwrap())
    };
    raise_limits();
    let lines = std::env::var("FLEET_BROKER").unwrap_or_default();
    let broker = Mosquitto::start_with(&format!("{QUIET}{lines}\n"), |_| {});
    let (burst, seconds) = (number("FLEET_BURST", 10), number("FLEET_SECONDS", 60));
    let plan = Plan {
        port: broker.port,
        appliances: number("FLEET_APPLIANCES", 1000) as usize,
        sites: 20,
        burst,
        every: Duration::from_secs(burst),
        bursts: seconds.div_ceil(burst),
        in_step: number("FLEET_IN_STEP", 0) == 1,
        round: 0,
    };
    measure(&broker, &plan, number("FLEET_ROWS", 10_000_000));
}

// Dashboards and consumers in groups.

/// Lets the fleet of `plan` speak once all of `servers` have seen it come online.
fn speak(plan: &Plan, servers: &[&Server]) -> HashSet<Pseudonym> {
    let fleet = Fleet::connect(plan);
    for server in servers {
        wait_for("the fleet", || {
            states(server).get("online") == Some(&plan.appliances)
        });
    }
    fleet.begin();
    ids(&fleet.finish())
}

#[test]
fn dashboards_of_a_group_share_the_results_and_nothing_else() {
    let group = "share = 'desks'\nsession_s = 3600";
    let broker = Mosquitto::start_with(QUIET, |_| {});
    let first = Server::start(&broker.url(), "first", group);
    let mut second = Server::start(&broker.url(), "second", group);
    let outside = Server::start(&broker.url(), "outside", "");
    assert_eq!(first.get("/api/state")["share"], "desks");
    let mut all = speak(&Plan::short(&broker, 8, 0), &[&first, &second, &outside]);
    let whole = |all: &HashSet<Pseudonym>, second: &Server| {
        wait_for("all results, alone and in the group", || {
            let together = &stored(&first) | &stored(second);
            stored(&outside) == *all && together == *all
        });
    };
    whole(&all, &second);
    let (left, right) = (stored(&first), stored(&second));
    assert!(left.is_disjoint(&right));
    assert!(left.len() > all.len() / 4 && right.len() > all.len() / 4);
    let stopped = BTreeMap::from([("stopped".to_owned(), 8)]);
    for server in [&first, &second, &outside] {
        wait_for("states and alerts", || {
            states(server) == stopped && alerts(server) == alerts(&outside)
        });
    }
    assert!(alerts(&outside).0 > 0 && alerts(&outside).1 > 0);

    // One is killed: the broker keeps its share for it.
    second.process = None;
    all.extend(speak(&Plan::short(&broker, 8, 1), &[&first, &outside]));
    wait_for("all of them outside the group", || stored(&outside) == all);
    assert!((&stored(&first) | &stored(&second)).len() < all.len());
    second.again();
    whole(&all, &second);

    // One leaves: it gets what waited for it, hears everything from then on, and takes nothing from the group any more.
    second.process = None;
    all.extend(speak(&Plan::short(&broker, 8, 4), &[&first, &outside]));
    let path = second.folder.path().join("config.toml");
    let config = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, config.replace("share = 'desks'\n", "")).unwrap();
    second.again();
    whole(&all, &second);
    let third = speak(&Plan::short(&broker, 8, 2), &[&first, &second, &outside]);
    for server in [&first, &second, &outside] {
        wait_for("all of them at each", || third.is_subset(&stored(server)));
    }

    // One goes for good: when its session has ended, its share goes to those that are left.
    let group = "share = 'desks'\nsession_s = 1";
    let mut brief = Server::start(&broker.url(), "brief", group);
    wait_for("its subscriptions", || states(&brief).len() == 1);
    brief.process = None;
    wait_for("the end of its session", || {
        let log = std::fs::read_to_string(broker.folder().join("log")).unwrap();
        log.contains("Expiring client scansentry-dashboard-brief")
    });
    let fourth = speak(&Plan::short(&broker, 8, 3), &[&first, &outside]);
    wait_for("all of them in the rest of the group", || {
        fourth.is_subset(&stored(&first))
    });
}

#[test]
fn a_dashboard_follows_the_sites_and_appliances_that_it_names() {
    let broker = Mosquitto::start_with(QUIET, |_| {});
    let all = Server::start(&broker.url(), "all", "");
    let some = Server::start(&broker.url(), "some", "follow = ['site-1', 'site-0/mri-2']");
    let fleet = Fleet::connect(&Plan::short(&broker, 6, 0));
    for (server, appliances) in [(&all, 6), (&some, 4)] {
        wait_for("its appliances", || {
            states(server).get("online") == Some(&appliances)
        });
    }
    fleet.begin();
    let sent = ids(&fleet.finish());
    wait_for("all results", || stored(&all) == sent);
    wait_for("their results", || {
        stored(&some).len() == sent.len() * 4 / 6
    });
    assert_eq!(
        some.get("/api/results?appliance=site-0/mri-0")["rows"],
        json!([])
    );
    assert_eq!(some.get("/api/state")["follow"][0], "site-1");
}

/// What the consumers of a group have worked on, and how often: their common store, with the event id as its key.
type Worked = Mutex<HashMap<Pseudonym, u32>>;

/// A consumer as docs/fleet.md has it: a session that the broker keeps, and a message is confirmed when it lies in the store. It dies after
/// `most` messages, with what it has received then and not confirmed; else it ends at `stop`.
fn consume(port: u16, name: &str, worked: &Worked, most: usize, stop: &AtomicBool) {
    let mut count = 0;
    let filter = "$share/engine/scansentry/+/+/result";
    hear(port, name, Some(3600), filter, stop, |payload| {
        count += 1;
        *worked.lock().unwrap().entry(event_id(payload)).or_default() += 1;
        // The last one is worked on and never confirmed, and comes again.
        count < most
    });
}

/// Gives what comes on `filter` to `each` until that says no, which leaves the message unconfirmed, or until `stop`. The broker keeps the session for
/// `kept_s` seconds, if at all.
fn hear(
    port: u16,
    name: &str,
    kept_s: Option<u32>,
    filter: &str,
    stop: &AtomicBool,
    mut each: impl FnMut(&[u8]) -> bool,
) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    runtime.unwrap().block_on(async {
        let mut mqtt = Config::defaults().mqtt;
        mqtt.url = format!("mqtt://127.0.0.1:{port}");
        let mut settings = Settings::new(&mqtt, name).unwrap();
        if let Some(seconds) = kept_s {
            settings = settings.with_persistent_session(seconds);
        }
        let mut session = Session::open(&settings);
        while !stop.load(Ordering::Relaxed) {
            let event = tokio::time::timeout(Duration::from_millis(100), session.next()).await;
            match event {
                Err(_) => {}
                Ok(Event::Connected) => session.subscribe(filter, true).await.unwrap(),
                Ok(Event::Message {
                    payload, receipt, ..
                }) => {
                    if !each(&payload) {
                        break;
                    }
                    if let Some(receipt) = receipt {
                        session.confirm(receipt).await.unwrap();
                    }
                }
                Ok(other) => panic!("{other:?}"),
            }
        }
    });
}

#[test]
fn consumers_of_a_group_work_on_everything_although_one_dies() {
    let broker = Mosquitto::start_with(QUIET, |_| {});
    let (worked, stop) = (Worked::default(), AtomicBool::new(false));
    let (port, plan) = (broker.port, Plan::short(&broker, 8, 0));
    let sent = std::thread::scope(|scope| {
        let start = |name, most| {
            let (worked, stop) = (&worked, &stop);
            scope.spawn(move || consume(port, name, worked, most, stop))
        };
        start("steady", usize::MAX);
        let dying = start("dying", 20);
        wait_for("both subscriptions", || {
            let log = std::fs::read_to_string(broker.folder().join("log")).unwrap();
            ["as steady", "as dying"]
                .iter()
                .all(|name| log.contains(name))
        });
        pause(Duration::from_millis(300));
        let sent = ids(&Fleet::run(&plan));
        dying.join().unwrap();
        pause(Duration::from_millis(300));
        assert!(worked.lock().unwrap().len() < sent.len(), "its share waits");
        start("dying", usize::MAX);
        wait_for("all results", || worked.lock().unwrap().len() == sent.len());
        stop.store(true, Ordering::Relaxed);
        sent
    });
    let worked = worked.into_inner().unwrap();
    assert_eq!(worked.keys().copied().collect::<HashSet<_>>(), sent);
    let again = worked.values().filter(|&&times| times > 1).count();
    assert!((1..=20).contains(&again), "{again} came again");
}

// Brokers that are bridged.

/// A way to a port that can be cut.
struct Link {
    port: u16,
    cut: Arc<AtomicBool>,
}

impl Link {
    fn to(target: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let cut = Arc::new(AtomicBool::new(false));
        let state = cut.clone();
        std::thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                let Ok(far) = TcpStream::connect(("127.0.0.1", target)) else {
                    continue;
                };
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (from, to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    let cut = state.clone();
                    std::thread::spawn(move || pass(from, to, &cut));
                }
            }
        });
        Self { port, cut }
    }

    fn cut(&self, cut: bool) {
        self.cut.store(cut, Ordering::Relaxed);
    }
}

/// Passes bytes on until the link is cut or one side has gone.
fn pass(mut from: TcpStream, mut to: TcpStream, cut: &AtomicBool) {
    let look = Some(Duration::from_millis(20));
    from.set_read_timeout(look).unwrap();
    let mut bytes = [0; 4096];
    while !cut.load(Ordering::Relaxed) {
        match from.read(&mut bytes) {
            Ok(0) => break,
            Ok(count) if to.write_all(&bytes[..count]).is_err() => break,
            Ok(_) => {}
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {}
            Err(_) => break,
        }
    }
    let _ = from.shutdown(Shutdown::Both);
    let _ = to.shutdown(Shutdown::Both);
}

/// The documented bridge, over `port` and without TLS and login.
fn bridge(port: u16) -> String {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(path.join("docs/examples/mosquitto-bridge.conf")).unwrap();
    let of_test = |line: &&str| {
        // What the test broker says itself, or cannot have.
        let other = [
            "#",
            "persistence ",
            "max_queued_messages ",
            "bridge_cafile ",
            "remote_username ",
            "remote_password ",
        ];
        !other.iter().any(|start| line.starts_with(start))
    };
    let lines: Vec<_> = text.lines().filter(of_test).collect();
    let text = lines.join("\n");
    for part in [
        "address central.example:8883",
        "radiology",
        "restart_timeout 1 30",
    ] {
        assert!(text.contains(part), "{part}");
    }
    text.replace("central.example:8883", &format!("127.0.0.1:{port}"))
        .replace("radiology", "site-0")
        .replace("restart_timeout 1 30", "restart_timeout 1")
        + "\n"
}

#[test]
fn a_bridge_passes_on_everything_although_the_link_is_cut() {
    let central = Mosquitto::start();
    let link = Link::to(central.port);
    let lines = format!("allow_anonymous true\n{}", bridge(link.port));
    let mut site = Mosquitto::start_with(&lines, |_| {});
    let server = Server::start(&central.url(), "central", "");
    let (near, far) = (site.subscribe(), central.subscribe());
    let mut plan = Plan::short(&site, 6, 0);
    plan.sites = 1;
    let fleet = Fleet::connect(&plan);
    wait_for("the fleet at the central dashboard", || {
        states(&server).get("online") == Some(&6)
    });
    fleet.begin();
    wait_for("the first results", || !stored(&server).is_empty());
    link.cut(true);
    let sent = fleet.finish();
    assert_eq!(sent.lost, 0, "the appliances do not notice");
    let before = stored(&server);
    assert!(before.len() < sent.results.len(), "the link was cut late");
    // What waits at the site outlives its broker. It has read their goodbyes by then.
    pause(Duration::from_millis(500));
    site.stop();
    site.restart();
    link.cut(false);
    wait_for("what was sent meanwhile", || stored(&server) == ids(&sent));
    wait_for("the states", || {
        states(&server) == BTreeMap::from([("stopped".to_owned(), 6)])
    });
    // One picture of these is positive, in the first study of the first appliance, which is over.
    assert_eq!((alerts(&server), sent.alerts), ((1, 1), 2));
    let passed = far.of_kind("result");
    let properties = |m: &Arrived| {
        m.user.contains("schema:scansentry/result/1") && m.content_type == "application/json"
    };
    assert!(passed.iter().all(properties), "{:?}", passed[0]);

    // The way back: an acknowledgement and a command, each once.
    let alert = server.get("/api/state")["alerts"][0].clone();
    let (status, text) = server.post(
        "/api/ack",
        &json!({ "site": alert["site"], "device": alert["device"], "alert_id": alert["alert_id"] }),
    );
    assert_eq!(status, 200, "{text}");
    let command = json!({ "schema": "scansentry/command/1", "id": "1", "command": "pause" });
    central.publish("scansentry/site-0/mri-0/command", &command.to_string(), &[]);
    // Who subscribes anew because the site's broker was away may be told of the retained one once more.
    let acks = |subscriber: &Subscriber| {
        let all = subscriber.messages();
        all.iter()
            .filter(|m| m.topic.contains("/ack/") && !m.retained)
            .count()
    };
    wait_for("both at the site", || {
        acks(&near) > 0 && !near.of_kind("command").is_empty()
    });
    pause(Duration::from_secs(1));
    for subscriber in [&near, &far] {
        assert_eq!(
            (acks(subscriber), subscriber.of_kind("command").len()),
            (1, 1)
        );
    }
}

/// Each appliance is a connection here and one at the broker.
fn raise_limits() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    setrlimit(Resource::Nofile, limit).unwrap();
}

/// What a process takes: resident memory, its greatest, processor time.
#[derive(Clone, Copy)]
struct Figures {
    resident_kb: u64,
    peak_kb: u64,
    cpu_s: f64,
}

impl Figures {
    fn of(process: &Process) -> Self {
        Self {
            resident_kb: process.figure("VmRSS"),
            peak_kb: process.figure("VmHWM"),
            cpu_s: process.cpu_seconds(),
        }
    }
}

/// When something with an id was first seen.
type Seen = HashMap<Pseudonym, Instant>;

/// Runs a plan beside a dashboard that keeps `max_rows`, an open page and a subscriber, holds what arrived against what was sent, and prints
/// what was measured.
fn measure(broker: &Mosquitto, plan: &Plan, max_rows: u64) -> Value {
    let server = Server::start(&broker.url(), "fleet", &format!("max_rows = {max_rows}"));
    let keeps_all = plan.results() as u64 <= max_rows;
    let page = events(&server.url);
    let empty = Figures::of(&broker.process);
    let stop = Arc::new(AtomicBool::new(false));
    let subscriber = {
        let (port, stop) = (plan.port, stop.clone());
        std::thread::spawn(move || subscriber(port, &stop))
    };
    let rows = {
        let (path, stop) = (server.history().join("history.sqlite3"), stop.clone());
        std::thread::spawn(move || watch_rows(&path, &stop))
    };
    let fleet = Fleet::connect(plan);
    wait_for("all appliances at the broker", || {
        fleet.born() == plan.appliances
    });
    wait_for("all appliances on the page", || {
        states(&server) == BTreeMap::from([("online".into(), plan.appliances)])
    });
    pause(Duration::from_millis(500));
    let dashboard = server.process.as_ref().unwrap();
    let before = (Figures::of(dashboard), Figures::of(&broker.process));
    let page_before = page.lock().unwrap().len();
    let start = Instant::now();
    fleet.begin();
    let sending = std::thread::spawn(move || {
        let sent = fleet.finish();
        (sent, Instant::now())
    });
    let (mut state_s, mut state_bytes, mut resident_kb) = (Vec::new(), 0, Vec::new());
    while !sending.is_finished() {
        let asked = Instant::now();
        let (status, text) = get(&server.url, "/api/state", &[]);
        assert_eq!(status, 200, "{text}");
        state_s.push(asked.elapsed().as_secs_f64());
        state_bytes = text.len();
        resident_kb.push(dashboard.figure("VmRSS"));
        pause(Duration::from_secs(1));
    }
    let (sent, ended) = sending.join().unwrap();
    let expected = ids(&sent);
    assert_eq!(expected.len(), plan.results(), "every result has its id");
    let late = Instant::now();
    // What does not come within this is lost, and is counted below.
    let stopped = BTreeMap::from([("stopped".to_owned(), plan.appliances)]);
    let complete = || {
        let rows = server.metric("scansentry_dashboard_history_rows");
        (!keeps_all || rows == expected.len() as u64) && states(&server) == stopped
    };
    while !complete() && late.elapsed() < Duration::from_secs(20) {
        pause(Duration::from_millis(100));
    }
    let at_the_end = states(&server);
    pause(Duration::from_millis(300));
    stop.store(true, Ordering::Relaxed);
    let (heard, rows) = (subscriber.join().unwrap(), rows.join().unwrap());
    let after = (Figures::of(dashboard), Figures::of(&broker.process));
    let missing = |seen: &Seen| expected.iter().filter(|id| !seen.contains_key(*id)).count();
    let lag = |seen: &Seen| {
        let of = |(id, at): (&Pseudonym, &Instant)| {
            let first = sent.results.get(id)?;
            Some(at.saturating_duration_since(*first).as_secs_f64())
        };
        spread(seen.iter().filter_map(of).collect())
    };
    let seconds = (ended - start).as_secs_f64();
    let messages: u64 = sent.volume.values().map(|(count, _)| count).sum();
    let bytes = |name: &str| {
        let file = server.history().join(name);
        std::fs::metadata(file).map_or(0, |m| m.len())
    };
    let history_bytes = bytes("history.sqlite3") + bytes("history.sqlite3-wal");
    let volume = sent.volume.iter().map(|(kind, (count, bytes))| {
        let about = json!({ "messages": count, "bytes_each": bytes / count });
        ((*kind).to_owned(), about)
    });
    let report = json!({
        "appliances": plan.appliances, "seconds": round(seconds), "in_step": plan.in_step, "burst": plan.burst,
        "messages_a_second": round(messages as f64 / seconds),
        "results": { "published": expected.len(), "acknowledged": sent.acked.len(), "stored": rows.len(), "missing_in_history": missing(&rows), "missing_at_subscriber": missing(&heard) },
        "alerts": { "published": sent.alerts, "in_history": alerts(&server).0 }, "states_at_the_end": at_the_end,
        "lost_connections": sent.lost,
        "lag_s": { "acknowledged": spread(sent.acked.clone()), "stored": lag(&rows), "subscriber": lag(&heard) },
        "dashboard": {
            "resident_kb": [before.0.resident_kb, resident_kb[resident_kb.len() / 2], after.0.resident_kb], "peak_kb": after.0.peak_kb,
            "cores": round((after.0.cpu_s - before.0.cpu_s) / seconds), "history_bytes": history_bytes, "bytes_a_row": history_bytes / rows.len().max(1) as u64,
            "state_bytes": state_bytes, "state_s": spread(state_s), "page_bytes_a_second": round((page.lock().unwrap().len() - page_before) as f64 / seconds),
        },
        "broker": {
            "resident_kb": [empty.resident_kb, before.1.resident_kb, after.1.resident_kb], "peak_kb": after.1.peak_kb,
            "bytes_a_connection": (before.1.resident_kb - empty.resident_kb) * 1024 / plan.appliances as u64, "cores": round((after.1.cpu_s - before.1.cpu_s) / seconds),
        },
        "volume": Value::Object(volume.collect()),
    });
    println!("{}", table(&report));
    println!("{report}");
    assert_eq!(sent.acked.len(), expected.len());
    assert_eq!(at_the_end, stopped);
    assert_eq!(
        (missing(&rows), missing(&heard)),
        (0, 0),
        "results were lost"
    );
    assert!(!keeps_all || stored(&server) == expected);
    report
}

fn round(number: f64) -> f64 {
    (number * 1000.0).round() / 1000.0
}

fn spread(mut seconds: Vec<f64>) -> Value {
    seconds.sort_by(f64::total_cmp);
    let at = |q| quantile(&seconds, q).map(round);
    json!({ "p50": at(0.5), "p95": at(0.95), "max": at(1.0) })
}

fn table(report: &Value) -> String {
    let mut lines = vec![format!(
        "{} appliances, {} s, {} messages/s, bursts of {}{}",
        report["appliances"],
        report["seconds"],
        report["messages_a_second"],
        report["burst"],
        if report["in_step"] == true {
            ", in step"
        } else {
            ""
        }
    )];
    for (name, place) in [
        ("results", "/results"),
        ("alerts", "/alerts"),
        ("published to acknowledged, s", "/lag_s/acknowledged"),
        ("published to row in the history, s", "/lag_s/stored"),
        ("published to another subscriber, s", "/lag_s/subscriber"),
        ("dashboard", "/dashboard"),
        ("broker", "/broker"),
        ("messages and bytes of payload", "/volume"),
    ] {
        let value = report.pointer(place).unwrap();
        let text = value.to_string().replace(['{', '}', '"'], "");
        lines.push(format!(
            "  {name:36} {}",
            text.replace(',', ", ").replace(':', ": ")
        ));
    }
    lines.join("\n")
}

/// Somebody else who hears the results, until `stop`.
fn subscriber(port: u16, stop: &AtomicBool) -> Seen {
    let mut seen = Seen::new();
    hear(
        port,
        "somebody",
        None,
        "scansentry/+/+/result",
        stop,
        |payload| {
            seen.entry(event_id(payload)).or_insert_with(Instant::now);
            true
        },
    );
    seen
}

/// Without parsing all of it: this process measures others on the same machine.
fn event_id(payload: &[u8]) -> Pseudonym {
    let text = std::str::from_utf8(payload).unwrap();
    let (_, rest) = text.split_once("\"event_id\":\"").unwrap();
    rest[..32].parse().unwrap()
}

/// When each row could be read by another process, as the answers to a page are, to about 10 ms; until `stop`.
#[allow(clippy::disallowed_methods, reason = "it looks at a pace")]
fn watch_rows(path: &std::path::Path, stop: &AtomicBool) -> Seen {
    let history = rusqlite::Connection::open(path).unwrap();
    history.busy_timeout(Duration::from_secs(10)).unwrap();
    let mut select = history
        .prepare("SELECT id, event_id FROM result WHERE id > ?1")
        .unwrap();
    let mut seen = Seen::new();
    let mut last = 0_i64;
    loop {
        let ending = stop.load(Ordering::Relaxed);
        let rows = select.query_map([last], |row| Ok((row.get(0)?, Pseudonym(row.get(1)?))));
        let rows: Vec<(i64, Pseudonym)> = rows.unwrap().map(Result::unwrap).collect();
        let now = Instant::now();
        for (id, event) in rows {
            last = last.max(id);
            seen.insert(event, now);
        }
        if ending {
            return seen;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
}
