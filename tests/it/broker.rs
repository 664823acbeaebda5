//! The embedded broker does what the demo and the tests need of one: QoS 1, retained messages, last wills, both versions.

use std::time::Duration;

use rumqttc::v5::mqttbytes::QoS;
use rumqttc::v5::mqttbytes::v5::{LastWill, Packet};
use rumqttc::v5::{AsyncClient, Event, EventLoop, Incoming, MqttOptions};
use scansentry::broker::EmbeddedBroker;

const PATIENCE: Duration = Duration::from_secs(10);

fn options(broker: EmbeddedBroker, id: &str) -> MqttOptions {
    let mut options = MqttOptions::new(id, "127.0.0.1", broker.port());
    options.set_keep_alive(Duration::from_secs(5));
    options
}

/// Polls until `wanted` finds what it looks for.
async fn until<T>(events: &mut EventLoop, mut wanted: impl FnMut(Incoming) -> Option<T>) -> T {
    let search = async {
        loop {
            if let Event::Incoming(packet) = events.poll().await.unwrap()
                && let Some(found) = wanted(packet)
            {
                return found;
            }
        }
    };
    tokio::time::timeout(PATIENCE, search)
        .await
        .expect("it comes in time")
}

async fn next_message(events: &mut EventLoop) -> (String, String, bool) {
    until(events, |packet| match packet {
        Packet::Publish(publish) => Some((
            String::from_utf8(publish.topic.to_vec()).unwrap(),
            String::from_utf8(publish.payload.to_vec()).unwrap(),
            publish.retain,
        )),
        _ => None,
    })
    .await
}

async fn subscriber(broker: EmbeddedBroker, id: &str, filter: &str) -> (AsyncClient, EventLoop) {
    let (client, mut events) = AsyncClient::new(options(broker, id), 10);
    client.subscribe(filter, QoS::AtLeastOnce).await.unwrap();
    until(&mut events, |packet| {
        matches!(packet, Packet::SubAck(_)).then_some(())
    })
    .await;
    (client, events)
}

async fn publish(broker: EmbeddedBroker, id: &str, topic: &str, payload: &str, retain: bool) {
    let (client, mut events) = AsyncClient::new(options(broker, id), 10);
    client
        .publish(topic, QoS::AtLeastOnce, retain, payload.to_owned())
        .await
        .unwrap();
    until(&mut events, |packet| {
        matches!(packet, Packet::PubAck(_)).then_some(())
    })
    .await;
    client.disconnect().await.unwrap();
    while events.poll().await.is_ok() {}
}

#[tokio::test]
async fn qos_1_is_acknowledged_and_delivered() {
    let broker = EmbeddedBroker::start(None).unwrap();
    let (_client, mut events) = subscriber(broker, "reader", "scansentry/#").await;
    for n in 0..20 {
        publish(
            broker,
            "writer",
            "scansentry/lab/mri/result",
            &n.to_string(),
            false,
        )
        .await;
    }
    for n in 0..20 {
        assert_eq!(next_message(&mut events).await.1, n.to_string());
    }
}

#[tokio::test]
async fn a_retained_message_reaches_who_comes_later_and_an_empty_one_removes_it() {
    let broker = EmbeddedBroker::start(None).unwrap();
    publish(broker, "writer", "a/status", "online", true).await;
    publish(broker, "writer", "a/status", "stopped", true).await;
    let (_client, mut events) = subscriber(broker, "late", "a/+").await;
    assert_eq!(
        next_message(&mut events).await,
        ("a/status".to_owned(), "stopped".to_owned(), true)
    );

    publish(broker, "writer", "a/status", "", true).await;
    publish(broker, "writer", "a/other", "here", true).await;
    let (_client, mut events) = subscriber(broker, "later", "a/+").await;
    assert_eq!(next_message(&mut events).await.0, "a/other");
}

#[tokio::test]
async fn a_last_will_is_published_when_a_client_vanishes_and_is_retained() {
    let broker = EmbeddedBroker::start(None).unwrap();
    let (_client, mut events) = subscriber(broker, "reader", "b/status").await;
    let mut mortal = options(broker, "mortal");
    mortal.set_last_will(LastWill::new(
        "b/status",
        "offline",
        QoS::AtLeastOnce,
        true,
        None,
    ));
    let (client, mut mortal_events) = AsyncClient::new(mortal, 10);
    until(&mut mortal_events, |packet| {
        matches!(packet, Packet::ConnAck(_)).then_some(())
    })
    .await;
    // The connection closes without a DISCONNECT.
    drop((client, mortal_events));

    assert_eq!(next_message(&mut events).await.1, "offline");
    let (_client, mut events) = subscriber(broker, "late", "b/status").await;
    assert_eq!(
        next_message(&mut events).await,
        ("b/status".to_owned(), "offline".to_owned(), true)
    );
}

#[tokio::test]
async fn a_clean_disconnect_publishes_no_will() {
    let broker = EmbeddedBroker::start(None).unwrap();
    let (_client, mut events) = subscriber(broker, "reader", "c/#").await;
    let mut polite = options(broker, "polite");
    polite.set_last_will(LastWill::new(
        "c/will",
        "offline",
        QoS::AtLeastOnce,
        false,
        None,
    ));
    let (client, mut polite_events) = AsyncClient::new(polite, 10);
    until(&mut polite_events, |packet| {
        matches!(packet, Packet::ConnAck(_)).then_some(())
    })
    .await;
    client.disconnect().await.unwrap();
    while polite_events.poll().await.is_ok() {}
    tokio::time::sleep(Duration::from_millis(200)).await;
    publish(broker, "writer", "c/next", "x", false).await;
    assert_eq!(next_message(&mut events).await.0, "c/next");
}

#[tokio::test]
async fn mqtt_3_1_1_clients_get_what_mqtt_5_clients_publish() {
    let broker = EmbeddedBroker::start(None).unwrap();
    publish(broker, "writer", "d/status", "online", true).await;
    let options = rumqttc::MqttOptions::new("old", "127.0.0.1", broker.port_v4());
    let (client, mut events) = rumqttc::AsyncClient::new(options, 10);
    client
        .subscribe("d/#", rumqttc::QoS::AtLeastOnce)
        .await
        .unwrap();
    let message = tokio::time::timeout(PATIENCE, async {
        loop {
            if let rumqttc::Event::Incoming(rumqttc::Packet::Publish(publish)) =
                events.poll().await.unwrap()
            {
                return publish;
            }
        }
    });
    let message = message.await.unwrap();
    assert_eq!(
        (&message.topic[..], &message.payload[..]),
        ("d/status", &b"online"[..])
    );
}

#[test]
fn a_port_that_is_taken_is_an_error() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port();
    let error = EmbeddedBroker::start(Some(port)).unwrap_err().to_string();
    let expected = format!("embedded broker: port {port} on 127.0.0.1 is not free: ");
    assert!(error.starts_with(&expected), "{error}");
}
