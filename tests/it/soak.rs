//! The soak: one appliance at full speed, one with an image a minute, for an hour, watched from outside. `make soak`.

use std::collections::{HashSet, VecDeque};
use std::io::{BufRead as _, BufReader};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use scansentry::store::DATABASE;
use serde_json::Value;

use crate::support::{Appliance, Mosquitto, Process, pause, slices};

/// Files that may wait in the folder of the fast appliance.
const AHEAD: usize = 400;

/// Files that stay in the folder of the fast appliance; older ones are taken away, as a scanner's clean-up does.
const KEPT: usize = 20_000;

/// Pictures in turn, each with a number behind its end, so that no two files are the same.
const PICTURES: usize = 200;

/// What a daemon takes at one moment.
#[derive(Debug, Clone, Copy)]
struct Sample {
    hours: f64,
    images: usize,
    memory_kb: f64,
    descriptors: usize,
    threads: usize,
    ledger_bytes: u64,
    log_bytes: u64,
}

/// One appliance with what is known of it.
struct Watched {
    name: &'static str,
    appliance: Appliance,
    seen: Arc<Mutex<Seen>>,
    _subscriber: Process,
    fed: usize,
    lying: VecDeque<String>,
    samples: Vec<Sample>,
}

#[derive(Default)]
struct Seen {
    scans: HashSet<u128>,
    events: HashSet<u128>,
    resends: usize,
}

fn number(text: &Value) -> u128 {
    u128::from_str_radix(text.as_str().unwrap(), 16).unwrap()
}

impl Watched {
    fn start(name: &'static str, broker: &Mosquitto) -> Self {
        let mut appliance = Appliance::new(&broker.url());
        appliance.set("SCANSENTRY__DEVICE__ID", name);
        appliance.set("SCANSENTRY__LOG__LEVEL", "info");
        let mut subscriber = Process::spawn(
            Command::new("mosquitto_sub")
                .args(["-h", "127.0.0.1", "-p", &broker.port.to_string()])
                .args(["-q", "1", "-c", "-i", name])
                .args(["-t", &format!("scansentry/+/{name}/result")])
                .stdout(Stdio::piped()),
        );
        let lines = BufReader::new(subscriber.0.stdout.take().unwrap()).lines();
        let seen = Arc::new(Mutex::new(Seen::default()));
        let theirs = seen.clone();
        std::thread::spawn(move || {
            for line in lines.map_while(Result::ok) {
                let result: Value = serde_json::from_str(&line).unwrap();
                let mut seen = theirs.lock().unwrap();
                let new_scan = seen.scans.insert(number(&result["scan_id"]));
                if seen.events.insert(number(&result["event_id"])) {
                    assert!(new_scan, "a second outcome for a scan: {line}");
                } else {
                    seen.resends += 1;
                }
            }
        });
        appliance.start();
        Self {
            name,
            appliance,
            seen,
            _subscriber: subscriber,
            fed: 0,
            lying: VecDeque::new(),
            samples: Vec::new(),
        }
    }

    fn images(&self) -> usize {
        self.seen.lock().unwrap().scans.len()
    }

    fn feed(&mut self, pictures: &[Vec<u8>]) {
        let mut bytes = pictures[self.fed % pictures.len()].clone();
        bytes.extend_from_slice(&(self.fed as u64).to_le_bytes());
        let name = format!("{}.img", self.fed);
        self.appliance.rename_in(&name, &bytes);
        self.fed += 1;
        self.lying.push_back(name);
        if self.lying.len() > KEPT
            && let Some(old) = self.lying.pop_front()
        {
            std::fs::remove_file(self.appliance.export().join(old)).unwrap();
        }
    }

    fn sample(&mut self, start: Instant) {
        let pid = self.appliance.process.as_ref().unwrap().0.id();
        let bytes = |name: String| {
            std::fs::metadata(self.appliance.state().join(name)).map_or(0, |m| m.len())
        };
        self.samples.push(Sample {
            hours: start.elapsed().as_secs_f64() / 3600.0,
            images: self.images(),
            memory_kb: self.appliance.process_figure("VmRSS") as f64,
            descriptors: std::fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .count(),
            threads: self.appliance.process_figure("Threads") as usize,
            ledger_bytes: bytes(DATABASE.into()) + bytes(format!("{DATABASE}-wal")),
            log_bytes: self.appliance.log().len() as u64,
        });
    }

