//! What the messages promise beyond their keys: properties, birth and will, the alert's rule, previews, commands. Against a real Mosquitto.

use std::time::{Duration, Instant};

use base64::Engine as _;
use serde_json::{Value, json};

use crate::contract;
use crate::support::{
    Appliance, Arrived, FOUR_LABELS, Mosquitto, Subscriber, assert_no_double_outcome, pause, plain,
    slices, toy_bundle, wait_for,
};

const BASE: &str = "scansentry/radiology/mri-1";

#[test]
fn properties_say_what_a_message_is_and_whether_it_was_sent_before() {
    let mut broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    appliance.set("SCANSENTRY__MQTT__EXPIRY_S", "3600");
    appliance.start();
    let slices = slices(3);
    appliance.rename_in("a.png", &slices[0]);
    subscriber.wait_for_scans(1);
    let of = |kind: &str| subscriber.of_kind(kind);
    let result = &of("result")[0];
    assert_eq!(result.content_type, "application/json");
    assert!(result.expiry.is_some_and(|s| (3500..=3600).contains(&s)));
    assert_eq!(result.user, "schema:scansentry/result/1");
    let status = &of("status")[0];
    assert_eq!(
        (status.content_type.as_str(), status.expiry),
        ("text/plain", None)
    );
    let health = &of("health")[0];
    assert_eq!(
        (health.user.as_str(), health.expiry),
        ("schema:scansentry/health/1", None)
    );
    assert!(
        of("preview").is_empty(),
        "previews are off unless asked for"
    );

    // Waiting over a restart, a message may have been sent before; a new one was not.
    broker.kill();
    appliance.rename_in("b.png", &slices[1]);
    wait_for("an outcome without a broker", || {
        appliance.status()["counts"]["classified"] == 2
    });
    appliance.kill();
    broker.restart();
    appliance.start();
    subscriber.wait_for_scans(2);
    appliance.rename_in("c.png", &slices[2]);
    subscriber.wait_for_scans(3);
    let replayed: Vec<_> = of("result")
        .iter()
        .map(|m| m.user.contains("replay:true"))
        .collect();
    assert_eq!(replayed, [false, true, false]);
}

#[test]
fn birth_and_will_are_kept_on_both_versions_and_said_again_to_a_restarted_broker() {
    for protocol in ["5", "4"] {
        let mut broker = Mosquitto::start();
        let subscriber = broker.subscribe();
        let mut appliance = Appliance::new(&broker.url());
        appliance.set("SCANSENTRY__MQTT__PROTOCOL", protocol);
        appliance.start();
        let said = || -> Vec<String> {
            let status = subscriber.of_kind("status");
            status
                .into_iter()
                .filter(|m| !m.retained)
                .map(|m| m.payload)
                .collect()
        };
        let kept = |wanted: &str| {
            let late = broker.subscribe_late();
            wait_for(wanted, || {
                late.of_kind("status")
                    .iter()
                    .any(|m| m.retained && m.payload == wanted)
            });
        };
        wait_for("the birth", || said() == ["online"]);
        kept("online");
        broker.kill();
        broker.restart();
        wait_for("the birth after the broker's restart", || said().len() >= 2);
        assert!(said().iter().all(|s| s == "online"), "{:?}", said());
        let late = broker.subscribe_late();
        wait_for("online", || {
            late.of_kind("status")
                .iter()
                .any(|m| m.retained && m.payload == "online")
        });
        appliance.kill();
        wait_for("the will", || said().last().is_some_and(|s| s == "offline"));
        let will = subscriber.of_kind("status").pop().unwrap();
        let properties = (will.content_type.as_str(), will.user.as_str());
        match protocol {
            "5" => assert_eq!(properties, ("text/plain", "schema:scansentry/status/1")),
            _ => assert_eq!(properties, ("", "")),
        }
        let late = broker.subscribe_late();
        wait_for("offline", || {
            late.of_kind("status")
                .iter()
                .any(|m| m.retained && m.payload == "offline")
        });
    }
}

