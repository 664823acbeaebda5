//! What a package installs: the units' sandbox, the configuration it comes with, and storescp in front of a running daemon.
//! `make test-deb` runs the package itself.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::support::{Appliance, Mosquitto, Process, free_port, slices, wait_for};

fn project(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn there(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {program}")])
        .stdout(Stdio::null())
        .status()
        .unwrap()
        .success();
    if !found {
        eprintln!("not run: {program} is not installed; run `make setup`");
    }
    found
}

#[test]
fn units_expose_little() {
    if !there("systemd-analyze") {
        return;
    }
    for unit in ["scansentry", "scansentry-dashboard", "scansentry-storescp"] {
        // Fails above the threshold, in tenths.
        let output = Command::new("systemd-analyze")
            .args(["security", "--offline=true", "--threshold=15", "--no-pager"])
            .arg(project(&format!("systemd/{unit}.service")))
            .output()
            .unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(
            output.status.success() && text.contains("Overall exposure level"),
            "{text}{}",
            String::from_utf8_lossy(&output.stderr)
        );
    }
}

#[test]
fn the_packaged_configuration_names_real_keys_with_their_defaults() {
    let text = std::fs::read_to_string(project("packaging/config.toml")).unwrap();
    let settings: Vec<_> = text
        .lines()
        .map(|line| line.trim_start_matches('#'))
        .filter(|line| line.starts_with('[') || (line.contains(" = ") && !line.starts_with(' ')))
        .collect();
    assert!(settings.len() > 8, "{settings:?}");
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), settings.join("\n")).unwrap();
    let output = Command::new(env!("CARGO_BIN_EXE_scansentry"))
        .args(["check", "--offline", "--config"])
        .arg(file.path())
        .output()
        .unwrap();
    // What is not on this machine is a problem; a key that does not exist would be another.
    let problems = String::from_utf8(output.stderr).unwrap();
    let places = [
        "watch.folder: /srv/scanner/export ",
        "state.dir: ",
        "model.bundle: ",
        "mqtt.password_file: /run/credentials/scansentry.service/secret_mqtt-password",
    ];
    for problem in problems.lines() {
        assert!(
            places.iter().any(|place| problem.starts_with(place)),
            "{problem}"
        );
    }
    assert!(problems.contains(places[3]), "{problems}");
}

/// The command of `scansentry-storescp.service` with its folder in another place, for a shell.
fn receiver(folder: &Path) -> String {
    let unit = std::fs::read_to_string(project("systemd/scansentry-storescp.service")).unwrap();
    let unit = unit.replace("\\\n", " ");
    let command = unit
        .lines()
        .find_map(|line| line.strip_prefix("ExecStart="))
        .unwrap();
    let place = "/var/lib/scansentry-storescp/export";
    assert_eq!(command.matches(place).count(), 2);
    command.replace(place, folder.to_str().unwrap())
}

#[test]
fn dicom_sent_over_the_network_becomes_results() {
    if !there("storescp") || !there("storescu") || !there("img2dcm") {
        return;
    }
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    let incoming = appliance.export().join(".incoming");
    std::fs::create_dir(&incoming).unwrap();
    appliance.start();

    let port = free_port().to_string();
    let _receiver = Process::spawn(
        Command::new("sh")
            .args(["-c", &format!("exec {}", receiver(&appliance.export()))])
            .env("AETITLE", "SCANSENTRY")
            .env("OPTIONS", "")
            .env("PORT", &port),
    );
    let sent = tempfile::tempdir().unwrap();
    let slices = slices(6);
    // Those that are JPEGs.
    for number in [2, 3] {
        let picture = sent.path().join("picture.jpg");
        std::fs::write(&picture, &slices[number]).unwrap();
        let object = sent.path().join(format!("{number}.dcm"));
        let made = Command::new("img2dcm")
            .args(["-k", "Modality=MR", "-k", "PatientName=CANARY"])
            .args([&picture, &object])
            .status()
            .unwrap();
        assert!(made.success());
        std::fs::remove_file(picture).unwrap();
    }
    let send = || {
        Command::new("storescu")
            .args(["-q", "-xy", "localhost", &port, "-aec", "SCANSENTRY", "+sd"])
            .arg(sent.path())
            .status()
            .unwrap()
            .success()
    };
    wait_for("the receiver", send);

    let results = subscriber.wait_for_scans(2);
    for result in &results {
        assert_eq!(
            (result["outcome"].as_str(), result["source"].as_str()),
            (Some("classified"), Some("dicom")),
            "{result}"
        );
    }
    // Renamed in, under names that say nothing of the patient or the objects.
    assert_eq!(std::fs::read_dir(&incoming).unwrap().count(), 0);
    let header = |name: &str| {
        let output = Command::new("dcmdump")
            .args(["+P", "SOPInstanceUID", "-s"])
            .arg(appliance.export().join(name))
            .output()
            .unwrap();
        let text = String::from_utf8(output.stdout).unwrap();
        text.split(['[', ']']).nth(1).unwrap().to_owned()
    };
    let names: Vec<_> = std::fs::read_dir(appliance.export())
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .filter(|name| name != ".incoming")
        .collect();
    assert_eq!(names.len(), 2, "{names:?}");
    for name in names {
        assert!(
            !name.contains("CANARY") && !name.contains(&header(&name)),
            "{name}"
        );
    }
}
