//! What a broker, or the network before it, can do wrong: the outbox is delivered in the end, in order, each event at least once and byte for
//! byte, and no message stands in the way of the others. With a real Mosquitto, and with a broker that follows a script.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::DirBuilderExt as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use scansentry::message::OutboxMessage;
use scansentry::scan::{Pseudonym, hex};
use scansentry::store::Store;
use serde_json::{Value, json};

use crate::contract;
use crate::support::{
    Appliance, Mosquitto, PATIENCE, Process, Subscriber, assert_no_double_outcome, certificates,
    free_port, pause, slices, wait_for,
};

const TOPIC: &str = "scansentry/radiology/mri-1/result";

// What the outbox is filled with.

/// The message with a number: a rejected picture, of one of three studies.
fn event(number: usize) -> Value {
    let id = |of: usize| hex(&id_of(of).0);
    let result = json!({
        "schema": "scansentry/result/1", "event_id": id(number), "scan_id": id(1_000_000 + number), "revision": 1,
        "study_id": id(2_000_000 + number % 3), "series_id": null, "modality": null, "frame": null, "device": "mri-1", "site": "radiology",
        "acquired_at": null, "processed_at": "2026-01-31T08:00:00Z", "source": null,
        "model": { "name": "braintumor", "version": "0.2.0", "sha256": "0".repeat(64) }, "outcome": "rejected", "label": null,
        "probability": null, "scores": null, "threshold": 0.5, "indeterminate": null, "decision_rule": "model", "decision": null,
        "statement": null, "rejected": { "code": "blank", "message": "no pixel is bright" }, "misfit": null, "roi": null, "quality": null,
        "timings_ms": null, "replayed": false, "notice": "research use only, not for diagnosis",
    });
    contract::check_payload("result", &result);
    result
}

fn id_of(number: usize) -> Pseudonym {
    let mut bytes = [7; 16];
    bytes[..8].copy_from_slice(&(number as u64).to_be_bytes());
    Pseudonym(bytes)
}

/// Blanks behind the JSON make a message large.
const LARGE: usize = 20_000;

/// Puts `count` messages into the outbox before the daemon has run; those that are `large` with [`LARGE`] blanks.
fn fill(appliance: &Appliance, count: usize, large: &[usize]) {
    let dir = appliance.state();
    std::fs::DirBuilder::new().mode(0o700).create(&dir).unwrap();
    let opened = Store::open(&dir).unwrap();
    let numbers: Vec<_> = (0..count).collect();
    for chunk in numbers.chunks(1000) {
        let messages = chunk.iter().map(|&number| {
            let mut payload = event(number).to_string().into_bytes();
            if large.contains(&number) {
                payload.resize(payload.len() + LARGE, b' ');
            }
            OutboxMessage {
                seq: 0,
                event_id: id_of(number),
                topic: TOPIC.into(),
                payload,
                returned: false,
            }
        });
        let messages: Vec<_> = messages.collect();
        let queue = move |ledger: &mut scansentry::store::Ledger| {
            messages
                .iter()
                .try_for_each(|m| ledger.answer(None, m, 100))
        };
        opened.store.call_blocking(queue).unwrap();
    }
    drop(opened.store);
    opened.thread.join().unwrap();
}

/// Numbers of the events in the order of their first arrival; an event that comes again comes with the same bytes.
fn first_arrivals<'a>(payloads: impl IntoIterator<Item = &'a [u8]>) -> Vec<usize> {
    let mut seen: HashMap<usize, &[u8]> = HashMap::new();
    let mut order = Vec::new();
    for payload in payloads {
        let message: Value = serde_json::from_slice(payload).unwrap();
        let id = message["event_id"].as_str().unwrap();
        let number = usize::from_str_radix(&id[..16], 16).unwrap();
        match seen.insert(number, payload) {
            None => order.push(number),
            Some(before) => assert_eq!(before, payload, "event {number} in other words"),
        }
    }
    order
}

fn all_but(count: usize, without: &[usize]) -> Vec<usize> {
    (0..count).filter(|n| !without.contains(n)).collect()
}

