//! The word to systemd, heard at a real notification socket: readiness, reloads, status, and a watchdog that work feeds and not a clock.

use std::os::unix::net::UnixDatagram;
use std::time::{Duration, Instant};

use crate::support::{Appliance, Mosquitto, slices, wait_for};

/// What the daemon is told of the watchdog; half of it is what a loop may be silent.
const WATCHDOG: Duration = Duration::from_secs(6);

/// An appliance whose service manager is the test.
struct Supervised {
    appliance: Appliance,
    socket: UnixDatagram,
    /// Every line so far, and when.
    heard: Vec<(Instant, String)>,
}

impl Supervised {
    fn new(broker: &Mosquitto) -> Self {
        let more = "[pipeline]\nworkers = 2\ndeadline_s = 5\n";
        let mut appliance = Appliance::with(&broker.url(), more);
        let path = appliance.folder.path().join("notify");
        let socket = UnixDatagram::bind(&path).unwrap();
        socket.set_nonblocking(true).unwrap();
        appliance.set("NOTIFY_SOCKET", path.to_str().unwrap());
        appliance.set("WATCHDOG_USEC", &WATCHDOG.as_micros().to_string());
        Self {
            appliance,
            socket,
            heard: Vec::new(),
        }
    }

    fn listen(&mut self) -> &[(Instant, String)] {
        let mut buffer = [0; 4096];
        while let Ok(length) = self.socket.recv(&mut buffer) {
            let text = String::from_utf8_lossy(&buffer[..length]).into_owned();
            let now = Instant::now();
            self.heard
                .extend(text.lines().map(|line| (now, line.to_owned())));
        }
        &self.heard
    }

    fn count(&mut self, start: &str) -> usize {
        let heard = self.listen();
        heard
            .iter()
            .filter(|(_, line)| line.starts_with(start))
            .count()
    }

    /// Waits for one more line that begins with `start`.
    #[track_caller]
    fn wait_for(&mut self, start: &str) {
        let before = self.count(start);
        wait_for(start, || self.count(start) > before);
    }

    /// Waits until the watchdog would have struck.
    fn starve(&mut self) {
        wait_for("the watchdog to go hungry", || {
            let last = self
                .listen()
                .iter()
                .rfind(|(_, line)| line == "WATCHDOG=1")
                .unwrap();
            last.0.elapsed() > WATCHDOG
        });
    }
}

#[test]
fn systemd_hears_of_start_work_reload_and_stop() {
    let broker = Mosquitto::start();
    let mut supervised = Supervised::new(&broker);
    supervised.appliance.start();
    supervised.wait_for("WATCHDOG=1");
    assert!(supervised.count("EXTEND_TIMEOUT_USEC=") == 2 && supervised.count("READY=1") == 1);
    supervised.wait_for("STATUS=idle; 0 classified, 0 rejected; waiting: 0 files, 0 messages");

    for (number, slice) in slices(4).iter().enumerate() {
        supervised
            .appliance
            .rename_in(&format!("{number}.png"), slice);
    }
    supervised.wait_for("STATUS=idle; 4 classified");
    supervised.wait_for("WATCHDOG=1");

    let process = supervised.appliance.process.take().unwrap();
    process.signal("HUP");
    wait_for("the reload", || supervised.count("READY=1") == 2);
    assert!(supervised.count("RELOADING=1") == 1 && supervised.count("MONOTONIC_USEC=") == 1);
    // A reload that is refused ends as well, or systemd would wait for it.
    let config = supervised.appliance.folder.path().join("config.toml");
    std::fs::write(config, "[mqqt]\n").unwrap();
    process.signal("HUP");
    wait_for("the end of the refused reload", || {
        supervised.count("READY=1") == 3
    });
    assert_eq!(supervised.count("RELOADING=1"), 2);
    supervised.wait_for("WATCHDOG=1");

    supervised.appliance.process = Some(process);
    assert_eq!(supervised.appliance.stop(), Some(0));
    assert_eq!(supervised.count("STOPPING=1"), 1);
}

#[test]
fn a_ledger_that_stands_still_starves_the_watchdog() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut supervised = Supervised::new(&broker);
    supervised.appliance.start();
    supervised.wait_for("WATCHDOG=1");
    let freezer = supervised.appliance.freeze("store");
    for (number, slice) in slices(2).iter().enumerate() {
        supervised
            .appliance
            .rename_in(&format!("{number}.png"), slice);
    }
    supervised.starve();
    assert_eq!(supervised.count("STATUS=ledger: stands still"), 1);
    // Where nobody kills it, it goes on when the ledger does.
    drop(freezer);
    subscriber.wait_for_scans(2);
    supervised.wait_for("WATCHDOG=1");
}

#[test]
fn workers_may_rest_and_one_that_hangs_is_replaced_while_the_watchdog_is_fed() {
    let broker = Mosquitto::start();
    let mut supervised = Supervised::new(&broker);
    supervised.appliance.start();
    supervised.wait_for("WATCHDOG=1");
    let freezer = supervised.appliance.freeze("worker");
    // With nothing to do they are missed by nobody.
    let rest = Instant::now();
    wait_for("rest", || rest.elapsed() > WATCHDOG);
    supervised.wait_for("WATCHDOG=1");
    supervised.appliance.rename_in("a.png", &slices(1)[0]);
    supervised.wait_for("STATUS=idle; 1 classified");
    let log = supervised.appliance.log();
    assert!(log.contains("a worker hangs on a file"), "{log}");
    // The one that was left behind hangs on, and counts for nothing.
    let rest = Instant::now();
    wait_for("rest", || rest.elapsed() > 2 * WATCHDOG);
    supervised.wait_for("WATCHDOG=1");
    assert_eq!(supervised.count("STATUS=worker"), 0);
    drop(freezer);
    assert_eq!(supervised.appliance.stop(), Some(0));
}
