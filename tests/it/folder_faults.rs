//! What can happen to the export folder: mounts that come and go, lost permissions, more files than the kernel can tell of, whatever else may
//! lie there, clocks that jump, file systems without events. Every file has one outcome in the end, without a restart.

use std::fs::{FileTimes, OpenOptions, Permissions};
use std::io::Write as _;
use std::os::unix::ffi::OsStringExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant, SystemTime};

use rusqlite::Connection;
use scansentry::store::DATABASE;

use crate::support::{
    Appliance, Mosquitto, Namespace, PATIENCE, assert_no_double_outcome, is_root, numbered, pause,
    slices, wait_for,
};

#[test]
fn a_share_is_mounted_over_the_folder_and_unmounted_and_comes_back() {
    let Some(space) = Namespace::new() else {
        return;
    };
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    space.confine(&mut appliance);
    let export = appliance.export();
    let inside = space.path(&export);
    appliance.start();
    appliance.rename_in("below.png", &numbered(0));
    subscriber.wait_for_scans(1);

    // As at a boot where the share is mounted late. Nothing in the folder itself tells of it.
    space.mount_tmpfs(&export, "8m");
    std::fs::write(inside.join("a.png"), numbered(1)).unwrap();
    subscriber.wait_for_scans(2);
    // File events come from there: the next walk is minutes away.
    std::fs::write(inside.join("b.png"), numbered(2)).unwrap();
    subscriber.wait_for_scans(3);
    assert_eq!(appliance.began_and_ended("folder_away"), (0, 0));

    space.run(&["umount", "-l", export.to_str().unwrap()]);
    wait_for("degraded health", || {
        appliance.began_and_ended("folder_away") == (1, 0)
    });
    space.mount_tmpfs(&export, "8m");
    std::fs::write(inside.join("a.png"), numbered(1)).unwrap();
    std::fs::write(inside.join("c.png"), numbered(3)).unwrap();
    let results = subscriber.wait_for_scans(4);
    wait_for("good health", || {
        appliance.began_and_ended("folder_away") == (1, 1)
    });
    assert_eq!(assert_no_double_outcome(&results), 0);
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn permissions_are_lost_and_given_back() {
    if !is_root() {
        println!("skipped: not root, so the daemon cannot run as another user");
        return;
    }
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    let chmod = |path: &Path, mode| {
        std::fs::set_permissions(path, Permissions::from_mode(mode)).unwrap();
    };
    chmod(appliance.folder.path(), 0o755);
    let export = appliance.export();
    std::fs::create_dir(appliance.state()).unwrap();
    std::os::unix::fs::chown(appliance.state(), Some(65534), Some(65534)).unwrap();
    let user = [
        "setpriv",
        "--reuid=65534",
        "--regid=65534",
        "--clear-groups",
    ];
    appliance.program.splice(0..0, user.map(str::to_owned));
    let works = appliance.command(&["--version"]).output();
    if !works.is_ok_and(|output| output.status.success()) {
        println!("skipped: another user cannot run the program");
        return;
    }
    appliance.set("SCANSENTRY__WATCH__INCOMPLETE_S", "1");
    appliance.set("SCANSENTRY__WATCH__RESCAN_S", "5");
    appliance.start();
    appliance.rename_in("a.png", &numbered(1));
    subscriber.wait_for_scans(1);

    // Names can be read without being allowed to look at what is behind them; that is as good as nothing.
    chmod(&export, 0o744);
    wait_for("degraded health", || {
        appliance.began_and_ended("folder_away") == (1, 0)
    });
    appliance.rename_in("b.png", &numbered(2));
    chmod(&export, 0o755);
    subscriber.wait_for_scans(2);
    wait_for("good health", || {
        appliance.began_and_ended("folder_away") == (1, 1)
    });

    // A single file: rejected, and taken up when it can be read.
    let secret = export.join("secret.part");
    std::fs::write(&secret, numbered(3)).unwrap();
    chmod(&secret, 0o600);
    std::fs::rename(&secret, export.join("secret.png")).unwrap();
    let results = subscriber.wait_for_scans(3);
    assert_eq!(results[2]["rejected"]["code"], "unreadable");
    chmod(&export.join("secret.png"), 0o644);
    assert_eq!(subscriber.wait_for_scans(4)[3]["outcome"], "classified");

    // A sub-folder of another user: said once, and taken up when it may be read.
    let (made, closed) = (appliance.folder.path().join("made"), export.join("closed"));
    std::fs::create_dir(&made).unwrap();
    chmod(&made, 0o700);
    std::fs::write(made.join("d.png"), numbered(4)).unwrap();
    std::fs::rename(&made, &closed).unwrap();
    let said = |word: &str| {
        let log = appliance.log();
        let about = |l: &&str| l.contains(word) && l.contains("events_unavailable");
        log.lines().filter(about).count()
    };
    wait_for("degraded health", || said("degraded") == 1);
    chmod(&closed, 0o755);
    subscriber.wait_for_scans(5);
    wait_for("good health", || said("recovered") == 1);
    std::fs::write(closed.join("e.png"), numbered(5)).unwrap();
    let results = subscriber.wait_for_scans(6);
    assert_eq!(assert_no_double_outcome(&results), 0);
    assert_eq!(said("degraded"), 1);
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn more_files_at_once_than_the_kernel_tells_of() {
    flood(1500);
}

#[test]
#[ignore = "long: make faults"]
fn twenty_thousand_files_at_once() {
    flood(20_000);
}

/// Files that appear while the daemon stands still and its queue of events is full to the brim: only a walk can find them.
fn flood(count: usize) {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.start();
    let limit = std::fs::read_to_string("/proc/sys/fs/inotify/max_queued_events").unwrap();
    let limit: usize = limit.trim().parse().unwrap();
    let fillers = ["x.tmp", "y.tmp"].map(|name| {
        let path = appliance.export().join(name);
        OpenOptions::new()
            .create(true)
            .append(true)
            .open(path)
            .unwrap()
    });
    let daemon = appliance.process.as_ref().unwrap();
    daemon.signal("STOP");
    // Events of two files in turn, because the kernel drops one that is like the one before.
    for round in 0..=limit {
        let filler = &fillers[round % 2];
        filler
            .set_modified(SystemTime::UNIX_EPOCH + Duration::from_secs(round as u64))
            .unwrap();
    }
    for number in 0..count {
        let name = format!("{number}.png");
        std::fs::write(appliance.export().join(name), numbered(number)).unwrap();
    }
    daemon.signal("CONT");
    wait_for("every file's outcome", || {
        pause(Duration::from_secs(1));
        let counts = &appliance.status()["counts"];
        counts["classified"] == count && counts["outbox"] == 0
    });
    assert!(appliance.log().contains("file events were lost"));
    wait_for("the last result", || {
        subscriber.of_kind("result").len() >= count
    });
    let results = subscriber.results();
    assert_eq!(results.len(), count);
    assert_eq!(assert_no_double_outcome(&results), 0);
    // The events work again.
    appliance.rename_in("after.png", &numbered(count));
    wait_for("one more", || {
        appliance.status()["counts"]["classified"] == count + 1
    });
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn whatever_lies_in_the_folder_has_one_outcome() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.start();
    let export = appliance.export();
    let outside = appliance.folder.path().join("outside");
    let mut pictures = (0..).map(numbered);
    let mut picture = || pictures.next().unwrap();
    let write = |path: &Path, bytes: &[u8]| std::fs::write(path, bytes).unwrap();
    let mut scans = 0;

    // Folders in new folders, filled faster than they can be watched.
    for series in 0..5 {
        let folder = export.join(format!("study/{series}/a/b/c"));
        std::fs::create_dir_all(&folder).unwrap();
        write(&folder.join("1.png"), &picture());
        write(&folder.join("../2.png"), &picture());
        scans += 2;
    }
    // Names of all kinds.
    let long = "n".repeat(251);
    for name in [
        b"\xff\xfe\x80.png".to_vec(),
        format!("{long}.png").into_bytes(),
        b"line\nfeed \x1b[31m".to_vec(),
    ] {
        write(&export.join(std::ffi::OsString::from_vec(name)), &picture());
        scans += 1;
    }
    // Times far off.
    for (name, seconds) in [("future.png", 4_102_444_800), ("past.png", 0)] {
        let path = export.join(name);
        write(&path, &picture());
        let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_times(FileTimes::new().set_modified(time)).unwrap();
        scans += 1;
    }
    // A folder comes in whole, and the same bytes under other names are no other scans.
    std::fs::create_dir_all(outside.join("moved")).unwrap();
    let twice = picture();
    write(&outside.join("moved/1.png"), &twice);
    write(&outside.join("moved/2.png"), &picture());
    std::fs::rename(outside.join("moved"), export.join("moved")).unwrap();
    scans += 2;
    write(&export.join("copy.png"), &twice);
    std::fs::hard_link(export.join("copy.png"), export.join("linked.png")).unwrap();
    symlink("copy.png", export.join("inner-link.png")).unwrap();
    // What is none of the scanner's, or no file.
    write(&outside.join("other.png"), &picture());
    symlink(outside.join("other.png"), export.join("outer-link.png")).unwrap();
    symlink(&outside, export.join("outer-folder")).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(export.join("socket")).unwrap();
    let mut odd = vec!["outside_folder", "not_a_file", "not_a_file"];
    let made = |program: &str, arguments: &[&str]| {
        let status = Command::new(program)
            .args(arguments)
            .current_dir(&export)
            .status();
        status.is_ok_and(|s| s.success())
    };
    if made("mkfifo", &["fifo"]) {
        odd.push("not_a_file");
    }
    if is_root() && made("mknod", &["device", "c", "1", "5"]) {
        odd.push("not_a_file");
    }
    scans += odd.len();
    let results = subscriber.wait_for_scans(scans);
    let mut codes: Vec<_> = results
        .iter()
        .filter_map(|r| r["rejected"]["code"].as_str())
        .collect();
    codes.sort_unstable();
    odd.sort_unstable();
    assert_eq!(codes, odd);

    // Moved about, out and in again: nothing new.
    std::fs::rename(export.join("study"), export.join("renamed")).unwrap();
    std::fs::rename(export.join("moved/1.png"), export.join("elsewhere.png")).unwrap();
    std::fs::rename(export.join("copy.png"), outside.join("copy.png")).unwrap();
    std::fs::rename(export.join("moved"), outside.join("moved")).unwrap();
    pause(Duration::from_millis(500));
    std::fs::rename(outside.join("copy.png"), export.join("again.png")).unwrap();
    std::fs::rename(outside.join("moved"), export.join("moved")).unwrap();
    // Rewritten in place: a new scan.
    write(&export.join("past.png"), &picture());
    scans += 1;
    subscriber.wait_for_scans(scans);
    // A new file in a folder that was renamed.
    write(&export.join("renamed/4/a/b/c/late.png"), &picture());
    scans += 1;
    subscriber.wait_for_scans(scans);
    pause(Duration::from_secs(3));
    let results = subscriber.results();
    assert_eq!(results.len(), scans, "nothing is published twice");
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn a_file_that_is_cut_and_grows_while_it_is_read_has_one_outcome() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.set("SCANSENTRY__WATCH__SETTLE_MS", "50");
    appliance.start();
    let path = appliance.export().join("a.bmp");
    let mut bytes = std::io::Cursor::new(Vec::new());
    let picture = image::RgbImage::from_fn(1500, 1000, |x, y| image::Rgb([x as u8, y as u8, 90]));
    picture
        .write_to(&mut bytes, image::ImageFormat::Bmp)
        .unwrap();
    let bytes = bytes.into_inner();
    // Each close says "complete", and the next writer begins at once.
    for round in 0..60 {
        let mut file = std::fs::File::create(&path).unwrap();
        file.write_all(&bytes[..bytes.len() * (1 + round % 6) / 7])
            .unwrap();
        pause(Duration::from_millis(round as u64 % 20));
        file.set_len(bytes.len() as u64 / 3).unwrap();
    }
    std::fs::write(&path, &bytes).unwrap();
    let results = subscriber.wait_for_scans(1);
    assert_eq!(results[0]["outcome"], "classified");
    pause(Duration::from_secs(2));
    assert_eq!(subscriber.results().len(), 1);
    assert_eq!(appliance.status()["counts"]["rejected"], 0);
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn a_clock_that_jumps_makes_nothing_wait_and_nothing_forgotten() {
    let mut places = std::fs::read_dir("/usr/lib").unwrap().map(|entry| {
        let place = entry.unwrap().path();
        place.join("faketime/libfaketime.so.1")
    });
    let Some(library) = places.find(|library| library.exists()) else {
        println!("skipped: no libfaketime (Debian package faketime)");
        return;
    };
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    let clock = appliance.folder.path().join("clock");
    let jump = |by: &str| {
        let new = clock.with_extension("new");
        std::fs::write(&new, by).unwrap();
        std::fs::rename(new, &clock).unwrap();
    };
    // Our clock is a day ahead of who writes there: half a picture looks as if it had long been left alone, and grows all the same.
    jump("+1d");
    let half = appliance.export().join("half.png");
    let slice = &slices(1)[0];
    std::fs::write(&half, &slice[..slice.len() / 2]).unwrap();
    // By `env`, so that only the daemon's clock is wrong.
    appliance.program.splice(
        0..0,
        [
            "env".to_owned(),
            format!("LD_PRELOAD={}", library.display()),
            format!("FAKETIME_TIMESTAMP_FILE={}", clock.display()),
            "FAKETIME_NO_CACHE=1".to_owned(),
            "FAKETIME_DONT_FAKE_MONOTONIC=1".to_owned(),
        ],
    );
    appliance.set("SCANSENTRY__WATCH__RESCAN_S", "5");
    appliance.set("SCANSENTRY__ALERT__QUIET_S", "2");
    appliance.start();
    pause(Duration::from_secs(2));
    assert_eq!(appliance.status()["counts"]["rejected"], 0);
    std::fs::write(&half, slice).unwrap();
    let results = subscriber.wait_for_scans(1);
    assert_eq!(results[0]["outcome"], "classified");
    let mut scans = 1;
    let mut studies = 0;
    // Two years on, past the retention; four back, before everything that is known; and right again.
    for by in ["+0d", "+730d", "-1460d", "+0d"] {
        jump(by);
        for way in 0..2 {
            scans += 1;
            let name = format!("{scans}.png");
            if way == 0 {
                appliance.rename_in(&name, &numbered(scans));
            } else {
                // Without an event that says that it is complete.
                let file = std::fs::File::create(appliance.export().join(&name));
                let mut file = file.unwrap();
                file.write_all(&numbered(scans)).unwrap();
                subscriber.wait_for_scans(scans);
            }
        }
        wait_for("the end of the study", || {
            subscriber.of_kind("study").len() > studies
        });
        studies = subscriber.of_kind("study").len();
        // A walk, and what it makes forgotten.
        pause(Duration::from_secs(6));
    }
    assert_eq!(subscriber.results().len(), scans, "nothing again");
    let counts = appliance.status()["counts"].clone();
    assert_eq!(counts["classified"], scans);
    let known = subscriber.results();
    let id = known[0]["scan_id"].as_str().unwrap();
    let lookup = appliance.command(&["lookup", id]).output().unwrap();
    assert!(lookup.status.success(), "the first is still known");
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn a_fuse_share_is_polled_without_being_told() {
    let Some(space) = Namespace::new() else {
        return;
    };
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    let export = appliance.export();
    let server = appliance.folder.path().join("server");
    std::fs::create_dir(&server).unwrap();
    if !space.try_run(&["bindfs", server.to_str().unwrap(), export.to_str().unwrap()]) {
        println!("skipped: no FUSE mount (Debian package bindfs, /dev/fuse)");
        return;
    }
    space.confine(&mut appliance);
    appliance.set("SCANSENTRY__WATCH__POLL_S", "1");
    appliance.start();
    // Another machine writes: not through this mount, so no event comes here.
    for number in 0..3 {
        std::fs::write(server.join(format!("{number}.png")), numbered(number)).unwrap();
        subscriber.wait_for_scans(number + 1);
    }
    assert!(appliance.log().contains("polling"));
    // The server dies: an error at every access, until it is mounted again.
    space.run(&["umount", "-l", export.to_str().unwrap()]);
    wait_for("degraded health", || {
        appliance.began_and_ended("folder_away") == (1, 0)
    });
    std::fs::write(server.join("late.png"), numbered(9)).unwrap();
    space.run(&["bindfs", server.to_str().unwrap(), export.to_str().unwrap()]);
    let results = subscriber.wait_for_scans(4);
    assert_eq!(assert_no_double_outcome(&results), 0);
    wait_for("good health", || {
        appliance.began_and_ended("folder_away") == (1, 1)
    });
    assert_eq!(appliance.stop(), Some(0));
}

/// Files come as fast as they are worked on, and more of them wait than the queue holds: the rest is found by walks, which must get their turn while
/// the others go on coming.
#[test]
fn a_stream_without_a_gap_leaves_no_file_behind() {
    const AHEAD: i64 = 300;
    const EARLY: i64 = 2500;
    let broker = Mosquitto::start();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.set("SCANSENTRY__LIMITS__QUEUE", "16");
    appliance.start();
    let ledger = || Connection::open(appliance.state().join(DATABASE)).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let (ledger, mut fed) = (ledger(), 0);
            let worked_on = "SELECT coalesce(max(value), 0) FROM counter WHERE name = 'classified'";
            while !done.load(Ordering::Relaxed) {
                let worked_on: i64 = ledger.query_row(worked_on, [], |row| row.get(0)).unwrap();
                if fed < worked_on + AHEAD {
                    appliance.rename_in(&format!("{fed:06}.png"), &numbered(fed as usize));
                    fed += 1;
                }
            }
        });
        let ledger = ledger();
        let early = "SELECT count(*) FROM file JOIN scan USING (scan_id) WHERE done_at IS NOT NULL AND path < ?1";
        let start = Instant::now();
        let mut have = 0;
        // The stream ends in any case, or the test would not.
        while have < EARLY && start.elapsed() < PATIENCE {
            let before = format!("{EARLY:06}").into_bytes();
            have = ledger.query_row(early, [before], |row| row.get(0)).unwrap();
            pause(Duration::from_millis(50));
        }
        done.store(true, Ordering::Relaxed);
        assert_eq!(have, EARLY, "of the first, while others come");
    });
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn a_file_that_is_renamed_in_is_looked_at_once() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::toy(&broker.url());
    appliance.start();
    for number in 0..5 {
        appliance.rename_in(&format!("{number}.png"), &numbered(number));
        subscriber.wait_for_scans(number + 1);
    }
    // Longer than a file has to be quiet.
    pause(Duration::from_secs(1));
    let again = "these bytes have their outcome already";
    assert_eq!(appliance.log().matches(again).count(), 0);
}
