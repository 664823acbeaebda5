//! The contract: every message that any test sees is held against the schemas in `docs/mqtt/`, which are checked themselves too.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::{Value, json};

use crate::support::Arrived;

fn docs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("docs")
}

/// The schemas by name.
fn schemas() -> BTreeMap<String, Value> {
    let files = std::fs::read_dir(docs().join("mqtt")).unwrap();
    files
        .filter_map(|file| {
            let path = file.unwrap().path();
            let name = path.file_name()?.to_str()?.strip_suffix(".schema.json")?;
            let text = std::fs::read_to_string(&path).unwrap();
            Some((name.to_owned(), serde_json::from_str(&text).unwrap()))
        })
        .collect()
}

/// Refuses keys that a schema does not describe. For readers the schemas are open, since keys may be added; here an undocumented key is a fault.
fn close(schema: &mut Value) {
    match schema {
        Value::Object(object) => {
            if object.contains_key("properties") && object.contains_key("type") {
                object.insert("additionalProperties".into(), json!(false));
            }
            object.values_mut().for_each(close);
        }
        Value::Array(list) => list.iter_mut().for_each(close),
        _ => {}
    }
}

static VALIDATORS: LazyLock<BTreeMap<String, Validator>> = LazyLock::new(|| {
    let mut schemas = schemas();
    schemas.values_mut().for_each(close);
    let mut registry = jsonschema::Registry::new();
    for schema in schemas.values() {
        let uri = schema["$id"].as_str().unwrap();
        registry = registry.add(uri, schema).unwrap();
    }
    let registry = registry.prepare().unwrap();
    let build = |schema: &Value| {
        jsonschema::options()
            .with_registry(&registry)
            .build(schema)
            .unwrap()
    };
    schemas
        .iter()
        .map(|(name, schema)| (name.clone(), build(schema)))
        .collect()
});

/// Checks a payload against a schema.
#[track_caller]
pub fn check_payload(schema: &str, payload: &Value) {
    let problems: Vec<_> = VALIDATORS[schema]
        .iter_errors(payload)
        .map(|e| format!("{}: {e}", e.instance_path()))
        .collect();
    assert_eq!(problems, Vec::<String>::new(), "{schema}: {payload}");
}

/// Checks a message of an appliance or a dashboard; other topics are let pass.
#[track_caller]
pub fn check(message: &Arrived) {
    if message.topic.split('/').count() < 4 || !message.topic.starts_with("scansentry/") {
        return;
    }
    let name = match message.kind() {
        "command/result" => "command-result",
        kind if kind.starts_with("ack/") => "ack",
        kind => kind,
    };
    assert!(
        VALIDATORS.contains_key(name),
        "{} is not documented",
        message.topic
    );
    let payload = match name {
        "status" => Value::String(message.payload.clone()),
        // An empty payload takes a retained message back.
        "ack" if message.payload.is_empty() => return,
        // What others send may be wrong on purpose.
        "command" => return,
        _ => message.json(),
    };
    check_payload(name, &payload);
    if let Some(schema) = payload["schema"].as_str()
        && !message.user.is_empty()
    {
        let property = format!("schema:{schema}");
        assert!(message.user.contains(&property), "{}", message.user);
    }
}

#[test]
fn the_schemas_are_valid_and_say_what_every_key_is() {
    fn described(schema: &Value, place: &str, missing: &mut Vec<String>) {
        if let Some(properties) = schema["properties"].as_object() {
            for (key, value) in properties {
                let known = value.get("description").is_some() || value.get("$ref").is_some();
                // Conditions repeat keys, and timings are described together.
                if !known
                    && !place.ends_with("then")
                    && !place.ends_with("if")
                    && !place.ends_with("else")
                {
                    missing.push(format!("{place}/{key}"));
                }
            }
        }
        match schema {
            Value::Object(object) => object
                .iter()
                .for_each(|(key, value)| described(value, &format!("{place}/{key}"), missing)),
            Value::Array(list) => list
                .iter()
                .for_each(|value| described(value, place, missing)),
            _ => {}
        }
    }
    let mut missing = Vec::new();
    for (name, schema) in schemas() {
        jsonschema::meta::validate(&schema).unwrap_or_else(|e| panic!("{name}: {e}"));
        described(&schema, &name, &mut missing);
    }
    missing.retain(|place| {
        !place.contains("timings_ms")
            && !place.contains("/anyOf/since")
            && !place.contains("/anyOf/scan_ids")
    });
    assert_eq!(missing, Vec::<String>::new());
    assert!(VALIDATORS.len() >= 10);
}

#[test]
fn an_undocumented_key_and_a_missing_one_fail() {
    let ack = json!({
        "schema": "scansentry/ack/1", "alert_id": "0".repeat(32), "device": "mri-1", "site": "radiology",
        "at": "2026-01-31T08:00:00.000Z", "by": "reading room", "notice": "research use only, not for diagnosis",
    });
    check_payload("ack", &ack);
    let mut more = ack.clone();
    more["patient"] = json!("x");
    assert!(!VALIDATORS["ack"].is_valid(&more));
    let mut less = ack;
    less.as_object_mut().unwrap().remove("by");
    assert!(!VALIDATORS["ack"].is_valid(&less));
}