fn appliance(url: &str, protocol: u8) -> Appliance {
    let mut appliance = Appliance::with(
        url,
        &format!(
            "[mqtt]\nprotocol = {protocol}\nack_timeout_s = 1\nconnect_timeout_s = 2\ninflight = 8\n[health]\ninterval_s = 1"
        ),
    );
    appliance.set("SCANSENTRY__MQTT__BACKOFF_MIN_MS", "10");
    appliance
}

fn count(appliance: &Appliance, name: &str) -> u64 {
    appliance.status()["counts"][name].as_u64().unwrap()
}

/// `outbox list --json`.
fn parked(appliance: &Appliance) -> Vec<Value> {
    let output = appliance.command(&["outbox", "list", "--json"]).output();
    let text = String::from_utf8(output.unwrap().stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

/// How many `outbox retry --all` brings back.
fn retry_all(appliance: &Appliance) -> u64 {
    let output = appliance.command(&["outbox", "retry", "--all", "--json"]);
    let output = { output }.output().unwrap();
    let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(answer["unknown"], 0);
    answer["queued"].as_u64().unwrap()
}

// The broker with a script.

#[derive(Debug, Clone)]
struct Publish {
    topic: String,
    payload: Vec<u8>,
    /// How often a message with these bytes came before.
    before: usize,
    /// The user property `replay`; MQTT 5.
    replay: bool,
}

impl Publish {
    /// Its number, if it is of the outbox.
    fn number(&self) -> Option<usize> {
        (self.topic == TOPIC).then(|| first_arrivals([&self.payload[..]])[0])
    }
}

/// What the broker does with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Does {
    Acknowledge,
    /// Acknowledges after some milliseconds.
    Late(u64),
    /// MQTT 5: with this reason.
    Refuse(u8),
    Withhold,
    Close,
    /// MQTT 5: a DISCONNECT with this reason.
    Disconnect(u8),
    /// Neither reads nor says anything more on this connection.
    Nothing,
}

type Script = Box<dyn FnMut(&Publish) -> Does + Send>;

struct Shared {
    script: Script,
    /// All messages, and what was done with them.
    seen: Vec<(Publish, Does)>,
    /// Connections by client id.
    clients: HashMap<String, (TcpStream, u8)>,
    connections: usize,
    /// The answer to CONNECT: a return or reason code.
    answer: u8,
}

/// A broker that does what a script says with the messages that it is sent.
struct Scripted {
    port: u16,
    shared: Arc<Mutex<Shared>>,
}

impl Scripted {
    fn start(script: impl FnMut(&Publish) -> Does + Send + 'static) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let port = listener.local_addr().unwrap().port();
        let shared = Arc::new(Mutex::new(Shared {
            script: Box::new(script),
            seen: Vec::new(),
            clients: HashMap::new(),
            connections: 0,
            answer: 0,
        }));
        let broker = shared.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (stream, broker) = (stream.unwrap(), broker.clone());
                // A connection that breaks off is over.
                std::thread::spawn(move || _ = serve(stream, &broker));
            }
        });
        Self { port, shared }
    }

    fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    fn follow(&self, script: impl FnMut(&Publish) -> Does + Send + 'static) {
        self.shared.lock().unwrap().script = Box::new(script);
    }

    fn seen(&self) -> Vec<(Publish, Does)> {
        self.shared.lock().unwrap().seen.clone()
    }

    fn connections(&self) -> usize {
        self.shared.lock().unwrap().connections
    }

    /// Results that were acknowledged.
    fn results(&self) -> Vec<Publish> {
        let taken = |does: Does| matches!(does, Does::Acknowledge | Does::Late(_));
        let seen = self.seen().into_iter().filter(|(_, does)| taken(*does));
        seen.map(|(message, _)| message)
            .filter(|message| message.topic == TOPIC)
            .collect()
    }

    fn arrivals(&self) -> Vec<usize> {
        let results = self.results();
        first_arrivals(results.iter().map(|message| &message.payload[..]))
    }

    #[track_caller]
    fn wait_for(&self, count: usize) {
        let start = std::time::Instant::now();
        while self.arrivals().len() < count {
            let arrived = self.arrivals();
            assert!(start.elapsed() < PATIENCE, "of {count} came {arrived:?}");
            pause(Duration::from_millis(20));
        }
    }
}

