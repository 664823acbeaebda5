//! What a dashboard hears and is asked: received messages, parsed tolerantly, and the questions that its page may put.
//!
//! Readers of the MQTT contract must bear unknown keys and missing new ones; so only what is needed here is required, and a
//! message that lacks it is refused as a whole. The payloads themselves are kept as they came, but for what the page could not bear in a
//! health report.

use std::fmt;

use base64::Engine as _;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::scan::Pseudonym;

/// Largest payload that is taken, previews aside, bytes.
const MAX_PAYLOAD: usize = 128 << 10;
/// Largest preview that is taken, bytes.
const MAX_PREVIEW: usize = 512 << 10;
/// A clock may be this far ahead, milliseconds; beyond that the time of arrival counts.
const CLOCK_TOLERANCE_MS: i64 = 3_600_000;
/// Largest count that a database holds.
const MAX_COUNT: u64 = i64::MAX as u64;
/// Most cells along one side of an activation map.
const MAX_CELLS: usize = 64;

/// One appliance, as its topics name it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct ApplianceKey {
    /// `device.site`.
    pub site: String,
    /// `device.id`.
    pub device: String,
}

impl fmt::Display for ApplianceKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.site, self.device)
    }
}

impl std::str::FromStr for ApplianceKey {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (site, device) = text.split_once('/').unwrap_or((text, ""));
        if is_name(site) && is_name(device) {
            Ok(Self {
                site: site.into(),
                device: device.into(),
            })
        } else {
            Err("appliance: is not SITE/DEVICE; use the names that /api/state lists".into())
        }
    }
}

fn is_name(text: &str) -> bool {
    let valid = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
    (1..=64).contains(&text.len()) && text.chars().all(valid)
}

/// A received message, parsed.
#[derive(Debug, Clone, PartialEq)]
pub struct Received {
    /// Whose.
    pub appliance: ApplianceKey,
    /// When it arrived, milliseconds since 1970.
    pub at_ms: i64,
    /// Whether the broker had kept it from before.
    pub retained: bool,
    /// What it says.
    pub body: Body,
}

/// What a message says.
#[derive(Debug, Clone, PartialEq)]
pub enum Body {
    /// `online`, `stopped` or `offline`.
    Status(Presence),
    /// A health report.
    Health(HealthSeen),
    /// The result of one picture.
    Result(Box<ResultSeen>),
    /// A revision of an alert.
    Alert(AlertSeen),
    /// The summary of a study.
    Study(StudySeen),
    /// A small picture with its activation map.
    Preview(Box<PreviewSeen>),
    /// An alert was acknowledged; `None` when that was taken back.
    Ack(Pseudonym, Option<AckSeen>),
}

impl Body {
    /// The kind, as in the topic.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Status(_) => "status",
            Self::Health(_) => "health",
            Self::Result(_) => "result",
            Self::Alert(_) => "alert",
            Self::Study(_) => "study",
            Self::Preview(_) => "preview",
            Self::Ack(..) => "ack",
        }
    }
}

/// The retained status of an appliance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Presence {
    /// Connected.
    Online,
    /// Stopped in order.
    Stopped,
    /// Gone without a word.
    Offline,
}

impl Presence {
    /// As published.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Online => "online",
            Self::Stopped => "stopped",
            Self::Offline => "offline",
        }
    }
}

/// A health report.
#[derive(Debug, Clone, PartialEq)]
pub struct HealthSeen {
    /// When it was made, milliseconds since 1970.
    pub at_ms: i64,
    /// Files waiting.
    pub files: u64,
    /// Messages waiting.
    pub messages: u64,
    /// The payload.
    pub payload: Value,
}

/// The result of one picture.
#[derive(Debug, Clone, PartialEq)]
pub struct ResultSeen {
    /// The same in every resend.
    pub event_id: Pseudonym,
    /// The same for the same bytes.
    pub scan_id: Pseudonym,
    /// The study.
    pub study_id: Option<Pseudonym>,
    /// Frame of a multi-frame file, from 1.
    pub frame: Option<u32>,
    /// When it was classified, milliseconds since 1970.
    pub at_ms: i64,
    /// `positive`, `negative`, `indeterminate`, `rejected` or `skipped`.
    pub decision: Verdict,
    /// Total time, milliseconds.
    pub total_ms: Option<f64>,
    /// The payload.
    pub payload: Value,
}