#[test]
fn the_command_in_the_documentation_is_one() {
    let text = std::fs::read_to_string(docs().join("mqtt/README.md")).unwrap();
    let examples: Vec<_> = text
        .lines()
        .filter_map(|line| line.trim().strip_prefix("-m '"))
        .collect();
    assert_eq!(examples.len(), 1);
    let command = serde_json::from_str(examples[0].trim_end_matches('\'')).unwrap();
    check_payload("command", &command);
}

#[test]
fn the_codes_in_the_schemas_are_the_programs() {
    use scansentry::health::Condition;
    use scansentry::imaging::decode::DecodeNote;
    use scansentry::imaging::quality::QualityFlag;
    use scansentry::prediction::RejectCode;
    fn of<'a>(schema: &'a Value, pointer: &str) -> BTreeSet<&'a str> {
        let list = schema
            .pointer(pointer)
            .unwrap_or_else(|| panic!("{pointer}"));
        list.as_array()
            .unwrap()
            .iter()
            .map(|v| v.as_str().unwrap())
            .collect()
    }
    let schemas = schemas();
    let result = &schemas["result"]["properties"];
    for code in of(result, "/rejected/anyOf/0/properties/code/enum") {
        let known: RejectCode = serde_json::from_value(json!(code)).unwrap();
        assert_eq!(known.as_str(), code);
    }
    for flag in of(result, "/quality/anyOf/0/properties/flags/items/enum") {
        let known: QualityFlag = serde_json::from_value(json!(flag)).unwrap();
        assert_eq!(known.as_str(), flag);
    }
    for note in of(result, "/quality/anyOf/0/properties/notes/items/enum") {
        serde_json::from_value::<DecodeNote>(json!(note)).unwrap();
    }
    let conditions = of(
        &schemas["health"],
        "/properties/conditions/items/properties/code/enum",
    );
    assert_eq!(conditions, Condition::ALL.map(Condition::code).into());
    // The other way round, by the sources: no code is left out.
    for (file, kind, listed) in [
        (
            "src/prediction.rs",
            "RejectCode",
            of(result, "/rejected/anyOf/0/properties/code/enum"),
        ),
        ("src/health.rs", "Condition", conditions),
    ] {
        let text = std::fs::read_to_string(docs().join("..").join(file)).unwrap();
        let body = text.split(&format!("pub enum {kind} {{")).nth(1).unwrap();
        let body = body.split("\n}").next().unwrap();
        let variants = body.lines().filter(|l| !l.contains("///")).count() - 1;
        assert_eq!(variants, listed.len(), "{kind}");
    }
}

#[test]
fn the_asyncapi_document_names_every_schema_and_topic() {
    let text = std::fs::read_to_string(docs().join("mqtt/asyncapi.yaml")).unwrap();
    assert!(text.starts_with("asyncapi: 3."));
    for name in schemas().keys().filter(|name| *name != "common") {
        let reference = format!("./{name}.schema.json");
        assert!(text.contains(&reference), "{reference}");
    }
    for kind in [
        "status",
        "health",
        "result",
        "alert",
        "study",
        "preview",
        "command",
        "command/result",
        "ack/{alertId}",
    ] {
        let address = format!("address: \"{{prefix}}/{{site}}/{{device}}/{kind}\"");
        assert!(text.contains(&address), "{address}");
    }
}

#[test]
fn the_node_red_flow_reads_topics_and_keys_that_exist() {
    let text = std::fs::read_to_string(docs().join("examples/node-red-flow.json")).unwrap();
    let flow: Vec<Value> = serde_json::from_str(&text).unwrap();
    let ids: BTreeSet<_> = flow
        .iter()
        .map(|node| node["id"].as_str().unwrap())
        .collect();
    assert_eq!(ids.len(), flow.len(), "ids are unique");
    for node in &flow {
        for wire in node["wires"]
            .as_array()
            .into_iter()
            .flatten()
            .flat_map(|w| w.as_array().unwrap())
        {
            assert!(ids.contains(wire.as_str().unwrap()), "{wire} leads nowhere");
        }
    }
    let schemas = schemas();
    let mut topics = BTreeSet::new();
    for node in flow.iter().filter(|node| node["type"] == "mqtt in") {
        let topic = node["topic"].as_str().unwrap();
        let kind = topic.strip_prefix("scansentry/+/+/").unwrap();
        assert!(schemas.contains_key(kind), "{topic}");
        topics.insert(kind.to_owned());
    }
    assert!(topics.is_superset(&BTreeSet::from([
        "alert".into(),
        "health".into(),
        "status".into()
    ])));
    // Keys that its functions read, as `message.key`, of the kind that their comment names.
    let mut read = 0;
    for node in flow.iter().filter(|node| node["type"] == "function") {
        let code = node["func"].as_str().unwrap();
        let kind = code
            .lines()
            .next()
            .unwrap()
            .strip_prefix("// reads ")
            .unwrap();
        for part in code.split("message.").skip(1) {
            let key: String = part
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect();
            assert!(
                schemas[kind]["properties"].get(&key).is_some(),
                "{kind} has no {key}"
            );
            read += 1;
        }
    }
    assert!(read >= 5);
}