fn serve(mut stream: TcpStream, broker: &Mutex<Shared>) -> std::io::Result<()> {
    let mut version = 4;
    loop {
        let (kind, body) = read_packet(&mut stream)?;
        match kind >> 4 {
            1 => {
                // Protocol name (6 bytes), level, flags, keep alive; MQTT 5: properties; client id.
                version = body[6];
                let mut rest = &body[10..];
                if version == 5 {
                    skip_properties(&mut rest);
                }
                let id = take_text(&mut rest);
                let mut shared = broker.lock().unwrap();
                shared.connections += 1;
                let answer = shared.answer;
                write_packet(&mut stream, 0x20, version, &[0, answer], &[0])?;
                if answer != 0 {
                    return Ok(());
                }
                let taken_over = shared.clients.insert(id, (stream.try_clone()?, version));
                if let Some((mut other, version)) = taken_over {
                    if version == 5 {
                        let _ = write_packet(&mut other, 0xe0, 5, &[0x8e], &[0]);
                    }
                    let _ = other.shutdown(std::net::Shutdown::Both);
                }
            }
            3 => {
                let mut rest = &body[..];
                let topic = take_text(&mut rest);
                let packet = [rest[0], rest[1]];
                rest = &rest[2..];
                let properties = if version == 5 {
                    skip_properties(&mut rest)
                } else {
                    &[]
                };
                let replay = properties.windows(6).any(|bytes| bytes == b"replay");
                let mut shared = broker.lock().unwrap();
                let same = |(other, _): &&(Publish, Does)| other.payload == rest;
                let message = Publish {
                    topic,
                    payload: rest.to_vec(),
                    before: shared.seen.iter().filter(same).count(),
                    replay,
                };
                let does = (shared.script)(&message);
                shared.seen.push((message, does));
                drop(shared);
                if let Does::Late(ms) = does {
                    pause(Duration::from_millis(ms));
                }
                match does {
                    Does::Acknowledge | Does::Late(_) => {
                        write_packet(&mut stream, 0x40, version, &packet, &[])?;
                    }
                    Does::Refuse(reason) => {
                        let body = [packet[0], packet[1], reason];
                        write_packet(&mut stream, 0x40, version, &body, &[0])?;
                    }
                    Does::Withhold => {}
                    Does::Disconnect(reason) => {
                        write_packet(&mut stream, 0xe0, version, &[reason], &[0])?;
                        return Ok(());
                    }
                    Does::Close => return Ok(()),
                    Does::Nothing => loop {
                        pause(Duration::from_mins(1));
                    },
                }
            }
            8 => {
                let granted = [body[0], body[1]];
                let body = [&granted[..], if version == 5 { &[0] } else { &[] }, &[1]].concat();
                write_packet(&mut stream, 0x90, version, &body, &[])?;
            }
            12 => write_packet(&mut stream, 0xd0, version, &[], &[])?,
            _ => return Ok(()),
        }
    }
}

