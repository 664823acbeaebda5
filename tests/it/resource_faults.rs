//! What the machine can run out of, and what can break in it: room for the state, descriptors, memory, the ledger's bytes, the engine. Nothing
//! is lost, and what is not one file's own fault passes without a restart.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::io::{Read as _, Seek as _, SeekFrom, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::support::{
    Appliance, Mosquitto, Namespace, Subscriber, assert_no_double_outcome, free_port, numbered,
    pause, wait_for,
};

/// Starts the daemon again whenever it ends by itself, as systemd does, until `done`; returns how often that was.
fn supervise(appliance: &mut Appliance, mut done: impl FnMut(&Appliance) -> bool) -> usize {
    let mut starts = 0;
    wait_for("the end under supervision", || {
        let ended = match &mut appliance.process {
            Some(process) => process.0.try_wait().unwrap().is_some(),
            None => true,
        };
        if ended {
            starts += 1;
            appliance.spawn();
        }
        pause(Duration::from_millis(100));
        done(appliance)
    });
    starts
}

/// The event ids of each scan.
fn events(results: &[Value]) -> BTreeMap<String, BTreeSet<String>> {
    let mut events: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let text = |v: &Value| v.as_str().unwrap().to_owned();
    for result in results {
        let of_scan = events.entry(text(&result["scan_id"])).or_default();
        of_scan.insert(text(&result["event_id"]));
    }
    events
}

#[test]
fn a_full_state_directory_holds_everything_up_and_loses_nothing() {
    let Some(space) = Namespace::new() else {
        return;
    };
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    space.confine(&mut appliance);
    // To the last byte, so that SQLite itself meets the end.
    appliance.set("SCANSENTRY__STATE__MIN_FREE_BYTES", "0");
    std::fs::create_dir(appliance.state()).unwrap();
    space.mount_tmpfs(&appliance.state(), "2m");
    appliance.start();
    appliance.rename_in("0.png", &numbered(0));
    subscriber.wait_for_scans(1);
    let ballast = space.path(&appliance.state()).join("ballast");
    let mut scans = 1;
    for round in 1..=2 {
        let mut file = std::fs::File::create(&ballast).unwrap();
        while file.write_all(&[0; 4096]).is_ok() {}
        while file.write_all(&[0]).is_ok() {}
        drop(file);
        // A few may still fit into what the database has already.
        wait_for("no room", || {
            appliance.rename_in(&format!("{scans}.png"), &numbered(scans));
            scans += 1;
            pause(Duration::from_millis(100));
            appliance.began_and_ended("state_unwritable") == (round, round - 1)
        });
        pause(Duration::from_secs(2));
        assert_eq!(
            appliance.began_and_ended("state_unwritable"),
            (round, round - 1),
            "said once: {}",
            appliance.log()
        );
        assert!(
            appliance
                .process
                .as_mut()
                .unwrap()
                .0
                .try_wait()
                .unwrap()
                .is_none()
        );
        std::fs::remove_file(&ballast).unwrap();
        let results = subscriber.wait_for_scans(scans);
        assert_eq!(assert_no_double_outcome(&results), 0);
        wait_for("recovery", || {
            appliance.began_and_ended("state_unwritable") == (round, round)
        });
    }
    assert_eq!(appliance.stop(), Some(0));
}