#[test]
fn an_alert_is_raised_by_its_rule_once_a_study() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::with(
        &broker.url(),
        "[alert]\nmin_positives = 2\nwindow = 3\nquiet_s = 4\nupdate_s = 1",
    );
    appliance.set("SCANSENTRY__PIPELINE__WORKERS", "1");
    std::fs::create_dir(appliance.export().join("series")).unwrap();
    appliance.start();
    for (number, slice) in slices(10).iter().enumerate() {
        appliance.rename_in(&format!("series/{number}.png"), slice);
        subscriber.wait_for_scans(number + 1);
    }
    wait_for("the summary", || !subscriber.of_kind("study").is_empty());
    // The order of the messages is that of the outbox.
    let (mut recent, mut met) = (Vec::new(), None);
    let mut order = Vec::new();
    for message in subscriber.messages() {
        let kind = message.kind().to_owned();
        if kind == "result" {
            let result = message.json();
            recent.push(result["decision"] == "positive");
            let last = &recent[recent.len().saturating_sub(3)..];
            if met.is_none() && last.iter().filter(|p| **p).count() >= 2 {
                met = Some(recent.len());
            }
        }
        if ["result", "alert"].contains(&kind.as_str()) {
            order.push(kind);
        }
    }
    let met = met.expect("two of three of these slices are positive");
    assert_eq!(
        order.iter().position(|k| k == "alert"),
        Some(met),
        "{order:?}"
    );
    let alerts: Vec<_> = subscriber
        .of_kind("alert")
        .iter()
        .map(Arrived::json)
        .collect();
    let states: Vec<_> = alerts
        .iter()
        .map(|a| a["state"].as_str().unwrap())
        .collect();
    assert_eq!(states[0], "raised");
    assert_eq!(*states.last().unwrap(), "closed");
    assert!(
        states[1..states.len() - 1].iter().all(|s| *s == "updated"),
        "{states:?}"
    );
    let revisions: Vec<_> = alerts
        .iter()
        .map(|a| a["revision"].as_u64().unwrap())
        .collect();
    assert_eq!(revisions, (1..=alerts.len() as u64).collect::<Vec<_>>());

    let study = subscriber.of_kind("study")[0].json();
    let mut expected: Vec<_> = subscriber
        .results()
        .into_iter()
        .filter(|r| r["decision"] == "positive")
        .map(|r| json!({ "scan_id": r["scan_id"], "frame": null, "probability": r["probability"] }))
        .collect();
    let key = |p: &Value| p["probability"].as_f64().unwrap();
    expected.sort_by(|a, b| {
        key(b)
            .total_cmp(&key(a))
            .then(a["scan_id"].as_str().cmp(&b["scan_id"].as_str()))
    });
    assert_eq!(study["positive_scans"], Value::Array(expected));
    assert_eq!(
        study["positives"].as_u64().unwrap() as usize,
        study["positive_scans"].as_array().unwrap().len()
    );
    assert_eq!(
        (&study["images"], &study["complete"], &study["revision"]),
        (&json!(10), &json!(true), &json!(1))
    );
}

fn image_of(preview: &Value) -> image::DynamicImage {
    let base64 = preview["image"]["base64"].as_str().unwrap();
    let png = base64::engine::general_purpose::STANDARD
        .decode(base64)
        .unwrap();
    image::load_from_memory_with_format(&png, image::ImageFormat::Png).unwrap()
}

#[test]
fn a_preview_is_what_the_model_saw_and_comes_after_its_result() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::with(&broker.url(), "[preview]\nenabled = true");
    appliance.start();
    let slice = &slices(2)[1];
    appliance.rename_in("a.png", slice);
    // A colour picture stays one.
    let grey = image::load_from_memory(slice).unwrap();
    let mut color = grey.to_rgb8();
    color
        .pixels_mut()
        .for_each(|p| p.0[2] = p.0[2].saturating_sub(40));
    let file = appliance.folder.path().join("color.png");
    color.save(&file).unwrap();
    appliance.rename_in("b.png", &std::fs::read(&file).unwrap());
    let frames = std::path::Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/golden/dicom/files/frames.dcm");
    std::fs::copy(frames, appliance.export().join("frames")).unwrap();
    appliance.rename_in("c.png", b"not an image");
    subscriber.wait_for_scans(4);
    let classified = || {
        let results = subscriber.results();
        results
            .into_iter()
            .filter(|r| r["outcome"] == "classified")
            .collect::<Vec<_>>()
    };
    wait_for("the previews", || {
        let count = classified().len();
        count > 3 && subscriber.of_kind("preview").len() == count
    });
    let order = subscriber.messages();
    for result in classified() {
        let matches = |m: &&Arrived, kind: &str| {
            m.kind() == kind
                && m.json()["scan_id"] == result["scan_id"]
                && m.json()["frame"] == result["frame"]
        };
        let place = |kind: &str| order.iter().position(|m| matches(&m, kind)).unwrap();
        assert!(place("preview") > place("result"));
        let message = &order[place("preview")];
        assert!(!message.retained && message.payload.len() <= 131_072);
        let preview = message.json();
        for key in ["study_id", "decision", "probability", "device"] {
            assert_eq!(preview[key], result[key], "{key}");
        }
        assert_ne!(preview["event_id"], result["event_id"]);
        assert_eq!(
            (&preview["width"], &preview["height"]),
            (&json!(224), &json!(224))
        );
        let map = &preview["heatmap"];
        assert_eq!((&map["rows"], &map["columns"]), (&json!(7), &json!(7)));
        let cells: Vec<_> = map["values"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|r| r.as_array().unwrap())
            .collect();
        assert_eq!(cells.len(), 49);
    }
    for (name, source) in [("a.png", "png"), ("b.png", "png")] {
        let out = appliance.folder.path().join("seen.png");
        let input = appliance.export().join(name);
        let seen = appliance
            .command(&[
                "preprocess",
                input.to_str().unwrap(),
                "--out",
                out.to_str().unwrap(),
            ])
            .output()
            .unwrap();
        assert!(seen.status.success(), "{source}");
        let seen = image::open(&out).unwrap();
        let shown = subscriber
            .of_kind("preview")
            .iter()
            .map(|m| image_of(&m.json()))
            .any(|shown| shown.color() == seen.color() && shown.as_bytes() == seen.as_bytes());
        assert!(shown, "no preview shows the pixels of {name}");
    }
    wait_for("the count", || {
        let health = subscriber.of_kind("health");
        let sent = health
            .last()
            .and_then(|h| h.json()["previews"]["sent"].as_u64());
        // Health comes with the next change at the latest.
        appliance.process.as_ref().unwrap().signal("HUP");
        pause(Duration::from_millis(200));
        sent.is_some()
    });
}

