//! Follows the appliances: messages into the history, changes to the pages, acknowledgements to the broker.
//!
//! What has arrived and is not stored yet is bounded: above QoS 0 by the broker, which is told to send at most
//! [`RECEIVE_MAXIMUM`](crate::mqtt::RECEIVE_MAXIMUM) messages that were not confirmed, and by [`MOST`], because not every broker keeps to that; at
//! QoS 0 by [`UNCONFIRMED`], and previews by [`PREVIEWS`]. A history that cannot be written is tried again with the same batch; the broker keeps the rest. With a lost connection goes what
//! the broker sends again on the next one.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::{broadcast, mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::subscriptions::Subscriptions;
use super::{Broker, Order, now_ms};
use crate::config::Config;
use crate::history::{ApplianceKey, Received, parse};
use crate::http::{Refusal, Update};
use crate::message::{NOTICE, rfc3339};
use crate::metrics::DashboardMetrics;
use crate::mqtt::{Backoff, Event, Receipt, Sending, Session, Settings, Ticket, Unsent};
use crate::scan::Pseudonym;
use crate::store::{Changes, History, HistoryReader, Retention, StoreError};

/// Messages that arrive within this time share a transaction.
const GATHER: Duration = Duration::from_millis(20);
/// So many do not wait for more.
const ENOUGH: usize = 128;
/// Messages that wait to be stored; further ones are not taken from the connection meanwhile.
const MOST: usize = 512;
/// Pages hear of changes at most this often.
const FLUSH: Duration = Duration::from_millis(200);
/// Most previews that wait to be stored.
const PREVIEWS: usize = 64;
/// Most messages that wait to be stored without the broker waiting for a confirmation (QoS 0).
const UNCONFIRMED: usize = 1024;
/// Rows and previews in one event.
const EVENT_ROWS: usize = 40;
/// Appliances, and alerts, in one event; the others come with the next ones. Some events are kept for pages that are behind.
const EVENT_STATES: usize = 128;
/// Wait before a batch is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often pages and metrics are told how things are.
const TICK: Duration = Duration::from_secs(5);
/// How often old rows are looked for.
const PRUNE: Duration = Duration::from_mins(1);
/// Between two rounds of forgetting when there is more to forget: new messages come first.
const PRUNE_PAUSE: Duration = Duration::from_millis(100);
/// Rows forgotten in one transaction.
const PRUNE_ROWS: usize = 2000;
/// How long an acknowledgement may take.
const ORDER_PATIENCE: Duration = Duration::from_secs(10);
/// How long the goodbye may take.
const GOODBYE: Duration = Duration::from_secs(2);
/// A retained acknowledgement is dropped by the broker after this, seconds.
const ACK_EXPIRY_S: u32 = 30 * 86_400;
const ACK_SCHEMA: &str = "scansentry/ack/1";

pub(super) struct Follow {
    pub(super) config: Arc<Config>,
    pub(super) settings: Settings,
    pub(super) name: String,
    pub(super) reader: HistoryReader,
    pub(super) updates: broadcast::Sender<Arc<Update>>,
    pub(super) broker: watch::Sender<Broker>,
    pub(super) metrics: DashboardMetrics,
}

/// Why a connection ended.
enum Ended {
    Stop,
    Lost(String),
}

/// A batch on its way into the history, and the history itself: there and back again.
type Writing = JoinHandle<(Box<History>, Vec<Received>, Result<Changes, StoreError>)>;

/// What to remember of a message that waits to be stored.
#[derive(Clone, Copy)]
struct Tag {
    /// To be confirmed once the message is stored.
    receipt: Option<Receipt>,
    /// Whether the broker sends it again on the next connection.
    again: bool,
    preview: bool,
}

