//! The published JSON: wire types, topics and event ids. Domain types are turned into these and nothing else is sent.
//!
//! Nothing here can hold a patient name, a UID or a file name: ids come in as [`Pseudonym`]s only.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::health::{Condition, Conditions, LastError};
use crate::imaging::decode::{DecodeNote, SourceKind};
use crate::imaging::quality::{Quality, QualityFlag};
use crate::prediction::{
    Classified, Decision, Prediction, RejectReason, Roi, RuleInForce, RuleOwner, Timings,
};
use crate::scan::{Pseudonym, PseudonymKey, ScanId};

/// In every payload that speaks of an image.
pub const NOTICE: &str = "research use only, not for diagnosis";

/// Milliseconds, rounded to the microsecond, for the wire.
pub fn millis(duration: std::time::Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// RFC 3339, UTC, milliseconds.
pub fn rfc3339(time: jiff::Timestamp) -> String {
    format!("{time:.3}")
}

/// RFC 3339, UTC, from seconds since 1970.
pub fn rfc3339_seconds(seconds: i64) -> String {
    jiff::Timestamp::from_second(seconds).map_or_else(|_| String::new(), |time| time.to_string())
}

/// Who speaks: part of every payload, and of every topic.
#[derive(Debug, Clone)]
pub struct Sender {
    /// `<prefix>/<site>/<device>`.
    pub topic_base: String,
    /// `device.id`.
    pub device: String,
    /// `device.site`.
    pub site: String,
}

impl Sender {
    /// The sender that the configuration names.
    pub fn new(config: &crate::config::Config) -> Self {
        let (device, site) = (config.device.id.clone(), config.device.site.clone());
        Self {
            topic_base: format!("{}/{site}/{device}", config.mqtt.topic_prefix),
            device,
            site,
        }
    }

    /// The topic of a kind of message.
    pub fn topic(&self, kind: Kind) -> String {
        format!("{}/{}", self.topic_base, kind.suffix())
    }
}

/// What an appliance publishes, each on its own topic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `online`, `stopped` or `offline`, as plain text; retained.
    Status,
    /// [`HealthMessage`]; retained.
    Health,
    /// [`ResultMessage`].
    Result,
    /// [`AlertMessage`].
    Alert,
    /// [`StudyMessage`].
    Study,
    /// [`PreviewMessage`].
    Preview,
    /// [`CommandResultMessage`].
    CommandResult,
}

impl Kind {
    const ALL: [Self; 7] = [
        Self::Status,
        Self::Health,
        // Before `Result`, which the same topics end in.
        Self::CommandResult,
        Self::Result,
        Self::Alert,
        Self::Study,
        Self::Preview,
    ];

    /// The end of its topic, after `<prefix>/<site>/<device>/`.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Status => "status",
            Self::Health => "health",
            Self::Result => "result",
            Self::Alert => "alert",
            Self::Study => "study",
            Self::Preview => "preview",
            Self::CommandResult => "command/result",
        }
    }

    /// The name of its schema; `docs/mqtt/` holds one for each.
    pub fn schema(self) -> &'static str {
        match self {
            Self::Status => "scansentry/status/1",
            Self::Health => "scansentry/health/1",
            Self::Result => "scansentry/result/1",
            Self::Alert => "scansentry/alert/1",
            Self::Study => "scansentry/study/1",
            Self::Preview => "scansentry/preview/1",
            Self::CommandResult => "scansentry/command-result/1",
        }
    }

    /// The media type of its payload.
    pub fn content_type(self) -> &'static str {
        match self {
            Self::Status => "text/plain",
            _ => "application/json",
        }
    }

    /// Whether the broker keeps the last one for those who subscribe later.
    pub fn retained(self) -> bool {
        matches!(self, Self::Status | Self::Health)
    }

    /// The kind of the topics of appliances.
    pub fn of_topic(topic: &str) -> Option<Self> {
        let ends = |kind: &Self| {
            let rest = topic.strip_suffix(kind.suffix());
            rest.is_some_and(|rest| rest.ends_with('/'))
        };
        Self::ALL.into_iter().find(ends)
    }
}