#[test]
fn a_preview_that_is_too_large_is_halved() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::with(
        &broker.url(),
        "[preview]\nenabled = true\nmax_bytes = 16384",
    );
    appliance.start();
    appliance.rename_in("a.png", &slices(1)[0]);
    wait_for("the preview", || !subscriber.of_kind("preview").is_empty());
    let message = &subscriber.of_kind("preview")[0];
    assert!(message.payload.len() <= 16_384);
    let preview = message.json();
    let side = preview["width"].as_u64().unwrap();
    assert!(side < 224 && 224 % side == 0, "{side}");
    assert_eq!(u64::from(image_of(&preview).width()), side);
}

#[test]
fn previews_of_an_outage_are_dropped_and_counted() {
    let mut broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    broker.kill();
    let mut appliance = Appliance::with(
        &broker.url(),
        "[preview]\nenabled = true\n[health]\ninterval_s = 1",
    );
    appliance.start();
    wait_for("the outage", || {
        appliance.log().contains("degraded: no connection")
    });
    for (number, slice) in slices(3).iter().enumerate() {
        appliance.rename_in(&format!("{number}.png"), slice);
    }
    wait_for("outcomes without a broker", || {
        appliance.status()["counts"]["classified"] == 3
    });
    broker.restart();
    subscriber.wait_for_scans(3);
    wait_for("the count", || {
        subscriber
            .of_kind("health")
            .last()
            .is_some_and(|h| h.json()["previews"]["dropped"] == 3)
    });
    assert!(subscriber.of_kind("preview").is_empty());
}

struct Commanded {
    broker: Mosquitto,
    subscriber: Subscriber,
    appliance: Appliance,
}

impl Commanded {
    fn start() -> Self {
        let broker = Mosquitto::start();
        let subscriber = broker.subscribe();
        let mut appliance = Appliance::with(&broker.url(), "[command]\nenabled = true");
        appliance.start();
        let health = || !subscriber.of_kind("health").is_empty();
        wait_for("the connection", health);
        Self {
            broker,
            subscriber,
            appliance,
        }
    }

    fn send(&self, command: &Value) {
        contract::check_payload("command", command);
        self.broker
            .publish(&format!("{BASE}/command"), &command.to_string(), &[]);
    }

    fn answers(&self, id: &str) -> Vec<Value> {
        let answers = self.subscriber.of_kind("command/result");
        answers
            .iter()
            .map(Arrived::json)
            .filter(|a| a["id"] == id)
            .collect()
    }

    fn order(&self, command: &Value) -> Value {
        self.send(command);
        let id = command["id"].as_str().unwrap();
        wait_for("the answer", || !self.answers(id).is_empty());
        self.answers(id).remove(0)
    }

    fn conditions(&self) -> Vec<String> {
        let health = self.subscriber.of_kind("health");
        let conditions = health.last().unwrap().json()["conditions"].clone();
        conditions
            .as_array()
            .unwrap()
            .iter()
            .map(|c| c["code"].as_str().unwrap().to_owned())
            .collect()
    }
}

fn command(id: &str, word: &str) -> Value {
    json!({ "schema": "scansentry/command/1", "id": id, "command": word })
}