/// What is at hand between broker, history and pages.
struct Hands {
    /// `None` while it is written.
    history: Option<Box<History>>,
    writing: Option<Writing>,
    /// Of the messages in `writing`, in the same order.
    tags: Vec<Tag>,
    /// Whether the connection that brought the messages in `writing` has ended.
    lost: bool,
    pending: Vec<(Received, Tag)>,
    /// Of messages that were not taken: nothing to store, and yet to be confirmed.
    untaken: Vec<Receipt>,
    /// Whether it was said that there are too many appliances.
    crowded: bool,
    /// Not before this is the next batch written.
    write_at: Instant,
    /// What the pages have not heard yet.
    unsent: Changes,
    sent_at: Instant,
    /// Where the last event that was full has ended.
    last_appliance: Option<ApplianceKey>,
    last_alert: Option<(ApplianceKey, Pseudonym)>,
    orders: HashMap<Ticket, (Instant, oneshot::Sender<Result<(), Refusal>>)>,
    subscriptions: Subscriptions,
    prune_at: Instant,
}

impl Follow {
    pub(super) async fn run(
        self,
        history: Box<History>,
        mut orders: mpsc::Receiver<Order>,
        stop: CancellationToken,
    ) {
        self.metrics.rows.set(history.rows());
        let mut backoff = Backoff::new(&self.config.mqtt);
        let now = Instant::now();
        let mut hands = Hands {
            history: Some(history),
            writing: None,
            tags: Vec::new(),
            lost: false,
            pending: Vec::new(),
            untaken: Vec::new(),
            crowded: false,
            write_at: now,
            unsent: Changes::default(),
            sent_at: now,
            last_appliance: None,
            last_alert: None,
            orders: HashMap::new(),
            subscriptions: Subscriptions::load(&self.config),
            prune_at: now,
        };
        let mut warned = false;
        loop {
            let mut session = Session::open(&self.settings);
            let ended = self
                .connection(&mut session, &mut hands, &mut orders, &mut backoff, &stop)
                .await;
            if hands.history.is_none() && hands.writing.is_none() {
                tracing::error!("dashboard: a defect in the program ended the history");
                self.broker.send_modify(|broker| {
                    broker.storage =
                        Some("history has ended by a defect in the program; start it again".into());
                });
                self.say_broker(false, Some("the history has ended".into()));
                return;
            }
            for (_, (_, done)) in hands.orders.drain() {
                let _ = done.send(Err(away()));
            }
            // Not confirmed: the broker sends these again on the next connection.
            hands.lost = hands.writing.is_some();
            hands.pending.retain(|(_, tag)| !tag.again);
            hands.untaken.clear();
            match ended {
                Ended::Stop => {
                    session.close(GOODBYE).await;
                    if let Some(writing) = hands.writing.take() {
                        let _ = tokio::time::timeout(GOODBYE, writing).await;
                    }
                    return;
                }
                Ended::Lost(reason) => {
                    if self.broker.borrow().connected || !warned {
                        tracing::warn!(
                            broker = self.settings.broker(),
                            "dashboard: no connection to the broker ({reason}); trying again"
                        );
                        warned = true;
                    }
                    drop(session);
                    self.say_broker(false, Some(reason));
                }
            }
            let wait = tokio::time::sleep(backoff.wait());
            tokio::pin!(wait);
            loop {
                tokio::select! {
                    () = stop.cancelled() => return,
                    () = &mut wait => break,
                    Some(order) = orders.recv() => { let _ = order.done.send(Err(away())); }
                }
            }
        }
    }

    fn say_broker(&self, connected: bool, reason: Option<String>) {
        self.metrics.connected.set(u64::from(connected));
        let changed = self.broker.send_if_modified(|broker| {
            let changed = broker.connected != connected;
            if changed {
                broker.since_ms = now_ms();
            }
            broker.connected = connected;
            broker.reason = reason;
            changed
        });
        if changed {
            self.tick();
        }
    }

    /// Tells the pages that the server is there, and how it stands with the broker.
    fn tick(&self) {
        self.send("tick", &super::page::broker_json(&self.broker.borrow()));
    }

