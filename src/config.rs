//! Configuration: layered, checked as a whole, every problem reported at once.
//!
//! `config/scansentry.toml` is compiled in and is the lowest layer, so the documented defaults *are* the defaults, and a
//! key that is not in that file does not exist. Above it: the configuration file, `conf.d/*.toml` beside it, and
//! `SCANSENTRY__SECTION__KEY` from the environment.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

use crate::imaging::quality::{QualityLimits, QualityRule};
use crate::manifest::DecisionRule;
use crate::prediction::{RuleInForce, RuleOwner};

/// The documented defaults, and with them the list of all keys.
pub const DEFAULTS: &str = include_str!("../config/scansentry.toml");

/// Where the configuration lies unless `--config` or `SCANSENTRY_CONFIG` says otherwise.
pub const DEFAULT_PATH: &str = "/etc/scansentry/config.toml";

const ENV_PREFIX: &str = "SCANSENTRY__";

/// The whole configuration, checked. Field docs are in `config/scansentry.toml`.
#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Config {
    pub device: Device,
    pub watch: Watch,
    pub limits: Limits,
    pub model: Model,
    pub decision: Decision,
    pub quality: Quality,
    pub pipeline: Pipeline,
    pub state: State,
    pub mqtt: Mqtt,
    pub alert: Alert,
    pub preview: Preview,
    pub command: Command,
    pub home_assistant: HomeAssistant,
    pub health: Health,
    pub http: Http,
    pub dashboard: Dashboard,
    pub log: Log,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Device {
    pub id: String,
    pub site: String,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Watch {
    pub folder: PathBuf,
    pub recursive: bool,
    pub max_depth: usize,
    pub ignore: Vec<String>,
    pub mode: WatchMode,
    pub rescan_s: u64,
    pub poll_s: u64,
    pub settle_ms: u64,
    pub incomplete_s: u64,
}

/// How changes in the folder are noticed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchMode {
    /// Events where the file system delivers them, polling elsewhere.
    Auto,
    /// Events in any case.
    Events,
    /// Polling in any case.
    Poll,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Limits {
    pub file_bytes: u64,
    pub pixels: u64,
    pub decode_bytes: u64,
    pub frames: u32,
    pub queue: usize,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Model {
    pub bundle: PathBuf,
    pub public_key: String,
    pub engine: EngineChoice,
    pub threads: usize,
}

/// Which runtime runs the model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EngineChoice {
    /// The fastest of this build.
    Auto,
    /// LiteRT.
    LiteRt,
    /// TensorFlow Lite 1.15.
    TfLite,
}

/// What stands above the model's own rule.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[allow(missing_docs)]
pub struct Decision {
    pub threshold: ModelsOwn,
    pub indeterminate: ModelsOwn,
}

/// A setting of the model that the appliance may put its own in the place of.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum ModelsOwn {
    /// [`MODELS_OWN`], or another word of the key.
    Word(String),
    /// The appliance's own.
    Number(f64),
    /// The appliance's own.
    Numbers(Vec<f64>),
}

/// The word for "as the model's manifest says". A key with this default takes numbers too.
const MODELS_OWN: &str = "model";

/// What [`Decision::indeterminate`] says.
enum Band {
    Models,
    Off,
    Own([f64; 2]),
}

/// The word for "no band".
const OFF: &str = "off";

impl Decision {
    /// The rule in force for a model whose own rule is `model`; every problem is one line.
    pub fn over(&self, model: &DecisionRule) -> Result<RuleInForce, Vec<String>> {
        let (threshold, band) = self.parts()?;
        let rule = DecisionRule {
            threshold: threshold.unwrap_or(model.threshold),
            indeterminate: match band {
                Band::Models => model.indeterminate,
                Band::Off => None,
                Band::Own(band) => Some(band),
            },
        };
        let band_is_models = matches!(band, Band::Models);
        let owner = if threshold.is_none() && band_is_models {
            RuleOwner::Model
        } else {
            RuleOwner::Appliance
        };
        let hint = if band_is_models && rule.indeterminate.is_some() {
            "; the band is the model's own, so set decision.indeterminate too, or \"off\""
        } else {
            ""
        };
        let problems = rule.problems();
        if problems.is_empty() {
            Ok(RuleInForce { rule, owner })
        } else {
            Err(problems.iter().map(|p| format!("{p}{hint}")).collect())
        }
    }

    /// What is set: the threshold and the band.
    fn parts(&self) -> Result<(Option<f64>, Band), Vec<String>> {
        let mut problems = Vec::new();
        let threshold = match &self.threshold {
            ModelsOwn::Word(word) if word == MODELS_OWN => None,
            ModelsOwn::Number(number) => Some(*number),
            other => {
                problems.push(format!(
                    "decision.threshold: {other} is no threshold; expected a number above 0 and below 1, or \"model\""
                ));
                None
            }
        };
        let band = match &self.indeterminate {
            ModelsOwn::Word(word) if word == MODELS_OWN => Band::Models,
            ModelsOwn::Word(word) if word == OFF => Band::Off,
            ModelsOwn::Numbers(numbers) if numbers.len() == 2 => {
                Band::Own([numbers[0], numbers[1]])
            }
            other => {
                problems.push(format!(
                    "decision.indeterminate: {other} is no band; expected [low, high] around the threshold, \"off\" or \"model\""
                ));
                Band::Models
            }
        };
        if problems.is_empty() {
            Ok((threshold, band))
        } else {
            Err(problems)
        }
    }

    /// What is wrong whatever the model's own rule is.
    fn check(&self, fail: &mut impl FnMut(String)) {
        // A band alone has to hold the model's threshold, which is not known here.
        let possible = |low: f64, high: f64| {
            0.0 <= low && low <= high && high <= 1.0 && low < 1.0 && high > 0.0
        };
        let own = match self.parts() {
            Ok((None, Band::Own([low, high]))) if !possible(low, high) => Err(vec![format!(
                "decision.indeterminate: [{low}, {high}] is out of range; expected [low, high] around the threshold, from 0 to 1"
            )]),
            Ok((None, _)) => Ok(()),
            Ok((Some(threshold), _)) => self
                .over(&DecisionRule {
                    threshold,
                    indeterminate: None,
                })
                .map(|_| ()),
            Err(lines) => Err(lines),
        };
        if let Err(lines) = own {
            lines.into_iter().for_each(fail);
        }
    }
}