    /// Prints what was measured, and holds it against bounds that no leak would keep.
    fn judge(&self) {
        // The first fifth is warming up.
        let settled = &self.samples[self.samples.len() / 5..];
        let (first, last) = (settled[0], settled[settled.len() - 1]);
        let slope = slope(settled);
        let most = |what: fn(&Sample) -> usize| settled.iter().map(what).max().unwrap();
        let least = |what: fn(&Sample) -> usize| settled.iter().map(what).min().unwrap();
        let memory = |kb: f64| format!("{:.1} MB", kb / 1024.0);
        let resends = self.seen.lock().unwrap().resends;
        println!(
            "{}: {} images, {resends} resends; memory {} to {}, {:+.2} MB/h; descriptors {}-{}, threads {}-{}; ledger {:.1} MB, {} bytes an image; log {} bytes an image",
            self.name,
            last.images,
            memory(first.memory_kb),
            memory(last.memory_kb),
            slope / 1024.0,
            least(|s| s.descriptors),
            most(|s| s.descriptors),
            least(|s| s.threads),
            most(|s| s.threads),
            last.ledger_bytes as f64 / 1e6,
            last.ledger_bytes / last.images.max(1) as u64,
            last.log_bytes / last.images.max(1) as u64,
        );
        for sample in self.samples.iter().step_by(self.samples.len().div_ceil(12)) {
            println!(
                "  {:5.2} h {:>8} images {:>10} {:>3} descriptors {:>3} threads {:>7.1} MB ledger",
                sample.hours,
                sample.images,
                memory(sample.memory_kb),
                sample.descriptors,
                sample.threads,
                sample.ledger_bytes as f64 / 1e6
            );
        }
        assert!(
            last.memory_kb < first.memory_kb * 1.25 + 8192.0,
            "memory grows"
        );
        assert!(most(|s| s.descriptors) <= first.descriptors + 8);
        assert!(most(|s| s.threads) <= first.threads + 8);
    }
}

/// Least squares, kB an hour.
fn slope(samples: &[Sample]) -> f64 {
    let n = samples.len() as f64;
    let mean = |what: fn(&Sample) -> f64| samples.iter().map(what).sum::<f64>() / n;
    let (x, y) = (mean(|s| s.hours), mean(|s| s.memory_kb));
    let over: f64 = samples
        .iter()
        .map(|s| (s.hours - x) * (s.memory_kb - y))
        .sum();
    over / samples.iter().map(|s| (s.hours - x).powi(2)).sum::<f64>()
}

#[test]
#[ignore = "an hour: make soak"]
fn an_hour_at_full_speed_and_one_at_an_image_a_minute() {
    let minutes = std::env::var("SOAK_MINUTES").map_or(60, |m| m.parse().unwrap());
    let time = Duration::from_mins(minutes);
    let broker = Mosquitto::start();
    let pictures = slices(PICTURES);
    let mut fast = Watched::start("fast", &broker);
    let mut slow = Watched::start("slow", &broker);
    let start = Instant::now();
    let pace = Duration::from_secs(10).min(time / 60);
    while start.elapsed() < time {
        while fast.fed < fast.images() + AHEAD {
            fast.feed(&pictures);
        }
        while slow.fed as u64 <= start.elapsed().as_secs() / 60 {
            slow.feed(&pictures);
        }
        if start.elapsed() > pace * fast.samples.len() as u32 {
            fast.sample(start);
            slow.sample(start);
        }
        pause(Duration::from_millis(20));
    }
    for watched in [&mut fast, &mut slow] {
        let late = Instant::now();
        while watched.images() < watched.fed {
            // Longer than the time between two walks: what only a walk finds is late, not lost, and is said to be.
            assert!(
                late.elapsed() < Duration::from_mins(7),
                "{}: {} of {} images have a result; status {}",
                watched.name,
                watched.images(),
                watched.fed,
                watched.appliance.status()
            );
            pause(Duration::from_millis(100));
        }
        println!(
            "{}: the last result {:.1} s after the last image",
            watched.name,
            late.elapsed().as_secs_f64()
        );
        watched.sample(start);
        let appliance = &mut watched.appliance;
        appliance.wait_until_delivered();
        assert_eq!(appliance.status()["counts"]["classified"], watched.fed);
        assert_eq!(watched.appliance.log().matches("degraded").count(), 0);
        assert_eq!(watched.appliance.stop(), Some(0));
        watched.judge();
    }
}
