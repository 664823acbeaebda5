//! MQTT: one [`Session`] is one connection with a fresh client, dropped on the first error. Nothing is kept across
//! connections here; what must survive lies in the outbox.
//!
//! rumqttc's `publish` only queues, and acknowledgements come by packet id, so one task polls the event loop (it is never
//! cancelled half-way through a poll) and matches ids with tickets: rumqttc sends in the order of the calls, so the n-th `Outgoing::Publish`
//! belongs to the n-th ticket.

mod lost;

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;

use rumqttc::{TlsConfiguration, Transport, v5};
use tokio::sync::mpsc;
use tokio_rustls::rustls::client::danger::{
    HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier,
};
use tokio_rustls::rustls::crypto::{
    CryptoProvider, verify_tls12_signature, verify_tls13_signature,
};
use tokio_rustls::rustls::pki_types::pem::PemObject as _;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use tokio_rustls::rustls::{
    self, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
};
use tokio_util::task::AbortOnDropHandle;

use crate::config::{BrokerAddress, Mqtt};

pub use lost::{Lost, Refusal};

/// Largest packet in or out; far above any message of ours.
const MAX_PACKET: usize = 1 << 20;

/// Bytes of incoming messages that may wait to be taken. With QoS 1 no broker that keeps to its window comes near it.
const MAX_WAITING: usize = 32 << 20;

/// Above so many the connection is read slowly, so that the broker is held up by TCP: Mosquitto 2.0 does not keep to the window that it is told
/// once the first message was confirmed, and sends all that it has.
const MUCH_WAITING: usize = 16 << 20;

/// The pause after each event then. Short, because acknowledgements and pings go out in between.
const PAUSE: Duration = Duration::from_millis(1);

/// Requests queued inside the client besides the messages in flight: status, health, subscriptions, disconnect.
const SPARE_REQUESTS: usize = 16;

/// Messages of a persistent session that may be on their way to us without being confirmed.
pub const RECEIVE_MAXIMUM: u16 = 256;

/// How to connect: the checked configuration with its files read.
#[derive(Clone)]
pub struct Settings {
    address: BrokerAddress,
    protocol: u8,
    client_id: String,
    login: Option<(String, String)>,
    tls: Option<Arc<ClientConfig>>,
    keep_alive: Duration,
    connect_timeout: Duration,
    inflight: u16,
    will: Option<(String, &'static [u8], Sending)>,
    persistent: Option<u32>,
}

impl std::fmt::Debug for Settings {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Settings({} as {})", self.broker(), self.client_id)
    }
}

/// A setting that cannot be used: one line `key: value; hint`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct SettingsError(String);

impl Settings {
    /// Reads the password and certificate files that `mqtt` names. `default_client_id` serves where none is configured.
    pub fn new(mqtt: &Mqtt, default_client_id: &str) -> Result<Self, SettingsError> {
        let address = mqtt.address().map_err(SettingsError)?;
        let login = if mqtt.username.is_empty() {
            None
        } else {
            let password = if mqtt.password_file.is_empty() {
                String::new()
            } else {
                let text = std::fs::read_to_string(&mqtt.password_file)
                    .map_err(|e| unreadable("password_file", &mqtt.password_file, &e))?;
                text.trim_end_matches(['\r', '\n']).to_owned()
            };
            Some((mqtt.username.clone(), password))
        };
        let tls = address
            .tls
            .then(|| tls_config(mqtt))
            .transpose()?
            .map(Arc::new);
        let client_id = if mqtt.client_id.is_empty() {
            default_client_id.to_owned()
        } else {
            mqtt.client_id.clone()
        };
        Ok(Self {
            address,
            protocol: mqtt.protocol,
            client_id,
            login,
            tls,
            keep_alive: Duration::from_secs(mqtt.keep_alive_s),
            connect_timeout: Duration::from_secs(mqtt.connect_timeout_s),
            inflight: mqtt.inflight,
            will: None,
            persistent: None,
        })
    }

