//! The command line: JSON lines, error texts, exit codes.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{Appliance, Mosquitto, bundle, copy_folder, free_port, slices};

fn run(arguments: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_scansentry"))
        .args(arguments)
        .env_remove("SCANSENTRY_CONFIG")
        .output()
        .unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn classify_prints_a_line_a_file_and_fails_if_one_does() {
    let folder = tempfile::tempdir().unwrap();
    let (good, bad) = (folder.path().join("good"), folder.path().join("bad.png"));
    std::fs::write(&good, &slices(1)[0]).unwrap();
    std::fs::write(&bad, b"not a png").unwrap();
    let bundle = bundle();
    let arguments = |file: &Path| {
        [
            "classify",
            "--bundle",
            bundle.to_str().unwrap(),
            file.to_str().unwrap(),
        ]
        .map(str::to_owned)
    };
    let [a, b, c, d] = arguments(&good);
    let output = run(&[&a, &b, &c, &d]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let line: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(line["file"], good.to_str().unwrap());
    assert!(line["error"].is_null());
    for key in [
        "decision",
        "probability",
        "threshold",
        "label",
        "scores",
        "roi",
        "model",
        "timings_ms",
    ] {
        assert!(!line[key].is_null(), "{key}");
    }
    let output = run(&[&a, &b, &c, &d, bad.to_str().unwrap(), "/nowhere/x.png"]);
    assert_eq!(output.status.code(), Some(1));
    let lines: Vec<Value> = String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    let codes: Vec<_> = lines
        .iter()
        .map(|l| l["error"]["code"].as_str().unwrap_or("-"))
        .collect();
    assert_eq!(codes, ["-", "not_an_image", "unreadable"]);
    assert!(lines[1]["probability"].is_null() && lines[1]["decision"].is_null());
}

#[test]
fn preprocess_writes_what_the_model_sees() {
    let folder = tempfile::tempdir().unwrap();
    let (file, out) = (folder.path().join("a"), folder.path().join("seen.png"));
    std::fs::write(&file, &slices(1)[0]).unwrap();
    let bundle = bundle();
    let (file, out) = (file.to_str().unwrap(), out.to_str().unwrap());
    let base = [
        "preprocess",
        "--bundle",
        bundle.to_str().unwrap(),
        file,
        "--out",
        out,
    ];
    assert!(run(&base).status.success());
    let seen = image::open(out).unwrap();
    assert_eq!((seen.width(), seen.height()), (224, 224));
    let mut explain = base.to_vec();
    explain.push("--explain");
    assert!(run(&explain).status.success());
    assert!(
        image::open(out).unwrap().width() > 1000,
        "five panels side by side"
    );
    let output = run(&[
        "preprocess",
        "--bundle",
        bundle.to_str().unwrap(),
        file,
        "--out",
        "/nowhere/x.png",
    ]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).starts_with("/nowhere/x.png: cannot be written"));
}

#[test]
fn check_lists_every_problem_and_exits_78() {
    let port = free_port();
    let mut appliance = Appliance::new(&format!("mqtt://127.0.0.1:{port}"));
    std::fs::remove_dir(appliance.export()).unwrap();
    appliance.set("SCANSENTRY__MODEL__BUNDLE", "/nowhere");
    let output = appliance.command(&["check"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let text = stderr(&output);
    for start in ["watch.folder: ", "mqtt.url: ", "model.bundle: "] {
        assert!(
            text.lines().any(|line| line.starts_with(start)),
            "{start}{text}"
        );
    }
    let offline = appliance.command(&["check", "--offline"]).output().unwrap();
    assert!(!stderr(&offline).contains("mqtt.url"));

    let broker = Mosquitto::start();
    let appliance = Appliance::new(&broker.url());
    let output = appliance.command(&["check"]).output().unwrap();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    assert!(String::from_utf8_lossy(&output.stdout).starts_with("ok: model braintumor"));
}

#[test]
fn wrong_configuration_and_usage_have_their_exit_codes() {
    let appliance = Appliance::with("mqtt://127.0.0.1:1", "[mqqt]\nport = 1\n");
    for verb in [&["run"][..], &["check"], &["status"]] {
        let output = appliance.command(verb).output().unwrap();
        assert_eq!(output.status.code(), Some(78), "{verb:?}");
        assert!(
            stderr(&output).contains("mqqt: is not a known key; did you mean mqtt?"),
            "{}",
            stderr(&output)
        );
    }
    assert_eq!(run(&["frobnicate"]).status.code(), Some(2));
    assert_eq!(run(&["classify"]).status.code(), Some(2));
    let missing = run(&["check", "--config", "/nowhere.toml"]);
    assert_eq!(missing.status.code(), Some(78));
    assert!(stderr(&missing).starts_with("/nowhere.toml: cannot be read"));
    let output = Appliance::new("mqtt://127.0.0.1:1")
        .command(&["status"])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).contains("holds no ledger"));
}

#[test]
fn a_tampered_model_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let copy = folder.path().join("bundle");
    copy_folder(&bundle(), &copy);
    let model = copy.join("model.tflite");
    let mut bytes = std::fs::read(&model).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&model, bytes).unwrap();
    let mut appliance = Appliance::new("mqtt://127.0.0.1:1");
    appliance.set("SCANSENTRY__MODEL__BUNDLE", copy.to_str().unwrap());
    let output = appliance.command(&["run"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert!(
        stderr(&output).contains("has SHA-256"),
        "{}",
        stderr(&output)
    );

    // The right hash, but golden images that the model does not reproduce.
    copy_folder(&bundle(), &copy);
    let manifest = copy.join("manifest.toml");
    let text = std::fs::read_to_string(&manifest).unwrap();
    let line = text
        .lines()
        .find(|l| l.starts_with("probability"))
        .unwrap()
        .to_owned();
    std::fs::write(&manifest, text.replacen(&line, "probability = 0.5", 1)).unwrap();
    let output = appliance.command(&["check", "--offline"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    assert!(
        stderr(&output).contains("golden image"),
        "{}",
        stderr(&output)
    );
}
