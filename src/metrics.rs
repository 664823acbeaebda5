//! Numbers for Prometheus. Labels are codes, names of models and states of machines, never anything of an image or a person.
//!
//! Counters are kept as things happen; gauges are set from the state of things when somebody asks.

use std::fmt::Write as _;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};

use crate::message::{Examined, ModelRef, outcome_word};

/// Upper bounds of the histograms, seconds.
const BOUNDS: [f64; 12] = [
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0,
];

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: Word,
    reason: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stage {
    stage: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Heard {
    kind: Word,
    outcome: Word,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct State {
    state: Word,
}

/// A label that is one of a fixed set of words.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Word(&'static str);

impl EncodeLabelValue for Word {
    fn encode(&self, encoder: &mut LabelValueEncoder) -> Result<(), std::fmt::Error> {
        encoder.write_str(self.0)
    }
}

type Level = Gauge<u64, AtomicU64>;

fn histogram() -> Histogram {
    Histogram::new(BOUNDS)
}

/// What the daemon counts.
#[derive(Debug, Clone)]
pub struct Metrics {
    pictures: Family<Outcome, Counter>,
    stages: Family<Stage, Histogram, fn() -> Histogram>,
}

/// What the daemon's parts say when somebody asks.
#[derive(Debug)]
pub struct Now<'a> {
    /// Files in hand.
    pub files: u64,
    /// Messages in the outbox.
    pub messages: u64,
    /// Parked messages.
    pub parked: u64,
    /// Whether there is a connection to the broker.
    pub connected: bool,
    /// Published codes of the conditions that hold.
    pub conditions: &'a [&'static str],
    /// The model.
    pub model: &'a ModelRef,
    /// The runtime that runs it.
    pub engine: &'a str,
}

impl Default for Metrics {
    fn default() -> Self {
        Self {
            pictures: Family::default(),
            stages: Family::new_with_constructor(histogram),
        }
    }
}

impl Metrics {
    /// Counts the pictures of a scan.
    pub fn count(&self, examined: &Examined) {
        for picture in &examined.pictures {
            let (found, reason) = (
                picture.outcome.as_ref().ok(),
                picture.outcome.as_ref().err(),
            );
            let detail = match (found, reason) {
                (Some(found), _) => found.prediction.decision.as_str(),
                (None, Some(reason)) => reason.code.as_str(),
                (None, None) => "",
            };
            self.pictures
                .get_or_create(&Outcome {
                    outcome: Word(outcome_word(found.is_some(), reason)),
                    reason: Word(detail),
                })
                .inc();
            let Some(timings) = found.map(|found| found.timings) else {
                continue;
            };
            for (stage, ms) in [
                ("decode", timings.decode),
                ("roi", timings.roi),
                ("resize", timings.resize),
                ("infer", timings.infer),
                ("total", timings.total),
            ] {
                self.stages
                    .get_or_create(&Stage { stage: Word(stage) })
                    .observe(ms / 1000.0);
            }
        }
    }

    /// The daemon's part of the answer to a scrape.
    pub fn register(&self, registry: &mut Registry, now: &Now<'_>) {
        registry.register(
            "pictures",
            "Pictures by outcome and decision or reason since the start",
            self.pictures.clone(),
        );
        registry.register_with_unit(
            "stage",
            "Time of each step of one picture",
            Unit::Seconds,
            self.stages.clone(),
        );
        level(
            registry,
            "backlog_files",
            "Files noticed and not finished",
            now.files,
        );
        level(
            registry,
            "backlog_messages",
            "Messages that the broker has not acknowledged",
            now.messages,
        );
        level(
            registry,
            "outbox_parked",
            "Messages set aside that the broker did not take while it took others",
            now.parked,
        );
        level(
            registry,
            "mqtt_connected",
            "1 with a connection to the broker",
            u64::from(now.connected),
        );
        let conditions = Family::<Code, Level>::default();
        for code in now.conditions {
            conditions.get_or_create(&Code { code: Word(code) }).set(1);
        }
        registry.register(
            "condition",
            "1 for each degraded state that holds",
            conditions,
        );
        registry.register(
            "model",
            "The model",
            Info::new(vec![
                ("name", now.model.name.clone()),
                ("version", now.model.version.clone()),
                ("sha256", now.model.sha256.clone()),
                ("engine", now.engine.to_owned()),
            ]),
        );
    }
}

