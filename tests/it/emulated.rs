//! The cross-built programs (`cross/build.sh`) on this machine, under QEMU: the main job against a real Mosquitto. Nothing here
//! ran on a real ARM board.
//!
//! `make test-emulated` builds the programs and names their targets in `SCANSENTRY_EMULATED`; otherwise the tests say that they did
//! nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::support::{
    Appliance, Mosquitto, Steps, assert_no_double_outcome, files_in, pause, real_images, slices,
    wait_for,
};

/// Made pictures, and as many real ones where they are.
const IMAGES: usize = 50;

/// How to run the program that was built for `target`; `None` where that is not asked for, which is said.
fn emulated(target: &str, qemu: &str, cpu: &str, sysroot: &str) -> Option<Vec<String>> {
    let wanted = std::env::var("SCANSENTRY_EMULATED").unwrap_or_default();
    if !wanted.split(' ').any(|wanted| wanted == target) {
        eprintln!("not tested: {target}; `make test-emulated` does");
        return None;
    }
    let program = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("target")
        .join(target)
        .join("stage/bin/scansentry");
    assert!(
        program.exists(),
        "{}: is not there; run cross/build.sh {target}",
        program.display()
    );
    let program = program.to_str().unwrap();
    Some(
        [qemu, "-cpu", cpu, "-L", sysroot, program]
            .map(str::to_owned)
            .to_vec(),
    )
}

#[test]
fn aarch64_gives_the_results_of_this_machine() {
    let qemu = emulated(
        "aarch64-unknown-linux-gnu",
        "qemu-aarch64-static",
        // As in a Raspberry Pi 4. QEMU 7.2's own processor, `max`, gets LiteRT's kernels for newer processors wrong: every picture has
        // the same probability, and the golden images refuse the model.
        "cortex-a72",
        "/usr/aarch64-linux-gnu",
    );
    if let Some(program) = qemu {
        same_results(&program, "LiteRT 2.1.4");
    }
}

#[test]
fn armv7_gives_the_results_of_this_machine() {
    let qemu = emulated(
        "armv7-unknown-linux-gnueabihf",
        "qemu-arm-static",
        "cortex-a7",
        "/usr/arm-linux-gnueabihf",
    );
    if let Some(program) = qemu {
        same_results(&program, "TensorFlow Lite 1.15.5");
    }
}

/// Shows the same images to this machine's daemon and to `program`'s and compares what arrives at the broker.
fn same_results(program: &[String], engine: &str) {
    let mut images = slices(IMAGES);
    match real_images(IMAGES) {
        Some(real) => images.extend(real),
        None => eprintln!("not compared on real images: no ../shared/data"),
    }

    let mut here = Appliance::new("mqtt://localhost:1883");
    let expected = outcomes(&mut here, &images);
    // The same key gives the same ids.
    let mut there = Appliance::new("mqtt://localhost:1883");
    there.program = program.to_vec();
    std::fs::create_dir(there.state()).unwrap();
    for (name, bytes) in files_in(&here.state()).unwrap() {
        if name == "pseudonym.key" {
            std::fs::write(there.state().join(name), bytes).unwrap();
        }
    }
    checks_and_classifies(&there, &images[0]);
    let found = outcomes(&mut there, &images);
    assert!(there.log().contains(engine), "{}", there.log());

    assert_eq!(
        expected.keys().collect::<Vec<_>>(),
        found.keys().collect::<Vec<_>>()
    );
    let mut steps = Steps::default();
    let mut decided_otherwise = 0;
    for (scan, expected) in &expected {
        let found = &found[scan];
        for key in ["outcome", "roi", "rejected", "source"] {
            assert_eq!(expected[key], found[key], "{key} of {scan}");
        }
        let Some(probability) = expected["probability"].as_f64() else {
            continue;
        };
        let difference = found["probability"].as_f64().unwrap() - probability;
        steps.add((difference * 256.0).round().abs() as u8);
        decided_otherwise += usize::from(expected["decision"] != found["decision"]);
    }
    println!("{engine}: {steps}; {decided_otherwise} decisions differ");
    steps.assert_close();
}

/// `check` finds nothing wrong and `classify` gives an answer.
fn checks_and_classifies(appliance: &Appliance, image: &[u8]) {
    let check = appliance.command(&["check", "--offline"]).output().unwrap();
    assert!(
        check.status.success(),
        "{}",
        String::from_utf8_lossy(&check.stderr)
    );
    let file = appliance.folder.path().join("slice.png");
    std::fs::write(&file, image).unwrap();
    let classify = appliance
        .command(&["classify", file.to_str().unwrap()])
        .output()
        .unwrap();
    let line: Value = serde_json::from_slice(&classify.stdout).unwrap();
    assert!(line["probability"].is_number(), "{line}");
}

/// Runs the daemon over `images`; the results by scan.
fn outcomes(appliance: &mut Appliance, images: &[Vec<u8>]) -> BTreeMap<String, Value> {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    appliance.set("SCANSENTRY__MQTT__URL", &broker.url());
    for (number, image) in images.iter().enumerate() {
        appliance.rename_in(&format!("{number}.img"), image);
    }
    appliance.start();
    // Emulation is slow: what counts is that results keep coming.
    let mut before = 0;
    while before < images.len() {
        wait_for("the next result", || {
            subscriber.of_kind("result").len() > before
        });
        before = subscriber.of_kind("result").len();
        pause(Duration::from_millis(100));
    }
    let results = subscriber.results();
    assert_eq!(assert_no_double_outcome(&results), 0);
    println!(
        "peak resident memory: {} kB",
        appliance.process_figure("VmHWM")
    );
    assert_eq!(appliance.stop(), Some(0));
    results
        .into_iter()
        .map(|result| (result["scan_id"].as_str().unwrap().to_owned(), result))
        .collect()
}