    fn send(&self, event: &'static str, data: &Value) {
        let data = data.to_string();
        // Without pages there is nobody to tell.
        let _ = self.updates.send(Arc::new(Update { event, data }));
    }

    async fn connection(
        &self,
        session: &mut Session,
        hands: &mut Hands,
        orders: &mut mpsc::Receiver<Order>,
        backoff: &mut Backoff,
        stop: &CancellationToken,
    ) -> Ended {
        let mut tick = tokio::time::interval(TICK);
        let patience = Duration::from_secs(self.config.mqtt.connect_timeout_s) + GOODBYE;
        let deadline = Instant::now() + patience;
        let mut connected = false;
        loop {
            if hands.prune_at <= Instant::now() && !self.prune(hands).await {
                return Ended::Lost("the history's thread has died".into());
            }
            let enough = hands.pending.len() >= ENOUGH && self.broker.borrow().storage.is_none();
            if hands.writing.is_none()
                && !hands.pending.is_empty()
                && (enough || hands.write_at <= Instant::now())
            {
                hands.begin_writing();
            }
            for receipt in std::mem::take(&mut hands.untaken) {
                if session.confirm(receipt).await.is_err() {
                    return Ended::Lost("the connection has ended".into());
                }
            }
            if hands.has_unsent() && hands.sent_at + FLUSH <= Instant::now() {
                self.flush(hands).await;
            }
            let (write_at, flush_at) = (hands.write_at, hands.sent_at + FLUSH);
            let may_write = hands.writing.is_none() && !hands.pending.is_empty();
            let may_flush = hands.has_unsent();
            tokio::select! {
                () = stop.cancelled() => return Ended::Stop,
                event = session.next(), if hands.pending.len() < MOST => match event {
                    Event::Connected => {
                        connected = true;
                        if hands.subscriptions.ask(session).await.is_err() {
                            return Ended::Lost("the connection has ended".into());
                        }
                        tracing::info!(broker = self.settings.broker(), "dashboard: connected to the broker");
                        self.say_broker(true, None);
                    }
                    Event::Message { topic, payload, retained, receipt } => {
                        backoff.reset();
                        self.hear(hands, &topic, &payload, retained, receipt);
                    }
                    Event::Acked(ticket) => hands.answer(ticket, Ok(())),
                    Event::Refused(ticket, reason) => hands.answer(ticket, Err(refused(&reason))),
                    Event::Lost(lost) => return Ended::Lost(lost.reason),
                },
                written = async { hands.writing.as_mut().expect("only polled while writing").await }, if hands.writing.is_some() => {
                    hands.writing = None;
                    let Ok((history, batch, result)) = written else {
                        return Ended::Lost("the history's thread has died".into());
                    };
                    if !self.stored(session, hands, history, batch, result).await {
                        return Ended::Lost("the connection has ended".into());
                    }
                }
                () = tokio::time::sleep_until(write_at), if may_write => {}
                () = tokio::time::sleep_until(flush_at), if may_flush => {}
                Some(order) = orders.recv() => {
                    if connected {
                        if self.publish(session, hands, order).await.is_err() {
                            return Ended::Lost("the connection has ended".into());
                        }
                    } else {
                        let _ = order.done.send(Err(away()));
                    }
                }
                _ = tick.tick() => {
                    if !connected && deadline <= Instant::now() {
                        return Ended::Lost("no answer in time".into());
                    }
                    hands.orders.retain(|_, (since, _)| since.elapsed() < ORDER_PATIENCE);
                    if session.refused() {
                        let line = "it refuses a subscription; check its access rules, and whether it has shared subscriptions where dashboard.share is set";
                        self.broker.send_modify(|broker| broker.reason = Some(line.into()));
                    }
                    self.tick();
                    self.count_appliances().await;
                }
            }
        }
    }

