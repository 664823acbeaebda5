//! The publisher: the outbox, in order, to the broker, until the broker has acknowledged it.
//!
//! ```text
//! away ──connected──▶ birth, health ──▶ sending ──lost, or an acknowledgement overdue──▶ away (wait, twice as long each time)
//!                                        │  ▲
//!                                        └──┘ outbox → PUBLISH → PUBACK → confirm
//! ```
//!
//! Nothing is taken out of the outbox before its PUBACK, and every connection starts again at the oldest message. What was
//! acknowledged but not yet confirmed in the ledger when the process died (or, as confirmations do not wait for the disk, in the last second before
//! a power cut) is sent once more, byte for byte, with the same `event_id`.
//!
//! A message that the broker does not take must not hold up the rest: [`suspicion`] finds it out, and it is parked in the ledger. At every
//! start, once a day and when the broker names a higher limit some of the parked ones come back, and each that is acknowledged then brings others.

mod suspicion;

use std::collections::HashMap;
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
    self, Backlog, COMMAND_TOPIC, ConditionMessage, ErrorMessage, HealthMessage, Kind,
    OutboxMessage, Received, Reporter, rfc3339,
};
use crate::mqtt::{Backoff, Event, Gone, Lost, Sending, Session, Settings, Ticket, Unsent};
use crate::preview::Inlet;
use crate::progress::{Beat, LOOK, Stopwatch, stir};
use crate::store::{Ledger, Store, StoreError, Survives};
use suspicion::{ENDS, Next, REFUSALS, RETURNED, Suspicion};

/// Payload of the retained status topic while connected.
pub const ONLINE: &[u8] = b"online";
/// Payload of the status topic after an orderly stop.
pub const STOPPED: &[u8] = b"stopped";
/// Payload that the broker publishes for a daemon that has gone without a word.
pub const OFFLINE: &[u8] = b"offline";

/// How long status and health may wait, besides the first status, for messages of the outbox to show that they get through.
const INTRODUCTION: Duration = Duration::from_mins(1);

/// Parked messages that come back at a start and once a day,
const SCOUTS: usize = 8;
/// and with each of them that is acknowledged.
const FOLLOWERS: usize = 2;

/// How often they do, besides the starts.
const SCOUTING: Duration = Duration::from_hours(24);

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
    /// Started anew at every turn, at least once a [`Beat`] while connected; stopped between connections.
    pub turn: Stopwatch,
}

/// Why a connection was given up.
enum Ended {
    /// The daemon stops.
    Stop,
    /// The connection is gone or useless.
    Lost(Lost),
    /// The ledger is gone: a defect.
    Store(StoreError),
}

impl From<Gone> for Ended {
    fn from(gone: Gone) -> Self {
        Self::Lost(gone.to_string().into())
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
        let mut outbox = Outbox::new(&self.mqtt, newest.unwrap_or_default());
        loop {
            self.turn.start();
            self.scout(&mut outbox).await;
            let mut connection =
                Connection::new(self, &settings, previews.as_mut(), started, &mut outbox);
            let ended = connection.run(stop).await;
            let lasted = connection.connected.map(|since| since.elapsed());
            match ended {
                Ended::Stop => {
                    connection.farewell().await;
                    return Ok(());
                }
                Ended::Store(error) => return Err(error),
                Ended::Lost(lost) => {
                    connection.blame(&lost).await?;
                    let hint = lost
                        .hint
                        .unwrap_or("check mqtt.url, the network and the broker");
                    self.health.raise(
                        Condition::BrokerAway,
                        format!(
                            "no connection to the broker at {} ({lost}); {hint}; results are kept until it is back",
                            settings.broker()
                        ),
                    );
                    tracing::debug!(reason = lost.reason, "connection lost");
                }
            }
            outbox.sent_before = outbox.sent_now;
            if let Some(lasted) = lasted {
                backoff.lasted(lasted);
            }
            if std::mem::take(&mut outbox.got_on) {
                backoff.reset();
            }
            self.turn.stop();
            tokio::select! {
                () = stop.cancelled() => return Ok(()),
                () = tokio::time::sleep(backoff.wait()) => {}
            }
        }
    }