fn read_packet(stream: &mut TcpStream) -> std::io::Result<(u8, Vec<u8>)> {
    let mut byte = [0];
    stream.read_exact(&mut byte)?;
    let kind = byte[0];
    let (mut length, mut shift) = (0, 0);
    loop {
        stream.read_exact(&mut byte)?;
        length |= usize::from(byte[0] & 127) << shift;
        shift += 7;
        if byte[0] < 128 {
            break;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((kind, body))
}

/// An MQTT packet; the kind with its flags.
pub fn packet(kind: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = vec![kind];
    let mut length = body.len();
    loop {
        let more = length >= 128;
        bytes.push((length % 128) as u8 | if more { 128 } else { 0 });
        length /= 128;
        if !more {
            return [&bytes, body].concat();
        }
    }
}

/// With `of_5` behind the body in MQTT 5: empty properties.
fn write_packet(
    stream: &mut TcpStream,
    kind: u8,
    version: u8,
    body: &[u8],
    of_5: &[u8],
) -> std::io::Result<()> {
    let body = [body, if version == 5 { of_5 } else { &[] }].concat();
    stream.write_all(&packet(kind, &body))
}

fn take_text(rest: &mut &[u8]) -> String {
    let length = usize::from(rest[0]) << 8 | usize::from(rest[1]);
    let text = String::from_utf8(rest[2..2 + length].to_vec()).unwrap();
    *rest = &rest[2 + length..];
    text
}

/// Properties of fewer than 128 bytes, as the daemon's are.
fn skip_properties<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let length = usize::from(rest[0]);
    assert!(length < 128);
    let (properties, more) = rest[1..].split_at(length);
    *rest = more;
    properties
}

/// Both versions of the protocol.
fn both(check: impl FnMut(u8)) {
    [5, 4].into_iter().for_each(check);
}

// Outages.

#[test]
fn absent_at_start_and_restarted_five_times() {
    restarts(5, 60);
}

#[test]
#[ignore = "long: make faults"]
fn restarted_twenty_times_during_2000_images() {
    restarts(20, 2000);
}

fn restarts(times: usize, images: usize) {
    let mut broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    broker.stop();
    let mut appliance = appliance(&broker.url(), 5);
    appliance.start();
    wait_for("the outage", || {
        appliance.log().contains("nobody listens there")
    });
    let mut exported = 0;
    let slices = slices(images);
    for time in 0..times {
        for slice in slices
            .iter()
            .take(images * (time + 1) / times)
            .skip(exported)
        {
            appliance.rename_in(&format!("{exported}.img"), slice);
            exported += 1;
        }
        broker.restart();
        // Somewhere in the work on these images.
        pause(Duration::from_millis(300 + 217 * time as u64 % 500));
        broker.stop();
    }
    broker.restart();
    subscriber.wait_for_scans(images);
    appliance.wait_until_delivered();
    let resends = assert_no_double_outcome(&subscriber.results());
    let (classified, rejected) = (
        count(&appliance, "classified"),
        count(&appliance, "rejected"),
    );
    assert_eq!(classified + rejected, images as u64);
    assert_eq!(count(&appliance, "parked"), 0);
    println!("{images} images, {times} restarts of the broker: {resends} resends");
}

#[test]
fn a_connection_that_goes_dead_is_given_up_and_what_was_on_its_way_sent_again() {
    both(|protocol| {
        let mut messages = 0;
        let broker = Scripted::start(move |_| {
            messages += 1;
            // The third message of each of the first connections, whatever it is.
            if messages % 7 == 3 && messages < 30 {
                Does::Nothing
            } else {
                Does::Acknowledge
            }
        });
        let mut appliance = appliance(&broker.url(), protocol);
        fill(&appliance, 20, &[]);
        appliance.start();
        broker.wait_for(20);
        assert_eq!(broker.arrivals(), all_but(20, &[]));
        appliance.wait_until_delivered();
        assert!(broker.connections() > 1);
    });
}

#[test]
fn without_an_acknowledgement_a_message_is_sent_again_with_the_same_event_id() {
    both(|protocol| {
        let broker = Scripted::start(|message| {
            // The first time nobody hears of it.
            if message.number() == Some(4) && message.before == 0 {
                Does::Withhold
            } else {
                Does::Acknowledge
            }
        });
        let mut appliance = appliance(&broker.url(), protocol);
        fill(&appliance, 12, &[]);
        appliance.start();
        broker.wait_for(12);
        appliance.wait_until_delivered();
        let sent: Vec<_> = broker.seen();
        let fourth: Vec<_> = sent.iter().filter(|(m, _)| m.number() == Some(4)).collect();
        assert_eq!(fourth.len(), 2);
        assert_eq!(fourth[0].0.payload, fourth[1].0.payload);
        assert_eq!(fourth[1].0.replay, protocol == 5);
        assert_eq!(count(&appliance, "parked"), 0);
    });
}

#[test]
fn a_slow_broker_gets_everything_in_order() {
    let broker = Scripted::start(|_| Does::Late(60));
    let mut appliance = appliance(&broker.url(), 5);
    fill(&appliance, 40, &[]);
    appliance.start();
    broker.wait_for(40);
    assert_eq!(broker.arrivals(), all_but(40, &[]));
    appliance.wait_until_delivered();
}

#[test]
fn order_is_kept_over_reconnects() {
    both(|protocol| {
        let mut messages = 0;
        let broker = Scripted::start(move |message| {
            messages += usize::from(message.number().is_some());
            if message.number().is_some() && messages % 5 == 0 {
                Does::Close
            } else {
                Does::Acknowledge
            }
        });
        let mut appliance = appliance(&broker.url(), protocol);
        fill(&appliance, 30, &[]);
        appliance.start();
        broker.wait_for(30);
        assert_eq!(broker.arrivals(), all_but(30, &[]));
        appliance.wait_until_delivered();
        assert_eq!(count(&appliance, "parked"), 0);
    });
}

// Brokers that do not accept us.

#[test]
fn refused_credentials_are_said_and_cost_nothing() {
    let open = "allow_anonymous true\n";
    let mut broker = Mosquitto::start();
    both(|protocol| {
        broker.reconfigure(open, "allow_anonymous false\n");
        let mut appliance = appliance(&broker.url(), protocol);
        appliance.start();
        appliance.rename_in("a.png", &slices(1)[0]);
        wait_for("the reason", || {
            appliance
                .log()
                .contains("(not authorised); check mqtt.username, mqtt.password_file")
        });
        wait_for("an outcome without a broker", || {
            count(&appliance, "classified") == 1
        });
        broker.reconfigure("allow_anonymous false\n", open);
        appliance.wait_until_delivered();
        assert!(count(&appliance, "delivered") >= 1);
        let warnings = appliance.log().matches("degraded: no connection").count();
        assert_eq!(warnings, 1, "one warning an outage");
    });
}

#[test]
fn what_a_broker_says_to_a_connection_is_said_once() {
    for (protocol, code, words) in [
        (
            5,
            0x86,
            "(wrong user name or password); check mqtt.username",
        ),
        (4, 4, "(wrong user name or password); check mqtt.username"),
        (5, 0x89, "(the broker is busy); it is tried again"),
        (5, 0x97, "(quota exceeded); raise the quota"),
    ] {
        let broker = Scripted::start(|_| Does::Acknowledge);
        broker.shared.lock().unwrap().answer = code;
        let mut appliance = appliance(&broker.url(), protocol);
        fill(&appliance, 3, &[]);
        appliance.start();
        wait_for("some tries", || broker.connections() > 5);
        assert!(appliance.log().contains(words), "{}", appliance.log());
        let warnings = appliance.log().matches("degraded: no connection").count();
        assert_eq!(warnings, 1, "one warning an outage");
        broker.shared.lock().unwrap().answer = 0;
        broker.wait_for(3);
    }
}

#[test]
fn what_is_wrong_with_tls_is_said() {
    let ports: Vec<u16> = (0..3).map(|_| free_port()).collect();
    let listeners = ports.iter().zip(["server", "expired", "other-name"]);
    let listeners = listeners.map(|(port, name)| {
        let files = format!("certfile {{dir}}/{name}.pem\nkeyfile {{dir}}/{name}.key\n");
        format!("listener {port} 127.0.0.1\n{files}")
    });
    let lines = format!("allow_anonymous true\n{}", listeners.collect::<String>());
    let broker = Mosquitto::start_with(&lines, certificates);
    let subscriber = broker.subscribe();
    let file = |name: &str| broker.folder().join(name).to_str().unwrap().to_owned();
    let secure = |port: u16| format!("mqtts://localhost:{port}");
    let mut appliance = appliance("mqtt://localhost", 5);
    let (own, other) = (file("ca.pem"), file("other-ca.pem"));
    let plain = |port: u16| format!("mqtt://127.0.0.1:{port}");
    for (url, ca, reason) in [
        (
            secure(ports[0]),
            &other[..],
            "not signed by a trusted authority); check mqtt.ca_file",
        ),
        (secure(ports[1]), &own, "has expired); renew"),
        (
            secure(ports[2]),
            &own,
            "is for another name); write the host in mqtt.url",
        ),
        (
            secure(broker.port),
            &own,
            "(mqtt:// or mqtts://) in mqtt.url",
        ),
        (plain(ports[0]), "", "(mqtt:// or mqtts://) in mqtt.url"),
    ] {
        appliance.set("SCANSENTRY__MQTT__URL", &url);
        appliance.set("SCANSENTRY__MQTT__CA_FILE", ca);
        let before = appliance.log().len();
        appliance.start();
        wait_for(reason, || appliance.log()[before..].contains(reason));
        assert_eq!(appliance.stop(), Some(0));
    }
    appliance.set("SCANSENTRY__MQTT__URL", &secure(ports[0]));
    appliance.set("SCANSENTRY__MQTT__CA_FILE", &own);
    appliance.rename_in("a.png", &slices(1)[0]);
    appliance.start();
    subscriber.wait_for_scans(1);
}

#[test]
fn another_client_with_the_same_id_is_named_and_everything_gets_through() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = appliance(&broker.url(), 5);
    appliance.start();
    wait_for("the connection", || {
        !subscriber.of_kind("health").is_empty()
    });
    // It comes back whenever the session is taken from it.
    let port = broker.port.to_string();
    let rival = Process::spawn(
        std::process::Command::new("mosquitto_sub")
            .args(["-h", "127.0.0.1", "-p", &port, "-V", "5"])
            .args(["-i", "scansentry-radiology.mri-1", "-t", "elsewhere"])
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null()),
    );
    for (number, slice) in slices(10).iter().enumerate() {
        appliance.rename_in(&format!("{number}.img"), slice);
        pause(Duration::from_millis(100));
    }
    // This Mosquitto closes the connection without a reason.
    wait_for("a hint", || {
        appliance.log().contains("two clients with the same id")
    });
    subscriber.wait_for_scans(10);
    drop(rival);
    appliance.wait_until_delivered();
    assert_no_double_outcome(&subscriber.results());
    assert_eq!(count(&appliance, "parked"), 0);
}

