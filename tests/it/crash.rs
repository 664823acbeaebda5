//! The process dies: at every step of the table in ARCHITECTURE.md, and at random times.

use std::collections::HashMap;
use std::time::Duration;

use rusqlite::Connection;
use scansentry::failpoint::POINTS;
use scansentry::store::DATABASE;

use crate::support::{
    Appliance, Mosquitto, Subscriber, assert_no_double_outcome, copy_folder, pause, real_images,
    slices, wait_for,
};

/// What the ledger holds after a death, with one image in the folder.
#[derive(Debug, PartialEq)]
struct OnDisk {
    /// Claims of the scan; `None` without a row.
    attempts: Option<i64>,
    outcomes: i64,
    /// Whether its messages wait.
    waiting: bool,
}

impl OnDisk {
    /// By the table of steps.
    fn after(point: &str) -> Self {
        let (attempts, outcomes, waiting) = match point {
            "hint" | "complete" | "read" | "claim" => (None, 0, false),
            "claimed" | "infer" | "inferred" | "record" => (Some(1), 0, false),
            "recorded" | "sent" | "acknowledged" | "confirm" => (Some(1), 1, true),
            "confirmed" => (Some(1), 1, false),
            _ => panic!("{point}: not in the table"),
        };
        Self {
            attempts,
            outcomes,
            waiting,
        }
    }

    /// As the next start finds it, in a copy: reading it brings the copy up to date.
    fn found(appliance: &Appliance) -> Self {
        let copy = tempfile::tempdir().unwrap();
        copy_folder(&appliance.state(), copy.path());
        let ledger = Connection::open(copy.path().join(DATABASE)).unwrap();
        let number = |sql| ledger.query_row(sql, [], |row| row.get::<_, i64>(0));
        Self {
            attempts: number("SELECT max(attempts) FROM scan").ok(),
            outcomes: number("SELECT count(done_at) FROM scan").unwrap(),
            waiting: number("SELECT count(*) FROM outbox").unwrap() > 0,
        }
    }
}

/// Starts the daemon with a fault and waits until it has died of it.
fn die(appliance: &mut Appliance, fault: &str) {
    appliance.set("SCANSENTRY_FAIL", fault);
    appliance.spawn();
    let process = appliance.process.as_mut().unwrap();
    assert_eq!(process.exit_code(), None, "{fault}: killed by a signal");
    assert!(appliance.log().contains("fail point"), "{fault}");
    appliance.set("SCANSENTRY_FAIL", "");
}

/// Checks that every image has one outcome and that everything was delivered, duplicates under the same `event_id` only; stops the daemon and returns how many
/// messages were resends.
#[track_caller]
fn assert_all_there(appliance: &mut Appliance, subscriber: &Subscriber, images: usize) -> usize {
    let results = subscriber.wait_for_scans(images);
    appliance.wait_until_delivered();
    // An update of the alert would come between what is read of the ledger and of the subscriber.
    assert_eq!(appliance.stop(), Some(0));
    let counts = &appliance.status()["counts"];
    assert_no_double_outcome(&subscriber.results());
    let mut events: HashMap<String, String> = HashMap::new();
    let mut resends = 0;
    for message in subscriber.messages() {
        if !["result", "alert", "study"].contains(&message.kind()) {
            continue;
        }
        let id = message.json()["event_id"].to_string();
        if let Some(first) = events.insert(id, message.payload.clone()) {
            assert_eq!(first, message.payload, "one event, two messages");
            resends += 1;
        }
    }
    let recorded = counts["classified"].as_u64().unwrap() + counts["rejected"].as_u64().unwrap();
    assert_eq!(recorded as usize, images, "one outcome an image");
    assert_eq!(counts["delivered"], events.len(), "each event counts once");
    assert!(results.iter().all(|r| r["rejected"].is_null()));
    resends
}

#[test]
fn killed_at_every_step_the_disk_holds_what_the_table_says_and_the_next_start_does_the_rest() {
    let image = &slices(2)[1..];
    for point in POINTS {
        let broker = Mosquitto::start();
        let subscriber = broker.subscribe();
        let mut appliance = Appliance::new(&broker.url());
        // One message an image, so that one acknowledgement is all of it.
        appliance.set("SCANSENTRY__ALERT__ENABLED", "false");
        appliance.rename_in("0.img", &image[0]);
        die(&mut appliance, &format!("{point}#1:kill"));
        assert_eq!(OnDisk::found(&appliance), OnDisk::after(point), "{point}");
        appliance.start();
        let resends = assert_all_there(&mut appliance, &subscriber, 1);
        let results = subscriber.results();
        let replayed = OnDisk::after(point) == OnDisk::after("claimed");
        assert_eq!(results[0]["replayed"], replayed, "{point}");
        // What was sent and not taken out is sent again; what was not, is not.
        match point {
            "acknowledged" | "confirm" => assert!(resends >= 1, "{point}"),
            "sent" => {}
            _ => assert_eq!(resends, 0, "{point}"),
        }
    }
}