/// The model that made a prediction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ModelRef {
    /// Name in the manifest.
    pub name: String,
    /// Version in the manifest.
    pub version: String,
    /// SHA-256 of the model file, hex.
    pub sha256: String,
}

/// A code with a line for people.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Reason {
    /// Stable machine-readable code.
    pub code: &'static str,
    /// One line.
    pub message: String,
}

impl From<&RejectReason> for Reason {
    fn from(reason: &RejectReason) -> Self {
        Self {
            code: reason.code.as_str(),
            message: reason.message.clone(),
        }
    }
}

/// Payload of `<base>/result`: one picture (a file, or one frame of a multi-frame file).
#[derive(Debug, Clone, Serialize)]
pub struct ResultMessage<'a> {
    /// `scansentry/result/1`.
    pub schema: &'static str,
    /// The same in every resend.
    pub event_id: Pseudonym,
    /// The same for the same bytes.
    pub scan_id: ScanId,
    /// 1, and one more each time that the scan was classified again on command.
    pub revision: u64,
    /// Which study the picture belongs to.
    pub study_id: Pseudonym,
    /// Which DICOM series the picture belongs to.
    pub series_id: Option<Pseudonym>,
    /// DICOM modality such as `MR`; null for other files and for words that are no defined term.
    pub modality: Option<&'static str>,
    /// Frame of a multi-frame file, from 1; null for single pictures.
    pub frame: Option<u32>,
    /// `device.id`.
    pub device: &'a str,
    /// `device.site`.
    pub site: &'a str,
    /// When the picture was taken or the file was written, UTC; null when not known.
    pub acquired_at: Option<String>,
    /// When it was classified, UTC.
    pub processed_at: String,
    /// Kind of file; null when it is not an image.
    pub source: Option<SourceKind>,
    /// The model.
    pub model: &'a ModelRef,
    /// `classified`, `rejected` or `skipped`.
    pub outcome: &'static str,
    /// Most probable label.
    pub label: Option<&'a str>,
    /// Probability of the positive labels, 0-1.
    pub probability: Option<f64>,
    /// Probability of each label.
    pub scores: Option<BTreeMap<&'a str, f64>>,
    /// The rule in force.
    #[serde(flatten)]
    pub rule: RuleMessage,
    /// `positive`, `negative` or `indeterminate`; null when rejected.
    pub decision: Option<Decision>,
    /// The decision in words.
    pub statement: Option<&'static str>,
    /// Why there is no prediction.
    pub rejected: Option<Reason>,
    /// The part of the picture that the model saw.
    pub roi: Option<Roi>,
    /// Why the decision is indeterminate although the model gave a probability: a gross misfit.
    pub misfit: Option<Reason>,
    /// What was measured on the picture, and what is unusual about it.
    pub quality: Option<QualityMessage<'a>>,
    /// How long it took.
    pub timings_ms: Option<Timings>,
    /// Whether an earlier run of the daemon had begun this scan and died.
    pub replayed: bool,
    /// [`NOTICE`].
    pub notice: &'static str,
}

/// The rule by which decisions are made, as keys of a payload.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct RuleMessage {
    /// At or above this the decision is positive, unless it is indeterminate.
    pub threshold: f64,
    /// From (included) and to (excluded) which probability the decision is indeterminate.
    pub indeterminate: Option<[f64; 2]>,
    /// Whose rule it is.
    pub decision_rule: RuleOwner,
}

impl From<RuleInForce> for RuleMessage {
    fn from(RuleInForce { rule, owner }: RuleInForce) -> Self {
        Self {
            threshold: rule.threshold,
            indeterminate: rule.indeterminate,
            decision_rule: owner,
        }
    }
}

/// What was measured on a picture; every measure from 0 to 1.
#[derive(Debug, Clone, Serialize)]
pub struct QualityMessage<'a> {
    /// What is unusual.
    pub flags: &'a [QualityFlag],
    /// What decoding had to do to the picture.
    pub notes: &'a [DecodeNote],
    /// The measures.
    #[serde(flatten)]
    pub measures: Quality,
}

