//! An MQTT broker inside this process (rumqttd), for `scansentry demo` and for tests: nothing to install, nothing to set up.
//!
//! It listens on 127.0.0.1 only, has no passwords and keeps everything in memory. It lives until the process ends:
//! rumqttd has no way to stop. MQTT 5 and MQTT 3.1.1 have a port each, since rumqttd speaks one version a port; messages
//! pass between the two, retained ones and last wills too.

use std::collections::HashMap;
use std::io;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use rumqttd::{Broker, Config, ConnectionSettings, RouterConfig, ServerSettings};

/// Enough for a demo with many watchers; a connection costs memory only when it is there.
const MAX_CONNECTIONS: usize = 200;
/// Larger than any message that ScanSentry publishes, previews included.
const MAX_PAYLOAD_BYTES: usize = 4 << 20;
/// QoS 1 messages that may be on their way to one client.
const MAX_INFLIGHT: usize = 100;
/// rumqttd keeps the messages of each topic in segments, and drops the oldest of this many.
const SEGMENT_BYTES: usize = 1 << 20;
const SEGMENTS: usize = 4;
/// How long the ports may take to answer.
const START_TIMEOUT: Duration = Duration::from_secs(5);

/// A running broker.
#[derive(Debug, Clone, Copy)]
pub struct EmbeddedBroker {
    port: u16,
    port_v4: u16,
}

/// Why the broker does not run.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// The port cannot be had.
    #[error("embedded broker: port {port} on 127.0.0.1 is not free: {source}")]
    Port {
        /// The port asked for; 0 for any.
        port: u16,
        /// What the system said.
        source: io::Error,
    },
    /// The broker did not start.
    #[error("embedded broker: {0}")]
    Start(String),
}

impl EmbeddedBroker {
    /// Starts a broker on `port`, or on any free one. When this returns, clients can connect.
    pub fn start(port: Option<u16>) -> Result<Self, BrokerError> {
        // rumqttd binds on its own, in a thread, and can only log a failure: so look first, and wait for it afterwards.
        let (port, port_v4) = free_ports(port.unwrap_or(0))?;
        let broker = Self { port, port_v4 };

        let (ended, has_ended) = mpsc::channel();
        std::thread::Builder::new()
            .name("broker".to_owned())
            .spawn(move || {
                let result = Broker::new(broker.config()).start();
                let _ = ended.send(result.map_or_else(
                    |error| error.to_string(),
                    |()| "its ports were taken".to_owned(),
                ));
            })
            .map_err(|error| BrokerError::Start(error.to_string()))?;

        let deadline = Instant::now() + START_TIMEOUT;
        while !(answers(port) && answers(port_v4)) {
            match has_ended.recv_timeout(Duration::from_millis(5)) {
                Err(RecvTimeoutError::Timeout) if Instant::now() < deadline => {}
                Err(_) => {
                    return Err(BrokerError::Start(format!(
                        "no answer on port {port} in {START_TIMEOUT:?}"
                    )));
                }
                Ok(reason) => return Err(BrokerError::Start(reason)),
            }
        }
        Ok(broker)
    }

    /// The port for MQTT 5.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// The port for MQTT 3.1.1.
    pub fn port_v4(&self) -> u16 {
        self.port_v4
    }

    /// `mqtt://127.0.0.1:PORT`, for MQTT 5.
    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    fn config(self) -> Config {
        let server = |name: &str, port| {
            let settings = ServerSettings {
                name: name.to_owned(),
                listen: loopback(port),
                tls: None,
                next_connection_delay_ms: 0,
                connections: ConnectionSettings {
                    connection_timeout_ms: 5_000,
                    max_payload_size: MAX_PAYLOAD_BYTES,
                    max_inflight_count: MAX_INFLIGHT,
                    auth: None,
                    external_auth: None,
                    dynamic_filters: true,
                },
            };
            Some(HashMap::from([(name.to_owned(), settings)]))
        };
        Config {
            router: RouterConfig {
                max_connections: MAX_CONNECTIONS,
                max_outgoing_packet_count: 200,
                max_segment_size: SEGMENT_BYTES,
                max_segment_count: SEGMENTS,
                ..RouterConfig::default()
            },
            v5: server("mqtt-5", self.port),
            v4: server("mqtt-3.1.1", self.port_v4),
            ..Config::default()
        }
    }
}

fn loopback(port: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, port))
}

/// `port`, or a free one for 0, and another free one. Somebody could take them before the broker does.
fn free_ports(port: u16) -> Result<(u16, u16), BrokerError> {
    let bind = |port| {
        let listener = TcpListener::bind(loopback(port))?;
        let address = listener.local_addr()?;
        Ok((listener, address.port()))
    };
    // Both at once, so that they differ.
    let (first, second) = (
        bind(port).map_err(|source| BrokerError::Port { port, source })?,
        bind(0),
    );
    let second = second.map_err(|source| BrokerError::Port { port: 0, source })?;
    Ok((first.1, second.1))
}

fn answers(port: u16) -> bool {
    TcpStream::connect_timeout(&loopback(port), Duration::from_millis(200)).is_ok()
}
