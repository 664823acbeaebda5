//! The layering of ARCHITECTURE.md: imports point down only.

use std::collections::BTreeMap;
use std::path::Path;

/// Modules by layer, from the bottom. Within the two middle kinds of layer nobody imports a neighbour.
const PURE: [&str; 15] = [
    "config",
    "failpoint",
    "health",
    "history",
    "home_assistant",
    "imaging",
    "manifest",
    "message",
    "phantom",
    "prediction",
    "preview",
    "progress",
    "scan",
    "signature",
    "tensor",
];
const EDGES: [&str; 10] = [
    "broker",
    "engine",
    "http",
    "metrics",
    "mqtt",
    "simulate",
    "store",
    "systemd",
    "telemetry",
    "watch",
];
const CORE: [&str; 1] = ["classifier"];
const LOOPS: [&str; 5] = ["commands", "dashboard", "pipeline", "publisher", "studies"];
const TOP: [&str; 2] = ["daemon", "cli"];

/// Crates that only one module may name.
const OWNED: [(&str, &str); 11] = [
    ("axum", "http"),
    ("ed25519_dalek", "signature"),
    ("hyper", "http"),
    ("prometheus_client", "metrics"),
    ("rumqttc", "mqtt"),
    ("rumqttd", "broker"),
    ("rusqlite", "store"),
    ("litert_sys", "engine"),
    ("tflite::", "engine"),
    ("notify::", "watch"),
    ("sd_notify", "systemd"),
];

fn rank(module: &str) -> Option<usize> {
    let layers: [&[&str]; 5] = [&PURE, &EDGES, &CORE, &LOOPS, &TOP];
    layers.iter().position(|layer| layer.contains(&module))
}

fn sources() -> BTreeMap<String, String> {
    fn collect(folder: &Path, module: Option<&str>, out: &mut BTreeMap<String, String>) {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let path = entry.path();
            let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let module = module.map_or_else(|| stem.clone(), str::to_owned);
            if path.is_dir() {
                collect(&path, Some(&module), out);
            } else if stem != "lib" && stem != "main" {
                let text = std::fs::read_to_string(&path).unwrap();
                // Tests inside a module may use what they like; comments import nothing.
                let code = text.split("#[cfg(test)]").next().unwrap();
                let code: Vec<_> = code
                    .lines()
                    .filter(|l| !l.trim_start().starts_with("//"))
                    .collect();
                out.entry(module).or_default().push_str(&code.join("\n"));
            }
        }
    }
    let mut out = BTreeMap::new();
    collect(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        None,
        &mut out,
    );
    out
}

fn imports(code: &str) -> Vec<&str> {
    code.split("crate::")
        .skip(1)
        .map(|rest| {
            rest.split(|c: char| !c.is_alphanumeric() && c != '_')
                .next()
                .unwrap()
        })
        .collect()
}

#[test]
fn imports_point_down_only() {
    let mut wrong = Vec::new();
    for (module, code) in sources() {
        let own = rank(&module)
            .unwrap_or_else(|| panic!("{module} has no layer; add it here and to ARCHITECTURE.md"));
        for import in imports(&code) {
            // `pub(crate)` and group imports end in an empty name.
            let Some(other) = rank(import) else { continue };
            let neighbours = own == other && import != module && [1, 3].contains(&own);
            if other > own || neighbours {
                wrong.push(format!("{module} imports {import}"));
            }
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}

#[test]
fn outside_crates_have_one_home_and_unsafe_lives_in_the_engine() {
    let mut wrong = Vec::new();
    for (module, code) in sources() {
        for (owned, home) in OWNED {
            let named =
                code.contains(&format!("use {owned}")) || code.contains(&format!(" {owned}::"));
            if named && module != home {
                wrong.push(format!("{module} names {owned}"));
            }
        }
        if (code.contains("unsafe {") || code.contains("unsafe fn")) && module != "engine" {
            wrong.push(format!("{module} has unsafe code"));
        }
    }
    assert_eq!(wrong, Vec::<String>::new());
}
