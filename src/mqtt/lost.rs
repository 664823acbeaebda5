//! Why a connection is gone or a message was refused, in words for people.

use std::error::Error;
use std::fmt::{self, Display};
use std::io::ErrorKind;

use rumqttc::v5;
use rumqttc::v5::mqttbytes::v5::{ConnectReturnCode, DisconnectReasonCode, PubAckReason};
use tokio_rustls::rustls::{self, AlertDescription, CertificateError};

/// Reason code 0x95, which rumqttc does not take in a PUBACK; Mosquitto sends it there.
const PACKET_TOO_LARGE: u8 = 0x95;

/// Longest reason, characters: the broker may have a say in it.
const LONGEST: usize = 200;

const LOGIN: &str =
    "check mqtt.username, mqtt.password_file, mqtt.client_id and the broker's access rules";
const SAME_ID: &str = "another client uses the same client id: give each appliance its own device.id or mqtt.client_id";
const BROKERS_LOG: &str = "see the broker's log; two clients with the same id (mqtt.client_id, device.id) have this effect, too";
const LIMITS: &str = "raise the broker's limits on the size of messages";
const LATER: &str = "it is tried again; see the broker's log if it lasts";
const CA: &str =
    "check mqtt.ca_file: it must hold the authority that signed the broker's certificate";
const CLOCK: &str = "renew the broker's certificate, or set this machine's clock";
const NAME: &str = "write the host in mqtt.url as the broker's certificate has it";
const CLIENT_CERTIFICATE: &str = "check mqtt.cert_file and mqtt.key_file";
const PLAIN: &str = "check port and scheme (mqtt:// or mqtts://) in mqtt.url";
const PORT: &str = "check host and port in mqtt.url, and whether the broker runs";
const NOT_MQTT: &str = "check port and scheme (mqtt:// or mqtts://) in mqtt.url, and mqtt.protocol";

/// Why a connection is gone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lost {
    /// A few words.
    pub reason: String,
    /// What to do, where something better can be said than to check the broker.
    pub hint: Option<&'static str>,
    /// Whether a message was too large for the broker.
    pub too_large: bool,
}

impl Lost {
    fn new(reason: &str, hint: &'static str) -> Self {
        Self {
            hint: Some(hint),
            ..reason.into()
        }
    }

    fn too_large(reason: impl Into<String>) -> Self {
        Self {
            hint: Some(LIMITS),
            too_large: true,
            ..Self::from(reason.into())
        }
    }

    pub(super) fn v5(error: &v5::ConnectionError, connected: bool) -> Self {
        use v5::{ConnectionError as E, StateError as S};
        match error {
            E::ConnectionRefused(code) | E::MqttState(S::ConnFail { reason: code }) => {
                refused_v5(*code)
            }
            E::MqttState(S::ServerDisconnect { reason_code, .. }) => disconnected(*reason_code),
            E::MqttState(S::OutgoingPacketTooLarge { max, .. }) => Self::too_large(format!(
                "a message is too large for the broker, which takes {max} bytes"
            )),
            E::MqttState(S::Deserialization(v5::mqttbytes::Error::InvalidConnectReturnCode(
                PACKET_TOO_LARGE,
            ))) if connected => Self::too_large("a message is too large for the broker"),
            E::MqttState(S::ConnectionAborted) => closed(connected),
            E::MqttState(S::Deserialization(inner)) if io_kind(inner).is_some() => {
                Self::other(inner, connected)
            }
            E::MqttState(S::Deserialization(_)) if !connected => {
                Self::new("the answer is no MQTT", NOT_MQTT)
            }
            E::Timeout(_) => "no answer in time".into(),
            other => Self::other(other, connected),
        }
    }

    pub(super) fn v4(error: &rumqttc::ConnectionError, connected: bool) -> Self {
        use rumqttc::ConnectReturnCode as C;
        use rumqttc::{ConnectionError as E, StateError as S};
        match error {
            E::ConnectionRefused(code) => match code {
                C::BadUserNamePassword => Self::new("wrong user name or password", LOGIN),
                C::NotAuthorized => Self::new("not authorised", LOGIN),
                C::BadClientId => Self::new("client id not accepted", LOGIN),
                C::ServiceUnavailable => Self::new("the broker is not available", LATER),
                C::RefusedProtocolVersion => Self::new("MQTT version not accepted", NOT_MQTT),
                C::Success => "refused".into(),
            },
            E::MqttState(S::ConnectionAborted) => closed(connected),
            E::MqttState(S::Deserialization(inner)) if io_kind(inner).is_some() => {
                Self::other(inner, connected)
            }
            E::MqttState(S::Deserialization(_)) if !connected => {
                Self::new("the answer is no MQTT", NOT_MQTT)
            }
            E::NetworkTimeout | E::FlushTimeout => "no answer in time".into(),
            other => Self::other(other, connected),
        }
    }