#[test]
fn two_appliances_with_the_same_id_wait_longer_each_time() {
    both(|protocol| {
        let broker = Scripted::start(|_| Does::Acknowledge);
        let mut both: Vec<_> = (0..2).map(|_| appliance(&broker.url(), protocol)).collect();
        for appliance in &mut both {
            appliance.set("SCANSENTRY__MQTT__BACKOFF_MIN_MS", "100");
            appliance.set("SCANSENTRY__MQTT__BACKOFF_MAX_S", "3600");
            appliance.start();
        }
        // Whoever is connected is thrown out after a wait of the other: 100 ms, 200 ms, ... With the shortest wait each time it would
        // be hundreds of connections by the time that the waits are seconds.
        let lost =
            |appliance: &Appliance| appliance.log().matches("degraded: no connection").count();
        wait_for("waits of seconds", || {
            both.iter().map(lost).sum::<usize>() >= 10
        });
        let reason = if protocol == 5 {
            "(session taken over); another client uses the same client id"
        } else {
            "two clients with the same id"
        };
        for appliance in &both {
            assert!(appliance.log().contains(reason));
            appliance.rename_in("a.png", &slices(1)[0]);
        }
        wait_for("both results", || {
            both.iter()
                .all(|appliance| count(appliance, "delivered") >= 1)
        });
    });
}