    fn hear(
        &self,
        hands: &mut Hands,
        topic: &str,
        payload: &[u8],
        retained: bool,
        receipt: Option<Receipt>,
    ) {
        let prefix = &self.config.mqtt.topic_prefix;
        match parse(prefix, topic, payload, retained, now_ms()) {
            Ok(message) => {
                let kind = message.body.kind();
                let tag = Tag {
                    receipt,
                    again: receipt.is_some() || retained,
                    preview: kind == "preview",
                };
                let waiting = |which: fn(&Tag) -> bool| {
                    let pending = hands.pending.iter().map(|(_, tag)| tag);
                    pending.chain(&hands.tags).filter(|t| which(t)).count()
                };
                let full = (tag.preview
                    && (self.config.dashboard.preview_bytes == 0
                        || waiting(|t| t.preview) >= PREVIEWS))
                    || (receipt.is_none() && waiting(|t| t.receipt.is_none()) >= UNCONFIRMED);
                if full {
                    self.metrics.heard(kind, "dropped");
                    hands.untaken.extend(receipt);
                    return;
                }
                if hands.pending.is_empty() {
                    hands.write_at = hands.write_at.max(Instant::now() + GATHER);
                }
                hands.pending.push((message, tag));
            }
            Err(reason) => {
                tracing::debug!("a message was not taken: {reason}");
                self.metrics.heard("unknown", "unusable");
                hands.untaken.extend(receipt);
            }
        }
    }

    /// After a batch: confirms it, or keeps it for another try. `false` when the connection has ended.
    async fn stored(
        &self,
        session: &mut Session,
        hands: &mut Hands,
        history: Box<History>,
        batch: Vec<Received>,
        result: Result<Changes, StoreError>,
    ) -> bool {
        self.metrics.rows.set(history.rows());
        hands.history = Some(history);
        let mut tags = std::mem::take(&mut hands.tags);
        let lost = std::mem::take(&mut hands.lost);
        if lost {
            // Their receipts belong to a connection that has ended.
            for tag in &mut tags {
                tag.receipt = None;
            }
        }
        match result {
            Ok(changes) => {
                if self.broker.borrow().storage.is_some() {
                    tracing::info!("dashboard: the history can be written again");
                    self.broker.send_modify(|broker| broker.storage = None);
                    self.tick();
                }
                for (kind, new) in &changes.counted {
                    self.metrics
                        .heard(kind, if *new { "stored" } else { "known" });
                }
                for kind in &changes.dropped {
                    self.metrics.heard(kind, "dropped");
                }
                if !changes.dropped.is_empty() && !hands.crowded {
                    hands.crowded = true;
                    tracing::warn!(
                        "dashboard: more appliances than it remembers; messages of new ones are dropped until others are forgotten"
                    );
                }
                hands.gather(changes);
                for receipt in tags.into_iter().filter_map(|tag| tag.receipt) {
                    if session.confirm(receipt).await.is_err() {
                        return false;
                    }
                }
            }
            Err(error) => {
                if self.broker.borrow().storage.is_none() {
                    tracing::error!("dashboard: the history cannot be written: {error}");
                    let line = format!(
                        "history cannot be written ({error}); the broker keeps new messages"
                    );
                    self.broker
                        .send_modify(|broker| broker.storage = Some(line));
                    self.tick();
                }
                let mut again: Vec<_> = batch.into_iter().zip(tags).collect();
                if lost {
                    again.retain(|(_, tag)| !tag.again);
                }
                again.append(&mut hands.pending);
                hands.pending = again;
                hands.write_at = Instant::now() + RETRY;
            }
        }
        true
    }