    fn other(error: &(dyn Error + 'static), connected: bool) -> Self {
        if let Some(tls) = tls_error(error) {
            return tls_words(tls);
        }
        match io_kind(error) {
            Some(ErrorKind::ConnectionRefused) => Self::new("nobody listens there", PORT),
            Some(
                ErrorKind::ConnectionReset
                | ErrorKind::ConnectionAborted
                | ErrorKind::UnexpectedEof
                | ErrorKind::BrokenPipe,
            ) => closed(connected),
            _ => error.to_string().into(),
        }
    }
}

impl From<String> for Lost {
    fn from(reason: String) -> Self {
        let plain = reason.chars().map(|c| if c.is_control() { ' ' } else { c });
        Self {
            reason: plain.take(LONGEST).collect(),
            hint: None,
            too_large: false,
        }
    }
}

impl From<&str> for Lost {
    fn from(reason: &str) -> Self {
        reason.to_owned().into()
    }
}

impl Display for Lost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.reason)
    }
}

fn closed(connected: bool) -> Lost {
    if connected {
        Lost::new("the broker closed the connection", BROKERS_LOG)
    } else {
        Lost::new(
            "the broker closed the connection before it was accepted",
            NOT_MQTT,
        )
    }
}

fn refused_v5(code: ConnectReturnCode) -> Lost {
    use ConnectReturnCode as C;
    match code {
        C::BadUserNamePassword => Lost::new("wrong user name or password", LOGIN),
        C::NotAuthorized => Lost::new("not authorised", LOGIN),
        C::Banned => Lost::new("this client is banned", LOGIN),
        C::BadClientId | C::ClientIdentifierNotValid => Lost::new("client id not accepted", LOGIN),
        C::ServerBusy => Lost::new("the broker is busy", LATER),
        C::ServerUnavailable | C::ServiceUnavailable => {
            Lost::new("the broker is not available", LATER)
        }
        C::ConnectionRateExceeded => Lost::new("too many connections in a short time", SAME_ID),
        C::QuotaExceeded => Lost::new("quota exceeded", "raise the quota at the broker"),
        C::PacketTooLarge => Lost::new("the first message is too large", LIMITS),
        C::UnsupportedProtocolVersion | C::RefusedProtocolVersion => {
            Lost::new("MQTT version not accepted", NOT_MQTT)
        }
        other => format!("refused: {other:?}").into(),
    }
}

fn disconnected(code: DisconnectReasonCode) -> Lost {
    use DisconnectReasonCode as C;
    match code {
        C::SessionTakenOver => Lost::new("session taken over", SAME_ID),
        C::PacketTooLarge => Lost::too_large("a message is too large for the broker"),
        C::NotAuthorized => Lost::new("not authorised", LOGIN),
        C::QuotaExceeded => Lost::new("quota exceeded", "raise the quota at the broker"),
        C::MessageRateTooHigh => Lost::new(
            "too many messages in a short time",
            "raise the broker's limit, or set mqtt.inflight lower",
        ),
        C::ReceiveMaximumExceeded => Lost::new(
            "too many messages on their way",
            "set mqtt.inflight lower, or raise the broker's limit",
        ),
        C::ConnectionRateExceeded => Lost::new("too many connections in a short time", SAME_ID),
        C::ServerBusy => Lost::new("the broker is busy", LATER),
        C::ServerShuttingDown => Lost::new("the broker shuts down", LATER),
        C::AdministrativeAction => Lost::new("ended by the broker's administrator", BROKERS_LOG),
        C::KeepAliveTimeout => "nothing was heard of this side for too long".into(),
        other => format!("ended by the broker: {other:?}").into(),
    }
}

fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        let inner = error
            .downcast_ref::<std::io::Error>()
            .and_then(std::io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner as &(dyn Error + 'static)),
            None => error.source(),
        };
    }
    None
}

fn io_kind(error: &(dyn Error + 'static)) -> Option<ErrorKind> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref::<std::io::Error>() {
            return Some(found.kind());
        }
        next = error.source();
    }
    None
}