/// A file system that turns read-only keeps whoever has files open there from writing; so does this attribute, which can be taken back.
#[test]
fn a_state_directory_that_turns_read_only_and_back_loses_nothing() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.start();
    appliance.rename_in("0.png", &numbered(0));
    subscriber.wait_for_scans(1);
    let state = appliance.state();
    let files = ["ledger.sqlite3", "ledger.sqlite3-wal"].map(|name| state.join(name));
    let chattr = |change: &str| {
        let status = Command::new("chattr").arg(change).args(&files).status();
        status.is_ok_and(|status| status.success())
    };
    if !chattr("+i") {
        println!("skipped: no immutable files (not root, or not on this file system)");
        return;
    }
    for number in 1..5 {
        appliance.rename_in(&format!("{number}.png"), &numbered(number));
    }
    wait_for("degraded", || {
        appliance.began_and_ended("state_unwritable").0 == 1
    });
    pause(Duration::from_secs(3));
    let said = appliance.began_and_ended("state_unwritable");
    assert!(chattr("-i"));
    assert_eq!(said, (1, 0), "{}", appliance.log());
    let results = subscriber.wait_for_scans(5);
    assert_eq!(assert_no_double_outcome(&results), 0);
    wait_for("recovery", || {
        appliance.began_and_ended("state_unwritable") == (1, 1)
    });
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn without_descriptors_the_daemon_waits_until_there_are_some() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    let port = free_port();
    appliance.set("SCANSENTRY__HTTP__ENABLED", "true");
    appliance.set("SCANSENTRY__HTTP__LISTEN", &format!("127.0.0.1:{port}"));
    appliance.set("SCANSENTRY__WATCH__INCOMPLETE_S", "1");
    appliance.start();
    appliance.rename_in("0.png", &numbered(0));
    subscriber.wait_for_scans(1);
    let pid = appliance.process.as_ref().unwrap().0.id();
    let limit = |count: usize| {
        let (pid, limit) = (pid.to_string(), format!("--nofile={count}:4096"));
        let set = Command::new("prlimit")
            .args(["--pid", &pid, &limit])
            .status();
        assert!(set.unwrap().success());
    };
    // None is left, and whoever has one keeps it; connections wait for more.
    limit(3);
    let calls: Vec<_> = (0..40)
        .map(|_| TcpStream::connect(("127.0.0.1", port)).unwrap())
        .collect();
    for number in 1..6 {
        appliance.rename_in(&format!("{number}.png"), &numbered(number));
    }
    wait_for("degraded", || {
        appliance.began_and_ended("folder_away") == (1, 0)
    });
    pause(Duration::from_secs(3));
    assert_eq!(subscriber.results().len(), 1);
    assert_eq!(appliance.began_and_ended("folder_away"), (1, 0));
    limit(1024);
    let results = subscriber.wait_for_scans(6);
    assert_eq!(assert_no_double_outcome(&results), 0);
    assert!(results.iter().all(|r| r["outcome"] == "classified"));
    wait_for("recovery", || {
        appliance.began_and_ended("folder_away") == (1, 1)
    });
    drop(calls);
    let mut call = TcpStream::connect(("127.0.0.1", port)).unwrap();
    let request = "GET /healthz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    call.write_all(request.as_bytes()).unwrap();
    let mut answer = String::new();
    call.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
    assert_eq!(appliance.stop(), Some(0));
}

/// A grey PNG of `side` times `side` zeros: the header says how large it is, and it is small all the same.
fn bomb(side: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let image = image::GrayImage::new(side, side);
    let encoder = image::codecs::png::PngEncoder::new(&mut bytes);
    image.write_with_encoder(encoder).unwrap();
    bytes
}

#[test]
fn bombs_are_rejected_and_the_rest_goes_on_within_a_memory_limit() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    let group =
        Path::new("/sys/fs/cgroup/memory").join(format!("scansentry-{}", std::process::id()));
    if std::fs::create_dir(&group).is_err() {
        println!("skipped: no memory control group (cgroup v1, as root)");
        return;
    }
    std::fs::write(group.join("memory.limit_in_bytes"), "120M").unwrap();
    let enter = format!("echo $$ > {}/cgroup.procs; exec \"$@\"", group.display());
    let shell = ["sh", "-c", &enter, "sh"].map(str::to_owned);
    appliance.program.splice(0..0, shell);
    appliance.rename_in("0.png", &numbered(0));
    appliance.rename_in("bomb.png", &bomb(9000));
    appliance.start();
    let results = subscriber.wait_for_scans(2);
    let codes: Vec<_> = results
        .iter()
        .filter_map(|r| r["rejected"]["code"].as_str())
        .collect();
    assert_eq!(codes, ["too_many_pixels"]);
    // Where the limits let it through, the kernel ends the process, three times.
    appliance.stop();
    appliance.set("SCANSENTRY__LIMITS__PIXELS", "1000000000");
    appliance.set("SCANSENTRY__LIMITS__DECODE_BYTES", "8589934592");
    appliance.rename_in("larger.png", &bomb(12_000));
    for number in 1..6 {
        appliance.rename_in(&format!("{number}.png"), &numbered(number));
    }
    let starts = supervise(&mut appliance, |_| events(&subscriber.results()).len() == 8);
    assert_eq!(starts, 4);
    let results = subscriber.results();
    let codes: Vec<_> = results
        .iter()
        .filter_map(|r| r["rejected"]["code"].as_str())
        .collect();
    assert_eq!(
        codes.iter().filter(|c| **c == "crashed").count(),
        1,
        "{codes:?}"
    );
    assert_no_double_outcome(&results);
    assert_eq!(appliance.stop(), Some(0));
    wait_for("an empty control group", || {
        std::fs::remove_dir(&group).is_ok()
    });
}

