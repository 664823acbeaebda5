//! Operating it: what `status` and `health` say of a daemon that runs, is degraded, was stopped or was killed.

use std::process::Output;

use serde_json::Value;

use crate::support::{Appliance, Mosquitto, free_port, slices, wait_for};

fn status(appliance: &Appliance, arguments: &[&str]) -> Output {
    let arguments = [&["status"], arguments].concat();
    appliance.command(&arguments).output().unwrap()
}

/// What `status` says to people, and whether `--check` is content.
fn said(appliance: &Appliance) -> (String, bool) {
    let output = status(appliance, &["--check"]);
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    let good = match output.status.code() {
        Some(0) => true,
        Some(1) => false,
        code => panic!("{code:?}"),
    };
    (String::from_utf8(output.stdout).unwrap(), good)
}

fn codes(conditions: &Value) -> Vec<&str> {
    let conditions = conditions.as_array().unwrap().iter();
    conditions.map(|c| c["code"].as_str().unwrap()).collect()
}

/// How often the log says that the condition `code` began, and that it ended.
fn lines(appliance: &Appliance, code: &str) -> (usize, usize) {
    let log = appliance.log();
    let of = |word: &str| {
        let line = |l: &&str| l.contains(word) && l.contains(&format!("condition=\"{code}\""));
        log.lines().filter(line).count()
    };
    (of("degraded: "), of("recovered"))
}

#[test]
fn status_tells_a_daemon_that_runs_from_one_that_stopped_or_died() {
    let broker = Mosquitto::start();
    let mut appliance = Appliance::new(&broker.url());
    appliance.start();
    let (text, good) = said(&appliance);
    assert!(
        good && text.starts_with("daemon         running since 2"),
        "{text}"
    );
    wait_for("a connection and the note of it", || said(&appliance).1);
    let running = appliance.status();
    assert_eq!(
        (&running["daemon"], &running["state"]),
        (&"running".into(), &"ok".into())
    );
    assert_eq!(running["conditions"], serde_json::json!([]));

    assert_eq!(appliance.stop(), Some(0));
    let (text, good) = said(&appliance);
    assert!(
        !good && text.starts_with("daemon         stopped at 2"),
        "{text}"
    );
    let stopped = appliance.status();
    assert_eq!(stopped["daemon"], "stopped");
    assert_eq!(stopped["started_at"], running["started_at"]);
    assert!(stopped["stopped_at"].as_str() > stopped["started_at"].as_str());

    // Killed while something is wrong: what held is said, and since when it is not known any better.
    std::fs::remove_dir_all(appliance.export()).unwrap();
    appliance.start();
    wait_for("the note", || {
        codes(&appliance.status()["conditions"]) == ["folder_away"]
    });
    assert!(!said(&appliance).1);
    appliance.kill();
    let died = appliance.status();
    assert_eq!(
        (&died["daemon"], &died["state"]),
        (&"died".into(), &"degraded".into())
    );
    assert_eq!(codes(&died["conditions"]), ["folder_away"]);
    let (text, good) = said(&appliance);
    assert!(
        !good && text.starts_with("daemon         not running; it ended without a word"),
        "{text}"
    );

    // What went wrong is known in the next run, too.
    std::fs::create_dir(appliance.export()).unwrap();
    appliance.start();
    wait_for("a good state", || said(&appliance).1);
    let error = &appliance.status()["last_error"];
    assert_eq!(error, &died["last_error"]);
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .starts_with("degraded: the export folder")
    );
}

#[test]
fn a_broker_that_is_away_has_one_line_a_backlog_and_the_oldest_message() {
    let mut broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    broker.kill();
    let mut appliance = Appliance::new(&broker.url());
    appliance.start();
    for (number, slice) in slices(2).iter().enumerate() {
        appliance.rename_in(&format!("{number}.png"), slice);
    }
    // A rejected image is an outcome, not an error of the daemon.
    appliance.rename_in("letter.png", b"Dear colleague");
    wait_for("the outcomes and the note", || {
        let status = appliance.status();
        status["counts"]["classified"] == 2
            && status["rejections"]["not_an_image"] == 1
            && codes(&status["conditions"]) == ["broker_away"]
    });
    let away = appliance.status();
    assert!(away["backlog"]["messages"].as_u64() >= Some(3));
    let oldest = away["backlog"]["oldest"].as_str().unwrap();
    assert!(
        away["started_at"].as_str().unwrap()[..19] <= oldest[..19],
        "{away}"
    );
    let error = &away["last_error"];
    assert!(
        error["message"]
            .as_str()
            .unwrap()
            .starts_with("degraded: no connection to the broker"),
        "{error}"
    );
    let (text, _) = said(&appliance);
    assert!(
        text.contains(&format!("messages, the oldest from {oldest}")),
        "{text}"
    );
    assert!(
        text.contains("  broker_away since 2") && text.contains("last error     2"),
        "{text}"
    );
    assert_eq!(lines(&appliance, "broker_away"), (1, 0));

    broker.restart();
    subscriber.wait_for_scans(3);
    wait_for("a good state", || {
        let status = appliance.status();
        said(&appliance).1 && status["backlog"]["messages"] == 0
    });
    assert_eq!(lines(&appliance, "broker_away"), (1, 1));
    assert_eq!(appliance.status()["backlog"]["oldest"], Value::Null);
    // The same in the health message.
    wait_for("a health message of it", || {
        let health = subscriber.of_kind("health");
        health
            .last()
            .is_some_and(|h| h.json()["last_error"] == *error)
    });
}

#[test]
fn a_folder_that_is_away_has_one_line_each_time() {
    let mut appliance = Appliance::new(&format!("mqtt://127.0.0.1:{}", free_port()));
    appliance.start();
    let aside = appliance.folder.path().join("aside");
    for time in 1..=2 {
        std::fs::rename(appliance.export(), &aside).unwrap();
        wait_for("the line and the note", || {
            lines(&appliance, "folder_away") == (time, time - 1)
                && codes(&appliance.status()["conditions"]).contains(&"folder_away")
        });
        std::fs::rename(&aside, appliance.export()).unwrap();
        wait_for("its end", || {
            lines(&appliance, "folder_away") == (time, time)
        });
    }
    assert_eq!(lines(&appliance, "broker_away"), (1, 0));
}