/// What became of a picture, in one word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// At or above the threshold.
    Positive,
    /// Below it.
    Negative,
    /// No decision.
    Indeterminate,
    /// No prediction.
    Rejected,
    /// No image.
    Skipped,
}

impl Verdict {
    /// As published.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Positive => "positive",
            Self::Negative => "negative",
            Self::Indeterminate => "indeterminate",
            Self::Rejected => "rejected",
            Self::Skipped => "skipped",
        }
    }
}

/// A revision of an alert.
#[derive(Debug, Clone, PartialEq)]
pub struct AlertSeen {
    /// The alert.
    pub alert_id: Pseudonym,
    /// Its study.
    pub study_id: Pseudonym,
    /// 1 when raised, then counting up.
    pub revision: u64,
    /// Whether the study has been quiet.
    pub closed: bool,
    /// When this revision was made, milliseconds since 1970.
    pub at_ms: i64,
    /// The payload.
    pub payload: Value,
}

/// The summary of a study.
#[derive(Debug, Clone, PartialEq)]
pub struct StudySeen {
    /// The study.
    pub study_id: Pseudonym,
    /// The payload.
    pub payload: Value,
}

/// A small picture with its activation map.
#[derive(Debug, Clone, PartialEq)]
pub struct PreviewSeen {
    /// Whose picture.
    pub scan_id: Pseudonym,
    /// Frame of a multi-frame file, from 1.
    pub frame: Option<u32>,
    /// The picture, PNG.
    pub png: Vec<u8>,
    /// The activation map, if the model has one.
    pub heatmap: Option<Heatmap>,
}

/// An activation map; `values` has `rows` lists of `columns` numbers, 0-255.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heatmap {
    /// 1-64.
    pub rows: usize,
    /// 1-64.
    pub columns: usize,
    /// Row by row from the top.
    pub values: Vec<Vec<u8>>,
}

/// Who acknowledged an alert, and when.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AckSeen {
    /// Milliseconds since 1970.
    pub at_ms: i64,
    /// Name of the dashboard.
    pub by: String,
}

/// Why a message was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Unusable {
    /// Not one of ours.
    #[error("topic is not one of <prefix>/<site>/<device>/<kind>")]
    Topic,
    /// Too large.
    #[error("payload is larger than is taken")]
    TooLarge,
    /// Not the JSON that the kind's schema asks for.
    #[error("payload is not what the schema asks for")]
    Payload,
}

/// Parses a message that arrived on `topic` at `now_ms`. `prefix` is `mqtt.topic_prefix`.
pub fn parse(
    prefix: &str,
    topic: &str,
    payload: &[u8],
    retained: bool,
    now_ms: i64,
) -> Result<Received, Unusable> {
    let rest = topic
        .strip_prefix(prefix)
        .and_then(|rest| rest.strip_prefix('/'))
        .ok_or(Unusable::Topic)?;
    let levels: Vec<_> = rest.split('/').collect();
    let (site, device, kind, alert) = match levels[..] {
        [site, device, kind] => (site, device, kind, None),
        [site, device, "ack", alert] => (site, device, "ack", Some(alert)),
        _ => return Err(Unusable::Topic),
    };
    if !is_name(site) || !is_name(device) {
        return Err(Unusable::Topic);
    }
    let limit = if kind == "preview" {
        MAX_PREVIEW
    } else {
        MAX_PAYLOAD
    };
    if payload.len() > limit {
        return Err(Unusable::TooLarge);
    }
    let body = match (kind, alert) {
        ("status", None) => Body::Status(match payload {
            b"online" => Presence::Online,
            b"stopped" => Presence::Stopped,
            b"offline" => Presence::Offline,
            _ => return Err(Unusable::Payload),
        }),
        ("health", None) => health(payload, now_ms)?,
        ("result", None) => result(payload, now_ms)?,
        ("alert", None) => alert_body(payload, now_ms)?,
        ("study", None) => study(payload)?,
        ("preview", None) => preview(payload)?,
        ("ack", Some(alert)) => {
            let alert_id = alert.parse().map_err(|_| Unusable::Topic)?;
            Body::Ack(alert_id, ack(payload, now_ms)?)
        }
        _ => return Err(Unusable::Topic),
    };
    Ok(Received {
        appliance: ApplianceKey {
            site: site.into(),
            device: device.into(),
        },
        at_ms: now_ms,
        retained,
        body,
    })
}