    /// The same with a last will.
    #[must_use]
    pub fn with_will(mut self, topic: String, payload: &'static [u8], sending: Sending) -> Self {
        self.will = Some((topic, payload, sending));
        self
    }

    /// The same under another client id.
    #[must_use]
    pub fn with_client_id(mut self, client_id: String) -> Self {
        self.client_id = client_id;
        self
    }

    /// The same with a session that the broker keeps for `expiry_s` seconds without a connection (MQTT 3.1.1: for ever), and
    /// with messages that count as received only after [`Session::confirm`].
    #[must_use]
    pub fn with_persistent_session(mut self, expiry_s: u32) -> Self {
        self.persistent = Some(expiry_s);
        self
    }

    /// `host:port` for messages.
    pub fn broker(&self) -> String {
        format!("{}:{}", self.address.host, self.address.port)
    }

    fn host(&self) -> String {
        // rumqttc joins host and port with a colon, so a bare IPv6 address needs its brackets.
        if self.address.host.contains(':') && !self.address.tls {
            format!("[{}]", self.address.host)
        } else {
            self.address.host.clone()
        }
    }

    fn transport(&self) -> Transport {
        self.tls.as_ref().map_or(Transport::Tcp, |tls| {
            Transport::Tls(TlsConfiguration::Rustls(tls.clone()))
        })
    }
}

fn unreadable(key: &str, path: &str, error: &dyn std::fmt::Display) -> SettingsError {
    SettingsError(format!(
        "mqtt.{key}: {path} cannot be used ({error}); check the path, its owner and its content"
    ))
}

fn tls_config(mqtt: &Mqtt) -> Result<ClientConfig, SettingsError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .expect("ring supports the default protocol versions");
    let builder = if mqtt.insecure {
        builder
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
    } else {
        builder.with_root_certificates(roots(mqtt)?)
    };
    if mqtt.cert_file.is_empty() {
        return Ok(builder.with_no_client_auth());
    }
    let chain = certificates("cert_file", &mqtt.cert_file)?;
    let key = PrivateKeyDer::from_pem_file(Path::new(&mqtt.key_file))
        .map_err(|e| unreadable("key_file", &mqtt.key_file, &e))?;
    builder
        .with_client_auth_cert(chain, key)
        .map_err(|e| unreadable("cert_file", &mqtt.cert_file, &e))
}

/// The authorities that may vouch for the broker.
fn roots(mqtt: &Mqtt) -> Result<RootCertStore, SettingsError> {
    let mut roots = RootCertStore::empty();
    if mqtt.ca_file.is_empty() {
        let found = rustls_native_certs::load_native_certs();
        roots.add_parsable_certificates(found.certs);
        if roots.is_empty() {
            return Err(SettingsError("mqtt.ca_file: is not set and the system has no trusted certificates; install ca-certificates or set it".into()));
        }
    } else {
        for certificate in certificates("ca_file", &mqtt.ca_file)? {
            roots
                .add(certificate)
                .map_err(|e| unreadable("ca_file", &mqtt.ca_file, &e))?;
        }
    }
    Ok(roots)
}

/// `mqtt.insecure`: every certificate is good. The handshake's signature is still checked, so whoever answers holds that certificate's key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.0.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

fn certificates(key: &str, path: &str) -> Result<Vec<CertificateDer<'static>>, SettingsError> {
    let found: Result<Vec<_>, _> =
        CertificateDer::pem_file_iter(Path::new(path)).and_then(Iterator::collect);
    match found {
        Ok(list) if list.is_empty() => Err(unreadable(key, path, &"no certificate in it")),
        Ok(list) => Ok(list),
        Err(error) => Err(unreadable(key, path, &error)),
    }
}

/// How a message is sent: retained or not, and its MQTT 5 properties, which MQTT 3.1.1 leaves out. Payloads are always UTF-8 text, and
/// are marked as such.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sending {
    /// Whether the broker keeps the message for those who subscribe later.
    pub retain: bool,
    /// Content type, such as `application/json`.
    pub content_type: Option<&'static str>,
    /// Seconds that the broker keeps the message for a subscriber that is away; `None` is as long as it likes.
    pub expiry_s: Option<u32>,
    /// User properties: names and values.
    pub user: Vec<(&'static str, &'static str)>,
}