impl<'a> QualityMessage<'a> {
    /// What is published of a classified picture.
    pub fn of(classified: &'a Classified, notes: &'a [DecodeNote]) -> Option<Self> {
        let assessment = classified.quality.as_ref()?;
        Some(Self {
            flags: &assessment.flags,
            notes,
            measures: assessment.quality,
        })
    }
}

/// Scores under their labels' names.
pub fn scores_by_label<'a>(labels: &'a [String], scores: &[f64]) -> BTreeMap<&'a str, f64> {
    let labels = labels.iter().map(String::as_str);
    labels.zip(scores.iter().copied()).collect()
}

/// The misfit of a picture, if it decided the outcome.
pub fn misfit(classified: &Classified) -> Option<Reason> {
    let misfit = classified.quality.as_ref()?.misfit.as_ref()?;
    (classified.prediction.decision == Decision::Indeterminate).then(|| Reason {
        code: misfit.flag.as_str(),
        message: misfit.message.clone(),
    })
}

/// Payload of `<base>/alert`: one alert a study, with revisions.
#[derive(Debug, Clone, Serialize)]
pub struct AlertMessage<'a> {
    /// `scansentry/alert/1`.
    pub schema: &'static str,
    /// The same in every resend.
    pub event_id: Pseudonym,
    /// The same in every revision of this alert.
    pub alert_id: Pseudonym,
    /// 1 when raised, then counting up.
    pub revision: u64,
    /// `raised`, `updated` or `closed`.
    pub state: &'static str,
    /// The study.
    pub study_id: Pseudonym,
    /// `device.id`.
    pub device: &'a str,
    /// `device.site`.
    pub site: &'a str,
    /// When this revision was made, UTC.
    pub at: String,
    /// Pictures in the study so far.
    pub images: u64,
    /// Positive ones among them.
    pub positives: u64,
    /// Highest probability.
    pub max_probability: Option<f64>,
    /// The scan that has it.
    pub top_scan_id: Option<ScanId>,
    /// The positive pictures with the highest probabilities, at most 32.
    pub positive_scans: &'a [PositivePicture],
    /// The rule in force.
    #[serde(flatten)]
    pub rule: RuleMessage,
    /// The model.
    pub model: &'a ModelRef,
    /// The alert in words.
    pub statement: &'static str,
    /// [`NOTICE`].
    pub notice: &'static str,
}

/// Payload of `<base>/study`: the summary when a study has been quiet.
#[derive(Debug, Clone, Serialize)]
pub struct StudyMessage<'a> {
    /// `scansentry/study/1`.
    pub schema: &'static str,
    /// The same in every resend.
    pub event_id: Pseudonym,
    /// The study.
    pub study_id: Pseudonym,
    /// How often it has been closed.
    pub revision: u64,
    /// `device.id`.
    pub device: &'a str,
    /// `device.site`.
    pub site: &'a str,
    /// First picture, UTC.
    pub opened_at: String,
    /// Last picture, UTC.
    pub last_at: String,
    /// Pictures, rejected ones included.
    pub images: u64,
    /// Positive ones among them.
    pub positives: u64,
    /// Rejected ones among them.
    pub rejected: u64,
    /// Highest probability.
    pub max_probability: Option<f64>,
    /// The scan that has it.
    pub top_scan_id: Option<ScanId>,
    /// The positive pictures with the highest probabilities, at most 32.
    pub positive_scans: &'a [PositivePicture],
    /// Whether no file waited as the study was closed.
    pub complete: bool,
    /// The model.
    pub model: &'a ModelRef,
    /// [`NOTICE`].
    pub notice: &'static str,
}

/// A positive picture of a study.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct PositivePicture {
    /// Which scan.
    pub scan_id: ScanId,
    /// Frame of a multi-frame file, from 1.
    pub frame: Option<u32>,
    /// Its probability, 0-1.
    pub probability: f64,
}