// Messages that the broker does not take.

/// A message of [`LARGE`] bytes among ten, and one at the end, at a Mosquitto with `limit`.
fn too_large(protocol: u8, limit: &str) {
    let open = "allow_anonymous true\n";
    let mut broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let limited = format!("{open}{limit}\n");
    broker.reconfigure(open, &limited);
    let mut appliance = appliance(&broker.url(), protocol);
    fill(&appliance, 12, &[3, 7]);
    appliance.start();
    appliance.wait_until_delivered();
    wait_for("the others", || numbers(&subscriber).len() == 10);
    let list = parked(&appliance);
    assert_eq!(list.len(), 2, "{list:?}");
    for message in &list {
        assert_eq!(message["kind"], "result");
        assert!(message["bytes"].as_u64().unwrap() > LARGE as u64);
    }
    let status = appliance.status();
    assert_eq!(status["counts"]["parked"], 2);
    let reasons = status["parked"].as_object().unwrap();
    assert_eq!(reasons.values().filter_map(Value::as_u64).sum::<u64>(), 2);
    let degraded = |subscriber: &Subscriber| {
        let health = subscriber.of_kind("health").pop().unwrap().json();
        let codes = health["conditions"].as_array().unwrap();
        codes.iter().any(|c| c["code"] == "messages_parked")
    };
    wait_for("the condition", || degraded(&subscriber));
    assert_eq!(
        appliance
            .log()
            .matches("degraded: the broker does not take some")
            .count(),
        1
    );
    let people = appliance.command(&["status"]).output().unwrap().stdout;
    let people = String::from_utf8(people).unwrap();
    assert!(people.contains("parked                  2"), "{people}");

    // Restarted they come back, and are set aside again.
    assert_eq!(appliance.stop(), Some(0));
    appliance.start();
    wait_for("the try at the start", || {
        appliance.log().contains("parked messages are tried again")
    });
    broker.reconfigure(&limited, open);
    wait_for("a second try, or a delivery", || {
        count(&appliance, "outbox") == 0
    });
    let still = count(&appliance, "parked");
    let back = retry_all(&appliance);
    // A daemon that the broker tells of its larger limit brings them back by itself, perhaps just now.
    let told = protocol == 5 && limit.starts_with("max_packet_size");
    assert!(back == still || told && back < still, "{back} of {still}");
    wait_for("all of them", || numbers(&subscriber).len() == 12);
    appliance.wait_until_delivered();
    assert!(parked(&appliance).is_empty());
    wait_for("good health", || !degraded(&subscriber));
    for large in subscriber.of_kind("result") {
        let replayed = large.user.contains("replay:true");
        assert!(protocol == 4 || large.payload.len() < LARGE || replayed);
    }
}