impl Sending {
    fn user_properties(&self) -> Vec<(String, String)> {
        let owned = |(name, value): &(&str, &str)| ((*name).to_owned(), (*value).to_owned());
        self.user.iter().map(owned).collect()
    }
}

/// Names one published message within its session.
pub type Ticket = u64;

/// Names a received message that waits for [`Session::confirm`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Receipt(u16);

/// What happened on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The broker accepted the connection.
    Connected,
    /// The broker has the message.
    Acked(Ticket),
    /// The broker does not take the message.
    Refused(Ticket, Refusal),
    /// A message on a subscribed topic.
    Message {
        /// Its topic.
        topic: String,
        /// Its bytes.
        payload: Vec<u8>,
        /// Whether it was kept by the broker from before.
        retained: bool,
        /// To be confirmed once the message is safe; only in a persistent session and above QoS 0.
        receipt: Option<Receipt>,
    },
    /// The connection is gone, and this session with it.
    Lost(Lost),
}

impl Event {
    /// Bytes that it holds, if it is a message; else 0.
    fn size(&self) -> usize {
        match self {
            Self::Message { topic, payload, .. } => size_of::<Self>() + topic.len() + payload.len(),
            _ => 0,
        }
    }
}

/// Where a connection's events go.
struct Events {
    queue: mpsc::UnboundedSender<Event>,
    waiting: Arc<AtomicUsize>,
}

impl Events {
    /// Hands an event over; `false` when there can be no more. A message for which there is no room is dropped, or ends the connection
    /// where the broker is told what has arrived.
    fn hand_over(&self, event: Event) -> bool {
        let size = event.size();
        let room = self.waiting.fetch_add(size, Ordering::Relaxed) + size <= MAX_WAITING;
        let event = match event {
            Event::Message { receipt, .. } if !room => {
                self.waiting.fetch_sub(size, Ordering::Relaxed);
                if receipt.is_none() {
                    return true;
                }
                Event::Lost("the broker sends more at once than it may".into())
            }
            event => event,
        };
        let last = matches!(event, Event::Lost(_));
        self.queue.send(event).is_ok() && !last
    }