/// Payload of `<base>/health`, retained.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct HealthMessage<'a> {
    /// `scansentry/health/1`.
    pub schema: &'static str,
    /// `device.id`.
    pub device: &'a str,
    /// `device.site`.
    pub site: &'a str,
    /// When, UTC.
    pub at: String,
    /// `ok` or `degraded`.
    pub state: &'static str,
    /// Why degraded; empty when ok.
    pub conditions: Vec<ConditionMessage>,
    /// Files waiting and messages waiting.
    pub backlog: Backlog,
    /// The latest error; `None` when there was none.
    pub last_error: Option<ErrorMessage>,
    /// Alerts that are raised and not closed.
    pub open_alerts: u64,
    /// Totals of the ledger.
    pub counts: Counts,
    /// What became of the previews; `None` when they are switched off.
    pub previews: Option<PreviewCounts>,
    /// When the daemon started, UTC.
    pub started_at: String,
    /// Version of the program.
    pub version: &'static str,
    /// The model.
    pub model: &'a ModelRef,
    /// The runtime that runs it.
    pub engine: &'a str,
}

/// Payload of `<base>/preview`: what the model saw of a picture.
#[derive(Debug, Clone, Serialize)]
pub struct PreviewMessage<'a> {
    /// `scansentry/preview/1`.
    pub schema: &'static str,
    /// One for each result's revision.
    pub event_id: Pseudonym,
    /// The scan.
    pub scan_id: ScanId,
    /// Its study.
    pub study_id: Pseudonym,
    /// Frame of a multi-frame file, from 1.
    pub frame: Option<u32>,
    /// `device.id`.
    pub device: &'a str,
    /// `device.site`.
    pub site: &'a str,
    /// When, UTC.
    pub at: String,
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// The picture.
    pub image: ImageMessage<'a>,
    /// The class activation map.
    pub heatmap: Option<&'a HeatmapMessage>,
    /// The decision.
    pub decision: Decision,
    /// Probability of the positive labels, 0-1.
    pub probability: f64,
    /// [`NOTICE`].
    pub notice: &'static str,
}

/// A picture in a message.
#[derive(Debug, Clone, Serialize)]
pub struct ImageMessage<'a> {
    /// `image/png`.
    #[serde(rename = "type")]
    pub media_type: &'static str,
    /// Its bytes.
    pub base64: &'a str,
}

/// A class activation map in a message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HeatmapMessage {
    /// Cells down.
    pub rows: usize,
    /// Cells across.
    pub columns: usize,
    /// Row by row, 0-255.
    pub values: Vec<Vec<u8>>,
}

/// What became of the previews since the daemon started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct PreviewCounts {
    /// Handed to the broker.
    pub sent: u64,
    /// Left out: no room, no broker, or too large.
    pub dropped: u64,
}

/// The name of the schema of commands.
pub const COMMAND_SCHEMA: &str = "scansentry/command/1";

/// The end of the topic of commands.
pub const COMMAND_TOPIC: &str = "command";

/// Something that came on the command topic.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Received {
    /// Its bytes.
    pub payload: Vec<u8>,
    /// Whether the broker kept it from before.
    pub retained: bool,
}

/// Payload of `<base>/command`.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CommandMessage {
    /// [`COMMAND_SCHEMA`].
    pub schema: String,
    /// Chosen by the sender, one for each command.
    pub id: String,
    /// What to do.
    pub command: CommandWord,
    /// RFC 3339.
    #[serde(default)]
    pub since: Option<String>,
    /// As in results.
    #[serde(default)]
    pub scan_ids: Option<Vec<String>>,
}

/// What to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum CommandWord {
    /// Start no new file.
    Pause,
    /// Go on.
    Resume,
    /// Classify past scans again.
    Reprocess,
}

impl CommandWord {
    /// The word as it is published.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::Reprocess => "reprocess",
        }
    }
}

/// Why a command is not carried out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It is no command, or lacks something.
    Invalid,
    /// It has too many bytes.
    TooLarge,
    /// The broker kept it, and would send it again with every connection.
    Retained,
    /// The export folder is not there, so no file can be looked for.
    FolderAway,
}

impl Refusal {
    /// The code as it is published.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Invalid => "invalid",
            Self::TooLarge => "too_large",
            Self::Retained => "retained",
            Self::FolderAway => "folder_away",
        }
    }
}

