//! Simulated appliances: each a real MQTT client with a connection and a last will of its own, and messages made by the same types as the daemon's.
//! No folder, no model, no ledger: what is simulated is the load on what comes behind.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use scansentry::config::{Config, Mqtt};
use scansentry::imaging::decode::SourceKind;
use scansentry::imaging::quality::{Assessment, Quality};
use scansentry::manifest::DecisionRule;
use scansentry::message::{
    AlertChange, Backlog, ClassifiedPicture, Counts, Examined, HealthMessage, Kind, ModelRef,
    OutboxMessage, PositivePicture, Reporter, Sender, StudyState, encode, rfc3339,
};
use scansentry::mqtt::{Backoff, Event, Sending, Session, Settings, Ticket};
use scansentry::prediction::{
    Classified, Decision, Prediction, Roi, RuleInForce, RuleOwner, Timings,
};
use scansentry::publisher::{OFFLINE, ONLINE, STOPPED};
use scansentry::scan::{Pseudonym, PseudonymKey, sha256};
use tokio::runtime::Runtime;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// One picture in so many is positive; a study with one raises an alert.
const POSITIVE: u64 = 40;

/// What every appliance of a fleet does.
#[derive(Debug, Clone)]
pub struct Plan {
    pub port: u16,
    /// Appliances; the n-th stands at the site `site-<n % sites>`.
    pub appliances: usize,
    pub sites: usize,
    /// Results of one burst, which are one study,
    pub burst: u64,
    /// and time between the beginnings of two bursts.
    pub every: Duration,
    pub bursts: u64,
    /// Whether all bursts begin at the same moment; otherwise they are spread evenly.
    pub in_step: bool,
    /// Enters all ids: another round, other scans.
    pub round: u64,
}

impl Plan {
    pub fn results(&self) -> usize {
        self.appliances * (self.burst * self.bursts) as usize
    }
}

/// What one appliance, or a fleet, has sent.
#[derive(Default)]
pub struct Sent {
    /// When each result was handed to its connection for the first time.
    pub results: HashMap<Pseudonym, Instant>,
    /// From there to the broker's acknowledgement, seconds.
    pub acked: Vec<f64>,
    /// Messages and bytes of payload by kind, resends left out.
    pub volume: BTreeMap<&'static str, (u64, u64)>,
    pub alerts: u64,
    /// Connections that were lost.
    pub lost: u64,
}

impl Sent {
    fn add(&mut self, other: Self) {
        self.results.extend(other.results);
        self.acked.extend(other.acked);
        for (kind, (count, bytes)) in other.volume {
            let entry = self.volume.entry(kind).or_default();
            *entry = (entry.0 + count, entry.1 + bytes);
        }
        self.alerts += other.alerts;
        self.lost += other.lost;
    }
}

/// Appliances that are connected, and wait for the word to begin.
pub struct Fleet {
    runtime: Runtime,
    begin: watch::Sender<Option<Instant>>,
    appliances: Vec<JoinHandle<Sent>>,
    born: Arc<AtomicUsize>,
}

impl Fleet {
    pub fn connect(plan: &Plan) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()
            .unwrap();
        let (begin, word) = watch::channel(None);
        let born = Arc::new(AtomicUsize::new(0));
        let start = |number| {
            let appliance = Simulated::new(plan, number);
            runtime.spawn(appliance.live(plan.clone(), word.clone(), born.clone()))
        };
        let appliances = (0..plan.appliances).map(start).collect();
        Self {
            runtime,
            begin,
            appliances,
            born,
        }
    }

    /// Appliances whose status and health the broker has.
    pub fn born(&self) -> usize {
        self.born.load(Ordering::Relaxed)
    }

    pub fn begin(&self) {
        self.begin.send_replace(Some(Instant::now()));
    }

    /// Until all have said all, and have stopped in order.
    pub fn finish(self) -> Sent {
        let mut sent = Sent::default();
        for appliance in self.appliances {
            sent.add(self.runtime.block_on(appliance).unwrap());
        }
        sent
    }

    /// From the beginning to the end.
    pub fn run(plan: &Plan) -> Sent {
        let fleet = Self::connect(plan);
        fleet.begin();
        fleet.finish()
    }
}

/// A message that waits for its acknowledgement.
struct Message {
    kind: Kind,
    payload: Vec<u8>,
    /// Of a result.
    event_id: Option<Pseudonym>,
    first: Option<Instant>,
}

struct Simulated {
    number: usize,
    mqtt: Mqtt,
    settings: Settings,
    reporter: Reporter,
    started: jiff::Timestamp,
    counts: Counts,
    /// The study of the burst before.
    study: Option<StudyState>,
}