/// What a dashboard counts.
#[derive(Debug, Clone, Default)]
pub struct DashboardMetrics {
    heard: Family<Heard, Counter>,
    /// Results in the history.
    pub rows: Level,
    /// 1 with a connection to the broker.
    pub connected: Level,
    /// Pages with live events.
    pub pages: Level,
    states: Family<State, Level>,
}

impl DashboardMetrics {
    /// Counts messages by kind and what became of them: `stored`, `known`, `unusable`, `dropped`.
    pub fn heard(&self, kind: &'static str, outcome: &'static str) {
        let (kind, outcome) = (Word(kind), Word(outcome));
        self.heard.get_or_create(&Heard { kind, outcome }).inc();
    }

    /// How many appliances are in a state.
    pub fn appliances(&self, state: &'static str, count: u64) {
        let state = Word(state);
        self.states.get_or_create(&State { state }).set(count);
    }

    /// The dashboard's part of the answer to a scrape.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "dashboard_messages",
            "Messages heard by kind and what became of them",
            self.heard.clone(),
        );
        registry.register(
            "dashboard_history_rows",
            "Results in the history",
            self.rows.clone(),
        );
        registry.register(
            "dashboard_mqtt_connected",
            "1 with a connection to the broker",
            self.connected.clone(),
        );
        registry.register(
            "dashboard_pages",
            "Pages with live events",
            self.pages.clone(),
        );
        registry.register(
            "dashboard_appliances",
            "Appliances by state",
            self.states.clone(),
        );
    }
}

fn level(registry: &mut Registry, name: &str, help: &str, value: u64) {
    let gauge = Level::default();
    gauge.set(value);
    registry.register(name, help, gauge);
}

/// The answer to a scrape: what `fill` registers under the prefix `scansentry_`, and the process itself.
pub fn text(fill: impl FnOnce(&mut Registry)) -> String {
    let mut registry = Registry::default();
    let ours = registry.sub_registry_with_prefix("scansentry");
    let version = vec![("version", env!("CARGO_PKG_VERSION"))];
    ours.register("build", "The program", Info::new(version));
    fill(ours);
    if let Some(process) = Process::now() {
        let group = registry.sub_registry_with_prefix("process");
        level(
            group,
            "resident_memory_bytes",
            "Resident memory",
            process.resident,
        );
        level(
            group,
            "open_fds",
            "Open file descriptors",
            process.descriptors,
        );
        let start = Gauge::<f64, AtomicU64>::default();
        start.set(process.started_s);
        group.register("start_time_seconds", "When the process started", start);
        let cpu = Counter::<f64, AtomicU64>::default();
        cpu.inc_by(process.cpu.as_secs_f64());
        group.register("cpu_seconds", "Processor time", cpu);
    }
    let mut text = String::new();
    if encode(&mut text, &registry).is_err() {
        let _ = writeln!(text, "# EOF");
    }
    text
}

/// What the kernel says about this process.
struct Process {
    resident: u64,
    descriptors: u64,
    started_s: f64,
    cpu: Duration,
}

impl Process {
    fn now() -> Option<Self> {
        let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
        // The name, in brackets, may hold anything; the fields after it are counted from 3.
        let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        let field = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        let ticks = rustix::param::clock_ticks_per_second() as f64;
        let machine = std::fs::read_to_string("/proc/stat").ok()?;
        let boot = machine
            .lines()
            .find_map(|line| line.strip_prefix("btime "))?;
        Some(Self {
            resident: field(24)? * rustix::param::page_size() as u64,
            descriptors: std::fs::read_dir("/proc/self/fd").ok()?.count() as u64,
            started_s: boot.trim().parse::<f64>().ok()? + field(22)? as f64 / ticks,
            cpu: Duration::from_secs_f64((field(14)? + field(15)?) as f64 / ticks),
        })
    }
}
