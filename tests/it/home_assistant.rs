//! Home Assistant's discovery against a real Mosquitto; its templates are rendered with real messages.

use std::collections::BTreeMap;

use serde_json::{Value, json};

use crate::support::{Appliance, Arrived, Mosquitto, Subscriber, slices, wait_for};

const TOPIC: &str = "homeassistant/device/scansentry_9_radiology_mri-1/config";

fn descriptions(subscriber: &Subscriber) -> Vec<Arrived> {
    let mut messages = subscriber.messages();
    messages.retain(|m| m.topic == TOPIC);
    messages
}

/// What Home Assistant would show for a component, from the last message on its topic.
fn state(component: &Value, last: &BTreeMap<String, String>) -> String {
    let payload = &last[component["state_topic"].as_str().unwrap()];
    let template = component["value_template"].as_str().unwrap();
    let mut context = json!({ "value": payload });
    if let Ok(value) = serde_json::from_str::<Value>(payload) {
        context["value_json"] = value;
    }
    let mut jinja = minijinja::Environment::new();
    // A key that does not exist is a fault here.
    jinja.set_undefined_behavior(minijinja::UndefinedBehavior::Strict);
    jinja
        .render_str(
            template,
            serde_json::from_value::<minijinja::Value>(context).unwrap(),
        )
        .unwrap()
}

#[test]
fn the_appliance_describes_itself_and_withdraws_it() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    appliance.set("SCANSENTRY__HOME_ASSISTANT__ENABLED", "true");
    appliance.set("SCANSENTRY__ALERT__QUIET_S", "3");
    appliance.start();
    wait_for("the description", || !descriptions(&subscriber).is_empty());
    let late = broker.subscribe_late();
    wait_for("the kept description", || {
        descriptions(&late).iter().any(|m| m.retained)
    });

    let description = descriptions(&subscriber)[0].json();
    assert_eq!(description["origin"]["name"], "scansentry");
    assert_eq!(
        description["device"]["identifiers"],
        json!(["scansentry_9_radiology_mri-1"])
    );
    let components = description["components"].as_object().unwrap();
    let names: Vec<_> = components.keys().map(String::as_str).collect();
    assert_eq!(
        names,
        ["alert", "backlog", "degraded", "online", "probability"]
    );
    let mut unique = std::collections::HashSet::new();
    for component in components.values() {
        assert!(["sensor", "binary_sensor"].contains(&component["platform"].as_str().unwrap()));
        assert!(unique.insert(component["unique_id"].as_str().unwrap()));
    }
    assert_eq!(components["alert"]["name"], "Tumour pattern alert");
    assert!(!description.to_string().to_lowercase().contains("diagnosed"));

    // Home Assistant starts: it is told again.
    let before = descriptions(&subscriber).len();
    broker.publish("homeassistant/status", "offline", &[]);
    broker.publish("homeassistant/status", "online", &[]);
    wait_for("the description again", || {
        descriptions(&subscriber).len() > before
    });
    assert_eq!(
        descriptions(&subscriber).len(),
        before + 1,
        "only when it starts"
    );

    let last = || -> BTreeMap<String, String> {
        let messages = subscriber.messages();
        messages.into_iter().map(|m| (m.topic, m.payload)).collect()
    };
    let shown = |name: &str| state(&components[name], &last());
    assert_eq!(shown("alert"), "OFF");
    assert_eq!(
        (shown("online"), shown("degraded"), shown("backlog")),
        ("ON".into(), "OFF".into(), "0".into())
    );
    for (number, slice) in slices(6).iter().enumerate() {
        appliance.rename_in(&format!("{number}.png"), slice);
    }
    subscriber.wait_for_scans(6);
    wait_for("the alert", || shown("alert") == "ON");
    wait_for("a probability", || {
        shown("probability")
            .parse::<f64>()
            .is_ok_and(|p| (0.0..=1.0).contains(&p))
    });
    wait_for("the end of the alert", || shown("alert") == "OFF");

    appliance.kill();
    wait_for("the last will", || shown("online") == "OFF");

    // Switched off, it takes back what it said.
    appliance.set("SCANSENTRY__HOME_ASSISTANT__ENABLED", "false");
    appliance.start();
    wait_for("the withdrawal", || {
        descriptions(&subscriber)
            .last()
            .is_some_and(|m| m.payload.is_empty())
    });
    let count = descriptions(&subscriber).len();
    assert_eq!(appliance.stop(), Some(0));
    appliance.start();
    appliance.rename_in("again.png", &slices(7)[6]);
    subscriber.wait_for_scans(7);
    assert_eq!(descriptions(&subscriber).len(), count, "once");
}