impl Simulated {
    fn new(plan: &Plan, number: usize) -> Self {
        let (device, site) = (
            format!("mri-{number}"),
            format!("site-{}", number % plan.sites),
        );
        let topic_base = format!("scansentry/{site}/{device}");
        let mut mqtt = Config::defaults().mqtt;
        mqtt.url = format!("mqtt://127.0.0.1:{}", plan.port);
        mqtt.backoff_max_s = 1;
        let settings = Settings::new(&mqtt, &format!("scansentry-{site}.{device}"))
            .unwrap()
            .with_will(
                format!("{topic_base}/status"),
                OFFLINE,
                sending(Kind::Status),
            );
        let mut key = [7; 32];
        key[..8].copy_from_slice(&(number as u64).to_le_bytes());
        Self {
            number,
            mqtt,
            settings,
            reporter: Reporter {
                sender: Sender {
                    topic_base,
                    device,
                    site,
                },
                key: PseudonymKey::new(key),
                model: Arc::new(ModelRef {
                    name: "braintumor".into(),
                    version: "0.1.0".into(),
                    sha256: "0".repeat(64),
                }),
                labels: vec!["no_tumor".into(), "tumor".into()],
                rule: RuleInForce {
                    rule: DecisionRule::default(),
                    owner: RuleOwner::Model,
                },
            },
            started: jiff::Timestamp::now(),
            counts: Counts::default(),
            study: None,
        }
    }

    async fn live(
        mut self,
        plan: Plan,
        mut word: watch::Receiver<Option<Instant>>,
        born: Arc<AtomicUsize>,
    ) -> Sent {
        let mut sent = Sent::default();
        let mut backoff = Backoff::new(&self.mqtt);
        let mut waiting: VecDeque<Message> = VecDeque::new();
        let mut begun = None;
        let mut bursts = 0;
        let mut counted = false;
        let share = self.number as f64 / plan.appliances as f64;
        let phase = plan.every.mul_f64(if plan.in_step { 0.0 } else { share });
        loop {
            let mut session = Session::open(&self.settings);
            let mut on_way: BTreeMap<Ticket, Message> = BTreeMap::new();
            let mut connected = false;
            loop {
                while connected
                    && on_way.len() < usize::from(self.mqtt.inflight)
                    && let Some(mut message) = waiting.pop_front()
                {
                    if message.first.is_none() {
                        let now = Instant::now();
                        message.first = Some(now);
                        sent.results.extend(message.event_id.map(|id| (id, now)));
                        let (count, bytes) = sent.volume.entry(message.kind.suffix()).or_default();
                        (*count, *bytes) = (*count + 1, *bytes + message.payload.len() as u64);
                        sent.alerts += u64::from(message.kind == Kind::Alert);
                    }
                    let topic = self.reporter.sender.topic(message.kind);
                    let payload = message.payload.clone();
                    let ticket = session
                        .publish(&topic, payload, &sending(message.kind))
                        .await;
                    let Ok(ticket) = ticket else {
                        waiting.push_front(message);
                        break;
                    };
                    on_way.insert(ticket, message);
                }
                if connected && on_way.is_empty() && waiting.is_empty() {
                    if !std::mem::replace(&mut counted, true) {
                        born.fetch_add(1, Ordering::Relaxed);
                    }
                    if bursts == plan.bursts {
                        self.leave(session).await;
                        return sent;
                    }
                }
                let next = begun.map(|begun: Instant| begun + phase + plan.every * bursts as u32);
                tokio::select! {
                    event = session.next() => match event {
                        Event::Connected => {
                            connected = true;
                            waiting.push_front(self.health());
                            waiting.push_front(plain(Kind::Status, ONLINE));
                        }
                        Event::Acked(ticket) => {
                            let message = on_way.remove(&ticket).unwrap();
                            if let (Some(first), Some(_)) = (message.first, message.event_id) {
                                sent.acked.push(first.elapsed().as_secs_f64());
                            }
                        }
                        Event::Refused(_, reason) => panic!("{reason}"),
                        Event::Message { .. } => {}
                        Event::Lost(_) => {
                            sent.lost += 1;
                            for message in on_way.into_values().rev() {
                                waiting.push_front(message);
                            }
                            break;
                        }
                    },
                    Ok(()) = word.changed(), if begun.is_none() => begun = *word.borrow(),
                    () = tokio::time::sleep_until(next.unwrap_or_else(Instant::now).into()), if next.is_some() && bursts < plan.bursts => {
                        waiting.extend(self.burst(&plan, bursts));
                        bursts += 1;
                    }
                }
            }
            tokio::time::sleep(backoff.wait()).await;
        }
    }

    /// An orderly stop: the last word is retained, and the last will is not published.
    async fn leave(&self, mut session: Session) {
        let topic = self.reporter.sender.topic(Kind::Status);
        let stopped = STOPPED.to_vec();
        session
            .publish(&topic, stopped, &sending(Kind::Status))
            .await
            .unwrap();
        while !matches!(session.next().await, Event::Acked(_)) {}
        session.close(Duration::from_secs(5)).await;
    }