    /// Tells the pages what has changed.
    async fn flush(&self, hands: &mut Hands) {
        hands.sent_at = Instant::now();
        let changes = hands.next_event();
        self.metrics.pages.set(self.updates.receiver_count() as u64);
        if self.updates.receiver_count() == 0 {
            hands.unsent = Changes::default();
            return;
        }
        if !changes.results.is_empty() {
            self.send(
                "results",
                &json!({ "rows": changes.results, "more": changes.more }),
            );
        }
        if !changes.previews.is_empty() {
            self.send("previews", &changes.previews.into());
        }
        let reader = self.reader.clone();
        let read = tokio::task::spawn_blocking(move || {
            let mut appliances = Vec::new();
            for key in &changes.appliances {
                appliances.extend(reader.appliances(Some(key))?);
            }
            let mut alerts = Vec::new();
            for (key, id) in &changes.alerts {
                alerts.extend(reader.alert(key, *id)?);
            }
            Ok::<_, StoreError>((appliances, alerts))
        });
        if let Ok(Ok((appliances, alerts))) = read.await {
            if !appliances.is_empty() {
                self.send("appliances", &appliances.into());
            }
            if !alerts.is_empty() {
                self.send("alerts", &alerts.into());
            }
        }
    }

    async fn count_appliances(&self) {
        let reader = self.reader.clone();
        let Ok(Ok(states)) = tokio::task::spawn_blocking(move || reader.states()).await else {
            return;
        };
        for name in ["online", "degraded", "stopped", "offline", "unknown"] {
            let of = |(state, count): &(String, u64)| (state == name).then_some(*count);
            self.metrics
                .appliances(name, states.iter().find_map(of).unwrap_or_default());
        }
        self.metrics.pages.set(self.updates.receiver_count() as u64);
    }

    /// Forgets old rows between two batches, a few at a time. Acknowledgements stay with the broker, which lets them expire: to the other
    /// dashboards, an empty one would say that it was taken back. `false` when the history's thread has died.
    async fn prune(&self, hands: &mut Hands) -> bool {
        let Some(mut history) = hands.history.take() else {
            return true;
        };
        hands.prune_at = Instant::now() + PRUNE;
        let dashboard = &self.config.dashboard;
        let keep = Retention {
            before_ms: now_ms() - i64::from(dashboard.retention_days) * 86_400_000,
            max_rows: dashboard.max_rows,
            preview_bytes: dashboard.preview_bytes,
        };
        let pruned = tokio::task::spawn_blocking(move || {
            let pruned = history.prune(keep, PRUNE_ROWS);
            (history, pruned)
        });
        let Ok((history, pruned)) = pruned.await else {
            return false;
        };
        self.metrics.rows.set(history.rows());
        hands.history = Some(history);
        match pruned {
            Ok(true) => hands.prune_at = Instant::now() + PRUNE_PAUSE,
            Ok(false) => {}
            Err(error) => tracing::debug!("dashboard: old rows are not forgotten: {error}"),
        }
        true
    }

    fn ack_topic(&self, appliance: &ApplianceKey, alert: Pseudonym) -> String {
        format!("{}/{appliance}/ack/{alert}", self.config.mqtt.topic_prefix)
    }

    async fn publish(
        &self,
        session: &mut Session,
        hands: &mut Hands,
        order: Order,
    ) -> Result<(), crate::mqtt::Gone> {
        let topic = self.ack_topic(&order.appliance, order.alert);
        let payload = if order.take_back {
            Vec::new()
        } else {
            let ack = json!({
                "schema": ACK_SCHEMA,
                "alert_id": order.alert,
                "device": order.appliance.device,
                "site": order.appliance.site,
                "at": rfc3339(jiff::Timestamp::now()),
                "by": self.name,
                "notice": NOTICE,
            });
            ack.to_string().into_bytes()
        };
        match session
            .publish(&topic, payload, &sending(order.take_back))
            .await
        {
            Ok(ticket) => _ = hands.orders.insert(ticket, (Instant::now(), order.done)),
            Err(Unsent::Gone(gone)) => return Err(gone),
            Err(too_large) => _ = order.done.send(Err(refused(&too_large))),
        }
        Ok(())
    }
}

/// How an acknowledgement is sent; one that is taken back is an empty message.
fn sending(empty: bool) -> Sending {
    if empty {
        return Sending {
            retain: true,
            ..Sending::default()
        };
    }
    Sending {
        retain: true,
        content_type: Some("application/json"),
        expiry_s: Some(ACK_EXPIRY_S),
        user: vec![("schema", ACK_SCHEMA)],
    }
}