/// `text` as RFC 3339 in milliseconds since 1970; a clock far ahead counts as `now_ms`.
fn milliseconds(text: &str, now_ms: i64) -> Result<i64, Unusable> {
    let time: jiff::Timestamp = text.parse().map_err(|_| Unusable::Payload)?;
    let ms = time.as_millisecond();
    Ok(if ms > now_ms + CLOCK_TOLERANCE_MS {
        now_ms
    } else {
        ms
    })
}

fn decode<T: serde::de::DeserializeOwned>(payload: &[u8]) -> Result<(T, Value), Unusable> {
    let value: Value = serde_json::from_slice(payload).map_err(|_| Unusable::Payload)?;
    // serde would take an array of the fields as well.
    if !value.is_object() {
        return Err(Unusable::Payload);
    }
    let typed = T::deserialize(&value).map_err(|_| Unusable::Payload)?;
    Ok((typed, value))
}

fn health(payload: &[u8], now_ms: i64) -> Result<Body, Unusable> {
    #[derive(Deserialize)]
    struct Health {
        at: String,
        backlog: Backlog,
    }
    #[derive(Deserialize)]
    struct Backlog {
        files: u64,
        messages: u64,
    }
    let (health, mut payload): (Health, _) = decode(payload)?;
    if !payload["backlog"].is_object() {
        return Err(Unusable::Payload);
    }
    payload["conditions"] = conditions(&payload["conditions"]);
    if !(payload["last_error"]["at"].is_string() && payload["last_error"]["message"].is_string()) {
        payload["last_error"] = Value::Null;
    }
    if !payload["backlog"]["oldest"].is_string() {
        payload["backlog"]["oldest"] = Value::Null;
    }
    Ok(Body::Health(HealthSeen {
        at_ms: milliseconds(&health.at, now_ms)?,
        files: health.backlog.files.min(MAX_COUNT),
        messages: health.backlog.messages.min(MAX_COUNT),
        payload,
    }))
}

/// The conditions that a page can show: objects with a message and a time as texts.
fn conditions(found: &Value) -> Value {
    let shown = |c: &&Value| c["message"].is_string() && c["since"].is_string();
    let found = found.as_array().into_iter().flatten();
    found.filter(shown).cloned().collect()
}

fn result(payload: &[u8], now_ms: i64) -> Result<Body, Unusable> {
    #[derive(Deserialize)]
    struct Picture {
        event_id: Pseudonym,
        scan_id: Pseudonym,
        study_id: Option<Pseudonym>,
        frame: Option<u32>,
        processed_at: String,
        outcome: String,
        decision: Option<Verdict>,
        probability: Option<f64>,
        timings_ms: Option<Timings>,
    }
    #[derive(Deserialize)]
    struct Timings {
        total: Option<f64>,
    }
    let (picture, payload): (Picture, _) = decode(payload)?;
    let decision = match picture.outcome.as_str() {
        "classified" => picture.decision.ok_or(Unusable::Payload)?,
        "rejected" => Verdict::Rejected,
        "skipped" => Verdict::Skipped,
        _ => return Err(Unusable::Payload),
    };
    if picture
        .probability
        .is_some_and(|p| !(0.0..=1.0).contains(&p))
    {
        return Err(Unusable::Payload);
    }
    Ok(Body::Result(Box::new(ResultSeen {
        event_id: picture.event_id,
        scan_id: picture.scan_id,
        study_id: picture.study_id,
        frame: picture.frame,
        at_ms: milliseconds(&picture.processed_at, now_ms)?,
        decision,
        total_ms: picture.timings_ms.and_then(|t| t.total),
        payload,
    })))
}

fn alert_body(payload: &[u8], now_ms: i64) -> Result<Body, Unusable> {
    #[derive(Deserialize)]
    struct Change {
        alert_id: Pseudonym,
        study_id: Pseudonym,
        revision: u64,
        state: String,
        at: String,
    }
    let (alert, payload): (Change, _) = decode(payload)?;
    Ok(Body::Alert(AlertSeen {
        alert_id: alert.alert_id,
        study_id: alert.study_id,
        revision: alert.revision.min(MAX_COUNT),
        closed: alert.state == "closed",
        at_ms: milliseconds(&alert.at, now_ms)?,
        payload,
    }))
}

fn study(payload: &[u8]) -> Result<Body, Unusable> {
    #[derive(Deserialize)]
    struct Study {
        study_id: Pseudonym,
    }
    let (study, payload): (Study, _) = decode(payload)?;
    Ok(Body::Study(StudySeen {
        study_id: study.study_id,
        payload,
    }))
}

