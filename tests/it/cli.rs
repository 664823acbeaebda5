//! The command line: JSON lines, error texts, exit codes.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::support::{
    Appliance, FOUR_LABELS, Mosquitto, bundle, copy_folder, free_port, plain, png, slices,
    toy_bundle,
};

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

/// The lines of `classify`.
#[track_caller]
fn classified(arguments: &[&str]) -> Vec<Value> {
    let output = run(&[&["classify"], arguments].concat());
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn near(found: &Value, expected: f64) -> bool {
    (found.as_f64().unwrap() - expected).abs() < 0.02
}

#[test]
fn several_positive_labels_are_added_up() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("white.png");
    std::fs::write(&file, plain(255)).unwrap();
    for model in ["float32-four-labels", "int8-four-labels"] {
        let bundle = toy_bundle(folder.path(), model, 28, FOUR_LABELS);
        let arguments = ["--bundle", bundle.to_str().unwrap(), file.to_str().unwrap()];
        let line = classified(&arguments).remove(0);
        // None of the three is the most probable label, together they are.
        assert_eq!(
            (&line["label"], &line["decision"]),
            (&json!("none"), &json!("positive"))
        );
        assert!(near(&line["probability"], 0.6), "{line}");
        let scores = line["scores"].as_object().unwrap();
        assert_eq!(scores.len(), 4);
        for (label, score) in [
            ("glioma", 0.2),
            ("meningioma", 0.3),
            ("none", 0.4),
            ("pituitary", 0.1),
        ] {
            assert!(near(&scores[label], score), "{model}: {line}");
        }
        assert!(line.get("heatmap").is_none(), "not asked for");
        assert_eq!(
            (
                &line["threshold"],
                &line["indeterminate"],
                &line["decision_rule"]
            ),
            (&json!(0.5), &Value::Null, &json!("model"))
        );
    }
}

#[test]
fn the_configuration_stands_above_the_models_rule_and_nonsense_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let rest = format!("{FOUR_LABELS}[decision]\nindeterminate = [0.3, 0.55]\n");
    let model = toy_bundle(folder.path(), "float32-four-labels", 28, &rest);
    let file = folder.path().join("grey.png");
    // A sum of about 0.38.
    std::fs::write(&file, plain(128)).unwrap();
    for (decision, expected, rule) in [
        ("", "indeterminate", json!([0.5, [0.3, 0.55], "model"])),
        (
            "indeterminate = 'off'",
            "negative",
            json!([0.5, null, "appliance"]),
        ),
        (
            "threshold = 0.35\nindeterminate = 'off'",
            "positive",
            json!([0.35, null, "appliance"]),
        ),
        (
            "threshold = 0.4",
            "indeterminate",
            json!([0.4, [0.3, 0.55], "appliance"]),
        ),
        (
            "indeterminate = [0.45, 0.6]",
            "negative",
            json!([0.5, [0.45, 0.6], "appliance"]),
        ),
    ] {
        let mut appliance =
            Appliance::with("mqtt://127.0.0.1:1", &format!("[decision]\n{decision}"));
        appliance.set("SCANSENTRY__MODEL__BUNDLE", model.to_str().unwrap());
        let output = appliance
            .command(&["classify", file.to_str().unwrap()])
            .output()
            .unwrap();
        let line: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!(line["decision"], expected, "{decision}");
        let found = json!([
            line["threshold"],
            line["indeterminate"],
            line["decision_rule"]
        ]);
        assert_eq!(found, rule, "{decision}");
        let check = appliance.command(&["check", "--offline"]).output().unwrap();
        let text = String::from_utf8_lossy(&check.stdout).into_owned();
        assert_eq!(check.status.code(), Some(0), "{}", stderr(&check));
        assert_eq!(
            text.contains("by [decision], not the model's own"),
            line["decision_rule"] == "appliance",
            "{text}"
        );
    }
    for (decision, line) in [
        (
            "threshold = 1.5",
            "decision.threshold: 1.5 is out of range; expected above 0 and below 1",
        ),
        (
            "indeterminate = [0.6, 0.7]",
            "decision.indeterminate: [0.6, 0.7] does not hold the threshold 0.5; expected [low, high] around it, from 0 to 1",
        ),
        (
            "threshold = 0.6",
            "decision.indeterminate: [0.3, 0.55] does not hold the threshold 0.6; expected [low, high] around it, from 0 to 1; the band is \
             the model's own, so set decision.indeterminate too, or \"off\"",
        ),
    ] {
        let mut appliance =
            Appliance::with("mqtt://127.0.0.1:1", &format!("[decision]\n{decision}"));
        appliance.set("SCANSENTRY__MODEL__BUNDLE", model.to_str().unwrap());
        for verb in [
            &["check", "--offline"][..],
            &["run"],
            &["classify", file.to_str().unwrap()],
        ] {
            let output = appliance.command(verb).output().unwrap();
            assert_eq!(output.status.code(), Some(78), "{verb:?}");
            assert_eq!(stderr(&output), format!("{line}\n"), "{verb:?}");
        }
    }
}