#[test]
fn a_file_that_kills_the_engine_is_rejected_after_three_deaths_and_the_rest_goes_on() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    let deadly = with_size(8000);
    appliance.set("SCANSENTRY_FAIL", "infer@8000:segv");
    for number in 0..8 {
        appliance.rename_in(&format!("{number}.png"), &numbered(number));
    }
    appliance.rename_in("4-deadly.png", &deadly);
    let starts = supervise(&mut appliance, |_| events(&subscriber.results()).len() == 9);
    assert_eq!(starts, 4, "three deaths");
    let results = subscriber.results();
    let rejected: Vec<_> = results
        .iter()
        .filter(|r| r["outcome"] == "rejected")
        .collect();
    assert_eq!(rejected[0]["rejected"]["code"], "crashed");
    assert!(rejected.iter().all(|r| *r == rejected[0]));
    assert_no_double_outcome(&results);
    assert_eq!(appliance.stop(), Some(0));
}

/// A picture whose file has that many bytes: more than a picture of [`numbered`].
fn with_size(size: usize) -> Vec<u8> {
    let mut bytes = numbered(12345);
    assert!(bytes.len() < size);
    // What follows the end of a PNG is nothing to its readers.
    bytes.resize(size, 0);
    bytes
}

/// Waits until `number` new pictures are classified, beside what hangs.
fn go_on(appliance: &Appliance, subscriber: &Subscriber, scans: &mut usize) {
    for _ in 0..3 {
        appliance.rename_in(&format!("{scans}.png"), &numbered(*scans));
        *scans += 1;
    }
    subscriber.wait_for_scans(*scans);
}

#[test]
fn a_worker_that_hangs_is_replaced_in_the_running_process() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.set("SCANSENTRY_FAIL", "infer@8000:hang");
    appliance.set("SCANSENTRY__PIPELINE__WORKERS", "1");
    appliance.set("SCANSENTRY__PIPELINE__DEADLINE_S", "5");
    appliance.set("SCANSENTRY__PIPELINE__ATTEMPTS", "2");
    appliance.start();
    let mut scans = 0;
    appliance.rename_in("hangs.png", &with_size(8000));
    pause(Duration::from_millis(500));
    // The only worker hangs: these are for the next one, and the hanging file comes after them.
    go_on(&appliance, &subscriber, &mut scans);
    let degraded = || {
        let health = subscriber.of_kind("health").pop().unwrap().json();
        let mut conditions = health["conditions"].as_array().unwrap().iter();
        conditions.any(|c| c["code"] == "worker_replaced")
    };
    wait_for("degraded health", degraded);
    // A reload while the second worker is at it: neither the first nor the second keeps it waiting for ever.
    appliance.process.as_ref().unwrap().signal("HUP");
    wait_for("the reload", || {
        appliance.log().matches("ready").count() == 2
    });
    // Two attempts are enough.
    scans += 1;
    let results = subscriber.wait_for_scans(scans);
    let rejected: Vec<_> = results
        .iter()
        .filter(|r| r["outcome"] == "rejected")
        .collect();
    assert_eq!(rejected.len(), 1);
    assert_eq!(rejected[0]["rejected"]["code"], "crashed");
    go_on(&appliance, &subscriber, &mut scans);
    assert!(degraded(), "the threads are still there");
    let log = appliance.log();
    assert_eq!(log.matches("a worker hangs on a file").count(), 2, "{log}");
    assert!(!log.contains("hangs.png"));
    assert!(!log.contains("in time"), "{log}");
    assert_eq!(assert_no_double_outcome(&results), 0);
    assert_eq!(appliance.stop(), Some(0));
    assert!(!appliance.log().contains("in time"), "{}", appliance.log());
}

#[test]
fn one_hang_too_many_ends_the_process_and_the_file_is_rejected_in_the_end() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.set("SCANSENTRY_FAIL", "infer@8000:hang");
    appliance.set("SCANSENTRY__PIPELINE__WORKERS", "2");
    appliance.set("SCANSENTRY__PIPELINE__DEADLINE_S", "5");
    appliance.rename_in("hangs.png", &with_size(8000));
    for number in 0..5 {
        appliance.rename_in(&format!("{number}.png"), &numbered(number));
    }
    let starts = supervise(&mut appliance, |_| events(&subscriber.results()).len() == 6);
    assert_eq!(
        starts, 2,
        "two workers are left behind, the third hang ends the process"
    );
    let results = subscriber.results();
    let codes: Vec<_> = results
        .iter()
        .filter_map(|r| r["rejected"]["code"].as_str())
        .collect();
    assert_eq!(codes, ["crashed"]);
    assert_no_double_outcome(&results);
    assert_eq!(appliance.stop(), Some(0));
}