/// Payload of `<base>/command/result`.
#[derive(Debug, Clone, Serialize)]
pub struct CommandResultMessage<'a> {
    /// `scansentry/command-result/1`.
    pub schema: &'static str,
    /// The same in every resend.
    pub event_id: Pseudonym,
    /// The command's.
    pub id: Option<&'a str>,
    /// The command.
    pub command: Option<CommandWord>,
    /// `device.id`.
    pub device: &'a str,
    /// `device.site`.
    pub site: &'a str,
    /// When, UTC.
    pub at: String,
    /// `done` or `refused`.
    pub status: &'static str,
    /// Why refused.
    pub error: Option<Reason>,
    /// What a reprocess found.
    pub reprocess: Option<ReprocessMessage>,
}

/// What a reprocess found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct ReprocessMessage {
    /// Scans that are classified again.
    pub queued: u64,
    /// Scans whose files have left the folder.
    pub gone: u64,
    /// Ids without an outcome here.
    pub unknown: u64,
}

/// Totals of the ledger.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Counts {
    /// Scans with a prediction.
    pub classified: u64,
    /// Of these, positive.
    pub positive: u64,
    /// Of these, indeterminate.
    pub indeterminate: u64,
    /// Scans that were rejected.
    pub rejected: u64,
    /// Scans that hold no image and were left alone.
    pub skipped: u64,
    /// Messages that the broker acknowledged.
    pub delivered: u64,
    /// Messages that still wait.
    pub outbox: u64,
    /// When the oldest waiting message was recorded, seconds since 1970.
    pub oldest_outbox: Option<i64>,
    /// Messages set aside that the broker did not take while it took others.
    pub parked: u64,
    /// Of these, given up because there were too many.
    pub dropped: u64,
}

/// One reason for being degraded.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ConditionMessage {
    /// Stable machine-readable code.
    pub code: &'static str,
    /// Since when, UTC.
    pub since: String,
    /// One line.
    pub message: String,
}

impl ConditionMessage {
    /// The conditions that hold.
    pub fn list(conditions: &Conditions) -> Vec<Self> {
        let message = |(condition, (since, message)): (&Condition, &(_, String))| Self {
            code: condition.code(),
            since: rfc3339(*since),
            message: message.clone(),
        };
        conditions.iter().map(message).collect()
    }
}

/// `ok` or `degraded`.
pub fn state_word(conditions: &Conditions) -> &'static str {
    if conditions.is_empty() {
        "ok"
    } else {
        "degraded"
    }
}

/// An error or the beginning of a condition, as it was logged.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ErrorMessage {
    /// When, UTC.
    pub at: String,
    /// One line.
    pub message: String,
}

impl From<LastError> for ErrorMessage {
    fn from(LastError { at, message }: LastError) -> Self {
        Self {
            at: rfc3339(at),
            message,
        }
    }
}

/// What the daemon last said of itself, kept in the ledger for `status`; the names are those of [`HealthMessage`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StandingNote {
    /// When, UTC.
    pub at: String,
    /// When the daemon started, UTC.
    pub started_at: String,
    /// When it was stopped in order, UTC.
    pub stopped_at: Option<String>,
    /// Version of the program.
    pub version: &'static str,
    /// `ok` or `degraded`.
    pub state: &'static str,
    /// Why degraded.
    pub conditions: Vec<ConditionMessage>,
    /// Files noticed and not finished.
    pub files: u64,
    /// The latest error.
    pub last_error: Option<ErrorMessage>,
}

/// What waits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Backlog {
    /// Files noticed and not finished (the folder may hold more that were not looked at yet).
    pub files: u64,
    /// Messages that the broker has not acknowledged.
    pub messages: u64,
    /// When the oldest of these was recorded, UTC.
    pub oldest: Option<String>,
}

impl Backlog {
    /// So many files, and the messages that the ledger counts.
    pub fn new(files: u64, counts: &Counts) -> Self {
        Self {
            files,
            messages: counts.outbox,
            oldest: counts.oldest_outbox.map(rfc3339_seconds),
        }
    }
}

