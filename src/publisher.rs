//! The publisher: the outbox, in order, to the broker, until the broker has acknowledged it.
//!
//! ```text
//! away ──connected──▶ birth, health ──▶ sending ──lost, or an acknowledgement overdue──▶ away (wait, twice as long each time)
//!                                        │  ▲
//!                                        └──┘ outbox → PUBLISH → PUBACK → confirm
//! ```
//!
//! Nothing is taken out of the outbox before its PUBACK, and every connection starts again at the oldest message. What was
//! acknowledged but not yet confirmed in the ledger when the process died is sent once more, byte for byte, with the same `event_id`.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::config::{Health as HealthConfig, HomeAssistant, Mqtt};
use crate::failpoint;
use crate::health::{self, Condition, Conditions, Health};
use crate::home_assistant;
use crate::message::{
    self, Backlog, COMMAND_TOPIC, ConditionMessage, ErrorMessage, HealthMessage, Kind, Received,
    Reporter, rfc3339,
};
use crate::mqtt::{Backoff, Event, Gone, Sending, Session, Settings, Ticket};
use crate::preview::Inlet;
use crate::progress::Stopwatch;
use crate::store::{Ledger, Store, StoreError};

/// Payload of the retained status topic while connected.
pub const ONLINE: &[u8] = b"online";
/// Payload of the status topic after an orderly stop.
pub const STOPPED: &[u8] = b"stopped";
/// Payload that the broker publishes for a daemon that has gone without a word.
pub const OFFLINE: &[u8] = b"offline";

/// How long to leave a refused message alone.
const REFUSED_PAUSE: Duration = Duration::from_mins(1);

/// Previews on their way at the same time.
const PREVIEWS: usize = 8;

/// The ledger's note of where the appliance was described to Home Assistant.
const DESCRIBED: &str = "described";

/// How long the goodbye may take.
const GOODBYE: Duration = Duration::from_secs(2);

/// What the publisher works with.
pub struct Publisher {
    /// How to connect; the last will is added here.
    pub settings: Settings,
    /// Times and limits.
    pub mqtt: Mqtt,
    /// Pace of the health message.
    pub health_config: HealthConfig,
    /// The ledger with the outbox.
    pub store: Store,
    /// Woken when there is something to publish.
    pub outbox: Arc<Notify>,
    /// The board of conditions.
    pub health: Health,
    /// Who publishes.
    pub reporter: Arc<Reporter>,
    /// Previews that wait, if they are wanted.
    pub previews: Option<Inlet>,
    /// Where commands go, if they are obeyed.
    pub commands: Option<mpsc::Sender<Received>>,
    /// Whether and where to describe the appliance.
    pub home_assistant: HomeAssistant,
    /// Files in hand, for the health message.
    pub backlog: Arc<AtomicU64>,
    /// The runtime, for the health message.
    pub engine: String,
    /// Whether the daemon comes back at once under the same topics, so that its status stays online.
    pub stay_online: Arc<AtomicBool>,
    /// Started anew at every turn, at least once a second while connected; stopped between connections.
    pub turn: Stopwatch,
}

/// Why a connection was given up.
enum Ended {
    /// The daemon stops.
    Stop,
    /// The connection is gone or useless.
    Lost(String),
    /// The ledger is gone: a defect.
    Store(StoreError),
}

impl From<Gone> for Ended {
    fn from(gone: Gone) -> Self {
        Self::Lost(gone.to_string())
    }
}

impl Publisher {
    /// Publishes until `stop`, then for at most `mqtt.drain_s` more until the outbox is empty, then says goodbye.
    pub async fn run(mut self, stop: CancellationToken) -> Result<(), StoreError> {
        let previews = self.previews.take();
        let end = self.publish(previews, &stop).await;
        self.turn.stop();
        end
    }

    async fn publish(
        &self,
        mut previews: Option<Inlet>,
        stop: &CancellationToken,
    ) -> Result<(), StoreError> {
        let settings = self.settings.clone().with_will(
            self.reporter.sender.topic(Kind::Status),
            OFFLINE,
            self.sending(Some(Kind::Status), false),
        );
        let started = jiff::Timestamp::now();
        let mut backoff = Backoff::new(&self.mqtt);
        // What waits from an earlier run may have been sent by it.
        let newest = self.store.call(|ledger| ledger.newest_pending()).await;
        let mut sent_before = newest.unwrap_or_default();
        loop {
            self.turn.start();
            let mut connection =
                Connection::new(self, &settings, previews.as_mut(), started, sent_before);
            let ended = connection.run(stop, &mut backoff).await;
            sent_before = connection.sent_now;
            match ended {
                Ended::Stop => {
                    connection.farewell().await;
                    return Ok(());
                }
                Ended::Store(error) => return Err(error),
                Ended::Lost(reason) => {
                    let hint = "check mqtt.url, the network and the broker; results are kept until it is back";
                    self.health.raise(
                        Condition::BrokerAway,
                        format!(
                            "no connection to the broker at {} ({reason}); {hint}",
                            settings.broker()
                        ),
                    );
                    tracing::debug!(reason, "connection lost");
                }
            }
            self.turn.stop();
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(backoff.wait()) => {}
            }
        }
    }
}