/// A worker that comes back after it was given up finds its file done, and doubles nothing.
#[test]
fn a_worker_that_comes_back_too_late_changes_nothing() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.set("SCANSENTRY__PIPELINE__WORKERS", "1");
    appliance.set("SCANSENTRY__PIPELINE__DEADLINE_S", "5");
    appliance.start();
    let freezer = appliance.freeze("worker-0");
    appliance.rename_in("a.png", &numbered(0));
    subscriber.wait_for_scans(1);
    assert!(appliance.log().contains("a worker hangs on a file"));
    drop(freezer);
    wait_for("the end of the late one", || {
        appliance
            .log()
            .contains("a worker that was given up came to an end")
    });
    let mut scans = 1;
    go_on(&appliance, &subscriber, &mut scans);
    assert_eq!(subscriber.results().len(), scans);
    assert_eq!(appliance.stop(), Some(0));
}

/// Writes `bytes` over the file at `offset`.
fn damage(file: &Path, offset: u64, bytes: &[u8]) {
    let mut file = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    file.write_all(bytes).unwrap();
}

#[test]
fn a_damaged_ledger_is_set_aside_and_made_again_with_the_same_ids() {
    const FILES: usize = 60;
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.start();
    for number in 0..FILES {
        appliance.rename_in(&format!("{number}.png"), &numbered(number));
    }
    let all_done = |appliance: &Appliance, files: usize| {
        let output = appliance.command(&["status", "--json"]).output().unwrap();
        let status: Value = serde_json::from_slice(&output.stdout).unwrap_or_default();
        status["counts"]["classified"] == files && status["counts"]["outbox"] == 0
    };
    wait_for("all results", || all_done(&appliance, FILES));
    let first = events(&subscriber.wait_for_scans(FILES));
    let (state, ledger) = (appliance.state(), appliance.state().join("ledger.sqlite3"));
    let aside = || -> HashSet<_> {
        let names = std::fs::read_dir(&state)
            .unwrap()
            .map(|e| e.unwrap().file_name());
        let names = names.map(|name| name.into_string().unwrap());
        names
            .filter(|n| n.contains(".damaged-") && !n.ends_with("-wal") && !n.ends_with("-shm"))
            .collect()
    };
    let junk = [0xa5; 4096];
    // Where, whether the daemon was stopped in order before, and how many ledgers are set aside afterwards.
    let cases: [(&str, bool, usize); 4] = [
        ("header", true, 1),
        ("middle", true, 2),
        ("middle", false, 3),
        ("log", false, 3),
    ];
    for (place, in_order, expected) in cases {
        // Afterwards everything is in the ledger itself; without, the latest is in its log.
        if place != "log" {
            assert_eq!(appliance.stop(), Some(0));
        }
        if !in_order {
            if place != "log" {
                appliance.start();
            }
            appliance.kill();
        }
        match place {
            "header" => damage(&ledger, 0, &junk[..100]),
            // Behind the schema, through every table.
            "middle" => {
                let end = std::fs::metadata(&ledger).unwrap().len();
                for offset in (4096..end.saturating_sub(4096)).step_by(4096) {
                    damage(&ledger, offset, &junk[..2048]);
                }
            }
            // What was written since the last checkpoint cannot be read any more: an older ledger, and a good one.
            _ => damage(&state.join("ledger.sqlite3-wal"), 32 + 1048, &junk),
        }
        let published = subscriber.results().len();
        supervise(&mut appliance, |appliance| all_done(appliance, FILES));
        assert_eq!(aside().len(), expected, "{place}, in order: {in_order}");
        if place != "log" {
            wait_for("the results again", || {
                subscriber.results().len() >= published + FILES
            });
        }
        assert_eq!(events(&subscriber.results()), first, "{place}");
        // Names by the second.
        pause(Duration::from_secs(1));
    }
    let (began, _) = appliance.began_and_ended("ledger_rebuilt");
    assert_eq!(began, 3);

    // While it runs: met when it is read, at the latest by the next start.
    let before = aside();
    assert_eq!(appliance.stop(), Some(0));
    appliance.start();
    let end = std::fs::metadata(&ledger).unwrap().len();
    for offset in (4096..end).step_by(1024) {
        damage(&ledger, offset, &junk[..1024]);
    }
    for number in FILES..FILES + 20 {
        appliance.rename_in(&format!("{number}.png"), &numbered(number));
    }
    supervise(&mut appliance, |_| {
        events(&subscriber.results()).len() == FILES + 20
    });
    appliance.kill();
    supervise(&mut appliance, |appliance| all_done(appliance, FILES + 20));
    // The latest three are kept.
    let kept = aside();
    assert_eq!(kept.len(), 3, "{}", appliance.log());
    assert_eq!(kept.difference(&before).count(), 1, "{}", appliance.log());
    let last = events(&subscriber.wait_for_scans(FILES + 20));
    assert!(last.values().all(|events| events.len() == 1));
    assert!(first.iter().all(|(scan, events)| last[scan] == *events));
    assert_eq!(appliance.stop(), Some(0));
}