/// A study as the ledger has it.
#[derive(Debug, Clone, PartialEq)]
pub struct StudyState {
    /// Its id.
    pub study_id: Pseudonym,
    /// First image, seconds since 1970.
    pub opened_at: i64,
    /// Last image, seconds since 1970.
    pub last_at: i64,
    /// Pictures, rejected ones included.
    pub images: u64,
    /// Positive pictures.
    pub positives: u64,
    /// Rejected pictures.
    pub rejected: u64,
    /// Highest probability.
    pub max_probability: Option<f64>,
    /// The scan with the highest probability.
    pub top_scan: Option<ScanId>,
    /// Alert messages so far; 0 means that no alert was raised.
    pub alert_revision: u64,
    /// Whether pictures may still come.
    pub open: bool,
    /// Whether its alert is raised and not closed.
    pub alert_open: bool,
    /// Positive pictures when the alert last said something.
    pub alert_positives: u64,
    /// How often it has been closed.
    pub closings: u64,
    /// The positive pictures with the highest probabilities; looked up only for a message that says them.
    pub positive_pictures: Vec<PositivePicture>,
}

/// What is to be said about a study's alert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AlertChange {
    /// The rule is met, for the first time or again after the study was closed.
    Raised,
    /// Another count of positive pictures than in the last message.
    Updated,
    /// The study has been quiet.
    Closed,
}

/// An encoded message on its way to the broker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OutboxMessage {
    /// Position in the outbox; 0 before it is stored.
    pub seq: i64,
    /// Stable across resends.
    pub event_id: Pseudonym,
    /// Full topic.
    pub topic: String,
    /// The bytes to send.
    pub payload: Vec<u8>,
    /// Whether it has been parked before.
    pub returned: bool,
}

impl AlertChange {
    /// The state as it is published.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Raised => "raised",
            Self::Updated => "updated",
            Self::Closed => "closed",
        }
    }
}

/// One picture of a scan, on its way into a message.
#[derive(Debug)]
pub struct ClassifiedPicture {
    /// Frame number from 1 in a multi-frame file.
    pub frame: Option<u32>,
    /// What became of it.
    pub outcome: Result<Classified, RejectReason>,
}

/// A scan with all its pictures, on its way into messages.
#[derive(Debug)]
pub struct Examined {
    /// Whose outcome.
    pub scan_id: ScanId,
    /// Which claim this was, 1 the first.
    pub attempt: u32,
    /// Kind of file; `None` when it is not an image.
    pub kind: Option<SourceKind>,
    /// DICOM series.
    pub series_id: Option<Pseudonym>,
    /// DICOM modality.
    pub modality: Option<&'static str>,
    /// When the picture was taken or the file was written, as published.
    pub acquired_at: Option<String>,
    /// What decoding had to do to the pictures.
    pub notes: Vec<DecodeNote>,
    /// At least one.
    pub pictures: Vec<ClassifiedPicture>,
}

/// `classified`, `rejected` or `skipped`, as published.
pub fn outcome_word(classified: bool, reason: Option<&RejectReason>) -> &'static str {
    match reason {
        _ if classified => "classified",
        Some(reason) if reason.code.is_skip() => "skipped",
        _ => "rejected",
    }
}

/// Turns what happened into messages: who speaks, about which model, under which pseudonyms.
#[derive(Debug)]
pub struct Reporter {
    /// Who speaks.
    pub sender: Sender,
    /// The appliance's key.
    pub key: PseudonymKey,
    /// The model.
    pub model: Arc<ModelRef>,
    /// Its labels.
    pub labels: Vec<String>,
    /// The rule in force.
    pub rule: RuleInForce,
}

impl Reporter {
    /// The results of a scan, one for each picture; `revision` is how often it has been classified.
    pub fn results(
        &self,
        examined: &Examined,
        study_id: Pseudonym,
        revision: u64,
    ) -> Vec<OutboxMessage> {
        examined
            .pictures
            .iter()
            .map(|picture| self.result(examined, picture, study_id, revision))
            .collect()
    }