impl Publisher {
    /// How a message of a kind is sent. Retained messages say how things are, so they stay until the next one.
    fn sending(&self, kind: Option<Kind>, replay: bool) -> Sending {
        let Some(kind) = kind else {
            return Sending::default();
        };
        let mut user = vec![("schema", kind.schema())];
        if replay {
            user.push(("replay", "true"));
        }
        let expiry_s = self.mqtt.expiry_s;
        Sending {
            retain: kind.retained(),
            content_type: Some(kind.content_type()),
            expiry_s: (expiry_s > 0 && !kind.retained()).then_some(expiry_s),
            user,
        }
    }

    fn command_topic(&self) -> String {
        format!("{}/{COMMAND_TOPIC}", self.reporter.sender.topic_base)
    }

    /// Where the appliance is described to Home Assistant, if it is.
    fn description_topic(&self) -> Option<String> {
        let HomeAssistant { enabled, prefix } = &self.home_assistant;
        enabled.then(|| home_assistant::topic(prefix, &self.reporter.sender))
    }

    /// Notes where the appliance is described, so that it can be withdrawn there.
    async fn note_description(&self) {
        let topic = self.description_topic();
        let noted = self
            .store
            .call(move |ledger| ledger.set_note(DESCRIBED, topic.as_deref()))
            .await;
        if let Err(error) = noted {
            tracing::debug!("description: {error}");
        }
    }
}

/// What is to be said as soon as the outbox has been sent.
#[derive(Default)]
struct Due {
    /// The health has changed in a way that subscribers wait for.
    health: bool,
    /// Home Assistant wants the description again.
    description: bool,
}

/// One connection.
struct Connection<'a> {
    publisher: &'a Publisher,
    session: Session,
    previews: Option<&'a mut Inlet>,
    due: Due,
    /// The message that withdraws an old description.
    withdrawing: Option<Ticket>,
    started: jiff::Timestamp,
    /// Outbox messages sent and not acknowledged: which, and when sent.
    in_flight: HashMap<Ticket, (i64, Instant)>,
    /// Status and health messages sent and not acknowledged.
    own: HashMap<Ticket, Instant>,
    /// Acknowledged outbox messages that the ledger has not let go of yet.
    unconfirmed: Vec<i64>,
    /// Whether the broker refused a status or health message on this connection.
    own_refused: bool,
    /// Outbox messages that the broker refused on this connection, and until when they are left alone.
    refused: HashSet<i64>,
    refused_until: Option<Instant>,
    last_sent: i64,
    more: bool,
    /// Outbox messages up to this one may have reached the broker before: on an earlier connection, or in an earlier run.
    sent_before: i64,
    /// The latest outbox message that was sent on this connection.
    sent_now: i64,
}

impl<'a> Connection<'a> {
    fn new(
        publisher: &'a Publisher,
        settings: &Settings,
        previews: Option<&'a mut Inlet>,
        started: jiff::Timestamp,
        sent_before: i64,
    ) -> Self {
        Self {
            publisher,
            session: Session::open(settings),
            previews,
            due: Due::default(),
            withdrawing: None,
            started,
            in_flight: HashMap::new(),
            own: HashMap::new(),
            unconfirmed: Vec::new(),
            own_refused: false,
            refused: HashSet::new(),
            refused_until: None,
            last_sent: 0,
            more: true,
            sent_before,
            sent_now: sent_before,
        }
    }