    /// The results of one study, its alert if there is a positive one among them, and the end of the study before; then health.
    fn burst(&mut self, plan: &Plan, burst: u64) -> Vec<Message> {
        let study_id = self.id("study", &[plan.round, burst]);
        let now = jiff::Timestamp::now().as_second();
        let mut study = StudyState {
            study_id,
            opened_at: now,
            last_at: now,
            images: 0,
            positives: 0,
            rejected: 0,
            max_probability: None,
            top_scan: None,
            alert_revision: 0,
            open: true,
            alert_open: false,
            alert_positives: 0,
            closings: 0,
            positive_pictures: Vec::new(),
        };
        let mut messages = Vec::new();
        for number in burst * plan.burst..(burst + 1) * plan.burst {
            let positive = (number + self.number as u64).is_multiple_of(POSITIVE);
            let examined = self.examined(&[plan.round, number], positive);
            study.images += 1;
            self.counts.classified += 1;
            if positive {
                study.positives += 1;
                self.counts.positive += 1;
                study.max_probability = Some(0.93);
                study.top_scan = Some(examined.scan_id);
                study.positive_pictures.push(PositivePicture {
                    scan_id: examined.scan_id,
                    frame: None,
                    probability: 0.93,
                });
            }
            let results = self.reporter.results(&examined, study_id, 1);
            messages.extend(results.into_iter().map(|m| message(Kind::Result, m)));
        }
        if study.positives > 0 {
            study.alert_revision = 1;
            let raised = self.reporter.alert(&study, AlertChange::Raised);
            messages.push(message(Kind::Alert, raised));
        }
        if let Some(mut before) = self.study.replace(study) {
            before.closings = 1;
            if before.positives > 0 {
                before.alert_revision = 2;
                let closed = self.reporter.alert(&before, AlertChange::Closed);
                messages.push(message(Kind::Alert, closed));
            }
            messages.push(message(Kind::Study, self.reporter.study(&before, true)));
        }
        messages.push(self.health());
        messages
    }

    fn id(&self, domain: &str, numbers: &[u64]) -> Pseudonym {
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        self.reporter.key.pseudonym(domain, &[&bytes])
    }

    fn examined(&self, numbers: &[u64], positive: bool) -> Examined {
        let probability = if positive { 0.93 } else { 0.071 };
        let bytes: Vec<u8> = numbers.iter().flat_map(|n| n.to_le_bytes()).collect();
        Examined {
            scan_id: self.reporter.key.scan_id(&sha256(&bytes)),
            attempt: 1,
            kind: Some(SourceKind::Dicom),
            series_id: Some(self.id("series", &numbers[..1])),
            modality: Some("MR"),
            acquired_at: Some(rfc3339(jiff::Timestamp::now())),
            notes: vec![],
            pictures: vec![ClassifiedPicture {
                frame: None,
                outcome: Ok(Classified {
                    prediction: Prediction {
                        scores: vec![1.0 - probability, probability],
                        label: usize::from(positive),
                        probability,
                        decision: Decision::by(&self.reporter.rule.rule, probability),
                        heatmap: None,
                    },
                    roi: Roi {
                        x: 31,
                        y: 22,
                        width: 388,
                        height: 431,
                    },
                    seen: None,
                    quality: Some(Assessment {
                        quality: Quality {
                            brain_share: 0.412,
                            solidity: 0.954,
                            corner_share: 0.0,
                            contrast: 0.627,
                            clipped: 0.002,
                            color_share: 0.0,
                        },
                        flags: vec![],
                        misfit: None,
                    }),
                    timings: Timings {
                        decode: 3.412,
                        roi: 1.207,
                        resize: 0.431,
                        infer: 5.118,
                        total: 10.214,
                    },
                }),
            }],
        }
    }

    fn health(&self) -> Message {
        let payload = encode(&HealthMessage {
            schema: Kind::Health.schema(),
            device: &self.reporter.sender.device,
            site: &self.reporter.sender.site,
            at: rfc3339(jiff::Timestamp::now()),
            state: "ok",
            conditions: vec![],
            backlog: Backlog::new(0, &self.counts),
            last_error: None,
            open_alerts: 0,
            counts: self.counts,
            previews: None,
            started_at: rfc3339(self.started),
            version: env!("CARGO_PKG_VERSION"),
            model: &self.reporter.model,
            engine: "litert 2.1.4",
        });
        plain(Kind::Health, &payload)
    }
}

fn plain(kind: Kind, payload: &[u8]) -> Message {
    Message {
        kind,
        payload: payload.to_vec(),
        event_id: None,
        first: None,
    }
}

fn message(kind: Kind, message: OutboxMessage) -> Message {
    Message {
        kind,
        payload: message.payload,
        event_id: (kind == Kind::Result).then_some(message.event_id),
        first: None,
    }
}

/// As the publisher sends it.
fn sending(kind: Kind) -> Sending {
    Sending {
        retain: kind.retained(),
        content_type: Some(kind.content_type()),
        expiry_s: None,
        user: vec![("schema", kind.schema())],
    }
}