fn preview(payload: &[u8]) -> Result<Body, Unusable> {
    #[derive(Deserialize)]
    struct Preview {
        scan_id: Pseudonym,
        frame: Option<u32>,
        image: Image,
        heatmap: Option<Heatmap>,
    }
    #[derive(Deserialize)]
    struct Image {
        base64: String,
    }
    let preview: Preview = serde_json::from_slice(payload).map_err(|_| Unusable::Payload)?;
    let png = base64::engine::general_purpose::STANDARD
        .decode(preview.image.base64)
        .map_err(|_| Unusable::Payload)?;
    let even = |map: &Heatmap| {
        (1..=MAX_CELLS).contains(&map.rows)
            && (1..=MAX_CELLS).contains(&map.columns)
            && map.values.len() == map.rows
            && map.values.iter().all(|row| row.len() == map.columns)
    };
    if !png.starts_with(b"\x89PNG\r\n\x1a\n") || !preview.heatmap.as_ref().is_none_or(even) {
        return Err(Unusable::Payload);
    }
    Ok(Body::Preview(Box::new(PreviewSeen {
        scan_id: preview.scan_id,
        frame: preview.frame,
        png,
        heatmap: preview.heatmap,
    })))
}

fn ack(payload: &[u8], now_ms: i64) -> Result<Option<AckSeen>, Unusable> {
    #[derive(Deserialize)]
    struct Ack {
        at: String,
        by: String,
    }
    if payload.is_empty() {
        return Ok(None);
    }
    let ack: Ack = serde_json::from_slice(payload).map_err(|_| Unusable::Payload)?;
    Ok(Some(AckSeen {
        at_ms: milliseconds(&ack.at, now_ms)?,
        by: ack.by.chars().take(64).collect(),
    }))
}

/// The keys of a result that a list shows; the scan view has all of them.
const ROW_KEYS: [&str; 14] = [
    "event_id",
    "scan_id",
    "study_id",
    "frame",
    "processed_at",
    "acquired_at",
    "outcome",
    "decision",
    "statement",
    "probability",
    "threshold",
    "rejected",
    "misfit",
    "replayed",
];

/// A result as a list shows it: the short form of its payload.
pub fn row(appliance: &ApplianceKey, payload: &Value) -> Value {
    let mut row = json!({
        "site": appliance.site,
        "device": appliance.device,
        "flags": payload["quality"]["flags"],
        "total_ms": payload["timings_ms"]["total"],
    });
    for key in ROW_KEYS {
        row[key] = payload[key].clone();
    }
    row
}

/// Which results a page wants.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Filter {
    /// Of one appliance only.
    pub appliance: Option<ApplianceKey>,
    /// Of one kind only.
    pub verdict: Option<Verdict>,
    /// Processed at or after, milliseconds since 1970.
    pub from_ms: Option<i64>,
    /// Processed before, milliseconds since 1970.
    pub to_ms: Option<i64>,
    /// Only results stored before the one with this number.
    pub before: Option<i64>,
    /// At most this many.
    pub limit: usize,
}

/// What the page may ask.
#[derive(Debug, Clone, PartialEq)]
pub enum Question {
    /// Appliances, alerts that need attention, the server itself.
    State,
    /// A page of results.
    Results(Filter),
    /// Alerts that are closed and acknowledged, newest first.
    Alerts {
        /// Only alerts raised before, milliseconds since 1970.
        before_ms: Option<i64>,
        /// At most this many.
        limit: usize,
    },
    /// A study with its pictures.
    Study(ApplianceKey, Pseudonym),
    /// The latest results of a scan, all frames.
    Scan(ApplianceKey, Pseudonym),
    /// Numbers over time.
    Charts {
        /// Of one appliance only.
        appliance: Option<ApplianceKey>,
        /// From, milliseconds since 1970.
        from_ms: i64,
        /// Until, milliseconds since 1970.
        to_ms: i64,
    },
}

/// The widths of a chart's time steps, seconds.
const STEPS: [i64; 9] = [
    60, 300, 900, 3600, 10_800, 21_600, 86_400, 604_800, 2_592_000,
];

/// The smallest step that needs at most 72 of them, milliseconds.
pub fn step_ms(from_ms: i64, to_ms: i64) -> i64 {
    let seconds = (to_ms - from_ms) / 1000;
    let fits = STEPS.iter().find(|&&step| seconds <= 72 * step);
    fits.unwrap_or(&STEPS[STEPS.len() - 1]) * 1000
}