    fn result(
        &self,
        examined: &Examined,
        picture: &ClassifiedPicture,
        study_id: Pseudonym,
        revision: u64,
    ) -> OutboxMessage {
        let found = picture.outcome.as_ref().ok();
        let rejected = picture.outcome.as_ref().err();
        let prediction = found.map(|c| &c.prediction);
        let event_id = self.event_id(
            Kind::Result,
            examined.scan_id,
            u64::from(picture.frame.unwrap_or(0)),
            revision,
        );
        let payload = ResultMessage {
            schema: Kind::Result.schema(),
            event_id,
            scan_id: examined.scan_id,
            revision,
            study_id,
            series_id: examined.series_id,
            modality: examined.modality,
            frame: picture.frame,
            device: &self.sender.device,
            site: &self.sender.site,
            acquired_at: examined.acquired_at.clone(),
            processed_at: rfc3339(jiff::Timestamp::now()),
            source: examined.kind,
            model: &self.model,
            outcome: outcome_word(found.is_some(), rejected),
            label: prediction.map(|p| self.labels[p.label].as_str()),
            probability: prediction.map(|p| p.probability),
            scores: prediction.map(|p| scores_by_label(&self.labels, &p.scores)),
            rule: self.rule.into(),
            decision: prediction.map(|p| p.decision),
            statement: prediction.map(|p| p.decision.statement()),
            rejected: rejected.map(Reason::from),
            roi: found.map(|c| c.roi),
            misfit: found.and_then(misfit),
            quality: found.and_then(|c| QualityMessage::of(c, &examined.notes)),
            timings_ms: found.map(|c| c.timings),
            replayed: examined.attempt > 1,
            notice: NOTICE,
        };
        self.outbox_message(Kind::Result, event_id, &payload)
    }

    /// A change of a study's alert.
    pub fn alert(&self, study: &StudyState, change: AlertChange) -> OutboxMessage {
        let event_id = self.event_id(Kind::Alert, study.study_id, study.alert_revision, 1);
        let payload = AlertMessage {
            schema: Kind::Alert.schema(),
            event_id,
            alert_id: self.key.pseudonym("alert", &[&study.study_id.0]),
            revision: study.alert_revision,
            state: change.as_str(),
            study_id: study.study_id,
            device: &self.sender.device,
            site: &self.sender.site,
            at: rfc3339(jiff::Timestamp::now()),
            images: study.images,
            positives: study.positives,
            max_probability: study.max_probability,
            top_scan_id: study.top_scan,
            positive_scans: &study.positive_pictures,
            rule: self.rule.into(),
            model: &self.model,
            statement: Decision::Positive.statement(),
            notice: NOTICE,
        };
        self.outbox_message(Kind::Alert, event_id, &payload)
    }

    /// The summary of a study that has been quiet; `complete` when no file waits.
    pub fn study(&self, study: &StudyState, complete: bool) -> OutboxMessage {
        // A study may go on after it was closed; each closing is an event of its own.
        let event_id = self.event_id(Kind::Study, study.study_id, study.images, study.closings);
        let payload = StudyMessage {
            schema: Kind::Study.schema(),
            event_id,
            study_id: study.study_id,
            revision: study.closings,
            device: &self.sender.device,
            site: &self.sender.site,
            opened_at: rfc3339_seconds(study.opened_at),
            last_at: rfc3339_seconds(study.last_at),
            images: study.images,
            positives: study.positives,
            rejected: study.rejected,
            max_probability: study.max_probability,
            top_scan_id: study.top_scan,
            positive_scans: &study.positive_pictures,
            complete,
            model: &self.model,
            notice: NOTICE,
        };
        self.outbox_message(Kind::Study, event_id, &payload)
    }