/// Numbers of the results that have arrived.
fn numbers(subscriber: &Subscriber) -> Vec<usize> {
    let results = subscriber.of_kind("result");
    first_arrivals(results.iter().map(|m| m.payload.as_bytes()))
}

#[test]
fn larger_than_the_broker_says_that_it_takes() {
    too_large(5, "max_packet_size 15000");
}

#[test]
fn larger_than_the_broker_takes_without_a_word() {
    too_large(4, "max_packet_size 15000");
}

#[test]
fn larger_than_the_broker_takes_in_a_message() {
    too_large(5, "message_size_limit 15000");
}

#[test]
fn a_refusal_that_passes_keeps_the_order() {
    for reason in [0x97, 0x87, 0x80, 0x83] {
        let broker = Scripted::start(move |message| match message.number() {
            Some(2) if message.before < 2 => Does::Refuse(reason),
            _ => Does::Acknowledge,
        });
        let mut appliance = appliance(&broker.url(), 5);
        fill(&appliance, 30, &[]);
        appliance.start();
        broker.wait_for(30);
        appliance.wait_until_delivered();
        // What was on its way with it is ahead of it: less than a window. Nothing else is.
        let arrivals = broker.arrivals();
        let place = arrivals.iter().position(|n| *n == 2).unwrap();
        assert!(place < 8 + 2, "{arrivals:?}");
        let others: Vec<_> = arrivals.into_iter().filter(|n| *n != 2).collect();
        assert_eq!(others, all_but(30, &[2]));
        assert_eq!(count(&appliance, "parked"), 0);
        if reason == 0x97 {
            assert!(
                appliance
                    .log()
                    .contains("refuses messages (quota exceeded)")
            );
        }
    }
}

#[test]
fn one_that_is_always_refused_is_parked_while_the_rest_goes_on() {
    for (reason, words) in [
        (0x87, "not authorised"),
        (0x97, "quota exceeded"),
        (0x99, "payload not accepted"),
    ] {
        let broker = Scripted::start(move |message| match message.number() {
            Some(5) => Does::Refuse(reason),
            _ => Does::Acknowledge,
        });
        let mut appliance = appliance(&broker.url(), 5);
        fill(&appliance, 30, &[]);
        appliance.start();
        appliance.wait_until_delivered();
        assert_eq!(broker.arrivals(), all_but(30, &[5]));
        let list = parked(&appliance);
        assert_eq!(
            (list.len(), list[0]["reason"].as_str().unwrap()),
            (1, words)
        );
        broker.follow(|_| Does::Acknowledge);
        let number = list[0]["number"].to_string();
        let retried = appliance
            .command(&["outbox", "retry", &number, "999999"])
            .output();
        assert_eq!(
            retried.unwrap().status.code(),
            Some(1),
            "one of them is unknown"
        );
        broker.wait_for(30);
        let last = broker.results().pop().unwrap();
        assert!(last.replay && last.number() == Some(5));
        appliance.wait_until_delivered();
        assert_eq!(count(&appliance, "parked"), 0);
    }
}