impl std::fmt::Display for ModelsOwn {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Word(word) => write!(f, "{word:?}"),
            Self::Number(number) => write!(f, "{number}"),
            Self::Numbers(numbers) => write!(f, "{numbers:?}"),
        }
    }
}

/// What is done about pictures that are unusual.
#[derive(Debug, Clone, Copy, Deserialize)]
#[allow(missing_docs)]
pub struct Quality {
    pub misfits: Misfits,
    pub flag: QualityLimits,
    pub indeterminate: QualityLimits,
}

impl Quality {
    /// The limits as the rule that applies them.
    pub fn rule(&self) -> QualityRule {
        QualityRule {
            flag: self.flag,
            indeterminate: self.indeterminate,
        }
    }
}

/// What a gross misfit means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Misfits {
    /// The decision is indeterminate, whatever the model says.
    Indeterminate,
    /// The flags say so, the decision stands.
    Flag,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Pipeline {
    pub workers: usize,
    pub attempts: u32,
    pub deadline_s: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct State {
    pub dir: PathBuf,
    pub outbox_messages: u64,
    pub retention_days: u32,
    pub min_free_bytes: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Mqtt {
    pub url: String,
    pub protocol: u8,
    pub topic_prefix: String,
    pub client_id: String,
    pub username: String,
    pub password_file: String,
    pub ca_file: String,
    pub cert_file: String,
    pub key_file: String,
    pub insecure: bool,
    pub keep_alive_s: u64,
    pub connect_timeout_s: u64,
    pub ack_timeout_s: u64,
    pub inflight: u16,
    pub expiry_s: u32,
    pub backoff_min_ms: u64,
    pub backoff_max_s: u64,
    pub drain_s: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Alert {
    pub enabled: bool,
    pub min_positives: u32,
    pub window: u32,
    pub quiet_s: u64,
    pub update_s: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Preview {
    pub enabled: bool,
    pub max_bytes: usize,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Command {
    pub enabled: bool,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct HomeAssistant {
    pub enabled: bool,
    pub prefix: String,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Health {
    pub interval_s: u64,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Http {
    pub enabled: bool,
    pub listen: String,
    pub token_file: String,
    pub allowed_hosts: Vec<String>,
    pub connections: usize,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Dashboard {
    pub enabled: bool,
    pub name: String,
    pub dir: PathBuf,
    pub retention_days: u32,
    pub max_rows: u64,
    pub preview_bytes: u64,
    pub session_s: u32,
    pub follow: Vec<String>,
    pub share: String,
    pub upload: Upload,
    pub upload_files: usize,
}

/// Whether the page takes images.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Upload {
    /// Where only this machine can reach the page.
    Auto,
    /// In any case.
    On,
    /// Never.
    Off,
}

#[derive(Debug, Clone, Deserialize)]
#[allow(missing_docs)]
pub struct Log {
    pub level: String,
    pub format: LogFormat,
}

/// How log lines are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    /// By where standard error goes.
    Auto,
    /// For people.
    Text,
    /// One JSON object a line.
    Json,
    /// Fields for the systemd journal.
    Journald,
}

/// When a study's alert is raised: so many of the pictures classified last are positive.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AlertRule {
    /// How many, 1 to `window`.
    pub min_positives: u32,
    /// Of how many, 1-64.
    pub window: u32,
}

impl AlertRule {
    /// Whether pictures meet the rule: one bit each, the latest as the lowest, 1 for positive.
    pub fn met_by(self, recent: u64) -> bool {
        let window = u64::MAX >> (64 - self.window.clamp(1, 64));
        (recent & window).count_ones() >= self.min_positives
    }
}

impl Alert {
    /// The rule; `None` when there are no alerts.
    pub fn rule(&self) -> Option<AlertRule> {
        self.enabled.then_some(AlertRule {
            min_positives: self.min_positives,
            window: self.window,
        })
    }
}

impl Watch {
    /// How long a file must stay unchanged to count as complete.
    pub fn settle(&self) -> Duration {
        Duration::from_millis(self.settle_ms)
    }
}

/// What all engines may take where the number of workers is not given, in bytes: a quarter of what the systemd unit leaves to the daemon. Each is
/// reckoned at the size of its model: some runtimes copy the weights, and what an engine calculates with grows with the model too.
const ENGINES: usize = 128 << 20;

/// Cores that this process may use.
pub fn cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

impl Model {
    /// Threads of an inference while no other file is in work (else it has one): `threads`, or when it is 0 two, where there are two cores.
    pub fn inference_threads(&self) -> usize {
        match self.threads {
            0 => cores().min(2),
            n => n,
        }
    }
}

impl Http {
    /// `listen` taken apart; an error text in the project's style when it is not an IP address with a port.
    pub fn address(&self) -> Result<SocketAddr, String> {
        self.listen.parse().map_err(|_| {
            format!(
                "http.listen: {:?} is not an IP address with a port; write 127.0.0.1:8420, or 0.0.0.0:8420 for all interfaces",
                self.listen
            )
        })
    }
}

impl Dashboard {
    /// Where the history lies.
    pub fn folder(&self, state: &State) -> PathBuf {
        if self.dir.as_os_str().is_empty() {
            state.dir.join("dashboard")
        } else {
            self.dir.clone()
        }
    }
}

/// A broker address, taken apart.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BrokerAddress {
    /// Host name or IP address.
    pub host: String,
    /// TCP port, 1-65535.
    pub port: u16,
    /// Whether the connection is encrypted (`mqtts://`).
    pub tls: bool,
}

impl Mqtt {
    /// `url` taken apart; an error text in the project's style when it is not `mqtt[s]://host[:port]`.
    pub fn address(&self) -> Result<BrokerAddress, String> {
        let bad = |why: &str| {
            format!(
                "mqtt.url: {:?} {why}; write mqtt://HOST:1883 or mqtts://HOST:8883",
                self.url
            )
        };
        let (tls, rest) = if let Some(rest) = self.url.strip_prefix("mqtts://") {
            (true, rest)
        } else if let Some(rest) = self.url.strip_prefix("mqtt://") {
            (false, rest)
        } else {
            return Err(bad("does not begin with mqtt:// or mqtts://"));
        };
        let rest = rest.strip_suffix('/').unwrap_or(rest);
        if rest.contains('@') {
            return Err("mqtt.url: holds a user name or password; set mqtt.username and mqtt.password_file instead".into());
        }
        let default_port = if tls { 8883 } else { 1883 };
        let (host, port) = match rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
            Some((host, "")) => (host, default_port),
            Some((host, port)) => (
                host,
                port.strip_prefix(':')
                    .and_then(|p| p.parse().ok())
                    .ok_or_else(|| bad("has no valid port"))?,
            ),
            None => match rest.rsplit_once(':') {
                Some((host, port)) => (host, port.parse().map_err(|_| bad("has no valid port"))?),
                None => (rest, default_port),
            },
        };
        if host.is_empty() || host.contains(['/', '?', '#', ' ']) {
            return Err(bad("has no valid host"));
        }
        if port == 0 {
            return Err(bad("has port 0, which is not a valid port"));
        }
        Ok(BrokerAddress {
            host: host.to_owned(),
            port,
            tls,
        })
    }

    /// What works and is not safe, one line each: said at every start, by `check` and by `status`.
    pub fn warnings(&self) -> Vec<String> {
        let mut lines = Vec::new();
        if self.insecure {
            lines.push("mqtt.insecure: true, so anyone on the way can pose as the broker and read everything; set mqtt.ca_file instead".to_owned());
        }
        let in_the_clear = |address: &BrokerAddress| !address.tls && !address.is_loopback();
        if !self.username.is_empty() && self.address().is_ok_and(|a| in_the_clear(&a)) {
            lines.push("mqtt.username: is sent in the clear over mqtt://, with its password and all results; write mqtts://".to_owned());
        }
        lines
    }
}

impl BrokerAddress {
    /// Whether what is sent there never leaves this machine.
    fn is_loopback(&self) -> bool {
        let ip = self.host.parse::<std::net::IpAddr>();
        ip.map_or(self.host.eq_ignore_ascii_case("localhost"), |ip| {
            ip.is_loopback()
        })
    }
}

/// Everything that is wrong with a configuration; each entry is one line `what: value; hint`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems(pub Vec<String>);

impl std::fmt::Display for Problems {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl std::error::Error for Problems {}

/// Reads and checks the configuration: the defaults, then `path` (it must exist if `required`), then `conf.d/*.toml` in
/// the folder of `path` in name order, then `environment` (variables beginning with `SCANSENTRY__`).
pub fn load(
    path: &Path,
    required: bool,
    environment: impl IntoIterator<Item = (String, String)>,
) -> Result<Config, Problems> {
    let mut problems = Vec::new();
    let defaults: toml::Table = DEFAULTS
        .parse()
        .expect("the built-in defaults are valid TOML");
    let mut layers = Vec::new();
    if required || path.exists() {
        read_layer(path, &mut layers, &mut problems);
    }
    for file in drop_ins(path) {
        read_layer(&file, &mut layers, &mut problems);
    }
    for layer in &mut layers {
        let origin = layer.origin.clone();
        check_keys(&mut layer.table, &defaults, "", &origin, &mut problems);
    }
    let overrides = environment_layer(environment, &defaults, &mut problems);
    let mut builder = config::Config::builder()
        .add_source(config::File::from_str(DEFAULTS, config::FileFormat::Toml));
    for table in layers
        .into_iter()
        .map(|layer| layer.table)
        .chain([overrides])
    {
        builder = builder.add_source(config::File::from_str(
            &table.to_string(),
            config::FileFormat::Toml,
        ));
    }
    let config: Config = match builder.build().and_then(config::Config::try_deserialize) {
        Ok(config) => config,
        Err(error) => {
            // Types have been checked key by key; what is left is a word that is not one of a key's choices.
            problems.push(format!(
                "configuration: {}",
                error.to_string().replace('\n', " ")
            ));
            return Err(Problems(problems));
        }
    };
    config.validate(&mut problems);
    if problems.is_empty() {
        Ok(config)
    } else {
        Err(Problems(problems))
    }
}

impl Config {
    /// The built-in defaults.
    pub fn defaults() -> Self {
        toml::from_str(DEFAULTS).expect("the built-in defaults deserialize")
    }

    /// The number of worker threads for a model of that size in bytes: `pipeline.workers`, or when it is 0 one a core, up to 4, and fewer where
    /// their engines and a shared one would take more than [`ENGINES`].
    pub fn worker_count(&self, model: usize) -> usize {
        match self.pipeline.workers {
            0 => {
                let fit = (ENGINES / model.max(1)).saturating_sub(1);
                cores().min(4).min(fit).max(1)
            }
            n => n,
        }
    }

    fn validate(&self, problems: &mut Vec<String>) {
        let mut fail = |line: String| problems.push(line);
        for (key, value) in [
            ("device.id", &self.device.id),
            ("device.site", &self.device.site),
        ] {
            if !is_topic_level(value) {
                fail(format!(
                    "{key}: {value:?} is not a valid name; use 1-64 letters, digits, - and _"
                ));
            }
        }
        for (key, path) in [
            ("watch.folder", &self.watch.folder),
            ("model.bundle", &self.model.bundle),
            ("state.dir", &self.state.dir),
        ] {
            if path.as_os_str().is_empty() {
                fail(format!("{key}: is empty; give a folder"));
            }
        }
        if self.state.dir.starts_with(&self.watch.folder) {
            fail(format!(
                "state.dir: {} lies inside watch.folder; keep it outside, the export folder is only read",
                self.state.dir.display()
            ));
        }
        for pattern in &self.watch.ignore {
            if let Err(error) = globset::Glob::new(pattern) {
                fail(format!(
                    "watch.ignore: {pattern:?} is not a valid pattern ({}); see globset's syntax",
                    error.kind()
                ));
            }
        }
        for (key, topic) in [
            ("mqtt.topic_prefix", &self.mqtt.topic_prefix),
            ("home_assistant.prefix", &self.home_assistant.prefix),
        ] {
            if topic.is_empty()
                || topic.len() > 128
                || topic.starts_with(['/', '$'])
                || topic.ends_with('/')
                || topic.contains(['+', '#', '\0'])
            {
                fail(format!(
                    "{key}: {topic:?} is not a valid topic; use words joined by / without + # and leading $"
                ));
            }
        }
        let tls = match self.mqtt.address() {
            Ok(address) => address.tls,
            Err(line) => {
                fail(line);
                true
            }
        };
        if !matches!(self.mqtt.protocol, 4 | 5) {
            fail(format!(
                "mqtt.protocol: {} is not a known version; use 5, or 4 for MQTT 3.1.1",
                self.mqtt.protocol
            ));
        }
        if !self.mqtt.password_file.is_empty() && self.mqtt.username.is_empty() {
            fail("mqtt.password_file: is set without mqtt.username; set both or none".into());
        }
        if self.mqtt.cert_file.is_empty() != self.mqtt.key_file.is_empty() {
            fail("mqtt.cert_file: client certificate and mqtt.key_file belong together; set both or none".into());
        }
        for (key, value) in [
            ("ca_file", &self.mqtt.ca_file),
            ("cert_file", &self.mqtt.cert_file),
        ] {
            if !tls && !value.is_empty() {
                fail(format!(
                    "mqtt.{key}: is set but mqtt.url is not encrypted; write mqtts://"
                ));
            }
        }
        if self.mqtt.insecure && !tls {
            fail(
                "mqtt.insecure: true, but mqtt.url is not encrypted; it goes with mqtts:// only"
                    .into(),
            );
        }
        if self.mqtt.insecure && !self.mqtt.ca_file.is_empty() {
            fail("mqtt.insecure: true, and mqtt.ca_file is set; the one is for not checking the broker's certificate, the other for checking it".into());
        }
        if self
            .log
            .level
            .parse::<tracing_subscriber::filter::Targets>()
            .is_err()
        {
            fail(format!(
                "log.level: {:?} is not a level or filter; use error, warn, info, debug or trace",
                self.log.level
            ));
        }
        match self.http.address() {
            Ok(address) if !address.ip().is_loopback() && self.http.token_file.is_empty() => {
                fail(format!(
                    "http.token_file: is not set, but http.listen = {address} can be reached from other machines; set it, or listen on 127.0.0.1"
                ));
            }
            Ok(_) if !self.http.allowed_hosts.is_empty() && self.http.token_file.is_empty() => {
                fail(
                    "http.token_file: is not set, but http.allowed_hosts means callers from other machines; set it"
                        .into(),
                );
            }
            Ok(_) => {}
            Err(line) => fail(line),
        }
        let name = &self.dashboard.name;
        if name.len() > 64
            || !name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        {
            fail(format!(
                "dashboard.name: {name:?} is not a valid name; use up to 64 letters, digits, -, _ and ."
            ));
        }
        for entry in &self.dashboard.follow {
            let mut names = entry.splitn(2, '/');
            if !names.all(is_topic_level) {
                fail(format!(
                    "dashboard.follow: {entry:?} is neither SITE nor SITE/DEVICE; use the names of device.site and device.id"
                ));
            }
        }
        let share = &self.dashboard.share;
        if !share.is_empty() && !is_topic_level(share) {
            fail(format!(
                "dashboard.share: {share:?} is not a valid name of a group; use up to 64 letters, digits, - and _"
            ));
        }
        if !share.is_empty() && self.mqtt.protocol == 4 {
            fail(
                "dashboard.share: needs MQTT 5, but mqtt.protocol is 4; leave one of them out"
                    .into(),
            );
        }
        if self
            .dashboard
            .folder(&self.state)
            .starts_with(&self.watch.folder)
        {
            fail(
                "dashboard.dir: lies inside watch.folder; keep it outside, its files are no images"
                    .into(),
            );
        }
        self.check_ranges(&mut fail);
        self.quality.check_shares(&mut fail);
        self.decision.check(&mut fail);
    }

    fn check_ranges(&self, fail: &mut impl FnMut(String)) {
        let mut range = |key: &str, value: u64, low: u64, high: u64| {
            if !(low..=high).contains(&value) {
                fail(format!(
                    "{key}: {value} is out of range; expected {low}-{high} (default {})",
                    default_of(key)
                ));
            }
        };
        let (watch, limits, mqtt) = (&self.watch, &self.limits, &self.mqtt);
        range("watch.max_depth", watch.max_depth as u64, 1, 64);
        range("watch.rescan_s", watch.rescan_s, 5, 86_400);
        range("watch.poll_s", watch.poll_s, 1, 3600);
        range("watch.settle_ms", watch.settle_ms, 50, 600_000);
        range("watch.incomplete_s", watch.incomplete_s, 0, 3600);
        range("limits.file_bytes", limits.file_bytes, 1024, 1 << 32);
        range("limits.pixels", limits.pixels, 4096, 1_000_000_000);
        range("limits.decode_bytes", limits.decode_bytes, 1 << 20, 1 << 33);
        range("limits.frames", u64::from(limits.frames), 1, 4096);
        range("limits.queue", limits.queue as u64, 1, 65_536);
        range("model.threads", self.model.threads as u64, 0, 16);
        range("pipeline.workers", self.pipeline.workers as u64, 0, 16);
        range("pipeline.deadline_s", self.pipeline.deadline_s, 5, 86_400);
        range(
            "pipeline.attempts",
            u64::from(self.pipeline.attempts),
            1,
            10,
        );
        range(
            "state.outbox_messages",
            self.state.outbox_messages,
            100,
            10_000_000,
        );
        range(
            "state.retention_days",
            u64::from(self.state.retention_days),
            1,
            36_500,
        );
        range(
            "state.min_free_bytes",
            self.state.min_free_bytes,
            0,
            1 << 40,
        );
        range("mqtt.keep_alive_s", mqtt.keep_alive_s, 5, 3600);
        range("mqtt.connect_timeout_s", mqtt.connect_timeout_s, 1, 300);
        range("mqtt.ack_timeout_s", mqtt.ack_timeout_s, 1, 3600);
        range("mqtt.inflight", u64::from(mqtt.inflight), 1, 1000);
        range("mqtt.expiry_s", u64::from(mqtt.expiry_s), 0, 31_536_000);
        range("mqtt.backoff_min_ms", mqtt.backoff_min_ms, 10, 60_000);
        range("mqtt.backoff_max_s", mqtt.backoff_max_s, 1, 3600);
        range("mqtt.drain_s", mqtt.drain_s, 0, 300);
        let alert = &self.alert;
        range("alert.window", u64::from(alert.window), 1, 64);
        let window = u64::from(alert.window.clamp(1, 64));
        range(
            "alert.min_positives",
            u64::from(alert.min_positives),
            1,
            window,
        );
        range("alert.quiet_s", self.alert.quiet_s, 1, 86_400);
        range("alert.update_s", self.alert.update_s, 1, 3600);
        range(
            "preview.max_bytes",
            self.preview.max_bytes as u64,
            8192,
            524_288,
        );
        range("health.interval_s", self.health.interval_s, 1, 3600);
        let (http, dashboard) = (&self.http, &self.dashboard);
        range("http.connections", http.connections as u64, 8, 10_000);
        range(
            "dashboard.retention_days",
            u64::from(dashboard.retention_days),
            1,
            3650,
        );
        range("dashboard.max_rows", dashboard.max_rows, 1000, 10_000_000);
        range(
            "dashboard.preview_bytes",
            dashboard.preview_bytes,
            0,
            1 << 40,
        );
        range(
            "dashboard.session_s",
            u64::from(dashboard.session_s),
            0,
            u64::from(u32::MAX) - 1,
        );
        range(
            "dashboard.upload_files",
            dashboard.upload_files as u64,
            1,
            1_000_000,
        );
    }
}

impl Quality {
    fn check_shares(&self, fail: &mut impl FnMut(String)) {
        for (section, limits) in [("flag", self.flag), ("indeterminate", self.indeterminate)] {
            for (name, value) in [
                ("min_brain_share", limits.min_brain_share),
                ("max_brain_share", limits.max_brain_share),
                ("min_solidity", limits.min_solidity),
                ("max_corner_share", limits.max_corner_share),
                ("min_contrast", limits.min_contrast),
                ("max_clipped", limits.max_clipped),
                ("max_color_share", limits.max_color_share),
            ] {
                if !(0.0..=1.0).contains(&value) {
                    let key = format!("quality.{section}.{name}");
                    let default = default_of(&key);
                    fail(format!(
                        "{key}: {value} is out of range; expected 0-1 (default {default})"
                    ));
                }
            }
        }
    }
}

/// Whether `text` can be a site or a device in a topic.
fn is_topic_level(text: &str) -> bool {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=64).contains(&text.len()) && text.chars().all(valid)
}

fn default_of(key: &str) -> String {
    lookup(&known_keys(), key).map_or_else(String::new, ToString::to_string)
}

fn known_keys() -> toml::Table {
    DEFAULTS
        .parse()
        .expect("the built-in defaults are valid TOML")
}

/// The value at a dotted key.
fn lookup<'a>(table: &'a toml::Table, key: &str) -> Option<&'a toml::Value> {
    match key.split_once('.') {
        None => table.get(key),
        Some((section, rest)) => lookup(table.get(section)?.as_table()?, rest),
    }
}

struct Layer {
    origin: String,
    table: toml::Table,
}

fn drop_ins(path: &Path) -> Vec<PathBuf> {
    let Some(folder) = path.parent() else {
        return Vec::new();
    };
    let mut files: Vec<_> = std::fs::read_dir(folder.join("conf.d"))
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .collect();
    files.sort();
    files
}

fn read_layer(path: &Path, layers: &mut Vec<Layer>, problems: &mut Vec<String>) {
    let origin = path.display().to_string();
    match std::fs::read_to_string(path) {
        Err(error) => problems.push(format!(
            "{origin}: cannot be read ({error}); give another file with --config"
        )),
        Ok(text) => match text.parse::<toml::Table>() {
            Ok(table) => layers.push(Layer { origin, table }),
            Err(error) => {
                let (line, message) = line_and_message(&text, &error);
                problems.push(format!(
                    "{origin}:{line}: {message}; see config/scansentry.toml for the syntax"
                ));
            }
        },
    }
}

/// Where in `text` a TOML error is, as a line number from 1, and what it says, as one line.
pub fn line_and_message(text: &str, error: &toml::de::Error) -> (usize, String) {
    let start = error.span().map_or(0, |span| span.start.min(text.len()));
    let line = String::from_utf8_lossy(&text.as_bytes()[..start])
        .matches('\n')
        .count()
        + 1;
    let words: Vec<_> = error.message().split_whitespace().collect();
    (line, words.join(" "))
}

/// Reports and removes keys that `known` does not have and values of another type.
fn check_keys(
    table: &mut toml::Table,
    known: &toml::Table,
    prefix: &str,
    origin: &str,
    problems: &mut Vec<String>,
) {
    table.retain(|name, value| {
        let key = format!("{prefix}{name}");
        match known.get(name) {
            None => {
                problems.push(format!(
                    "{origin}: {key}: is not a known key; {}",
                    suggestion(&key)
                ));
                false
            }
            Some(toml::Value::Table(known)) => {
                if let toml::Value::Table(table) = value {
                    check_keys(table, known, &format!("{key}."), origin, problems);
                    true
                } else {
                    problems.push(format!(
                        "{origin}: {key}: is a section, not a value; write [{key}]"
                    ));
                    false
                }
            }
            Some(default) if same_type(value, default) => true,
            Some(default) => {
                problems.push(format!(
                    "{origin}: {key}: {value} is a {}; expected a {} such as {default}",
                    value.type_str(),
                    default.type_str()
                ));
                false
            }
        }
    });
}

fn same_type(value: &toml::Value, default: &toml::Value) -> bool {
    let number = |value: &toml::Value| value.is_float() || value.is_integer();
    match (value, default) {
        (value, toml::Value::String(word)) if word == MODELS_OWN => match value {
            toml::Value::Array(values) => values.iter().all(number),
            value => value.is_str() || number(value),
        },
        (toml::Value::Array(values), toml::Value::Array(_)) => {
            values.iter().all(toml::Value::is_str)
        }
        (toml::Value::Integer(number), toml::Value::Integer(_)) => *number >= 0,
        (toml::Value::Integer(_), toml::Value::Float(_)) => true,
        _ => value.same_type(default),
    }
}

/// The nearest known key, by edit distance; a hint in any case.
fn suggestion(key: &str) -> String {
    let mut names = Vec::new();
    collect_names(&known_keys(), "", &mut names);
    names
        .iter()
        .map(|name| (strsim::damerau_levenshtein(name, key), name))
        .min()
        .filter(|(distance, name)| *distance <= name.len() / 2)
        .map_or_else(
            || "config/scansentry.toml lists all of them".to_owned(),
            |(_, name)| format!("did you mean {name}?"),
        )
}

fn collect_names(table: &toml::Table, prefix: &str, names: &mut Vec<String>) {
    for (name, value) in table {
        let key = format!("{prefix}{name}");
        if let toml::Value::Table(inner) = value {
            collect_names(inner, &format!("{key}."), names);
        }
        names.push(key);
    }
}

/// `SCANSENTRY__SECTION__KEY=value` as a layer, each value read as its key's type.
fn environment_layer(
    environment: impl IntoIterator<Item = (String, String)>,
    known: &toml::Table,
    problems: &mut Vec<String>,
) -> toml::Table {
    let mut layer = toml::Table::new();
    for (variable, text) in environment {
        let Some(rest) = variable.strip_prefix(ENV_PREFIX) else {
            continue;
        };
        let key = rest.to_ascii_lowercase().replace("__", ".");
        let Some(default) = lookup(known, &key).filter(|value| !value.is_table()) else {
            let hint = suggestion(&key);
            problems.push(format!("{variable}: is not a known key; {hint}"));
            continue;
        };
        match parse_as(default, &text) {
            Some(value) => insert(&mut layer, &key, value),
            None => problems.push(format!(
                "{variable}: {text:?} is not a {}; expected one such as {default}",
                default.type_str()
            )),
        }
    }
    layer
}

/// `text` as a value of the type of `default`.
fn parse_as(default: &toml::Value, text: &str) -> Option<toml::Value> {
    use toml::Value;
    Some(match default {
        Value::Integer(_) => Value::Integer(text.parse().ok().filter(|n: &i64| *n >= 0)?),
        Value::Float(_) => Value::Float(text.parse().ok()?),
        Value::String(word) if word == MODELS_OWN => {
            let numbers: Result<Vec<f64>, _> =
                text.split(',').map(|part| part.trim().parse()).collect();
            match numbers.as_deref() {
                Ok([number]) => Value::Float(*number),
                Ok(numbers) => Value::Array(numbers.iter().copied().map(Value::Float).collect()),
                Err(_) => Value::String(text.to_owned()),
            }
        }
        Value::Boolean(_) => Value::Boolean(text.parse().ok()?),
        Value::Array(_) => Value::Array(
            text.split(',')
                .map(str::trim)
                .filter(|s| !s.is_empty())
                .map(|s| Value::String(s.to_owned()))
                .collect(),
        ),
        _ => Value::String(text.to_owned()),
    })
}

/// Puts a value at a dotted key, making the tables on the way.
fn insert(table: &mut toml::Table, key: &str, value: toml::Value) {
    match key.split_once('.') {
        None => _ = table.insert(key.to_owned(), value),
        Some((section, rest)) => {
            let inner = table
                .entry(section.to_owned())
                .or_insert_with(|| toml::Value::Table(toml::Table::new()));
            if let toml::Value::Table(inner) = inner {
                insert(inner, rest, value);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load_text(text: &str, environment: &[(&str, &str)]) -> Result<Config, Problems> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        load(
            &path,
            true,
            environment
                .iter()
                .map(|(k, v)| ((*k).to_owned(), (*v).to_owned())),
        )
        .map_err(|p| {
            Problems(
                p.0.iter()
                    .map(|l| l.replace(&format!("{}", path.display()), "FILE"))
                    .collect(),
            )
        })
    }

    #[test]
    fn large_models_have_fewer_workers_unless_their_number_is_given() {
        let mut config = Config::defaults();
        let most = cores().min(4);
        for (model, fit) in [(4 << 20, 31), (40 << 20, 2), (60 << 20, 1), (500 << 20, 1)] {
            assert_eq!(config.worker_count(model), most.min(fit), "{model}");
        }
        config.pipeline.workers = 3;
        assert_eq!(config.worker_count(500 << 20), 3);
    }

    #[test]
    fn the_documented_defaults_are_valid() {
        let config = load_text("", &[]).unwrap();
        assert_eq!(config.mqtt.url, "mqtt://localhost:1883");
        assert_eq!(config.device.id, "mri-1");
        let mut problems = Vec::new();
        Config::defaults().validate(&mut problems);
        assert_eq!(problems, Vec::<String>::new());
    }

    #[test]
    fn callers_from_other_machines_need_a_token() {
        for (http, line) in [
            (
                "listen = '0.0.0.0:8420'",
                "can be reached from other machines",
            ),
            ("allowed_hosts = ['a.example']", "http.allowed_hosts means"),
        ] {
            let problems = load_text(&format!("[http]\n{http}\n"), &[]).unwrap_err();
            assert!(problems.0[0].contains(line), "{problems:?}");
            let with_token = format!("[http]\n{http}\ntoken_file = '/x'\n");
            load_text(&with_token, &[]).unwrap();
        }
    }

    #[test]
    fn later_layers_win() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        std::fs::write(
            &path,
            "[device]\nid = 'a'\nsite = 'base'\n[mqtt]\ninflight = 1\n",
        )
        .unwrap();
        std::fs::create_dir(folder.path().join("conf.d")).unwrap();
        std::fs::write(
            folder.path().join("conf.d/10-x.toml"),
            "[device]\nid = 'b'\n",
        )
        .unwrap();
        std::fs::write(
            folder.path().join("conf.d/20-y.toml"),
            "[device]\nid = 'c'\n",
        )
        .unwrap();
        let environment = [("SCANSENTRY__MQTT__INFLIGHT".to_owned(), "7".to_owned())];
        let config = load(&path, true, environment).unwrap();
        assert_eq!(
            (
                config.device.id.as_str(),
                config.device.site.as_str(),
                config.mqtt.inflight
            ),
            ("c", "base", 7)
        );
    }

    #[test]
    fn all_problems_come_at_once_with_a_hint() {
        let text = "[mqtt]\nurl = 'http://x'\ninflght = 3\nkeep_alive_s = 'x'\n[devise]\nid = 'a'\n[limits]\npixels = 1\n[watch]\nmode = 'poll'\n";
        let problems = load_text(
            text,
            &[
                ("SCANSENTRY__MQTT__PROTOCOL", "five"),
                ("SCANSENTRY__NO__SUCH", "1"),
            ],
        )
        .unwrap_err();
        insta::assert_snapshot!(problems.to_string(), @r#"
        FILE: devise: is not a known key; did you mean device?
        FILE: mqtt.inflght: is not a known key; did you mean mqtt.inflight?
        FILE: mqtt.keep_alive_s: "x" is a string; expected a integer such as 30
        SCANSENTRY__MQTT__PROTOCOL: "five" is not a integer; expected one such as 5
        SCANSENTRY__NO__SUCH: is not a known key; config/scansentry.toml lists all of them
        mqtt.url: "http://x" does not begin with mqtt:// or mqtts://; write mqtt://HOST:1883 or mqtts://HOST:8883
        limits.pixels: 1 is out of range; expected 4096-1000000000 (default 50000000)
        "#);
    }

    #[test]
    fn a_broken_file_and_a_wrong_choice_are_named() {
        let problems = load_text("[mqtt\n", &[]).unwrap_err();
        assert!(problems.0[0].starts_with("FILE:1: "), "{problems}");
        let problems = load_text("[watch]\nmode = 'telepathy'\n", &[]).unwrap_err();
        assert!(problems.to_string().contains("telepathy"), "{problems}");
    }

    #[test]
    fn the_rule_is_the_models_unless_it_is_set() {
        let model = DecisionRule {
            threshold: 0.5,
            indeterminate: Some([0.4, 0.6]),
        };
        let rule = |text: &str, environment: &[(&str, &str)]| {
            load_text(text, environment).map(|config| config.decision.over(&model))
        };
        let ours = |threshold, indeterminate| {
            Ok(RuleInForce {
                rule: DecisionRule {
                    threshold,
                    indeterminate,
                },
                owner: RuleOwner::Appliance,
            })
        };
        let models = rule("", &[]).unwrap().unwrap();
        assert_eq!((models.rule, models.owner), (model, RuleOwner::Model));
        for (text, threshold, band) in [
            ("threshold = 0.45", 0.45, Some([0.4, 0.6])),
            ("indeterminate = 'off'", 0.5, None),
            ("indeterminate = [0, 0.7]", 0.5, Some([0.0, 0.7])),
            ("threshold = 0.9\nindeterminate = 'off'", 0.9, None),
            (
                "threshold = 0.9\nindeterminate = [0.2, 0.95]",
                0.9,
                Some([0.2, 0.95]),
            ),
        ] {
            let found = rule(&format!("[decision]\n{text}\n"), &[]).unwrap();
            assert_eq!(found, ours(threshold, band), "{text}");
        }
        let environment = [
            ("SCANSENTRY__DECISION__THRESHOLD", "0.3"),
            ("SCANSENTRY__DECISION__INDETERMINATE", "0.2, 0.7"),
        ];
        assert_eq!(rule("", &environment).unwrap(), ours(0.3, Some([0.2, 0.7])));
        let off = [("SCANSENTRY__DECISION__INDETERMINATE", "off")];
        assert_eq!(rule("", &off).unwrap(), ours(0.5, None));

        // What only the model shows to be wrong.
        let lines = rule("[decision]\nthreshold = 0.7\n", &[])
            .unwrap()
            .unwrap_err();
        assert_eq!(
            lines,
            [
                "decision.indeterminate: [0.4, 0.6] does not hold the threshold 0.7; expected [low, high] around it, from 0 to 1; the band is the model's own, so set decision.indeterminate too, or \"off\""
            ]
        );
        let lines = rule("[decision]\nindeterminate = [0.6, 0.7]\n", &[])
            .unwrap()
            .unwrap_err();
        assert!(
            lines[0].contains("does not hold the threshold 0.5"),
            "{lines:?}"
        );
    }

    #[test]
    fn a_rule_that_is_nonsense_is_refused_without_a_model() {
        for (text, expected) in [
            ("threshold = 0", "decision.threshold: 0 is out of range"),
            ("threshold = 1.0", "decision.threshold: 1 is out of range"),
            ("threshold = nan", "decision.threshold: NaN is out of range"),
            (
                "threshold = 'off'",
                "decision.threshold: \"off\" is no threshold",
            ),
            (
                "threshold = [0.5]",
                "decision.threshold: [0.5] is no threshold",
            ),
            (
                "indeterminate = 0.5",
                "decision.indeterminate: 0.5 is no band",
            ),
            (
                "indeterminate = [0.5]",
                "decision.indeterminate: [0.5] is no band",
            ),
            (
                "indeterminate = 'on'",
                "decision.indeterminate: \"on\" is no band",
            ),
            (
                "indeterminate = [0.7, 0.6]",
                "decision.indeterminate: [0.7, 0.6] is out of range",
            ),
            (
                "indeterminate = [-0.1, 0.6]",
                "decision.indeterminate: [-0.1, 0.6] is out of range",
            ),
            (
                "indeterminate = [0, 0]",
                "decision.indeterminate: [0, 0] is out of range",
            ),
            (
                "indeterminate = [1, 1]",
                "decision.indeterminate: [1, 1] is out of range",
            ),
            (
                "indeterminate = [nan, 0.5]",
                "decision.indeterminate: [NaN, 0.5] is out of range",
            ),
            (
                "threshold = 0.8\nindeterminate = [0.4, 0.6]",
                "decision.indeterminate: [0.4, 0.6] does not hold the threshold 0.8",
            ),
            (
                "threshold = true",
                "FILE: decision.threshold: true is a boolean",
            ),
            (
                "indeterminate = ['a', 'b']",
                "FILE: decision.indeterminate: [\"a\", \"b\"] is a array",
            ),
        ] {
            let problems = load_text(&format!("[decision]\n{text}\n"), &[]).unwrap_err();
            assert!(problems.0[0].starts_with(expected), "{text}: {problems}");
            assert_eq!(problems.0.len(), 1, "{text}: {problems}");
        }
    }

    #[test]
    fn broker_addresses() {
        let address = |url: &str| {
            Mqtt {
                url: url.into(),
                ..Config::defaults().mqtt
            }
            .address()
        };
        let ok = |host: &str, port, tls| {
            Ok(BrokerAddress {
                host: host.into(),
                port,
                tls,
            })
        };
        assert_eq!(address("mqtt://b"), ok("b", 1883, false));
        assert_eq!(address("mqtts://b.example"), ok("b.example", 8883, true));
        assert_eq!(address("mqtt://[::1]:99/"), ok("::1", 99, false));
        for bad in [
            "mqtt://",
            "mqtt://a:0",
            "mqtt://a:70000",
            "b:1883",
            "mqtt://u:p@b",
            "mqtt://a/b",
        ] {
            assert!(address(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_not_safe_is_said_or_refused() {
        for (url, more, warned, refused) in [
            ("mqtts://broker.example", "", "", ""),
            (
                "mqtts://broker.example",
                "insecure = true",
                "mqtt.insecure: true",
                "",
            ),
            (
                "mqtt://broker.example",
                "insecure = true",
                "",
                "mqtts:// only",
            ),
            (
                "mqtts://broker.example",
                "insecure = true\nca_file = '/ca.pem'",
                "",
                "mqtt.ca_file is set",
            ),
            ("mqtt://broker.example", "", "", ""),
            ("mqtts://broker.example", "username = 'a'", "", ""),
            ("mqtt://localhost", "username = 'a'", "", ""),
            ("mqtt://127.0.0.1", "username = 'a'", "", ""),
            ("mqtt://[::1]", "username = 'a'", "", ""),
            (
                "mqtt://broker.example",
                "username = 'a'",
                "in the clear",
                "",
            ),
            ("mqtt://192.0.2.7", "username = 'a'", "in the clear", ""),
        ] {
            let loaded = load_text(&format!("[mqtt]\nurl = '{url}'\n{more}\n"), &[]);
            let (warnings, problems) = match loaded {
                Ok(config) => (config.mqtt.warnings().join("\n"), String::new()),
                Err(problems) => (String::new(), problems.to_string()),
            };
            for (found, expected) in [(warnings, warned), (problems, refused)] {
                assert!(found.contains(expected), "{url} {more}: {found}");
                assert_eq!(
                    found.is_empty(),
                    expected.is_empty(),
                    "{url} {more}: {found}"
                );
            }
        }
    }

    #[test]
    fn what_a_dashboard_follows_and_shares() {
        for (text, refused) in [
            (
                "[dashboard]\nfollow = ['radiology', 'ward/mri-1']\nshare = 'desks'",
                "",
            ),
            (
                "[dashboard]\nfollow = ['radiology/+']",
                "dashboard.follow: \"radiology/+\"",
            ),
            (
                "[dashboard]\nfollow = ['a/b/c']",
                "is neither SITE nor SITE/DEVICE",
            ),
            ("[dashboard]\nfollow = ['']", "dashboard.follow: \"\""),
            (
                "[dashboard]\nshare = 'a/b'",
                "dashboard.share: \"a/b\" is not a valid name",
            ),
            (
                "[dashboard]\nshare = 'desks'\n[mqtt]\nprotocol = 4",
                "dashboard.share: needs MQTT 5",
            ),
        ] {
            let problems = load_text(text, &[]).map_or_else(|p| p.to_string(), |_| String::new());
            assert!(problems.contains(refused), "{text}: {problems}");
            assert_eq!(
                problems.is_empty(),
                refused.is_empty(),
                "{text}: {problems}"
            );
        }
    }

    #[test]
    fn every_key_of_the_documentation_states_its_unit_or_meaning() {
        for line in DEFAULTS
            .lines()
            .filter(|l| l.contains(" = ") && !l.starts_with('#'))
        {
            let key = line.split(" = ").next().unwrap();
            assert!(
                line.contains('#') || ["ignore", "bundle"].contains(&key),
                "{line}"
            );
        }
    }
}