    /// Brings some parked messages back at the start, once a day, and when the broker's limit was raised.
    async fn scout(&self, outbox: &mut Outbox) {
        if outbox.scouted.is_none_or(|at| at.elapsed() >= SCOUTING) {
            outbox.scouted = Some(Instant::now());
            let back = self.store.call(|ledger| ledger.bring_back(SCOUTS)).await;
            if let Ok(count @ 1..) = back {
                tracing::info!(count, "parked messages are tried again");
            }
        }
        self.say_parked();
    }

    fn say_parked(&self) {
        if self.store.parked_len() > 0 {
            let message = "the broker does not take some messages while it takes others, so they are set aside; see scansentry outbox list, \
                           mend the broker's limits or access rules, then scansentry outbox retry --all";
            self.health.raise(Condition::MessagesParked, message);
        } else {
            self.health.clear(Condition::MessagesParked);
        }
    }

    /// Sets a message of the outbox aside, and what was known of it.
    async fn park(&self, outbox: &mut Outbox, seq: i64, reason: String) -> Result<(), StoreError> {
        outbox.suspicion.gone(seq);
        outbox.got_on = true;
        tracing::debug!(seq, reason, "parked");
        let now = jiff::Timestamp::now().as_second();
        let parked = self
            .store
            .call(move |ledger| ledger.park(seq, &reason, now));
        match parked.await {
            Ok(0) => {}
            Ok(dropped) => tracing::error!(
                dropped,
                "too many parked messages: the oldest were dropped, their outcomes stay in the ledger; see scansentry outbox list"
            ),
            Err(StoreError::Closed) => return Err(StoreError::Closed),
            // It stays in the outbox, and fails again.
            Err(error) => self
                .health
                .raise(Condition::StateUnwritable, error.to_string()),
        }
        self.say_parked();
        Ok(())
    }
}

/// What is known of the outbox over all connections.
struct Outbox {
    suspicion: Suspicion,
    /// Waits between refusals.
    refusals: Backoff,
    /// Refused messages are left alone until then.
    paused_until: Option<Instant>,
    /// The suspect is tried again then, when nothing comes that could be tried in its place.
    held_until: Option<Instant>,
    /// How long it is held: shorter where another try costs no connection.
    hold: Duration,
    /// Messages up to this one may have reached the broker before: on an earlier connection, or in an earlier run.
    sent_before: i64,
    /// The latest message that was sent.
    sent_now: i64,
    /// When parked messages were brought back.
    scouted: Option<Instant>,
    /// The limit that messages were parked for, bytes, if the broker has named one.
    limit: Option<usize>,
    /// Whether a message was parked that had stood in the way.
    got_on: bool,
}