fn tls_words(error: &rustls::Error) -> Lost {
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(certificate) => match certificate {
            CertificateError::UnknownIssuer | CertificateError::BadSignature => Lost::new(
                "the broker's certificate is not signed by a trusted authority",
                CA,
            ),
            CertificateError::Expired | CertificateError::ExpiredContext { .. } => {
                Lost::new("the broker's certificate has expired", CLOCK)
            }
            CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. } => {
                Lost::new("the broker's certificate is not valid yet", CLOCK)
            }
            CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. } => {
                Lost::new("the broker's certificate is for another name", NAME)
            }
            other => Lost::new(&format!("the broker's certificate: {other:?}"), CA),
        },
        E::AlertReceived(alert) => match alert {
            AlertDescription::CertificateRequired => {
                Lost::new("the broker wants a client certificate", CLIENT_CERTIFICATE)
            }
            AlertDescription::UnknownCA
            | AlertDescription::BadCertificate
            | AlertDescription::CertificateExpired
            | AlertDescription::CertificateRevoked
            | AlertDescription::CertificateUnknown
            | AlertDescription::AccessDenied => Lost::new(
                "the broker does not accept the client certificate",
                CLIENT_CERTIFICATE,
            ),
            other => format!("TLS: the broker says {other:?}").into(),
        },
        E::InvalidMessage(_) => Lost::new("the answer is no TLS", PLAIN),
        other => format!("TLS: {other}").into(),
    }
}

/// Why the broker did not take a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Refusal {
    /// A few words.
    pub reason: &'static str,
    /// Whether it is about this message, so that it would be refused again.
    pub for_good: bool,
}

impl Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.reason)
    }
}

impl From<PubAckReason> for Refusal {
    fn from(reason: PubAckReason) -> Self {
        use PubAckReason as R;
        let (reason, for_good) = match reason {
            R::NotAuthorized => ("not authorised", false),
            R::QuotaExceeded => ("quota exceeded", false),
            R::TopicNameInvalid => ("topic not accepted", true),
            R::PayloadFormatInvalid => ("payload not accepted", true),
            R::ImplementationSpecificError => ("a reason of the broker's own", false),
            R::PacketIdentifierInUse => ("packet identifier in use", false),
            R::UnspecifiedError | R::Success | R::NoMatchingSubscribers => {
                ("no reason given", false)
            }
        };
        Self { reason, for_good }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_broker_says_is_named_with_what_to_do() {
        let check = |lost: Lost, reason: &str, hint: &str| {
            assert_eq!(lost.reason, reason);
            assert!(lost.hint.unwrap().contains(hint), "{:?}", lost.hint);
        };
        check(
            refused_v5(ConnectReturnCode::BadUserNamePassword),
            "wrong user name or password",
            "mqtt.password_file",
        );
        check(
            disconnected(DisconnectReasonCode::SessionTakenOver),
            "session taken over",
            "mqtt.client_id",
        );
        let too_large = disconnected(DisconnectReasonCode::PacketTooLarge);
        assert!(too_large.too_large);
        for (error, hint) in [
            (CertificateError::UnknownIssuer, "mqtt.ca_file"),
            (CertificateError::Expired, "clock"),
            (CertificateError::NotValidForName, "mqtt.url"),
        ] {
            // As rumqttc hands it on: inside an I/O error inside its own.
            let io = std::io::Error::new(
                ErrorKind::InvalidData,
                rustls::Error::InvalidCertificate(error),
            );
            let error = v5::ConnectionError::Tls(rumqttc::TlsError::Io(io));
            let lost = Lost::v5(&error, false);
            assert!(lost.hint.unwrap().contains(hint), "{lost:?}");
        }
        let aborted = v5::ConnectionError::MqttState(v5::StateError::ConnectionAborted);
        check(
            Lost::v5(&aborted, true),
            "the broker closed the connection",
            "same id",
        );
        check(
            Lost::v5(&aborted, false),
            "the broker closed the connection before it was accepted",
            "mqtt.url",
        );
    }

    #[test]
    fn a_refusal_for_good_is_about_the_message() {
        assert!(Refusal::from(PubAckReason::PayloadFormatInvalid).for_good);
        assert!(!Refusal::from(PubAckReason::QuotaExceeded).for_good);
        assert!(!Refusal::from(PubAckReason::NotAuthorized).for_good);
    }
}
