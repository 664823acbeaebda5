//! Home Assistant's MQTT discovery: one retained message that describes the appliance as a device with its entities.
//!
//! Format: "Device discovery payload" in the documentation of Home Assistant's MQTT integration (since 2024.11). Every entity reads the
//! topics that the appliance publishes anyway. The alert is read from `health`, which is retained and counts open alerts: `alert`
//! itself is not retained and speaks of one study at a time.

use serde_json::{Value, json};

use crate::message::{Kind, Sender};

/// The topic of the description.
pub fn topic(prefix: &str, sender: &Sender) -> String {
    format!("{prefix}/device/{}/config", object_id(sender))
}

/// The topic on which Home Assistant says that it is there.
pub fn birth_topic(prefix: &str) -> String {
    format!("{prefix}/status")
}

/// Payload on the birth topic when Home Assistant has started.
pub const BIRTH: &[u8] = b"online";

/// Names may hold `_` themselves; the length of the first keeps two appliances from having the same.
fn object_id(sender: &Sender) -> String {
    let (site, device) = (&sender.site, &sender.device);
    format!("scansentry_{}_{site}_{device}", site.len())
}

/// The description: device, origin and entities.
pub fn description(sender: &Sender) -> Value {
    let id = object_id(sender);
    let (status, health) = (sender.topic(Kind::Status), sender.topic(Kind::Health));
    let entity = |name: &str, more: Value| {
        let mut entity = json!({
            "name": null,
            "unique_id": format!("{id}_{name}"),
            "availability_topic": status,
            "availability_template": "{{ 'online' if value == 'online' else 'offline' }}",
        });
        for (key, value) in more.as_object().into_iter().flatten() {
            entity[key] = value.clone();
        }
        entity
    };
    let mut online = entity(
        "online",
        json!({
            "platform": "binary_sensor",
            "name": "Online",
            "device_class": "connectivity",
            "entity_category": "diagnostic",
            "state_topic": status,
            "value_template": "{{ 'ON' if value == 'online' else 'OFF' }}",
        }),
    );
    // It says itself whether the appliance is there.
    for key in ["availability_topic", "availability_template"] {
        online.as_object_mut().map(|online| online.remove(key));
    }
    json!({
        "device": {
            "identifiers": [id],
            "name": format!("ScanSentry {} {}", sender.site, sender.device),
            "manufacturer": "ScanSentry",
            "model": "Research use only, not for diagnosis",
            "sw_version": env!("CARGO_PKG_VERSION"),
        },
        "origin": { "name": "scansentry", "sw_version": env!("CARGO_PKG_VERSION") },
        "qos": 1,
        "components": {
            "alert": entity("alert", json!({
                "platform": "binary_sensor",
                "name": "Tumour pattern alert",
                "icon": "mdi:bell-alert",
                "state_topic": health,
                "value_template": "{{ 'ON' if value_json.open_alerts > 0 else 'OFF' }}",
                "json_attributes_topic": sender.topic(Kind::Alert),
            })),
            "probability": entity("probability", json!({
                "platform": "sensor",
                "name": "Last probability of a tumour pattern",
                "icon": "mdi:percent",
                "state_class": "measurement",
                "suggested_display_precision": 3,
                "state_topic": sender.topic(Kind::Result),
                "value_template": "{{ value_json.probability }}",
            })),
            "backlog": entity("backlog", json!({
                "platform": "sensor",
                "name": "Backlog",
                "icon": "mdi:tray-full",
                "state_class": "measurement",
                "entity_category": "diagnostic",
                "state_topic": health,
                "value_template": "{{ value_json.backlog.files + value_json.backlog.messages }}",
            })),
            "degraded": entity("degraded", json!({
                "platform": "binary_sensor",
                "name": "Degraded",
                "device_class": "problem",
                "entity_category": "diagnostic",
                "state_topic": health,
                "value_template": "{{ 'OFF' if value_json.state == 'ok' else 'ON' }}",
                "json_attributes_topic": health,
            })),
            "online": online,
        },
    })
}