#[test]
fn killed_at_the_same_step_again_and_again_with_more_images_than_workers() {
    steps(&slices(5), &[2, 4]);
}

/// `make faults`.
#[test]
#[ignore = "long: make faults"]
fn killed_at_every_step_many_times() {
    steps(&slices(12), &[1, 2, 3, 5, 8, 10, 12]);
}

/// Dies at the n-th time of every point in turn, image after image, on one ledger; then does the rest.
fn steps(images: &[Vec<u8>], times: &[usize]) {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    // A death counts against every file in work; these are not the files' fault.
    appliance.set("SCANSENTRY__PIPELINE__ATTEMPTS", "10");
    let mut exported = 0;
    for point in POINTS {
        for nth in times {
            // Fresh ones each time, before and while the daemon runs.
            for image in images {
                let mut image = image.clone();
                image.extend_from_slice(&u64::to_le_bytes(exported as u64));
                appliance.rename_in(&format!("{exported}.img"), &image);
                exported += 1;
            }
            // Work on several files at once is only begun where no run died with files in work: some points are met later, or never.
            appliance.set("SCANSENTRY_FAIL", &format!("{point}#{nth}:kill"));
            appliance.spawn();
            wait_for("the death, or the end of the work", || {
                let process = appliance.process.as_mut().unwrap();
                let ended = process.0.try_wait().unwrap().is_some();
                ended || {
                    pause(Duration::from_millis(200));
                    appliance.try_status().is_some_and(|status| {
                        let counts = &status["counts"];
                        counts["classified"] == exported && counts["outbox"] == 0
                    })
                }
            });
            appliance.kill();
        }
    }
    appliance.set("SCANSENTRY_FAIL", "");
    appliance.start();
    let resends = assert_all_there(&mut appliance, &subscriber, exported);
    println!(
        "{exported} images, {} deaths, {resends} resends",
        POINTS.len() * times.len()
    );
}

#[test]
fn killed_at_random_times_loses_nothing_and_doubles_nothing() {
    kills(&slices(60), 4, 3, Duration::from_millis(900));
}

/// `make faults`.
#[test]
#[ignore = "long: make faults"]
fn killed_a_hundred_times_over_2000_images() {
    kills(&slices(2000), 100, 20, Duration::from_millis(600));
}

/// `make faults`.
#[test]
#[ignore = "long: make faults"]
fn killed_ten_times_with_300_real_images() {
    let Some(images) = real_images(300) else {
        println!("skipped: no ../shared/data");
        return;
    };
    kills(&images, 10, 10, Duration::from_millis(1500));
}

/// Exports `images` while the daemon and, spread over it, the broker are killed, then checks that every image has exactly one outcome and
/// everything was delivered.
fn kills(images: &[Vec<u8>], of_daemon: usize, of_broker: usize, pace: Duration) {
    let mut broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    // A kill by this test looks like a file that kills the process; with many of them one file may be hit more than three times.
    appliance.set("SCANSENTRY__PIPELINE__ATTEMPTS", "10");
    appliance.start();
    let mut exported = 0;
    for round in 0..of_daemon {
        let until = images.len() * (round + 1) / of_daemon;
        for (number, image) in images.iter().enumerate().take(until).skip(exported) {
            appliance.rename_in(&format!("{number}.img"), image);
        }
        exported = until;
        // Somewhere in the work on this round's images: a different place each round.
        pause(Duration::from_millis(30 + 71 * round as u64 % 300));
        appliance.kill();
        if round * of_broker / of_daemon != (round + 1) * of_broker / of_daemon {
            pause(Duration::from_millis(40));
            broker.kill();
            pause(pace / 4);
            broker.restart();
        }
        appliance.spawn();
        pause(pace);
    }
    let resends = assert_all_there(&mut appliance, &subscriber, images.len());
    let results = subscriber.results();
    let replayed = results.iter().filter(|r| r["replayed"] == true).count();
    println!(
        "{} images, {of_daemon} kills of the daemon, {of_broker} of the broker: {resends} resends, {replayed} replayed",
        images.len()
    );
}