#[test]
fn heatmap_draws_where_the_score_came_from() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let (spot, black, out) = (path("spot.png"), path("black.png"), path("out.png"));
    // Of 84x56 pixels, the cell of 6x4 at the ninth column and the fourth row of 14.
    let bright = |x: u32, y: u32| (48..54).contains(&x) && (12..16).contains(&y);
    std::fs::write(&spot, png(|x, y| if bright(x, y) { 255 } else { 128 })).unwrap();
    std::fs::write(&black, plain(0)).unwrap();
    let pixel = |x, y| image::open(&out).unwrap().to_rgb8().get_pixel(x, y).0;
    let channel = "activation = 'sigmoid'\nindex = 1\nlabels = ['no', 'yes']\npositive = ['yes']\nheatmap.index = 0\n";
    for (model, side, output, cells) in [
        ("float32-four-labels", 28, FOUR_LABELS, 14),
        ("int8-four-labels", 28, FOUR_LABELS, 14),
        ("uint8-two-outputs", 4, channel, 2),
    ] {
        let bundle = toy_bundle(folder.path(), model, side, output);
        let bundle = bundle.to_str().unwrap();
        let line = classified(&["--bundle", bundle, &spot, "--heatmap", &out]).remove(0);
        let found = &line["heatmap"];
        assert_eq!(
            (&found["rows"], &found["columns"]),
            (&json!(cells), &json!(cells)),
            "{model}"
        );
        assert_eq!(
            (&found["file"], &found["scale"]),
            (&json!(out), &json!(16.0))
        );
        let drawn = image::open(&out).unwrap();
        assert_eq!(
            (drawn.width(), drawn.height()),
            (84, 56),
            "the crop at its own resolution"
        );
        if cells == 14 {
            assert_eq!(
                (&found["peak"]["x"], &found["peak"]["y"]),
                (&json!(51), &json!(14)),
                "{model}"
            );
            let value = found["peak"]["value"].as_f64().unwrap();
            assert!((value - 7.94).abs() < 0.1, "{value}");
            let [red, _, blue] = pixel(50, 13);
            assert!(red > blue, "speaks for: red {red}, blue {blue}");
            assert!(
                pixel(10, 40).iter().all(|level| level.abs_diff(128) <= 2),
                "speaks for nothing"
            );
            // All against: blue, however little else there is to compare with.
            let line = classified(&["--bundle", bundle, &black, "--heatmap", &out]).remove(0);
            assert!((line["heatmap"]["peak"]["value"].as_f64().unwrap() + 8.0).abs() < 0.1);
            assert!(
                pixel(50, 13)[2] > 40 && pixel(50, 13)[0] == 0,
                "{:?}",
                pixel(50, 13)
            );
        } else {
            // Of four cells, the one with the spot.
            assert_eq!(
                (&found["peak"]["x"], &found["peak"]["y"]),
                (&json!(63), &json!(14)),
                "{found}"
            );
        }
    }

    // The shipped model, which sees a crop.
    let head = path("head");
    std::fs::write(&head, &slices(2)[1]).unwrap();
    let shipped = bundle();
    let line = classified(&[
        "--bundle",
        shipped.to_str().unwrap(),
        &head,
        "--heatmap",
        &out,
    ])
    .remove(0);
    let (roi, peak) = (&line["roi"], &line["heatmap"]["peak"]);
    let drawn = image::open(&out).unwrap();
    assert_eq!(
        (&json!(drawn.width()), &json!(drawn.height())),
        (&roi["width"], &roi["height"])
    );
    for (place, start, length) in [("x", "x", "width"), ("y", "y", "height")] {
        let start = roi[start].as_u64().unwrap();
        let inside = start..start + roi[length].as_u64().unwrap();
        assert!(inside.contains(&peak[place].as_u64().unwrap()), "{line}");
    }
}