#[test]
fn pause_holds_over_a_restart_and_resume_goes_on() {
    let mut on = Commanded::start();
    let slices = slices(3);
    let done = on.order(&command("p1", "pause"));
    assert_eq!(
        (&done["status"], &done["command"]),
        (&json!("done"), &json!("pause"))
    );
    wait_for("paused health", || on.conditions() == ["paused"]);
    on.appliance.rename_in("a.png", &slices[0]);
    pause(Duration::from_millis(1500));
    assert!(on.subscriber.results().is_empty());
    assert_eq!(on.appliance.stop(), Some(0));
    on.appliance.start();
    wait_for("paused health after the restart", || {
        on.subscriber
            .of_kind("status")
            .last()
            .is_some_and(|m| m.payload == "online")
            && on.conditions() == ["paused"]
    });
    pause(Duration::from_secs(1));
    assert!(on.subscriber.results().is_empty());

    // A command that the broker kept is refused with the reason, and said so.
    let kept = json!({ "schema": "scansentry/command/1", "id": "kept", "command": "resume" });
    on.broker
        .publish(&format!("{BASE}/command"), &kept.to_string(), &["-r"]);
    // Already subscribed, the appliance gets it as a fresh one: obeyed once, it comes back as a retained one after a restart.
    wait_for("the answer", || !on.answers("kept").is_empty());
    on.subscriber.wait_for_scans(1);
    on.order(&command("p2", "pause"));
    assert_eq!(on.appliance.stop(), Some(0));
    on.appliance.start();
    wait_for("the refusal", || {
        on.answers("kept")
            .iter()
            .any(|a| a["status"] == "refused" && a["error"]["code"] == "retained")
    });
    on.appliance.rename_in("b.png", &slices[1]);
    pause(Duration::from_secs(1));
    assert_eq!(on.subscriber.results().len(), 1, "still paused");

    // The same id is answered again and not carried out again.
    let first = on.answers("p1").remove(0);
    on.order(&command("r1", "resume"));
    on.subscriber.wait_for_scans(2);
    on.send(&command("p1", "pause"));
    wait_for("the answer again", || on.answers("p1").len() == 2);
    assert_eq!(on.answers("p1")[1], first);
    on.appliance.rename_in("c.png", &slices[2]);
    on.subscriber.wait_for_scans(3);

    // Without commands nobody could end a pause, so it ends.
    on.order(&command("p3", "pause"));
    assert_eq!(on.appliance.stop(), Some(0));
    on.appliance.set("SCANSENTRY__COMMAND__ENABLED", "false");
    on.appliance.start();
    assert!(on.appliance.log().contains("the pause is over"));
}

#[test]
fn reprocess_classifies_again_what_is_still_there_and_doubles_nothing() {
    let on = Commanded::start();
    let slices = slices(4);
    for (number, slice) in slices.iter().enumerate() {
        on.appliance.rename_in(&format!("{number}.png"), slice);
    }
    on.appliance.rename_in("letter.txt", b"Dear colleague");
    let first = on.subscriber.wait_for_scans(5);
    on.appliance.wait_until_delivered();
    let counts = on.appliance.status()["counts"].clone();
    std::fs::remove_file(on.appliance.export().join("0.png")).unwrap();
    let mut all = command("all", "reprocess");
    all["since"] = json!("1970-01-01T00:00:00Z");
    let answer = on.order(&all);
    assert_eq!(
        answer["reprocess"],
        json!({ "queued": 4, "gone": 1, "unknown": 0 })
    );
    wait_for("the new outcomes", || on.subscriber.results().len() == 9);
    pause(Duration::from_secs(1));
    let results = on.subscriber.results();
    assert_eq!(results.len(), 9, "once each");
    let again: Vec<_> = results
        .iter()
        .filter(|r| r["revision"] == 2)
        .cloned()
        .collect();
    assert_eq!(again.len(), 4);
    assert_no_double_outcome(&again);
    for result in &again {
        let before = first
            .iter()
            .find(|r| r["scan_id"] == result["scan_id"])
            .unwrap();
        assert_eq!(before["revision"], 1);
        assert_ne!(before["event_id"], result["event_id"]);
        for key in ["outcome", "probability", "decision", "study_id", "rejected"] {
            assert_eq!(before[key], result[key], "{key}");
        }
    }
    on.appliance.wait_until_delivered();
    let now = on.appliance.status()["counts"].clone();
    for key in ["classified", "positive", "rejected"] {
        assert_eq!(counts[key], now[key], "{key}");
    }

    // One by its id, and one that is not known.
    let mut one = command("one", "reprocess");
    one["scan_ids"] = json!([again[0]["scan_id"], "0".repeat(32)]);
    let answer = on.order(&one);
    assert_eq!(
        answer["reprocess"],
        json!({ "queued": 1, "gone": 0, "unknown": 1 })
    );
    wait_for("its outcome", || {
        on.subscriber.results().iter().any(|r| r["revision"] == 3)
    });

    // Without the folder nothing can be said about its files.
    let aside = on.appliance.folder.path().join("aside");
    std::fs::rename(on.appliance.export(), &aside).unwrap();
    wait_for("the condition", || on.conditions() == ["folder_away"]);
    all["id"] = json!("away");
    assert_eq!(on.order(&all)["error"]["code"], "folder_away");

    // Refused twice, it is two events.
    for count in 1..=2 {
        on.broker
            .publish(&format!("{BASE}/command"), "open the door", &[]);
        wait_for("the refusal", || {
            let answers = on.subscriber.of_kind("command/result");
            let refused = answers.iter().map(super::support::Arrived::json);
            let events: std::collections::HashSet<_> = refused
                .filter(|a| a["error"]["code"] == "invalid")
                .map(|a| a["event_id"].to_string())
                .collect();
            events.len() == count
        });
    }
}