    async fn run(&mut self, stop: &CancellationToken, backoff: &mut Backoff) -> Ended {
        match self.serve(stop, backoff).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn serve(
        &mut self,
        stop: &CancellationToken,
        backoff: &mut Backoff,
    ) -> Result<std::convert::Infallible, Ended> {
        let patience = Duration::from_secs(self.publisher.mqtt.connect_timeout_s) + GOODBYE;
        let first = tokio::select! {
            () = stop.cancelled() => return Err(Ended::Stop),
            first = tokio::time::timeout(patience, self.session.next()) => first,
        };
        match first {
            Ok(Event::Connected) => {}
            Ok(Event::Lost(reason)) => return Err(Ended::Lost(reason)),
            Ok(other) => return Err(Ended::Lost(format!("unexpected {other:?}"))),
            Err(_) => return Err(Ended::Lost("no answer in time".into())),
        }
        self.publisher.health.clear(Condition::BrokerAway);
        tracing::info!(
            broker = self.publisher.settings.broker(),
            "connected to the broker"
        );
        self.publish_own(Kind::Status, ONLINE.to_vec()).await?;
        if self.publisher.commands.is_some() {
            self.session
                .subscribe(&self.publisher.command_topic(), true)
                .await?;
        }
        self.describe().await?;

        let ack_timeout = Duration::from_secs(self.publisher.mqtt.ack_timeout_s);
        let mut conditions = self.publisher.health.subscribe();
        let mut health_tick =
            tokio::time::interval(Duration::from_secs(self.publisher.health_config.interval_s));
        let mut overdue_tick = tokio::time::interval(Duration::from_secs(1).min(ack_timeout / 2));
        let mut drain_until: Option<Instant> = None;
        loop {
            self.publisher.turn.start();
            let taken = self
                .previews
                .as_mut()
                .is_some_and(|previews| previews.take());
            // What was recorded before these previews is sent before them.
            self.more |= taken;
            self.send().await?;
            self.send_previews().await?;
            if std::mem::take(&mut self.due.health) {
                let now = conditions.borrow_and_update().clone();
                self.publish_health(now).await?;
            }
            if let Some(until) = drain_until
                && ((self.in_flight.is_empty() && self.unconfirmed.is_empty() && !self.more)
                    || until <= Instant::now())
            {
                return Err(Ended::Stop);
            }
            tokio::select! {
                event = self.session.next() => self.handle(event, backoff).await?,
                () = self.publisher.outbox.notified() => self.more = true,
                _ = health_tick.tick() => {
                    let now = conditions.borrow_and_update().clone();
                    self.publish_health(now).await?;
                }
                Ok(()) = conditions.changed() => {
                    let now = conditions.borrow_and_update().clone();
                    self.publish_health(now).await?;
                }
                _ = overdue_tick.tick() => {
                    self.check_overdue(ack_timeout)?;
                    // Here, so that a flood of birth messages is answered once a second.
                    if std::mem::take(&mut self.due.description) {
                        self.publish_description().await?;
                    }
                    if !self.unconfirmed.is_empty() {
                        self.confirm().await?;
                    }
                }
                () = stop.cancelled(), if drain_until.is_none() => {
                    drain_until = Some(Instant::now() + Duration::from_secs(self.publisher.mqtt.drain_s));
                    self.more = true;
                }
            }
        }
    }

    /// Fills the window from the outbox.
    async fn send(&mut self) -> Result<(), Ended> {
        let window = usize::from(self.publisher.mqtt.inflight);
        while self.more && self.in_flight.len() + self.unconfirmed.len() < window {
            let unsettled = self.in_flight.len() + self.unconfirmed.len();
            let (after, room) = (self.last_sent, window - unsettled);
            let messages = self
                .publisher
                .store
                .call(move |ledger| ledger.pending(after, room))
                .await;
            let messages = match messages {
                Ok(messages) => messages,
                Err(StoreError::Closed) => return Err(Ended::Store(StoreError::Closed)),
                Err(error) => {
                    // The workers report a ledger in trouble; the messages are still in it.
                    tracing::debug!("outbox: {error}");
                    self.more = false;
                    return Ok(());
                }
            };
            self.more = messages.len() == room;
            for message in messages {
                self.last_sent = message.seq;
                if self.refused.contains(&message.seq) {
                    continue;
                }
                let (kind, replay) = (
                    Kind::of_topic(&message.topic),
                    message.seq <= self.sent_before,
                );
                // It counts the open alerts.
                self.due.health |= kind == Some(Kind::Alert);
                let sending = self.publisher.sending(kind, replay);
                let ticket = self
                    .publish(&message.topic, message.payload, &sending)
                    .await?;
                failpoint::hit("sent", 0);
                self.sent_now = self.sent_now.max(message.seq);
                self.in_flight.insert(ticket, (message.seq, Instant::now()));
            }
        }
        Ok(())
    }

    /// Sends the previews that wait, once nothing is left in the outbox that belongs before them.
    async fn send_previews(&mut self) -> Result<(), Ended> {
        while !self.more
            && self.own.len() < PREVIEWS
            && let Some(payload) = self.previews.as_mut().and_then(|previews| previews.pop())
        {
            self.publish_own(Kind::Preview, payload).await?;
        }
        Ok(())
    }

    /// Describes the appliance to Home Assistant, or withdraws what was said under another name or before it was switched off.
    async fn describe(&mut self) -> Result<(), Ended> {
        let publisher = self.publisher;
        let wanted = publisher.description_topic();
        let noted = publisher.store.call(|ledger| ledger.note(DESCRIBED)).await;
        // A ledger that cannot be read now can be at the next connection.
        let noted = noted.unwrap_or_default();
        if let Some(old) = noted.as_ref().filter(|old| wanted.as_ref() != Some(old)) {
            let retained = Sending {
                retain: true,
                ..Sending::default()
            };
            let ticket = self.publish(old, Vec::new(), &retained).await?;
            self.own.insert(ticket, Instant::now());
            self.withdrawing = Some(ticket);
        } else if noted != wanted {
            publisher.note_description().await;
        }
        if publisher.home_assistant.enabled {
            let birth = home_assistant::birth_topic(&publisher.home_assistant.prefix);
            self.session.subscribe(&birth, true).await?;
            self.publish_description().await?;
        }
        Ok(())
    }

    async fn publish_description(&mut self) -> Result<(), Ended> {
        let Some(topic) = self.publisher.description_topic() else {
            return Ok(());
        };
        let description = home_assistant::description(&self.publisher.reporter.sender);
        let retained = Sending {
            retain: true,
            content_type: Some("application/json"),
            ..Sending::default()
        };
        let payload = message::encode(&description);
        let ticket = self.publish(&topic, payload, &retained).await?;
        self.own.insert(ticket, Instant::now());
        Ok(())
    }

    /// Takes a message of a topic that was subscribed to.
    fn take_message(&mut self, topic: &str, payload: Vec<u8>, retained: bool) {
        let publisher = self.publisher;
        if topic == home_assistant::birth_topic(&publisher.home_assistant.prefix) {
            self.due.description |= payload == home_assistant::BIRTH;
        } else if let Some(commands) = &publisher.commands
            && topic == publisher.command_topic()
            && commands.try_send(Received { payload, retained }).is_err()
        {
            tracing::debug!("a command was dropped: too many wait");
        }
    }

    /// Handles an event and all others that are there, so that their confirmations share one transaction.
    async fn handle(&mut self, event: Event, backoff: &mut Backoff) -> Result<(), Ended> {
        let mut acknowledged = false;
        let mut lost = None;
        let mut next = Some(event);
        while let Some(event) = next {
            match event {
                Event::Acked(ticket) => {
                    if let Some((seq, _)) = self.in_flight.remove(&ticket) {
                        self.unconfirmed.push(seq);
                        acknowledged = true;
                    }
                    self.own.remove(&ticket);
                    if self.withdrawing == Some(ticket) {
                        self.withdrawing = None;
                        self.publisher.note_description().await;
                    }
                    backoff.reset();
                }
                Event::Refused(ticket, reason) => {
                    self.own_refused |= self.own.remove(&ticket).is_some();
                    if let Some((seq, _)) = self.in_flight.remove(&ticket) {
                        self.refused.insert(seq);
                        self.refused_until
                            .get_or_insert(Instant::now() + REFUSED_PAUSE);
                    }
                    let message = format!(
                        "the broker refuses messages ({reason}); check its access rules and quotas"
                    );
                    self.publisher
                        .health
                        .raise(Condition::BrokerRefuses, message);
                }
                Event::Lost(reason) => lost = Some(reason),
                Event::Message {
                    topic,
                    payload,
                    retained,
                    ..
                } => self.take_message(&topic, payload, retained),
                Event::Connected => {}
            }
            next = self.session.try_next();
        }
        if acknowledged {
            if self.refused.is_empty() && !self.own_refused {
                self.publisher.health.clear(Condition::BrokerRefuses);
            }
            self.confirm().await?;
        }
        lost.map_or(Ok(()), |reason| Err(Ended::Lost(reason)))
    }

    /// Takes acknowledged messages out of the outbox. If that cannot be written now, they count against the window until it can.
    async fn confirm(&mut self) -> Result<(), Ended> {
        failpoint::hit("acknowledged", 0);
        let seqs = self.unconfirmed.clone();
        let confirmed = self
            .publisher
            .store
            .call(move |ledger| ledger.confirm(&seqs))
            .await;
        match confirmed {
            Ok(()) => {
                failpoint::hit("confirmed", 0);
                self.unconfirmed.clear();
            }
            Err(StoreError::Closed) => return Err(Ended::Store(StoreError::Closed)),
            Err(error) => {
                let message = error.to_string();
                self.publisher
                    .health
                    .raise(Condition::StateUnwritable, message);
            }
        }
        Ok(())
    }

    fn check_overdue(&mut self, timeout: Duration) -> Result<(), Ended> {
        let now = Instant::now();
        let sent = self
            .in_flight
            .values()
            .map(|(_, sent)| sent)
            .chain(self.own.values());
        if sent.clone().any(|sent| now - *sent > timeout) {
            return Err(Ended::Lost(format!(
                "no acknowledgement in {} s",
                timeout.as_secs()
            )));
        }
        // A wake-up that was lost, or an outbox that could not be read, costs a tick.
        self.more |= self.publisher.store.outbox_len()
            > (self.in_flight.len() + self.unconfirmed.len() + self.refused.len()) as u64;
        let settled = self.in_flight.is_empty() && self.unconfirmed.is_empty();
        if settled && self.refused_until.is_some_and(|until| until <= now) {
            // Once more from the oldest, when nothing is on its way or still to be confirmed that would be sent a second time.
            self.refused.clear();
            self.refused_until = None;
            self.last_sent = 0;
            self.sent_before = self.sent_now;
            self.more = true;
        }
        Ok(())
    }

    /// Hands a message to the session; a connection that takes nothing any more for as long as an acknowledgement may take is lost.
    async fn publish(
        &mut self,
        topic: &str,
        payload: Vec<u8>,
        sending: &Sending,
    ) -> Result<Ticket, Ended> {
        let patience = Duration::from_secs(self.publisher.mqtt.ack_timeout_s);
        let publishing = self.session.publish(topic, payload, sending);
        match tokio::time::timeout(patience, publishing).await {
            Ok(published) => Ok(published?),
            Err(_) => Err(Ended::Lost("the connection takes no messages".into())),
        }
    }

    async fn publish_own(&mut self, kind: Kind, payload: Vec<u8>) -> Result<(), Ended> {
        let topic = self.publisher.reporter.sender.topic(kind);
        let sending = self.publisher.sending(Some(kind), false);
        let ticket = self.publish(&topic, payload, &sending).await?;
        self.own.insert(ticket, Instant::now());
        Ok(())
    }

    async fn publish_health(&mut self, conditions: Conditions) -> Result<(), Ended> {
        let totals = |ledger: &mut Ledger| Ok((ledger.counts()?, ledger.open_alerts()?));
        let Ok((counts, open_alerts)) = self.publisher.store.call(totals).await else {
            return Ok(());
        };
        let reporter = &self.publisher.reporter;
        let payload = message::encode(&HealthMessage {
            schema: Kind::Health.schema(),
            device: &reporter.sender.device,
            site: &reporter.sender.site,
            at: rfc3339(jiff::Timestamp::now()),
            state: message::state_word(&conditions),
            conditions: ConditionMessage::list(&conditions),
            backlog: Backlog::new(self.publisher.backlog.load(Ordering::Relaxed), &counts),
            last_error: health::last_error().map(ErrorMessage::from),
            open_alerts,
            counts,
            previews: self.previews.as_ref().map(|previews| previews.counts()),
            started_at: rfc3339(self.started),
            version: env!("CARGO_PKG_VERSION"),
            model: &reporter.model,
            engine: &self.publisher.engine,
        });
        self.publish_own(Kind::Health, payload).await
    }

    /// Leaves the retained "stopped" and closes the connection in order.
    async fn farewell(mut self) {
        let stopped = !self.publisher.stay_online.load(Ordering::Relaxed);
        if stopped
            && self
                .publish_own(Kind::Status, STOPPED.to_vec())
                .await
                .is_ok()
        {
            let acknowledged = async {
                while !self.own.is_empty() {
                    match self.session.next().await {
                        Event::Acked(ticket) | Event::Refused(ticket, _) => {
                            _ = self.own.remove(&ticket);
                        }
                        Event::Lost(_) => return,
                        _ => {}
                    }
                }
            };
            let _ = tokio::time::timeout(GOODBYE, acknowledged).await;
        }
        self.session.close(GOODBYE).await;
    }
}