/// The value below which the share `q` of `sorted` lies (nearest rank); `None` of an empty list.
pub fn quantile(sorted: &[f64], q: f64) -> Option<f64> {
    let rank = (q * sorted.len() as f64).ceil() as usize;
    sorted.get(rank.max(1) - 1).copied()
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_800_000_000_000;
    const ID: &str = "00112233445566778899aabbccddeeff";

    fn parsed(kind: &str, payload: &str) -> Result<Body, Unusable> {
        let topic = format!("scansentry/ward/mri-1/{kind}");
        parse("scansentry", &topic, payload.as_bytes(), false, NOW).map(|r| r.body)
    }

    fn result_text(more: &str) -> String {
        format!(
            r#"{{"event_id":"{ID}","scan_id":"{ID}","processed_at":"2026-11-23T12:00:00.000Z","outcome":"classified","decision":"negative"{more}}}"#
        )
    }

    #[test]
    fn readers_bear_unknown_keys_and_missing_new_ones() {
        let Ok(Body::Result(seen)) = parsed("result", &result_text(r#","novel":{"a":1}"#)) else {
            panic!("not taken");
        };
        assert_eq!((seen.decision, seen.frame), (Verdict::Negative, None));
        assert_eq!(seen.payload["novel"]["a"], 1);
        assert_eq!(
            parsed("status", "online"),
            Ok(Body::Status(Presence::Online))
        );
        let id: Pseudonym = ID.parse().unwrap();
        assert_eq!(parsed(&format!("ack/{ID}"), ""), Ok(Body::Ack(id, None)));
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        for (kind, payload, why) in [
            ("status", "maybe", Unusable::Payload),
            ("result", "{}", Unusable::Payload),
            (
                "result",
                &result_text(r#","probability":1.5"#),
                Unusable::Payload,
            ),
            ("ack/xyz", "", Unusable::Topic),
            ("command", "{}", Unusable::Topic),
            (
                "alert",
                &format!(r#"["{ID}","{ID}",1,"raised","2026-11-23T12:00:00Z"]"#),
                Unusable::Payload,
            ),
            (
                "health",
                r#"["2026-11-23T12:00:00Z",[1,2]]"#,
                Unusable::Payload,
            ),
            ("study", &format!(r#"["{ID}"]"#), Unusable::Payload),
            ("preview", r#"{"scan_id":"0"}"#, Unusable::Payload),
        ] {
            assert_eq!(parsed(kind, payload), Err(why), "{kind} {payload}");
        }
        let odd = parse(
            "scansentry",
            "scansentry/a b/c/status",
            b"online",
            false,
            NOW,
        );
        assert_eq!(odd, Err(Unusable::Topic));
        let big = vec![b' '; MAX_PAYLOAD + 1];
        let big = parse("scansentry", "scansentry/a/b/health", &big, false, NOW);
        assert_eq!(big, Err(Unusable::TooLarge));
    }

    #[test]
    fn a_health_report_keeps_only_what_a_page_can_show() {
        for (conditions, left) in [
            (r#""disk""#, json!([])),
            (r#"[null,1,["x"],{"message":3,"since":"s"}]"#, json!([])),
            (
                r#"[{"code":"x","message":"m","since":"s"},7]"#,
                json!([{"code": "x", "message": "m", "since": "s"}]),
            ),
        ] {
            let text = format!(
                r#"{{"at":"2026-11-23T12:00:00Z","backlog":{{"files":{},"messages":1}},"conditions":{conditions}}}"#,
                u64::MAX
            );
            let Ok(Body::Health(seen)) = parsed("health", &text) else {
                panic!("not taken");
            };
            assert_eq!(seen.payload["conditions"], left);
            assert_eq!((seen.files, seen.messages), (i64::MAX as u64, 1));
        }
    }

    #[test]
    fn a_clock_far_ahead_does_not_count() {
        assert_eq!(milliseconds("2999-01-01T00:00:00Z", NOW), Ok(NOW));
        assert_eq!(milliseconds("1970-01-01T00:00:01Z", NOW), Ok(1000));
    }

    #[test]
    fn steps_and_quantiles() {
        assert_eq!(step_ms(0, 3_600_000), 60_000);
        assert_eq!(step_ms(0, 86_400_000), 3_600_000);
        let hundred: Vec<_> = (1..=100).map(f64::from).collect();
        assert_eq!(quantile(&hundred, 0.5), Some(50.0));
        assert_eq!(quantile(&hundred, 0.95), Some(95.0));
        assert_eq!(quantile(&[], 0.5), None);
    }
}