#[test]
fn a_kill_in_the_middle_of_a_reprocess_loses_and_doubles_nothing() {
    let mut on = Commanded::start();
    let count = 16;
    for (number, slice) in slices(count).iter().enumerate() {
        on.appliance.rename_in(&format!("{number}.png"), slice);
    }
    on.subscriber.wait_for_scans(count);
    let mut all = command("all", "reprocess");
    all["since"] = json!("1970-01-01T00:00:00Z");
    on.send(&all);
    let again = || -> Vec<Value> {
        let results = on.subscriber.results().into_iter();
        results.filter(|r| r["revision"] != 1).collect()
    };
    let scans = |results: &[Value]| {
        let ids = results.iter().map(|r| r["scan_id"].to_string());
        ids.collect::<std::collections::HashSet<_>>().len()
    };
    // Once answered, it is durable; killed then, and in the work on the files.
    wait_for("the answer", || !on.answers("all").is_empty());
    // A kill by this test looks like a file that kills the process, and a slow engine has the same one in hand each time.
    on.appliance.set("SCANSENTRY__PIPELINE__ATTEMPTS", "10");
    for _ in 0..3 {
        on.appliance.kill();
        on.appliance.start();
        pause(Duration::from_millis(30));
    }
    wait_for("all new outcomes", || scans(&again()) == count);
    on.appliance.wait_until_delivered();
    pause(Duration::from_secs(1));
    assert!(again().iter().all(|r| r["revision"] == 2));
    assert_no_double_outcome(&again());
    assert_eq!(on.appliance.status()["counts"]["classified"], count);
}

/// An appliance with a model of four labels, whose manifest has a band, and a white, a grey and a black picture: sums of 0.6, 0.38 and 0.2.
fn with_four_labels(broker: &Mosquitto) -> Appliance {
    let mut appliance = Appliance::with(&broker.url(), "[alert]\nquiet_s = 600\nupdate_s = 1");
    let rest = format!("{FOUR_LABELS}[decision]\nindeterminate = [0.3, 0.55]\n");
    let bundle = toy_bundle(appliance.folder.path(), "int8-four-labels", 28, &rest);
    appliance.set("SCANSENTRY__MODEL__BUNDLE", bundle.to_str().unwrap());
    appliance.start();
    for (name, level) in [("white.png", 255), ("grey.png", 128), ("black.png", 0)] {
        appliance.rename_in(name, &plain(level));
    }
    appliance
}

/// Decisions by probability, highest first, of the results with this revision.
fn decisions(results: &[Value], revision: u64) -> Vec<String> {
    let mut results: Vec<_> = results
        .iter()
        .filter(|r| r["revision"] == revision)
        .collect();
    let key = |r: &Value| r["probability"].as_f64().unwrap();
    results.sort_by(|a, b| key(b).total_cmp(&key(a)));
    let words = results
        .iter()
        .map(|r| r["decision"].as_str().unwrap().to_owned());
    words.collect()
}

/// Runs a verb that has to succeed; what it prints with `--json`.
#[track_caller]
fn verb(appliance: &Appliance, arguments: &[&str]) -> Value {
    let output = appliance
        .command(&[arguments, &["--json"]].concat())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{arguments:?}: {said}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn queued(queued: u64, gone: u64) -> Value {
    json!({ "queued": queued, "gone": gone, "unknown": 0 })
}

#[test]
fn results_and_alerts_say_whose_rule_decided() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = with_four_labels(&broker);
    let results = subscriber.wait_for_scans(3);
    assert_eq!(
        decisions(&results, 1),
        ["positive", "indeterminate", "negative"]
    );
    for result in &results {
        assert_eq!(result["label"], "none");
        assert_eq!(result["scores"].as_object().unwrap().len(), 4);
        let positive =
            ["glioma", "meningioma", "pituitary"].map(|l| result["scores"][l].as_f64().unwrap());
        let sum: f64 = positive.iter().sum();
        assert!((sum - result["probability"].as_f64().unwrap()).abs() < 1e-6);
    }
    wait_for("the alert", || !subscriber.of_kind("alert").is_empty());
    let rule = |message: &Value| {
        json!([
            message["threshold"],
            message["indeterminate"],
            message["decision_rule"]
        ])
    };
    let models = json!([0.5, [0.3, 0.55], "model"]);
    let alert = subscriber.of_kind("alert")[0].json();
    assert!(results.iter().chain([&alert]).all(|m| rule(m) == models));

    // The appliance's own rule, with the next start, for what comes and for what is done again.
    assert_eq!(appliance.stop(), Some(0));
    appliance.set("SCANSENTRY__DECISION__THRESHOLD", "0.35");
    appliance.set("SCANSENTRY__DECISION__INDETERMINATE", "off");
    appliance.start();
    assert!(
        appliance.log().contains("threshold 0.35 (by [decision]"),
        "{}",
        appliance.log()
    );
    assert_eq!(verb(&appliance, &["reprocess", "--all"]), queued(3, 0));
    let again = || decisions(&subscriber.results(), 2);
    wait_for("the new outcomes", || again().len() == 3);
    assert_eq!(again(), ["positive", "positive", "negative"]);
    let ours = json!([0.35, null, "appliance"]);
    let results = subscriber.results();
    assert!(
        results
            .iter()
            .filter(|r| r["revision"] == 2)
            .all(|r| rule(r) == ours)
    );
    wait_for("the alert to say so", || {
        let alerts = subscriber.of_kind("alert");
        alerts
            .iter()
            .map(Arrived::json)
            .any(|a| a["positives"] == 2 && rule(&a) == ours)
    });
}