#[test]
fn heatmaps_of_many_pictures_go_into_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name).to_str().unwrap().to_owned();
    let bundle = toy_bundle(folder.path(), "float32-four-labels", 28, FOUR_LABELS);
    let frames = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/dicom/files/frames.dcm"
    );
    let (white, bad, maps) = (path("white.png"), path("bad.png"), path("maps"));
    std::fs::write(&white, plain(255)).unwrap();
    std::fs::write(&bad, b"not a png").unwrap();
    std::fs::create_dir(&maps).unwrap();
    let base = ["classify", "--bundle", bundle.to_str().unwrap()];
    let output = run(&[
        &base[..],
        &[&white, &bad, "/nowhere.png", frames, "--heatmap", &maps],
    ]
    .concat());
    assert_eq!(output.status.code(), Some(1), "{}", stderr(&output));
    let text = String::from_utf8(output.stdout).unwrap();
    let lines: Vec<Value> = text
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(
        lines[0]["heatmap"]["file"],
        format!("{maps}/white.png.heatmap.png")
    );
    for rejected in &lines[1..3] {
        assert_eq!(rejected.get("heatmap"), Some(&Value::Null));
    }
    assert!(lines.len() > 4, "a file of several frames");
    for (number, line) in (1..).zip(&lines[3..]) {
        assert_eq!(line["frame"], number);
        let file = line["heatmap"]["file"].as_str().unwrap();
        assert_eq!(file, format!("{maps}/frames.dcm.{number}.heatmap.png"));
        assert!(image::open(file).is_ok());
    }

    let no_map = FOUR_LABELS.replace("heatmap.index = 0\n", "");
    let without = toy_bundle(
        &folder.path().join("other"),
        "float32-four-labels",
        28,
        &no_map,
    );
    let refused = |arguments: &[&str], expected: &str| {
        let output = run(&[&["classify", "--bundle"], arguments].concat());
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).starts_with(expected), "{}", stderr(&output));
        assert!(output.stdout.is_empty());
    };
    let (with, without, out) = (
        bundle.to_str().unwrap(),
        without.to_str().unwrap(),
        path("out.png"),
    );
    refused(
        &[without, &white, "--heatmap", &out],
        "model.bundle: this model gives no activation map",
    );
    refused(
        &[with, &white, &bad, "--heatmap", &out],
        &format!("--heatmap: {out} is one picture for 2 FILEs"),
    );
    refused(
        &[with, &white, &white, "--heatmap", &maps],
        "--heatmap: two FILEs are named white.png",
    );
    refused(
        &[with, &white, "--heatmap", &white],
        &format!("--heatmap: {white} is FILE itself"),
    );
    refused(&[with, frames, "--heatmap", &out], "--heatmap: ");
    refused(
        &[with, &white, "--heatmap", "/nowhere/x.png"],
        "/nowhere/x.png: cannot be written",
    );
    assert!(!Path::new(&out).exists());
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
fn a_closed_pipe_ends_a_verb_quietly_and_a_full_disk_with_a_word() {
    let bundle = bundle();
    let into = |stdout: std::process::Stdio| {
        Command::new(env!("CARGO_BIN_EXE_scansentry"))
            .args(["model", "verify", bundle.to_str().unwrap()])
            .env_remove("SCANSENTRY_CONFIG")
            .stdout(stdout)
            .output()
            .unwrap()
    };
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let output = into(writer.into());
    assert_eq!((output.status.code(), &*stderr(&output)), (Some(1), ""));
    let full = std::fs::File::options()
        .write(true)
        .open("/dev/full")
        .unwrap();
    let output = into(full.into());
    assert_eq!(output.status.code(), Some(1));
    let said = stderr(&output);
    assert!(
        said.starts_with("standard output: ") && said.lines().count() == 1,
        "{said}"
    );
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

#[test]
fn bench_measures_every_stage_and_leaves_nothing_behind() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().to_str().unwrap();
    let bundle = bundle();
    let arguments = [
        "bench",
        "--seconds",
        "1",
        "--bundle",
        bundle.to_str().unwrap(),
    ];
    let output = run(&[&arguments[..], &["--dir", dir, "--json"]].concat());
    assert!(output.status.success(), "{}", stderr(&output));
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    for stage in ["identify", "decode", "roi", "resize", "infer", "total"] {
        let spread = &report["stages_ms"][stage];
        let (median, p95) = (
            spread["median"].as_f64().unwrap(),
            spread["p95"].as_f64().unwrap(),
        );
        assert!(0.0 < median && median <= p95, "{stage}: {spread}");
    }
    for rate in ["one_worker", "all_workers", "bound", "recorded"] {
        assert!(
            report["images_per_second"][rate].as_f64().unwrap() > 0.0,
            "{rate}"
        );
    }
    assert!(report["ledger"]["commit_ms"]["median"].as_f64().unwrap() > 0.0);
    assert_eq!(report["images"]["source"], "generated");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);

    // Where nothing can be written, the rest is measured all the same.
    let output = run(&[&arguments[..], &["--dir", "/proc", "--json"]].concat());
    assert!(
        stderr(&output).starts_with("/proc: cannot be written"),
        "{}",
        stderr(&output)
    );
    let report: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert!(report["ledger"].is_null() && report["images_per_second"]["recorded"].is_null());
    assert!(report["images_per_second"]["bound"].as_f64().unwrap() > 0.0);
}