fn refused(reason: &dyn std::fmt::Display) -> Refusal {
    Refusal::Away(format!(
        "acknowledgement: the broker refuses it ({reason}); check its access rules"
    ))
}

fn away() -> Refusal {
    Refusal::Away(
        "broker: is away, so the other dashboards would not learn of it; try again when it is back"
            .into(),
    )
}

impl Hands {
    fn begin_writing(&mut self) {
        let Some(mut history) = self.history.take() else {
            return;
        };
        let (batch, tags): (Vec<_>, _) = std::mem::take(&mut self.pending).into_iter().unzip();
        self.tags = tags;
        self.writing = Some(tokio::task::spawn_blocking(move || {
            let result = history.write(&batch);
            (history, batch, result)
        }));
    }

    fn has_unsent(&self) -> bool {
        let unsent = &self.unsent;
        !(unsent.results.is_empty()
            && unsent.previews.is_empty()
            && unsent.appliances.is_empty()
            && unsent.alerts.is_empty())
    }

    /// What the pages hear next; what is too much for one event stays.
    fn next_event(&mut self) -> Changes {
        let mut changes = std::mem::take(&mut self.unsent);
        self.unsent.appliances = surplus(&mut changes.appliances, &mut self.last_appliance);
        self.unsent.alerts = surplus(&mut changes.alerts, &mut self.last_alert);
        changes
    }

    fn gather(&mut self, changes: Changes) {
        let unsent = &mut self.unsent;
        unsent.more += changes.more + keep_last(&mut unsent.results, changes.results);
        keep_last(&mut unsent.previews, changes.previews);
        unsent.appliances.extend(changes.appliances);
        unsent.alerts.extend(changes.alerts);
    }

    fn answer(&mut self, ticket: Ticket, result: Result<(), Refusal>) {
        if let Some((_, done)) = self.orders.remove(&ticket) {
            let _ = done.send(result);
        }
    }
}

/// Leaves at most [`EVENT_STATES`] in `changed`, those after `last` before the others, so that each has its turn. Returns what goes.
fn surplus<T: Ord + Clone>(changed: &mut BTreeSet<T>, last: &mut Option<T>) -> BTreeSet<T> {
    if changed.len() <= EVENT_STATES {
        return BTreeSet::new();
    }
    let later = changed.iter().filter(|key| last.as_ref() < Some(key));
    let earlier = changed.iter().filter(|key| last.as_ref() >= Some(key));
    let turn: Vec<T> = later.chain(earlier).take(EVENT_STATES).cloned().collect();
    *last = turn.last().cloned();
    let turn = BTreeSet::from_iter(turn);
    let rest = &*changed - &turn;
    *changed = turn;
    rest
}

/// Appends `new` to `rows` and drops the oldest beyond [`EVENT_ROWS`]; returns how many went.
fn keep_last(rows: &mut Vec<Value>, new: Vec<Value>) -> u64 {
    let mut all: VecDeque<_> = std::mem::take(rows).into();
    all.extend(new);
    let surplus = all.len().saturating_sub(EVENT_ROWS);
    all.drain(..surplus);
    *rows = all.into();
    surplus as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_turn_although_all_change_all_the_time() {
        let all: BTreeSet<usize> = (0..3 * EVENT_STATES + 5).collect();
        let (mut told, mut last) = (BTreeSet::new(), None);
        for _ in 0..4 {
            let mut event = all.clone();
            let rest = surplus(&mut event, &mut last);
            assert_eq!((event.len(), &event | &rest), (EVENT_STATES, all.clone()));
            told.append(&mut event);
        }
        assert_eq!(told, all);
        let mut few = BTreeSet::from([1, 2]);
        assert!(surplus(&mut few, &mut last).is_empty() && few.len() == 2);
    }
}