#[test]
fn a_daemon_that_has_long_been_idle_soon_notices_what_is_queued() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let appliance = with_four_labels(&broker);
    subscriber.wait_for_scans(3);
    // By now it looks every half a minute by itself, and did so just before.
    pause(Duration::from_secs(31));
    let asked = Instant::now();
    assert_eq!(verb(&appliance, &["reprocess", "--all"]), queued(3, 0));
    let again = || {
        subscriber
            .results()
            .iter()
            .filter(|r| r["revision"] == 2)
            .count()
    };
    wait_for("the new outcomes", || again() == 3);
    assert!(
        asked.elapsed() < Duration::from_secs(15),
        "{:?}",
        asked.elapsed()
    );
}

#[test]
fn the_end_of_a_study_comes_when_it_is_due_though_the_daemon_is_idle() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::with(&broker.url(), "[alert]\nquiet_s = 30");
    appliance.start();
    appliance.rename_in("a.png", &slices(1)[0]);
    subscriber.wait_for_scans(1);
    let last = Instant::now();
    // By itself it looks 29 s after its start, and 57.
    pause(Duration::from_secs(27));
    assert!(subscriber.of_kind("study").is_empty());
    wait_for("the study", || !subscriber.of_kind("study").is_empty());
    let took = last.elapsed();
    assert!(took < Duration::from_secs(45), "{took:?}");
}

#[test]
fn reprocess_works_beside_the_daemon_and_without_it() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    // The next walk by itself is far away: the daemon has to notice.
    let mut appliance = with_four_labels(&broker);
    appliance.rename_in("letter.txt", b"Dear colleague");
    appliance.rename_in("gone.png", &plain(64));
    subscriber.wait_for_scans(5);
    std::fs::remove_file(appliance.export().join("gone.png")).unwrap();
    let of = |revision: u64| {
        let results = subscriber.results();
        results
            .into_iter()
            .filter(|r| r["revision"] == revision)
            .collect::<Vec<_>>()
    };
    let settled = |appliance: &Appliance| {
        wait_for("quiet", || {
            let status = appliance.status();
            status["queued_again"] == 0 && status["counts"]["outbox"] == 0
        });
        let mut counts = appliance.status()["counts"].clone();
        counts["delivered"].take();
        counts
    };
    let counts = settled(&appliance);

    let dry = ["reprocess", "--all", "--dry-run"];
    assert_eq!(verb(&appliance, &dry), queued(4, 1));
    for (selection, count) in [
        (&["--decision", "positive"][..], 1),
        (&["--decision", "indeterminate"], 1),
        (&["--rejected"], 1),
        (
            &["--since", "2001-01-01", "--until", "2999-01-01T00:00:00Z"],
            4,
        ),
        (&["--since", "2999-01-01T12:00"], 0),
        (&["--until", "2001-01-01"], 0),
    ] {
        let arguments = [&["reprocess", "--dry-run"], selection].concat();
        assert_eq!(
            verb(&appliance, &arguments)["queued"],
            count,
            "{selection:?}"
        );
    }
    assert_eq!(appliance.status()["queued_again"], 0);
    assert_eq!(verb(&appliance, &["reprocess", "--all"]), queued(4, 1));
    wait_for("the new outcomes", || of(2).len() == 4);
    assert_eq!(settled(&appliance), counts, "nothing is counted twice");
    let (first, second) = (of(1), of(2));
    for result in &second {
        let before = first
            .iter()
            .find(|r| r["scan_id"] == result["scan_id"])
            .unwrap();
        assert_ne!(before["event_id"], result["event_id"]);
        assert_eq!(before["study_id"], result["study_id"]);
    }

    // Without the daemon it is remembered, twice said or not, and the outcomes stand until then.
    assert_eq!(appliance.stop(), Some(0));
    for _ in 0..2 {
        assert_eq!(verb(&appliance, &["reprocess", "--rejected"]), queued(1, 0));
    }
    let status = appliance.status();
    assert_eq!(
        (&status["queued_again"], &status["counts"]["rejected"]),
        (&json!(1), &json!(1))
    );
    appliance.start();
    wait_for("its outcome", || of(3).len() == 1);
    assert_eq!(settled(&appliance), counts);
    assert_eq!(of(3)[0]["rejected"]["code"], "not_an_image");

    // Without the folder nothing can be said about its files, so nothing is queued.
    let aside = appliance.folder.path().join("aside");
    std::fs::rename(appliance.export(), &aside).unwrap();
    let output = appliance.command(&["reprocess", "--all"]).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).starts_with("watch.folder: "));
    assert_eq!(appliance.status()["queued_again"], 0);
    for wrong in [
        &["reprocess"][..],
        &["reprocess", "--all", "--rejected"],
        &["reprocess", "--since", "yesterday"],
        &["reprocess", "--decision", "maybe"],
        &["quarantine", "retry"],
        &["quarantine", "retry", "--code", "odd"],
        &["quarantine", "retry", "xyz"],
    ] {
        assert_eq!(
            appliance.command(wrong).output().unwrap().status.code(),
            Some(2),
            "{wrong:?}"
        );
    }
}