    /// Gives the other side time when much waits for it.
    async fn ease(&self) {
        if self.waiting.load(Ordering::Relaxed) > MUCH_WAITING {
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// The session is gone.
#[derive(Debug, thiserror::Error)]
#[error("connection to the broker is gone")]
pub struct Gone;

/// Why a message was not sent.
#[derive(Debug, thiserror::Error)]
pub enum Unsent {
    /// The session is gone.
    #[error(transparent)]
    Gone(#[from] Gone),
    /// The broker has said that it takes no message of this size. The line is the same for all such messages, so that they can be counted.
    #[error("too large: the broker takes {limit} bytes, with topic and properties")]
    TooLarge {
        /// Bytes that the broker takes.
        limit: usize,
    },
}

/// What the broker has said of a session's limits and subscriptions.
#[derive(Debug)]
struct Said {
    subscription_refused: AtomicBool,
    /// Most bytes of one packet.
    max_packet: AtomicU32,
}

enum Client {
    V4(rumqttc::AsyncClient),
    V5(v5::AsyncClient),
}

/// One connection, or the attempt at one.
pub struct Session {
    client: Client,
    events: mpsc::UnboundedReceiver<Event>,
    waiting: Arc<AtomicUsize>,
    next: Ticket,
    said: Arc<Said>,
    // Polls the event loop; ends with the session.
    _poller: AbortOnDropHandle<()>,
}

impl Session {
    /// Begins to connect; [`Event::Connected`] or [`Event::Lost`] comes first.
    pub fn open(settings: &Settings) -> Self {
        // Unbounded, because a bounded channel could stop the poller while this side waits for the poller. What can gather is bounded all
        // the same: acknowledgements by the messages in flight, and incoming messages by `MAX_WAITING`.
        let (queue, events) = mpsc::unbounded_channel();
        let waiting = Arc::new(AtomicUsize::new(0));
        let events_tx = Events {
            queue,
            waiting: waiting.clone(),
        };
        let said = Arc::new(Said {
            subscription_refused: AtomicBool::new(false),
            max_packet: AtomicU32::new(u32::MAX),
        });
        let receipts = settings.persistent.map_or(0, |_| RECEIVE_MAXIMUM);
        let requests = usize::from(settings.inflight) + usize::from(receipts) + SPARE_REQUESTS;
        let (client, poller) = if settings.protocol == 4 {
            let mut options = rumqttc::MqttOptions::new(
                &settings.client_id,
                settings.host(),
                settings.address.port,
            );
            options
                .set_keep_alive(settings.keep_alive)
                .set_clean_session(settings.persistent.is_none())
                .set_manual_acks(settings.persistent.is_some())
                .set_inflight(settings.inflight);
            options
                .set_max_packet_size(MAX_PACKET, MAX_PACKET)
                .set_transport(settings.transport());
            if let Some((user, password)) = &settings.login {
                options.set_credentials(user, password);
            }
            if let Some((topic, payload, sending)) = &settings.will {
                options.set_last_will(rumqttc::LastWill::new(
                    topic,
                    payload.to_vec(),
                    rumqttc::QoS::AtLeastOnce,
                    sending.retain,
                ));
            }
            let (client, mut event_loop) = rumqttc::AsyncClient::new(options, requests);
            let mut network = event_loop.network_options();
            network
                .set_connection_timeout(settings.connect_timeout.as_secs())
                .set_tcp_nodelay(true);
            event_loop.set_network_options(network);
            (
                Client::V4(client),
                tokio::spawn(poll_v4(
                    event_loop,
                    events_tx,
                    settings.persistent.is_some(),
                    said.clone(),
                )),
            )
        } else {
            let mut options =
                v5::MqttOptions::new(&settings.client_id, settings.host(), settings.address.port);
            options
                .set_keep_alive(settings.keep_alive)
                .set_clean_start(settings.persistent.is_none())
                .set_manual_acks(settings.persistent.is_some())
                .set_transport(settings.transport());
            if settings.persistent.is_some() {
                options
                    .set_session_expiry_interval(settings.persistent)
                    .set_receive_maximum(Some(RECEIVE_MAXIMUM));
            }
            options.set_connection_timeout(settings.connect_timeout.as_secs());
            options.set_outgoing_inflight_upper_limit(settings.inflight);
            options.set_max_packet_size(Some(MAX_PACKET as u32));
            let mut network = options.network_options();
            network
                .set_connection_timeout(settings.connect_timeout.as_secs())
                .set_tcp_nodelay(true);
            options.set_network_options(network);
            if let Some((user, password)) = &settings.login {
                options.set_credentials(user, password);
            }
            if let Some((topic, payload, sending)) = &settings.will {
                options.set_last_will(v5::mqttbytes::v5::LastWill::new(
                    topic,
                    payload.to_vec(),
                    v5::mqttbytes::QoS::AtLeastOnce,
                    sending.retain,
                    Some(v5::mqttbytes::v5::LastWillProperties {
                        delay_interval: None,
                        payload_format_indicator: Some(1),
                        message_expiry_interval: sending.expiry_s,
                        content_type: sending.content_type.map(str::to_owned),
                        response_topic: None,
                        correlation_data: None,
                        user_properties: sending.user_properties(),
                    }),
                ));
            }
            let (client, event_loop) = v5::AsyncClient::new(options, requests);
            (
                Client::V5(client),
                tokio::spawn(poll_v5(
                    event_loop,
                    events_tx,
                    settings.persistent.is_some(),
                    said.clone(),
                )),
            )
        };
        Self {
            client,
            events,
            waiting,
            next: 0,
            said,
            _poller: AbortOnDropHandle::new(poller),
        }
    }

    /// The next event. After [`Event::Lost`] there is none.
    pub async fn next(&mut self) -> Event {
        let event = self.events.recv().await;
        self.taken(event)
            .unwrap_or_else(|| Event::Lost("the connection has ended".into()))
    }

    /// An event that is already there.
    pub fn try_next(&mut self) -> Option<Event> {
        let event = self.events.try_recv().ok();
        self.taken(event)
    }

    fn taken(&self, event: Option<Event>) -> Option<Event> {
        let size = event.as_ref().map_or(0, Event::size);
        self.waiting.fetch_sub(size, Ordering::Relaxed);
        event
    }

    /// Bytes of the largest packet that the broker takes, as far as it has said.
    pub fn limit(&self) -> usize {
        self.said.max_packet.load(Ordering::Relaxed) as usize
    }

    /// Queues a message with QoS 1. The caller keeps the number of unacknowledged messages at or below `mqtt.inflight`.
    pub async fn publish(
        &mut self,
        topic: &str,
        payload: Vec<u8>,
        sending: &Sending,
    ) -> Result<Ticket, Unsent> {
        let retain = sending.retain;
        match &self.client {
            Client::V4(client) => {
                client
                    .publish(topic, rumqttc::QoS::AtLeastOnce, retain, payload)
                    .await
                    .map_err(|_| Gone)?;
            }
            Client::V5(client) => {
                let properties = v5::mqttbytes::v5::PublishProperties {
                    payload_format_indicator: Some(1),
                    content_type: sending.content_type.map(str::to_owned),
                    message_expiry_interval: sending.expiry_s,
                    user_properties: sending.user_properties(),
                    ..Default::default()
                };
                let qos = v5::mqttbytes::QoS::AtLeastOnce;
                let message =
                    v5::mqttbytes::v5::Publish::new(topic, qos, payload, Some(properties.clone()));
                // Two bytes more: it has no packet identifier yet.
                let bytes = message.size() + 2;
                let limit = self.limit();
                if bytes > limit {
                    return Err(Unsent::TooLarge { limit });
                }
                client
                    .publish_with_properties(topic, qos, retain, message.payload, properties)
                    .await
                    .map_err(|_| Gone)?;
            }
        }
        let ticket = self.next;
        self.next += 1;
        Ok(ticket)
    }

    /// Asks for the messages of a topic filter, with QoS 1, or 0 for those that need not be kept while this side is away.
    pub async fn subscribe(&mut self, filter: &str, keep: bool) -> Result<(), Gone> {
        match &self.client {
            Client::V4(client) => {
                let qos = if keep {
                    rumqttc::QoS::AtLeastOnce
                } else {
                    rumqttc::QoS::AtMostOnce
                };
                client.subscribe(filter, qos).await.map_err(|_| Gone)
            }
            Client::V5(client) => {
                let qos = if keep {
                    v5::mqttbytes::QoS::AtLeastOnce
                } else {
                    v5::mqttbytes::QoS::AtMostOnce
                };
                client.subscribe(filter, qos).await.map_err(|_| Gone)
            }
        }
    }

    /// Gives up a topic filter that an earlier connection of a persistent session has asked for; one that is not there does not matter.
    pub async fn unsubscribe(&mut self, filter: &str) -> Result<(), Gone> {
        match &self.client {
            Client::V4(client) => client.unsubscribe(filter).await.map_err(|_| Gone),
            Client::V5(client) => client.unsubscribe(filter).await.map_err(|_| Gone),
        }
    }

    /// Whether the broker has refused a subscription of this session; a warning in the log says why.
    pub fn refused(&self) -> bool {
        self.said.subscription_refused.load(Ordering::Relaxed)
    }

    /// Tells the broker that a message of a persistent session is safe; until then it sends it again on the next connection.
    pub async fn confirm(&mut self, receipt: Receipt) -> Result<(), Gone> {
        match &self.client {
            Client::V4(client) => {
                let mut message = rumqttc::Publish::new("", rumqttc::QoS::AtLeastOnce, Vec::new());
                message.pkid = receipt.0;
                client.ack(&message).await.map_err(|_| Gone)
            }
            Client::V5(client) => {
                let message = v5::mqttbytes::v5::Publish {
                    qos: v5::mqttbytes::QoS::AtLeastOnce,
                    pkid: receipt.0,
                    ..Default::default()
                };
                client.ack(&message).await.map_err(|_| Gone)
            }
        }
    }

    /// Says goodbye, so that the broker does not publish the last will, and waits until the connection has ended.
    pub async fn close(mut self, patience: Duration) {
        let sent = match &self.client {
            Client::V4(client) => client.try_disconnect().is_ok(),
            Client::V5(client) => client.try_disconnect().is_ok(),
        };
        if sent {
            let _ = tokio::time::timeout(patience, async {
                while !matches!(self.next().await, Event::Lost(_)) {}
            })
            .await;
        }
    }
}

const CHECK_RULES: &str = "check its access rules";

/// Pairs packet ids with tickets: ids in the order in which they were sent, tickets counting up.
#[derive(Default)]
struct Tickets {
    next: Ticket,
    by_packet: HashMap<u16, Ticket>,
}

impl Tickets {
    fn sent(&mut self, packet: u16) {
        self.by_packet.insert(packet, self.next);
        self.next += 1;
    }

    fn acked(&mut self, packet: u16) -> Option<Ticket> {
        self.by_packet.remove(&packet)
    }
}

fn refuse_subscription(said: &Said, reason: &str, hint: &str) {
    tracing::warn!("the broker refuses a subscription ({reason}); {hint}");
    said.subscription_refused.store(true, Ordering::Relaxed);
}

async fn poll_v4(
    mut event_loop: rumqttc::EventLoop,
    events: Events,
    receipts: bool,
    said: Arc<Said>,
) {
    use rumqttc::{Event as E, Outgoing, Packet, SubscribeReasonCode};
    let mut tickets = Tickets::default();
    let mut connected = false;
    loop {
        events.ease().await;
        let event = match event_loop.poll().await {
            Ok(E::Incoming(Packet::ConnAck(_))) => {
                connected = true;
                Event::Connected
            }
            Ok(E::Incoming(Packet::PubAck(ack))) => match tickets.acked(ack.pkid) {
                Some(ticket) => Event::Acked(ticket),
                None => continue,
            },
            Ok(E::Incoming(Packet::SubAck(ack))) => {
                if ack.return_codes.contains(&SubscribeReasonCode::Failure) {
                    refuse_subscription(&said, "no reason given", CHECK_RULES);
                }
                continue;
            }
            Ok(E::Incoming(Packet::Publish(message))) => Event::Message {
                topic: message.topic,
                payload: message.payload.to_vec(),
                retained: message.retain,
                receipt: (receipts && message.pkid != 0).then_some(Receipt(message.pkid)),
            },
            Ok(E::Outgoing(Outgoing::Publish(packet))) => {
                tickets.sent(packet);
                continue;
            }
            Ok(E::Outgoing(Outgoing::Disconnect)) => Event::Lost("closed".into()),
            Ok(_) => continue,
            Err(error) => Event::Lost(Lost::v4(&error, connected)),
        };
        if !events.hand_over(event) {
            return;
        }
    }
}

async fn poll_v5(mut event_loop: v5::EventLoop, events: Events, receipts: bool, said: Arc<Said>) {
    use rumqttc::Outgoing;
    use v5::Event as E;
    use v5::mqttbytes::v5::{Packet, PubAckReason, SubscribeReasonCode};
    let mut tickets = Tickets::default();
    let mut connected = false;
    loop {
        events.ease().await;
        let event = match event_loop.poll().await {
            Ok(E::Incoming(Packet::ConnAck(answer))) => {
                connected = true;
                if let Some(limit) = answer.properties.and_then(|p| p.max_packet_size) {
                    said.max_packet.store(limit, Ordering::Relaxed);
                }
                Event::Connected
            }
            Ok(E::Incoming(Packet::PubAck(ack))) => match (tickets.acked(ack.pkid), ack.reason) {
                (None, _) => continue,
                (Some(ticket), PubAckReason::Success | PubAckReason::NoMatchingSubscribers) => {
                    Event::Acked(ticket)
                }
                (Some(ticket), reason) => Event::Refused(ticket, reason.into()),
            },
            Ok(E::Incoming(Packet::SubAck(ack))) => {
                let failed =
                    |c: &&SubscribeReasonCode| !matches!(c, SubscribeReasonCode::Success(_));
                if let Some(code) = ack.return_codes.iter().find(failed) {
                    let hint = if *code == SubscribeReasonCode::SharedSubscriptionsNotSupported {
                        "leave out dashboard.share, or use a broker that has shared subscriptions"
                    } else {
                        CHECK_RULES
                    };
                    refuse_subscription(&said, &format!("{code:?}"), hint);
                }
                continue;
            }
            Ok(E::Incoming(Packet::Publish(message))) => Event::Message {
                topic: String::from_utf8_lossy(&message.topic).into_owned(),
                payload: message.payload.to_vec(),
                retained: message.retain,
                receipt: (receipts && message.pkid != 0).then_some(Receipt(message.pkid)),
            },
            Ok(E::Outgoing(Outgoing::Publish(packet))) => {
                tickets.sent(packet);
                continue;
            }
            Ok(E::Outgoing(Outgoing::Disconnect)) => Event::Lost("closed".into()),
            Ok(_) => continue,
            Err(error) => Event::Lost(Lost::v5(&error, connected)),
        };
        if !events.hand_over(event) {
            return;
        }
    }
}

/// Waits between connections: doubling from `backoff_min_ms` to `backoff_max_s`, each shortened by a random part of up to a half,
/// so that a ward full of appliances does not come back in step.
#[derive(Debug)]
pub struct Backoff {
    min: Duration,
    max: Duration,
    now: Duration,
}

impl Backoff {
    /// At the shortest wait.
    pub fn new(mqtt: &Mqtt) -> Self {
        let min = Duration::from_millis(mqtt.backoff_min_ms);
        Self {
            min,
            max: Duration::from_secs(mqtt.backoff_max_s).max(min),
            now: min,
        }
    }

    /// How long to wait now; the next time it is twice as long.
    pub fn wait(&mut self) -> Duration {
        let wait = self.now;
        self.now = (self.now * 2).min(self.max);
        let mut random = [0; 2];
        // Without random numbers the wait is simply not shortened.
        let _ = getrandom::fill(&mut random);
        let part = f64::from(u16::from_le_bytes(random)) / f64::from(u16::MAX);
        wait.mul_f64(1.0 - part / 2.0)
    }

    /// Back to the shortest wait: the connection works.
    pub fn reset(&mut self) {
        self.now = self.min;
    }

    /// Back to the shortest wait, if a connection has lasted ten times as long as the wait before it, or twice the longest. One that is
    /// accepted and soon lost each time does not work: two clients with the same id take the session from each other.
    pub fn lasted(&mut self, time: Duration) {
        if time >= (self.now / 2 * 10).min(self.max * 2) {
            self.reset();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backoff_doubles_within_its_bounds() {
        let mqtt = Mqtt {
            backoff_min_ms: 100,
            backoff_max_s: 1,
            ..crate::config::Config::defaults().mqtt
        };
        let mut backoff = Backoff::new(&mqtt);
        for full in [100, 200, 400, 800, 1000, 1000] {
            let wait = backoff.wait().as_millis();
            assert!((full / 2..=full).contains(&wait), "{wait} of {full}");
        }
        backoff.reset();
        assert!(backoff.wait().as_millis() <= 100);
        backoff.lasted(Duration::from_millis(900));
        assert!(
            backoff.wait().as_millis() >= 100,
            "it was lost soon after a wait of 100 ms"
        );
        backoff.lasted(Duration::from_secs(2));
        assert!(backoff.wait().as_millis() <= 100);
    }
}