impl Outbox {
    fn new(mqtt: &Mqtt, sent_before: i64) -> Self {
        Self {
            suspicion: Suspicion::default(),
            refusals: Backoff::new(mqtt),
            paused_until: None,
            held_until: None,
            hold: Duration::ZERO,
            sent_before,
            sent_now: sent_before,
            scouted: None,
            limit: None,
            got_on: false,
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

/// A message of the outbox on its way.
#[derive(Clone, Copy)]
struct Sent {
    seq: i64,
    at: Instant,
    /// Whether it has been parked before.
    returned: bool,
}

impl Sent {
    /// How often it may fail.
    fn allowed(&self, times: u32) -> u32 {
        if self.returned { RETURNED } else { times }
    }
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
    outbox: &'a mut Outbox,
    /// Since when the broker has accepted it.
    connected: Option<Instant>,
    /// Outbox messages sent and not acknowledged.
    in_flight: HashMap<Ticket, Sent>,
    /// Status and health messages sent and not acknowledged.
    own: HashMap<Ticket, Instant>,
    /// Acknowledged outbox messages that the ledger has not let go of yet.
    unconfirmed: Vec<i64>,
    /// Whether the broker refused a status or health message on this connection.
    own_refused: bool,
    /// Whether subscriptions and health have been sent. After a connection on which nothing passed, messages of the outbox go first.
    introduced: bool,
    /// The latest acknowledged message of the outbox.
    passed: Option<Ticket>,
    /// The latest message that was sent; `None`: the oldest is next, once nothing is on its way.
    last_sent: Option<i64>,
    more: bool,
}

impl<'a> Connection<'a> {
    fn new(
        publisher: &'a Publisher,
        settings: &Settings,
        previews: Option<&'a mut Inlet>,
        started: jiff::Timestamp,
        outbox: &'a mut Outbox,
    ) -> Self {
        Self {
            publisher,
            session: Session::open(settings),
            previews,
            due: Due::default(),
            withdrawing: None,
            started,
            introduced: outbox.suspicion.next() == Next::Many,
            outbox,
            connected: None,
            in_flight: HashMap::new(),
            own: HashMap::new(),
            unconfirmed: Vec::new(),
            own_refused: false,
            passed: None,
            last_sent: None,
            more: true,
        }
    }

    async fn run(&mut self, stop: &CancellationToken) -> Ended {
        match self.serve(stop).await {
            Ok(never) => match never {},
            Err(ended) => ended,
        }
    }

    async fn serve(&mut self, stop: &CancellationToken) -> Result<std::convert::Infallible, Ended> {
        let patience = Duration::from_secs(self.publisher.mqtt.connect_timeout_s) + GOODBYE;
        let first = tokio::select! {
            () = stop.cancelled() => return Err(Ended::Stop),
            first = tokio::time::timeout(patience, self.session.next()) => first,
        };
        match first {
            Ok(Event::Connected) => {}
            Ok(Event::Lost(lost)) => return Err(Ended::Lost(lost)),
            Ok(other) => return Err(Ended::Lost(format!("unexpected {other:?}").into())),
            Err(_) => return Err(Ended::Lost("no answer in time".into())),
        }
        self.connected = Some(Instant::now());
        self.publisher.health.clear(Condition::BrokerAway);
        if self
            .outbox
            .limit
            .take_if(|limit| self.session.limit() > *limit)
            .is_some()
        {
            self.outbox.scouted = None;
            self.publisher.scout(self.outbox).await;
        }
        tracing::info!(
            broker = self.publisher.settings.broker(),
            "connected to the broker"
        );
        self.publish_own(Kind::Status, ONLINE.to_vec()).await?;
        if self.introduced {
            self.introduce().await?;
        }

        let ack_timeout = Duration::from_secs(self.publisher.mqtt.ack_timeout_s);
        let mut conditions = self.publisher.health.subscribe();
        let mut health_tick =
            tokio::time::interval(Duration::from_secs(self.publisher.health_config.interval_s));
        let mut beat = Beat::every(LOOK.min(ack_timeout / 2));
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
            if !self.introduced && self.may_introduce() {
                self.introduced = true;
                self.introduce().await?;
            }
            if self.others_may_be_sent() {
                self.send_previews().await?;
                if std::mem::take(&mut self.due.health) {
                    let now = conditions.borrow_and_update().clone();
                    self.publish_health(now).await?;
                }
            }
            let waiting = self.due.description || self.publisher.store.outbox_len() > 0;
            if waiting || !self.settled() {
                stir();
            }
            if let Some(until) = drain_until
                && ((self.settled() && !self.more) || until <= Instant::now())
            {
                return Err(Ended::Stop);
            }
            tokio::select! {
                event = self.session.next() => self.handle(event).await?,
                () = self.publisher.outbox.notified() => self.more = true,
                _ = health_tick.tick() => self.due.health = true,
                Ok(()) = conditions.changed() => self.due.health = true,
                () = beat.next() => {
                    self.check_overdue(ack_timeout)?;
                    // Here, so that a flood of birth messages is answered once.
                    if self.others_may_be_sent() && std::mem::take(&mut self.due.description) {
                        self.publish_description().await?;
                    }
                    if !self.unconfirmed.is_empty() {
                        self.confirm().await?;
                    }
                    self.publisher.scout(self.outbox).await;
                }
                () = stop.cancelled(), if drain_until.is_none() => {
                    drain_until = Some(Instant::now() + Duration::from_secs(self.publisher.mqtt.drain_s));
                    self.more = true;
                }
            }
        }
    }

    /// Subscribes, and describes the appliance.
    async fn introduce(&mut self) -> Result<(), Ended> {
        if self.publisher.commands.is_some() {
            self.session
                .subscribe(&self.publisher.command_topic(), true)
                .await?;
        }
        self.describe().await
    }

    /// Whether messages of the outbox have shown that they get through, or none waits; or have had their time.
    fn may_introduce(&self) -> bool {
        let waited = self
            .connected
            .is_some_and(|since| since.elapsed() >= INTRODUCTION);
        waited || (self.settled() && !self.more && self.own.is_empty())
    }

    /// Whether anything may be sent besides messages of the outbox: nothing, while one of these is on its way alone.
    fn others_may_be_sent(&self) -> bool {
        let alone = self.outbox.suspicion.next() != Next::Many && !self.in_flight.is_empty();
        self.introduced && !alone
    }

    /// Whether nothing of the outbox is on its way, or acknowledged and still in the ledger.
    fn settled(&self) -> bool {
        self.in_flight.is_empty() && self.unconfirmed.is_empty()
    }

    /// Sends what may be sent of the outbox.
    async fn send(&mut self) -> Result<(), Ended> {
        let window = usize::from(self.publisher.mqtt.inflight);
        while self.more {
            let next = self.outbox.suspicion.next();
            if next != Next::Many {
                self.last_sent = None;
            }
            if self.last_sent.is_none() {
                if !self.settled() {
                    return Ok(());
                }
                self.outbox.sent_before = self.outbox.sent_now;
            }
            let room = if next == Next::Many {
                window.saturating_sub(self.in_flight.len() + self.unconfirmed.len())
            } else {
                let paused = self
                    .outbox
                    .paused_until
                    .is_some_and(|until| until > Instant::now());
                // Alone: not even the status may be on its way.
                usize::from(self.own.is_empty() && !paused)
            };
            if room == 0 {
                return Ok(());
            }
            let (after, skip) = match next {
                Next::Many | Next::Oldest => (self.last_sent.unwrap_or_default(), 0),
                Next::Behind { suspect, skip } => (suspect, skip),
            };
            let messages = self
                .publisher
                .store
                .call(move |ledger| ledger.pending_behind(after, skip, room))
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
            if let (Next::Behind { .. }, true) = (next, messages.is_empty()) {
                // With nothing to try in its place the suspect is held for a while.
                self.more = self.outbox.suspicion.nothing_there();
                let until = Instant::now() + self.outbox.hold;
                self.outbox.held_until.get_or_insert(until);
            } else {
                self.outbox.held_until = None;
            }
            for message in messages {
                self.send_message(message).await?;
            }
            if next != Next::Many {
                self.last_sent = None;
            }
        }
        Ok(())
    }

    async fn send_message(&mut self, message: OutboxMessage) -> Result<(), Ended> {
        let OutboxMessage { seq, returned, .. } = message;
        self.last_sent = Some(seq);
        let kind = Kind::of_topic(&message.topic);
        // It counts the open alerts.
        self.due.health |= kind == Some(Kind::Alert);
        let replay = returned || seq <= self.outbox.sent_before;
        let sending = self.publisher.sending(kind, replay);
        match self
            .publish(&message.topic, message.payload, &sending)
            .await?
        {
            Ok(ticket) => {
                failpoint::hit("sent", 0);
                self.outbox.sent_now = self.outbox.sent_now.max(seq);
                let at = Instant::now();
                self.in_flight.insert(ticket, Sent { seq, at, returned });
            }
            // The broker has named its limit; there is no doubt.
            Err(too_large) => {
                self.outbox.limit = Some(self.session.limit());
                self.park(seq, too_large).await?;
            }
        }
        Ok(())
    }

    async fn park(&mut self, seq: i64, reason: String) -> Result<(), Ended> {
        let parked = self.publisher.park(self.outbox, seq, reason).await;
        parked.map_err(Ended::Store)
    }

    /// Looks for the message at fault after the connection has ended.
    async fn blame(&mut self, lost: &Lost) -> Result<(), StoreError> {
        let oldest = self.in_flight.iter().min_by_key(|(ticket, _)| **ticket);
        let Some((ticket, sent)) = oldest.map(|(ticket, sent)| (*ticket, *sent)) else {
            return Ok(());
        };
        let alone = self.in_flight.len() == 1 && self.own.is_empty();
        // Later ones were acknowledged, and it was not in good time.
        let patience = Duration::from_secs(self.publisher.mqtt.ack_timeout_s);
        let passed_over =
            sent.at.elapsed() > patience && self.passed.is_some_and(|passed| passed > ticket);
        if alone && lost.too_large {
            let reason = lost.to_string();
            self.publisher.park(self.outbox, sent.seq, reason).await?;
        } else if alone || passed_over {
            let allowed = sent.allowed(ENDS);
            self.outbox.hold = Duration::from_secs(self.publisher.mqtt.backoff_max_s) * 10;
            self.outbox
                .suspicion
                .failed(sent.seq, allowed, lost.to_string());
        } else if self.passed.is_none() {
            self.outbox.suspicion.none_passed();
        }
        Ok(())
    }

    /// Sends the previews that wait, once nothing is left in the outbox that belongs before them.
    async fn send_previews(&mut self) -> Result<(), Ended> {
        while !self.more
            && self.own.len() < PREVIEWS
            && let Some(payload) = self.previews.as_mut().and_then(|previews| previews.pop())
        {
            if !self.publish_own(Kind::Preview, payload).await? {
                self.previews.iter().for_each(|previews| previews.unsent());
            }
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
            self.withdrawing = self.publish_beside(old, Vec::new(), &retained).await?;
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
        self.publish_beside(&topic, payload, &retained).await?;
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
    async fn handle(&mut self, event: Event) -> Result<(), Ended> {
        let mut acknowledged = false;
        let (mut returned, mut guilty) = (0, Vec::new());
        let mut lost = None;
        let mut next = Some(event);
        while let Some(event) = next {
            match event {
                Event::Acked(ticket) => {
                    if let Some(sent) = self.in_flight.remove(&ticket) {
                        self.unconfirmed.push(sent.seq);
                        self.passed = self.passed.max(Some(ticket));
                        self.outbox.refusals.reset();
                        returned += usize::from(sent.returned);
                        let found = self.outbox.suspicion.acknowledged(sent.seq);
                        guilty.extend(found.map(|guilty| (guilty.seq, guilty.reason)));
                        acknowledged = true;
                    }
                    self.own.remove(&ticket);
                    if self.withdrawing == Some(ticket) {
                        self.withdrawing = None;
                        self.publisher.note_description().await;
                    }
                }
                Event::Refused(ticket, refusal) => {
                    self.own_refused |= self.own.remove(&ticket).is_some();
                    if let Some(sent) = self.in_flight.remove(&ticket) {
                        if refusal.for_good {
                            guilty.push((sent.seq, refusal.to_string()));
                        } else {
                            let allowed = sent.allowed(REFUSALS);
                            self.outbox
                                .suspicion
                                .failed(sent.seq, allowed, refusal.to_string());
                            self.pause();
                        }
                    }
                    self.say_refused(refusal.reason);
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
            if !self.outbox.suspicion.has_suspect() && !self.own_refused {
                self.publisher.health.clear(Condition::BrokerRefuses);
            }
            self.confirm().await?;
        }
        for (seq, reason) in guilty {
            self.park(seq, reason).await?;
        }
        if returned > 0 {
            let back = move |ledger: &mut Ledger| ledger.bring_back(returned * FOLLOWERS);
            let back = self.publisher.store.call(back).await;
            self.more |= back.is_ok_and(|count| count > 0);
            self.publisher.say_parked();
        }
        lost.map_or(Ok(()), |reason| Err(Ended::Lost(reason)))
    }

    fn say_refused(&self, reason: &str) {
        let message = format!(
            "the broker refuses messages ({reason}); check its access rules, quotas and limits"
        );
        self.publisher
            .health
            .raise(Condition::BrokerRefuses, message);
    }

    /// Leaves refused messages alone for a while, longer each time.
    fn pause(&mut self) {
        let now = Instant::now();
        self.outbox.hold = Duration::from_secs(self.publisher.mqtt.backoff_max_s);
        if self.outbox.paused_until.is_none_or(|until| until <= now) {
            self.outbox.paused_until = Some(now + self.outbox.refusals.wait());
        }
        self.more = true;
    }

    /// Takes acknowledged messages out of the outbox. If that cannot be written now, they count against the window until it can.
    async fn confirm(&mut self) -> Result<(), Ended> {
        failpoint::hit("acknowledged", 0);
        let seqs = self.unconfirmed.clone();
        let confirmed = self
            .publisher
            .store
            .call_that(Survives::Process, move |ledger| ledger.confirm(&seqs))
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
            .map(|sent| &sent.at)
            .chain(self.own.values());
        if sent.clone().any(|sent| now - *sent > timeout) {
            return Err(Ended::Lost(
                format!("no acknowledgement in {} s", timeout.as_secs()).into(),
            ));
        }
        if self.outbox.held_until.is_some_and(|until| until <= now) {
            self.outbox.held_until = None;
            self.outbox.suspicion.back_to_suspect();
        }
        // A wake-up that was lost, or an outbox that could not be read, or written to by another process, costs a tick.
        self.more |= self.publisher.store.outbox_len()
            > (self.in_flight.len() + self.unconfirmed.len()) as u64;
        Ok(())
    }

    /// Hands a message to the session; a connection that takes nothing any more for as long as an acknowledgement may take is lost. A
    /// message that is too large for the broker is not sent: the answer is a line that says so.
    async fn publish(
        &mut self,
        topic: &str,
        payload: Vec<u8>,
        sending: &Sending,
    ) -> Result<Result<Ticket, String>, Ended> {
        let patience = Duration::from_secs(self.publisher.mqtt.ack_timeout_s);
        let publishing = self.session.publish(topic, payload, sending);
        match tokio::time::timeout(patience, publishing).await {
            Ok(Ok(ticket)) => Ok(Ok(ticket)),
            Ok(Err(Unsent::Gone(gone))) => Err(gone.into()),
            Ok(Err(too_large @ Unsent::TooLarge { .. })) => Ok(Err(too_large.to_string())),
            Err(_) => Err(Ended::Lost("the connection takes no messages".into())),
        }
    }

    /// Publishes something that is not in the outbox.
    async fn publish_beside(
        &mut self,
        topic: &str,
        payload: Vec<u8>,
        sending: &Sending,
    ) -> Result<Option<Ticket>, Ended> {
        let ticket = match self.publish(topic, payload, sending).await? {
            Ok(ticket) => ticket,
            Err(too_large) => {
                self.own_refused = true;
                self.say_refused(&too_large);
                return Ok(None);
            }
        };
        self.own.insert(ticket, Instant::now());
        Ok(Some(ticket))
    }

    /// Publishes a message of a kind that is not in the outbox; whether it could be sent.
    async fn publish_own(&mut self, kind: Kind, payload: Vec<u8>) -> Result<bool, Ended> {
        let topic = self.publisher.reporter.sender.topic(kind);
        let sending = self.publisher.sending(Some(kind), false);
        let sent = self.publish_beside(&topic, payload, &sending).await?;
        Ok(sent.is_some())
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
        self.publish_own(Kind::Health, payload).await?;
        Ok(())
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