#[test]
fn reprocess_beside_a_daemon_that_is_killed_loses_and_doubles_nothing() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    // A kill by this test looks like a file that kills the process.
    appliance.set("SCANSENTRY__PIPELINE__ATTEMPTS", "10");
    appliance.start();
    let count = 16;
    for (number, slice) in slices(count).iter().enumerate() {
        appliance.rename_in(&format!("{number}.png"), slice);
    }
    subscriber.wait_for_scans(count);
    // Said three times while the daemon works on what was said before, and is killed on the way.
    for _ in 0..3 {
        let said = verb(&appliance, &["reprocess", "--all"]);
        assert_eq!(said, queued(count as u64, 0));
        pause(Duration::from_millis(100));
        appliance.kill();
        appliance.start();
    }
    wait_for("all of it", || {
        let status = appliance.status();
        status["queued_again"] == 0 && status["counts"]["outbox"] == 0
    });
    assert_eq!(appliance.status()["counts"]["classified"], count);
    let results = subscriber.results();
    let mut revisions = std::collections::BTreeMap::<_, std::collections::BTreeSet<_>>::new();
    for result in &results {
        let revision = result["revision"].as_u64().unwrap();
        revisions
            .entry(result["scan_id"].to_string())
            .or_default()
            .insert(revision);
    }
    assert_eq!(revisions.len(), count);
    for seen in revisions.values() {
        let last = seen.len() as u64;
        assert!(
            (2..=4).contains(&last),
            "done again at least once: {seen:?}"
        );
        assert!(
            seen.iter().copied().eq(1..=last),
            "none is missing: {seen:?}"
        );
    }
    // The same scan and revision is the same message.
    for revision in 1..=4 {
        let of: Vec<_> = results
            .iter()
            .filter(|r| r["revision"] == revision)
            .cloned()
            .collect();
        assert_no_double_outcome(&of);
    }
}