    /// The preview of a picture of a scan: its prediction, study and revision, size in pixels and PNG in base64, and map.
    pub fn preview(
        &self,
        examined: &Examined,
        frame: Option<u32>,
        prediction: &Prediction,
        (study_id, revision): (Pseudonym, u64),
        ((width, height), png): ((u32, u32), &str),
        heatmap: Option<&HeatmapMessage>,
    ) -> Vec<u8> {
        let number = u64::from(frame.unwrap_or(0));
        encode(&PreviewMessage {
            schema: Kind::Preview.schema(),
            event_id: self.event_id(Kind::Preview, examined.scan_id, number, revision),
            scan_id: examined.scan_id,
            study_id,
            frame,
            device: &self.sender.device,
            site: &self.sender.site,
            at: rfc3339(jiff::Timestamp::now()),
            width,
            height,
            image: ImageMessage {
                media_type: "image/png",
                base64: png,
            },
            heatmap,
            decision: prediction.decision,
            probability: prediction.probability,
            notice: NOTICE,
        })
    }

    /// The answer to a command that was carried out.
    pub fn answer(
        &self,
        id: &str,
        word: CommandWord,
        reprocess: Option<ReprocessMessage>,
    ) -> OutboxMessage {
        // With the time: an id that is used again after its answer was forgotten is another event.
        let at = jiff::Timestamp::now();
        let time = at.as_nanosecond().to_le_bytes();
        let parts: [&[u8]; 4] = [b"command", b"done", id.as_bytes(), &time];
        let event_id = self.key.pseudonym("event", &parts);
        let payload = CommandResultMessage {
            schema: Kind::CommandResult.schema(),
            event_id,
            id: Some(id),
            command: Some(word),
            device: &self.sender.device,
            site: &self.sender.site,
            at: rfc3339(at),
            status: "done",
            error: None,
            reprocess,
        };
        self.outbox_message(Kind::CommandResult, event_id, &payload)
    }

    /// The answer to a command that is not carried out.
    pub fn refusal(&self, received: &Received, refusal: Refusal, message: &str) -> OutboxMessage {
        // With the time: the same command may be refused again for another reason. Not so a retained one, which comes again with every
        // connection and is one event.
        let at = jiff::Timestamp::now();
        let time = at.as_nanosecond().to_le_bytes();
        let parts: [&[u8]; 4] = [b"command", b"refused", &received.payload, &time];
        let count = if refusal == Refusal::Retained { 3 } else { 4 };
        let event_id = self.key.pseudonym("event", &parts[..count]);
        // As much as can be read of it, so that the sender knows it again.
        let command: Option<Value> = serde_json::from_slice(&received.payload).ok();
        let id = command.as_ref().and_then(|c| c["id"].as_str());
        let word = command
            .as_ref()
            .and_then(|c| CommandWord::deserialize(&c["command"]).ok());
        let payload = CommandResultMessage {
            schema: Kind::CommandResult.schema(),
            event_id,
            id: id.filter(|id| id.len() <= 256),
            command: word,
            device: &self.sender.device,
            site: &self.sender.site,
            at: rfc3339(at),
            status: "refused",
            error: Some(Reason {
                code: refusal.as_str(),
                message: message
                    .chars()
                    .map(|c| if c.is_control() { ' ' } else { c })
                    .take(300)
                    .collect(),
            }),
            reprocess: None,
        };
        self.outbox_message(Kind::CommandResult, event_id, &payload)
    }

    /// The same whenever the same event is encoded, so that subscribers can drop duplicates. The first revision is left out of it, so
    /// that an appliance whose ledger was lost says the same ids again.
    fn event_id(&self, kind: Kind, subject: Pseudonym, number: u64, revision: u64) -> Pseudonym {
        let (number, again) = (number.to_le_bytes(), revision.to_le_bytes());
        let parts: [&[u8]; 5] = [
            kind.suffix().as_bytes(),
            &subject.0,
            self.model.sha256.as_bytes(),
            &number,
            &again,
        ];
        let count = if revision > 1 { 5 } else { 4 };
        self.key.pseudonym("event", &parts[..count])
    }

    fn outbox_message(
        &self,
        kind: Kind,
        event_id: Pseudonym,
        payload: &impl Serialize,
    ) -> OutboxMessage {
        OutboxMessage {
            seq: 0,
            event_id,
            topic: self.sender.topic(kind),
            payload: encode(payload),
            returned: false,
        }
    }
}

/// The JSON bytes of a payload.
pub fn encode(payload: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec(payload).expect("wire types hold only strings, finite numbers and lists")
}