#[test]
fn one_that_ends_every_connection_is_parked_while_the_rest_goes_on() {
    for (protocol, does) in [
        (5, Does::Close),
        (4, Does::Close),
        (5, Does::Withhold),
        (4, Does::Withhold),
        (5, Does::Disconnect(0x95)),
        (5, Does::Disconnect(0x97)),
    ] {
        // Two in a row.
        let broker = Scripted::start(move |message| match message.number() {
            Some(3 | 4) => does,
            _ => Does::Acknowledge,
        });
        let mut appliance = appliance(&broker.url(), protocol);
        fill(&appliance, 20, &[]);
        appliance.start();
        appliance.wait_until_delivered();
        let mut arrivals = broker.arrivals();
        arrivals.sort_unstable();
        assert_eq!(arrivals, all_but(20, &[3, 4]), "{protocol} {does:?}");
        assert_eq!(parked(&appliance).len(), 2);
        // Mended, it gets them at the next start.
        broker.follow(|_| Does::Acknowledge);
        assert_eq!(appliance.stop(), Some(0));
        appliance.start();
        broker.wait_for(20);
        appliance.wait_until_delivered();
        assert_eq!(count(&appliance, "parked"), 0);
    }
}

#[test]
fn a_broker_that_takes_nothing_has_nothing_parked() {
    for (protocol, does) in [
        (5, Does::Refuse(0x97)),
        (5, Does::Close),
        (4, Does::Close),
        (4, Does::Withhold),
    ] {
        let broker = Scripted::start(move |message| {
            if message.number().is_some() {
                does
            } else {
                Does::Acknowledge
            }
        });
        let mut appliance = appliance(&broker.url(), protocol);
        fill(&appliance, 20, &[]);
        appliance.start();
        let tries = if does == Does::Withhold { 8 } else { 16 };
        let tried = || {
            let seen = broker.seen();
            seen.iter().filter(|(m, _)| m.number().is_some()).count()
        };
        wait_for("many tries", || tried() >= tries);
        assert_eq!(
            (count(&appliance, "outbox"), count(&appliance, "parked")),
            (20, 0)
        );
        broker.follow(|_| Does::Acknowledge);
        broker.wait_for(19);
        appliance.wait_until_delivered();
        // The one that was under suspicion when it was mended may be set aside; it is not lost.
        let left = count(&appliance, "parked");
        assert!(left <= 1);
        assert_eq!(retry_all(&appliance), left);
        broker.wait_for(20);
    }
}

// Memory.

#[test]
fn a_backlog_of_3000_messages_drains() {
    backlog(3000);
}

#[test]
#[ignore = "long: make faults"]
fn a_backlog_of_50000_messages_drains_without_memory_growing() {
    backlog(50_000);
}

fn backlog(messages: usize) {
    let mut broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    broker.stop();
    let mut appliance = appliance(&broker.url(), 5);
    appliance.set("SCANSENTRY__MQTT__ACK_TIMEOUT_S", "30");
    appliance.set("SCANSENTRY__MQTT__INFLIGHT", "32");
    fill(&appliance, messages, &[]);
    appliance.start();
    assert_eq!(count(&appliance, "outbox"), messages as u64);
    let before = appliance.process_figure("VmRSS");
    broker.restart();
    let mut most = before;
    wait_for_outbox_of(&appliance, || {
        most = most.max(appliance.process_figure("VmRSS"));
    });
    let grown = most.saturating_sub(before) / 1024;
    println!(
        "{messages} messages: {} MB before, at most {grown} MB more",
        before / 1024
    );
    assert!(grown < 60, "{grown} MB more");
    wait_for("all of them", || numbers(&subscriber).len() == messages);
    assert_eq!(numbers(&subscriber), all_but(messages, &[]), "in order");
}

/// Waits for an empty outbox as long as it shrinks.
fn wait_for_outbox_of(appliance: &Appliance, mut meanwhile: impl FnMut()) {
    let mut left = u64::MAX;
    loop {
        wait_for("fewer messages", || {
            let now = count(appliance, "outbox");
            let fewer = now < left;
            left = left.min(now);
            fewer || now == 0
        });
        meanwhile();
        if left == 0 {
            return;
        }
    }
}