#[test]
fn quarantine_lists_what_was_rejected_and_tries_it_again() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::with(&broker.url(), "");
    appliance.set("SCANSENTRY__LIMITS__PIXELS", "4096");
    appliance.start();
    let slices = slices(3);
    appliance.rename_in("large.png", &slices[0]);
    appliance.rename_in("letter.txt", b"Dear colleague");
    appliance.rename_in("note.txt", b"Dear nobody");
    subscriber.wait_for_scans(3);
    let list = |appliance: &Appliance| -> Vec<Value> {
        let output = appliance
            .command(&["quarantine", "list", "--json"])
            .output()
            .unwrap();
        assert!(output.status.success());
        let text = String::from_utf8(output.stdout).unwrap();
        text.lines()
            .map(|line| serde_json::from_str(line).unwrap())
            .collect()
    };
    let rejected = list(&appliance);
    assert_eq!(rejected.len(), 3);
    for result in subscriber.results() {
        let line = rejected
            .iter()
            .find(|r| r["scan_id"] == result["scan_id"])
            .unwrap();
        assert_eq!(line["code"], result["rejected"]["code"]);
        assert_eq!(line["message"], result["rejected"]["message"]);
        assert_eq!(line["queued"], false);
    }
    let find = |name: &str| {
        let path = appliance.export().join(name).display().to_string();
        let line = rejected.iter().find(|r| r["files"] == json!([path]));
        line.unwrap_or_else(|| panic!("{name}: {rejected:?}"))
            .clone()
    };
    let (large, letter, note) = (find("large.png"), find("letter.txt"), find("note.txt"));
    assert_eq!(large["code"], "too_many_pixels");
    let id = |line: &Value| line["scan_id"].as_str().unwrap().to_owned();
    let text = appliance
        .command(&["quarantine", "list"])
        .output()
        .unwrap()
        .stdout;
    let text = String::from_utf8(text).unwrap();
    for word in [
        &id(&letter),
        "not_an_image",
        "too_many_pixels",
        "letter.txt",
    ] {
        assert!(text.contains(word), "{word}: {text}");
    }

    // After the fix, by its code.
    assert_eq!(appliance.stop(), Some(0));
    appliance.set("SCANSENTRY__LIMITS__PIXELS", "1000000");
    let retry = ["quarantine", "retry", "--code", "too_many_pixels"];
    assert_eq!(
        verb(&appliance, &[&retry[..], &["--dry-run"]].concat()),
        queued(1, 0)
    );
    assert_eq!(verb(&appliance, &retry), queued(1, 0));
    assert!(
        list(&appliance)
            .iter()
            .any(|r| r["queued"] == true && r["scan_id"] == large["scan_id"])
    );
    appliance.start();
    let again = |line: &Value, outcome: &str| {
        let results = subscriber.results();
        results.iter().any(|r| {
            r["scan_id"] == line["scan_id"] && r["revision"] == 2 && r["outcome"] == outcome
        })
    };
    wait_for("the prediction", || again(&large, "classified"));
    assert_eq!(list(&appliance).len(), 2);
    assert_eq!(appliance.status()["counts"]["rejected"], 2);

    // By ids, beside the daemon; those that are not rejected are not known here.
    let ids = ["quarantine", "retry", &id(&letter), &id(&large), "--json"];
    let output = appliance.command(&ids).output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let said: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(said, json!({ "queued": 1, "gone": 0, "unknown": 1 }));
    wait_for("the letter again", || again(&letter, "rejected"));

    // One that is gone is listed without a place and left out.
    std::fs::remove_file(appliance.export().join("note.txt")).unwrap();
    assert_eq!(
        verb(&appliance, &["quarantine", "retry", &id(&note)]),
        queued(0, 1)
    );
    assert_eq!(
        verb(&appliance, &["quarantine", "retry", "--all"]),
        queued(1, 1)
    );
    assert!(!appliance.log().contains("letter.txt"));
}

#[test]
fn commands_are_not_obeyed_unless_switched_on() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    appliance.start();
    wait_for("the connection", || {
        !subscriber.of_kind("health").is_empty()
    });
    broker.publish(
        &format!("{BASE}/command"),
        &command("p", "pause").to_string(),
        &[],
    );
    appliance.rename_in("a.png", &slices(1)[0]);
    subscriber.wait_for_scans(1);
    assert!(subscriber.of_kind("command/result").is_empty());
}

#[test]
fn the_example_of_access_rules_lets_everybody_do_their_part() {
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/examples/mosquitto.acl");
    // The test's own eyes and hands come without a name.
    let rules = format!(
        "topic readwrite #\n\n{}",
        std::fs::read_to_string(example).unwrap()
    );
    let lines = "allow_anonymous true\npassword_file {dir}/passwords\nacl_file {dir}/acl\n";
    let broker = Mosquitto::start_with(lines, |folder| {
        std::fs::write(folder.join("acl"), rules).unwrap();
        let passwords = folder.join("passwords");
        std::fs::write(&passwords, "").unwrap();
        for user in ["mri-1", "dashboard", "operator"] {
            let made = std::process::Command::new("mosquitto_passwd")
                .args(["-b", passwords.to_str().unwrap(), user, "secret"])
                .status();
            assert!(made.unwrap().success());
        }
    });
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::with(
        &broker.url(),
        "[command]\nenabled = true\n[home_assistant]\nenabled = true",
    );
    let password = appliance.folder.path().join("password");
    std::fs::write(&password, "secret").unwrap();
    appliance.set("SCANSENTRY__MQTT__USERNAME", "mri-1");
    appliance.set(
        "SCANSENTRY__MQTT__PASSWORD_FILE",
        password.to_str().unwrap(),
    );
    appliance.start();
    appliance.rename_in("a.png", &slices(1)[0]);
    subscriber.wait_for_scans(1);
    wait_for("the description", || {
        let messages = subscriber.messages();
        messages
            .iter()
            .any(|m| m.topic.starts_with("homeassistant/device/"))
    });
    let order = |user: &str, id: &str| {
        let (topic, port) = (format!("{BASE}/command"), broker.port.to_string());
        let command = command(id, "pause").to_string();
        let _ = std::process::Command::new("mosquitto_pub")
            .args(["-h", "127.0.0.1", "-p", &port, "-V", "5", "-q", "1"])
            .args(["-u", user, "-P", "secret", "-t", &topic, "-m", &command])
            .output()
            .unwrap();
    };
    let answered = |id: &str| {
        let answers = subscriber.of_kind("command/result");
        answers.iter().any(|a| a.json()["id"] == id)
    };
    order("dashboard", "not-mine");
    order("operator", "mine");
    wait_for("the operator's answer", || answered("mine"));
    assert!(!answered("not-mine"));
    assert!(!appliance.log().contains("broker refuses"));
}
