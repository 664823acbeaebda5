//! Installed model bundles: install, swap under a running daemon, go back, refuse, survive a damaged disk.
//!
//! A second bundle is the shipped one under another version: another manifest, so another bundle.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt, symlink};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use ed25519_dalek::pkcs8::EncodePublicKey as _;
use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::{Signer as _, SigningKey};
use scansentry::manifest::Manifest;
use serde_json::Value;

use crate::support::{
    Appliance, Mosquitto, Process, Subscriber, assert_no_double_outcome, bundle, copy_folder,
    is_root, pause, shipped_bundles, slices, wait_for,
};

/// Nobody listens there.
const NO_BROKER: &str = "mqtt://127.0.0.1:1";

/// The shipped bundle as `version`, in a folder of that name beside the appliance's.
fn variant(appliance: &Appliance, version: &str) -> PathBuf {
    let folder = appliance.folder.path().join(format!("bundle-{version}"));
    copy_folder(&bundle(), &folder);
    let line = format!("version = \"{}\"", shipped_version());
    edit_manifest(&folder, &line, &format!("version = \"{version}\""));
    folder
}

fn shipped_manifest() -> Manifest {
    let text = std::fs::read_to_string(bundle().join("manifest.toml")).unwrap();
    Manifest::parse(&text).unwrap()
}

fn shipped_version() -> String {
    shipped_manifest().version
}

/// The first golden image.
fn golden_image() -> String {
    shipped_manifest().golden.image[0].file.clone()
}

#[track_caller]
fn edit_manifest(folder: &Path, from: &str, to: &str) {
    let path = folder.join("manifest.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{from} is not in the manifest");
    std::fs::write(path, text.replacen(from, to, 1)).unwrap();
}

fn model(appliance: &Appliance, arguments: &[&str]) -> Output {
    let arguments = [&["model"], arguments].concat();
    appliance.command(&arguments).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[track_caller]
fn install(appliance: &Appliance, folder: &Path) -> String {
    let output = model(appliance, &["install", folder.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    String::from_utf8(output.stdout).unwrap()
}

#[track_caller]
fn rollback(appliance: &Appliance) {
    let output = model(appliance, &["rollback"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
}

#[track_caller]
fn show(appliance: &Appliance) -> Value {
    let output = model(appliance, &["show", "--json"]);
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    serde_json::from_slice(&output.stdout).unwrap()
}

/// Version and place of what runs, and of what a rollback would go to.
fn versions(appliance: &Appliance) -> [(String, String); 2] {
    let shown = show(appliance);
    [&shown, &shown["rollback"]].map(|bundle| {
        let text = |key: &str| bundle[key].as_str().unwrap_or("-").to_owned();
        (text("version"), text("place"))
    })
}

fn expected(now: (&str, &str), back: (&str, &str)) -> [(String, String); 2] {
    [now, back].map(|(version, place)| (version.to_owned(), place.to_owned()))
}

/// Everything in the folder of installed bundles.
fn installed(appliance: &Appliance) -> Vec<String> {
    let entries = std::fs::read_dir(appliance.state().join("models"));
    let mut names: Vec<_> = entries
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Every problem of an install that has to be refused with exit 78, and with nothing changed.
#[track_caller]
fn refused(appliance: &Appliance, folder: &Path) -> String {
    let before = (installed(appliance), versions(appliance));
    let output = model(appliance, &["install", folder.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
    assert_eq!((installed(appliance), versions(appliance)), before);
    stderr(&output)
}

#[test]
fn every_shipped_bundle_passes_its_self_test() {
    let appliance = Appliance::new(NO_BROKER);
    for bundle in shipped_bundles() {
        let name = bundle.file_name().unwrap().to_str().unwrap();
        let output = model(&appliance, &["verify", bundle.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(
            said.starts_with(&format!("ok: {name} ")),
            "{said}{}",
            stderr(&output)
        );
    }
    let said = install(&appliance, &shipped_bundles()[1]);
    assert!(said.starts_with("installed: braintumor-small "), "{said}");
}

#[test]
fn install_show_and_back_step_by_step() {
    let appliance = Appliance::new(NO_BROKER);
    let shipped = shipped_version();
    let configured = (shipped.as_str(), "configured");
    assert_eq!(versions(&appliance), expected(configured, ("-", "-")));
    let output = model(&appliance, &["rollback"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stderr(&output).starts_with("model: nothing is installed"));
    assert!(!appliance.state().join("models/current").exists());

    let said = install(&appliance, &variant(&appliance, "2"));
    assert!(said.starts_with("installed: braintumor 2; a running daemon takes it over"));
    assert_eq!(said.lines().count(), 1);
    assert_eq!(
        versions(&appliance),
        expected(("2", "installed"), configured)
    );
    let again = install(&appliance, &variant(&appliance, "2"));
    assert!(again.starts_with("unchanged: braintumor 2"), "{again}");
    install(&appliance, &variant(&appliance, "3"));
    assert_eq!(
        versions(&appliance),
        expected(("3", "installed"), ("2", "previous"))
    );
    install(&appliance, &variant(&appliance, "4"));
    assert_eq!(
        versions(&appliance),
        expected(("4", "installed"), ("3", "previous"))
    );
    let names = installed(&appliance);
    assert_eq!(
        names.len(),
        5,
        "two bundles, two links, the lock: {names:?}"
    );

    let shown = show(&appliance);
    let manifest = std::fs::read(appliance.folder.path().join("bundle-4/manifest.toml")).unwrap();
    let hash = scansentry::scan::hex(&scansentry::scan::sha256(&manifest));
    assert_eq!(shown["manifest_sha256"], hash.as_str());
    let dir = shown["dir"].as_str().unwrap();
    assert!(dir.ends_with(&format!("models/braintumor-4-{}", &hash[..12])));
    assert_eq!(
        (&shown["signature"], &shown["refused"]),
        (&"none".into(), &serde_json::json!([]))
    );
    let people = model(&appliance, &["show"]);
    let people = String::from_utf8(people.stdout).unwrap();
    for part in [
        "braintumor 4",
        "no_tumor, tumor (positive)",
        "installed: /",
        "braintumor 3, previous: /",
    ] {
        assert!(people.contains(part), "{part}: {people}");
    }
    // Other verbs use what is installed, too.
    let slice = appliance.folder.path().join("slice.png");
    std::fs::write(&slice, &slices(1)[0]).unwrap();
    let classified = appliance
        .command(&["classify", slice.to_str().unwrap()])
        .output()
        .unwrap();
    let line: Value = serde_json::from_slice(&classified.stdout).unwrap();
    assert_eq!(line["model"]["version"], "4");

    rollback(&appliance);
    assert_eq!(
        versions(&appliance),
        expected(("3", "installed"), configured)
    );
    rollback(&appliance);
    assert_eq!(versions(&appliance), expected(configured, ("-", "-")));
    assert_eq!(installed(&appliance), ["lock"]);
}

#[test]
fn what_is_installed_belongs_to_the_daemon_alone() {
    let mut appliance = Appliance::new(NO_BROKER);
    let state = appliance.state();
    std::fs::create_dir(&state).unwrap();
    let owner = if is_root() {
        65_534
    } else {
        std::fs::metadata(&state).unwrap().uid()
    };
    // The bundle is root's alone; the daemon's user gets a copy.
    let folder = variant(&appliance, "2");
    std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o700)).unwrap();
    // What the daemon's user could not read would be refused.
    let configured = appliance.folder.path().join("configured");
    copy_folder(&bundle(), &configured);
    appliance.set("SCANSENTRY__MODEL__BUNDLE", configured.to_str().unwrap());
    if is_root() {
        for folder in [
            appliance.folder.path(),
            &configured,
            &configured.join("golden"),
        ] {
            std::fs::set_permissions(folder, PermissionsExt::from_mode(0o755)).unwrap();
        }
        std::os::unix::fs::chown(&state, Some(owner), Some(owner)).unwrap();
    }
    install(&appliance, &folder);
    rollback(&appliance);
    install(&appliance, &folder);
    assert_eq!(versions(&appliance)[0].0, "2");
    let mut folders = vec![state];
    let mut files = 0;
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap().map(Result::unwrap) {
            let metadata = entry.metadata().unwrap();
            assert_eq!(metadata.uid(), owner, "{}", entry.path().display());
            let mode = metadata.permissions().mode() & 0o7777;
            if metadata.is_dir() {
                assert_eq!(mode, 0o700);
                folders.push(entry.path());
            } else if metadata.is_file() {
                assert_eq!(mode, 0o600);
                files += 1;
            }
        }
    }
    assert!(files > 4, "{files}");

    // Root opens the files, and what is installed runs as its owner.
    let at = |name: &str| appliance.folder.path().join(name);
    std::fs::write(at("slice.png"), &slices(1)[0]).unwrap();
    std::fs::set_permissions(at("slice.png"), PermissionsExt::from_mode(0o600)).unwrap();
    let ran = |arguments: &[&str]| {
        let mut command = appliance.command(arguments);
        let output = command.current_dir(at("")).output().unwrap();
        assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
        output
    };
    let classify = ["classify", "slice.png", "--heatmap", "map.png"];
    let classified = || {
        let output = ran(&classify);
        let line: Value = serde_json::from_slice(&output.stdout).unwrap();
        (line["model"]["version"].clone(), stderr(&output))
    };
    assert_eq!(classified(), ("2".into(), String::new()));
    ran(&["preprocess", "slice.png", "--out", "seen.png"]);
    for name in ["map.png", "seen.png"] {
        assert!(image::open(at(name)).is_ok(), "{name}");
    }
    ran(&["check", "--offline"]);
    if is_root() {
        let mine = appliance.state().join("models/current/model.tflite");
        std::os::unix::fs::chown(mine, Some(0), Some(0)).unwrap();
        let (version, said) = classified();
        assert_eq!(version, shipped_version().as_str());
        assert!(said.contains("model.tflite cannot be read"), "{said}");
    }
}

#[track_caller]
fn assert_always_online(subscriber: &Subscriber) {
    let status = subscriber.of_kind("status");
    assert!(status.iter().all(|m| m.payload == "online"), "{status:?}");
}

#[test]
fn a_running_daemon_swaps_models_without_losing_or_doubling_a_result() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    appliance.start();
    let shipped = shipped_version();
    // A stream of slices that does not wait for anything, and that either engine keeps up with.
    let engine = std::env::var("SCANSENTRY__MODEL__ENGINE");
    let rate = if engine.is_ok_and(|e| e == "tflite") {
        "1"
    } else {
        "8"
    };
    let mut simulate = Process::spawn(
        appliance
            .command(&["simulate", "--rate", rate, "--count", "100000", "--to"])
            .arg(appliance.export())
            .stdout(Stdio::null()),
    );
    let with_version = |version: &str| {
        let results = subscriber.results();
        results
            .iter()
            .filter(|r| r["model"]["version"] == version)
            .count()
    };
    let more_of = |version: &str| {
        let before = with_version(version);
        let what = format!("more results of version {version}");
        wait_for(&what, || with_version(version) > before + 3);
    };
    more_of(&shipped);
    install(&appliance, &variant(&appliance, "2"));
    more_of("2");
    install(&appliance, &variant(&appliance, "3"));
    // Another one before the first can have been taken over: only the last one counts.
    install(&appliance, &variant(&appliance, "4"));
    more_of("4");
    rollback(&appliance);
    more_of("3");
    rollback(&appliance);
    more_of(&shipped);
    install(&appliance, &variant(&appliance, "2"));
    more_of("2");

    simulate.signal("TERM");
    let _ = simulate.exit_code();
    let files = || std::fs::read_dir(appliance.export()).unwrap().count();
    let images = files();
    subscriber.wait_for_scans(images);
    appliance.wait_until_delivered();
    let results = subscriber.results();
    assert_eq!(
        results.len(),
        images,
        "no resend either: every stop was in order"
    );
    assert_eq!(assert_no_double_outcome(&results), 0);
    assert_eq!(appliance.status()["counts"]["classified"], images);

    // In the order of the swaps; the third model may have been skipped on its way in.
    let mut order: Vec<&str> = Vec::new();
    for result in &results {
        let version = result["model"]["version"].as_str().unwrap();
        if order.last() != Some(&version) {
            order.push(version);
        }
    }
    let with = [&shipped, "2", "3", "4", "3", &shipped, "2"];
    let without = [&shipped, "2", "4", "3", &shipped, "2"];
    assert!(order == with || order == without, "{order:?}");

    assert_always_online(&subscriber);
    let log = appliance.log();
    assert!(
        !log.contains("not reloaded") && !log.contains("ERROR"),
        "{log}"
    );
    let health = subscriber.of_kind("health").pop().unwrap().json();
    assert_eq!(
        (&health["model"]["version"], &health["state"]),
        (&"2".into(), &"ok".into())
    );
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn a_swap_waits_for_a_file_that_takes_long() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::with(
        &broker.url(),
        "[pipeline]\nworkers = 1\nattempts = 1\n[health]\ninterval_s = 1\n",
    );
    appliance.start();
    let freezer = appliance.freeze("worker");
    appliance.rename_in("a.png", &slices(2)[0]);
    wait_for("the file to be in work", || {
        let health = subscriber.of_kind("health").pop();
        health.is_some_and(|h| h.json()["backlog"]["files"] == 1)
    });
    install(&appliance, &variant(&appliance, "2"));
    wait_for("the reload", || {
        appliance.log().contains("another model is installed")
    });
    // Longer than a stop would wait.
    pause(Duration::from_secs(25));
    appliance.rename_in("b.png", &slices(2)[1]);
    assert_eq!(subscriber.results().len(), 0);
    drop(freezer);
    let results = subscriber.wait_for_scans(2);
    let by: Vec<_> = results
        .iter()
        .map(|r| (r["outcome"].as_str(), r["model"]["version"].as_str()))
        .collect();
    let shipped = shipped_version();
    let classified = Some("classified");
    assert_eq!(by, [(classified, Some(&*shipped)), (classified, Some("2"))]);
    assert!(!appliance.log().contains("in time"), "{}", appliance.log());
    assert_always_online(&subscriber);
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn a_swap_leaves_a_worker_that_hangs_behind() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    // Long enough for the new bundle to be installed before another worker takes the file.
    let more = "[pipeline]\nworkers = 1\ndeadline_s = 30\n";
    let mut appliance = Appliance::with(&broker.url(), more);
    appliance.start();
    let _freezer = appliance.freeze("worker");
    appliance.rename_in("a.png", &slices(1)[0]);
    install(&appliance, &variant(&appliance, "2"));
    let results = subscriber.wait_for_scans(1);
    assert_eq!(results[0]["model"]["version"], "2");
    assert!(appliance.log().contains("a worker hangs on a file"));
    assert_always_online(&subscriber);
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn what_fails_a_check_is_not_installed() {
    let appliance = Appliance::new(NO_BROKER);
    install(&appliance, &variant(&appliance, "2"));
    let case = |name: &str| variant(&appliance, name);

    let hash = case("hash");
    let mut bytes = std::fs::read(hash.join("model.tflite")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(hash.join("model.tflite"), bytes).unwrap();
    assert!(refused(&appliance, &hash).contains("model.tflite has SHA-256"));

    let golden = case("golden");
    let text = std::fs::read_to_string(golden.join("manifest.toml")).unwrap();
    let line = text.lines().find(|l| l.starts_with("probability")).unwrap();
    edit_manifest(&golden, line, "probability = 0.5");
    assert!(refused(&appliance, &golden).contains("gives"));

    let tensors = case("tensors");
    edit_manifest(&tensors, "width = 224", "width = 225");
    assert!(refused(&appliance, &tensors).contains("the model's input is"));

    let missing = case("missing");
    std::fs::remove_file(missing.join("model.tflite")).unwrap();
    std::fs::remove_file(missing.join(golden_image())).unwrap();
    let problems = refused(&appliance, &missing);
    assert_eq!(problems.lines().count(), 2, "{problems}");
    assert!(refused(&appliance, Path::new("/nowhere")).contains("/nowhere"));
    let empty = appliance.folder.path().join("empty");
    std::fs::create_dir(&empty).unwrap();
    assert!(refused(&appliance, &empty).contains("manifest.toml: "));

    // Not a model, but a text that says so.
    let text = case("text");
    std::fs::write(text.join("model.tflite"), b"x").unwrap();
    let hash = scansentry::scan::hex(&scansentry::scan::sha256(b"x"));
    let manifest = std::fs::read_to_string(text.join("manifest.toml")).unwrap();
    let old = manifest.lines().find(|l| l.starts_with("sha256")).unwrap();
    edit_manifest(&text, old, &format!("sha256 = \"{hash}\""));
    assert!(refused(&appliance, &text).starts_with("model.bundle: "));

    // Links, pipes and giants.
    let secret = appliance.folder.path().join("secret");
    std::fs::write(&secret, b"secret").unwrap();
    for (name, of) in [("link", "model.tflite"), ("card", "MODEL_CARD.md")] {
        let link = case(name);
        std::fs::remove_file(link.join(of)).unwrap();
        symlink(&secret, link.join(of)).unwrap();
        assert!(refused(&appliance, &link).contains(of), "{name}");
    }
    let folder = case("folder");
    std::fs::rename(
        folder.join("golden"),
        appliance.folder.path().join("golden"),
    )
    .unwrap();
    symlink(
        appliance.folder.path().join("golden"),
        folder.join("golden"),
    )
    .unwrap();
    let images = shipped_manifest().golden.image.len();
    assert_eq!(refused(&appliance, &folder).lines().count(), images);
    let pipe = case("pipe");
    std::fs::remove_file(pipe.join("model.tflite")).unwrap();
    let made = Command::new("mkfifo")
        .arg(pipe.join("model.tflite"))
        .status();
    assert!(made.unwrap().success());
    assert!(refused(&appliance, &pipe).contains("not a regular file"));
    for (name, of, limit) in [
        ("large-model", "model.tflite", 1_u64 << 30),
        ("large-golden", &golden_image(), 64 << 20),
        ("large-card", "MODEL_CARD.md", 1 << 20),
        ("large-manifest", "manifest.toml", 1 << 20),
    ] {
        let large = case(name);
        let file = std::fs::File::options()
            .write(true)
            .open(large.join(of))
            .unwrap();
        file.set_len(limit + 1).unwrap();
        assert!(refused(&appliance, &large).contains(&format!("larger than {limit} bytes")));
    }
    // A path out of the bundle.
    let out = case("out");
    edit_manifest(
        &out,
        &format!("file = \"{}\"", golden_image()),
        "file = \"../secret\"",
    );
    assert!(refused(&appliance, &out).contains("is not a path inside the bundle"));

    // No room: nothing of it stays behind.
    let mut full = appliance;
    full.set("SCANSENTRY__STATE__MIN_FREE_BYTES", "1099511627776");
    let before = installed(&full);
    let output = model(&full, &["install", variant(&full, "3").to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("are to stay free"),
        "{}",
        stderr(&output)
    );
    assert_eq!(installed(&full), before);
}

#[test]
fn only_what_a_manifest_names_is_copied() {
    let appliance = Appliance::new(NO_BROKER);
    let folder = variant(&appliance, "2");
    std::fs::write(folder.join("notes.txt"), b"mine").unwrap();
    symlink("/etc/passwd", folder.join("golden/other.png")).unwrap();
    install(&appliance, &folder);
    let dir = PathBuf::from(show(&appliance)["dir"].as_str().unwrap());
    assert!(dir.join("MODEL_CARD.md").exists() && !dir.join("notes.txt").exists());
    assert!(dir.join("golden/other.png").symlink_metadata().is_err());
}

/// A key in the appliance's folder, and `model.public_key` that names its public half.
fn configured_key(appliance: &mut Appliance) -> SigningKey {
    let key = SigningKey::from_bytes(&[7; 32]);
    let pem = key
        .verifying_key()
        .to_public_key_pem(LineEnding::LF)
        .unwrap();
    let path = appliance.folder.path().join("key.pem");
    std::fs::write(&path, pem).unwrap();
    appliance.set("SCANSENTRY__MODEL__PUBLIC_KEY", path.to_str().unwrap());
    key
}

fn sign(folder: &Path, key: &SigningKey) {
    let manifest = std::fs::read(folder.join("manifest.toml")).unwrap();
    let signature = key.sign(&manifest).to_bytes();
    std::fs::write(folder.join("manifest.toml.sig"), signature).unwrap();
}

/// What each verb that loads the model says in refusing, with exit code 78.
fn refusals(appliance: &Appliance) -> Vec<(&'static [&'static str], String)> {
    let verbs: [&'static [&'static str]; 4] = [
        &["check", "--offline"],
        &["run"],
        &["model", "show"],
        &["model", "verify"],
    ];
    let refusal = |verb: &'static [&'static str]| {
        let output = appliance.command(verb).output().unwrap();
        assert_eq!(output.status.code(), Some(78), "{verb:?}");
        (verb, stderr(&output))
    };
    verbs.map(refusal).into()
}

#[test]
fn with_a_key_only_signed_bundles_run() {
    let mut appliance = Appliance::new(NO_BROKER);
    install(&appliance, &variant(&appliance, "1"));
    let key = configured_key(&mut appliance);

    // Neither the installed nor the configured bundle is signed: every problem is said, and nothing runs.
    for (verb, problems) in refusals(&appliance) {
        let about = |start: &str| {
            problems
                .lines()
                .any(|l| l.starts_with(start) && l.contains("manifest.toml.sig cannot be read"))
        };
        assert!(
            about("installed model braintumor-1-") && about("model.bundle: "),
            "{verb:?}: {problems}"
        );
    }
    let try_install = |folder: &Path| {
        let output = model(&appliance, &["install", folder.to_str().unwrap()]);
        (output.status.code(), stderr(&output))
    };
    let unsigned = try_install(&variant(&appliance, "unsigned"));
    assert!(unsigned.0 == Some(78) && unsigned.1.contains("manifest.toml.sig cannot be read"));
    let mine = variant(&appliance, "2");
    sign(&mine, &SigningKey::from_bytes(&[8; 32]));
    let other = try_install(&mine);
    assert!(
        other.0 == Some(78) && other.1.contains("is no signature"),
        "{other:?}"
    );

    sign(&mine, &key);
    assert_eq!(try_install(&mine).0, Some(0));
    assert_eq!(show(&appliance)["signature"], "valid");
    assert_eq!(model(&appliance, &["verify"]).status.code(), Some(0));
    // Changed after it was signed: the manifest, or the signature itself.
    let tampered = variant(&appliance, "3");
    sign(&tampered, &key);
    edit_manifest(&tampered, "[decision]", "[decision] # mine");
    let output = model(&appliance, &["verify", tampered.to_str().unwrap()]);
    assert_eq!(output.status.code(), Some(78));
    assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    assert!(refused(&appliance, &tampered).contains("is no signature"));
    for bytes in [&[0; 64][..], &[1; 63], b"", &[2; 4096]] {
        std::fs::write(tampered.join("manifest.toml.sig"), bytes).unwrap();
        assert!(refused(&appliance, &tampered).contains("is no signature"));
    }
    // Going back would go to what is not signed.
    let output = model(&appliance, &["rollback"]);
    assert_eq!(output.status.code(), Some(78));
    assert_eq!(show(&appliance)["version"], "2");
    assert!(
        appliance
            .command(&["check", "--offline"])
            .output()
            .unwrap()
            .status
            .success()
    );

    // Tampered with in the state directory, hash and all: what is signed is checked at every load.
    let dir = PathBuf::from(show(&appliance)["dir"].as_str().unwrap());
    edit_manifest(&dir, "[decision]", "[decision] # mine");
    let output = appliance.command(&["run"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    // A key that is none.
    appliance.set("SCANSENTRY__MODEL__PUBLIC_KEY", "/etc/hostname");
    let output = appliance.command(&["check", "--offline"]).output().unwrap();
    assert_eq!(output.status.code(), Some(78));
    let problems = stderr(&output);
    assert!(problems.starts_with("model.public_key: /etc/hostname is no Ed25519 public key"));
    assert_eq!(problems.lines().count(), 1, "{problems}");
}

#[test]
fn a_signature_that_comes_later_is_installed() {
    let mut appliance = Appliance::new(NO_BROKER);
    install(&appliance, &variant(&appliance, "1"));
    let folder = variant(&appliance, "2");
    install(&appliance, &folder);
    sign(&folder, &SigningKey::from_bytes(&[7; 32]));
    let said = install(&appliance, &folder);
    assert!(said.starts_with("installed: braintumor 2"), "{said}");
    let said = install(&appliance, &folder);
    assert!(said.starts_with("unchanged: braintumor 2"), "{said}");
    assert_eq!(
        versions(&appliance),
        expected(("2", "installed"), ("1", "previous"))
    );
    configured_key(&mut appliance);
    assert_eq!(show(&appliance)["signature"], "valid");
}

#[test]
fn a_decision_that_does_not_go_with_the_installed_model_is_no_reason_for_another() {
    let mut appliance = Appliance::new(NO_BROKER);
    let rule = |version: &str, rule: &str| {
        let folder = variant(&appliance, version);
        edit_manifest(&folder, "threshold = 0.5", rule);
        folder
    };
    let (low, high) = (
        rule("low", "threshold = 0.5"),
        rule("high", "threshold = 0.65"),
    );
    install(&appliance, &low);
    install(&appliance, &high);
    // It goes with the installed model, not with the one before it.
    appliance.set("SCANSENTRY__DECISION__INDETERMINATE", "0.6, 0.7");
    let before = installed(&appliance);
    let output = model(&appliance, &["rollback"]);
    assert_eq!(output.status.code(), Some(78));
    let line = "decision.indeterminate: [0.6, 0.7] does not hold the threshold 0.5; ";
    assert!(stderr(&output).starts_with(line), "{}", stderr(&output));
    assert_eq!(installed(&appliance), before);
    assert_eq!(
        versions(&appliance),
        expected(("high", "installed"), ("-", "-"))
    );

    // The other way round.
    appliance.set("SCANSENTRY__DECISION__INDETERMINATE", "0.4, 0.6");
    for (verb, problems) in refusals(&appliance) {
        let line = "decision.indeterminate: [0.4, 0.6] does not hold the threshold 0.65; ";
        assert!(
            problems.starts_with(line) && problems.lines().count() == 1,
            "{verb:?}: {problems}"
        );
    }
    // What is installed now is the one to go back to: it is whole.
    install(&appliance, &low);
    appliance.set("SCANSENTRY__DECISION__INDETERMINATE", "model");
    assert_eq!(
        versions(&appliance),
        expected(("low", "installed"), ("high", "previous"))
    );
}

#[test]
fn who_may_not_see_what_is_installed_is_told_so() {
    let appliance = Appliance::new(NO_BROKER);
    let folder = variant(&appliance, "2");
    install(&appliance, &folder);
    let slice = appliance.folder.path().join("slice.png");
    std::fs::write(&slice, &slices(1)[0]).unwrap();
    let mode = |path: &Path, mode| {
        std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
    };
    mode(appliance.folder.path(), 0o755);
    for path in [&folder, &folder.join("golden")] {
        mode(path, 0o755);
    }
    mode(&appliance.state().join("models"), 0o000);
    let ran = |arguments: &[&str]| {
        let mut command = appliance.command(arguments);
        if is_root() {
            command.uid(65_534);
        }
        let output = command.output().unwrap();
        (output.status.code(), stderr(&output))
    };
    let (slice, folder) = (slice.to_str().unwrap(), folder.to_str().unwrap());
    let (code, said) = ran(&["classify", slice]);
    assert!(
        code == Some(1) && said.contains("; give --bundle, or run as the user of the daemon"),
        "{said}"
    );
    let (code, said) = ran(&["classify", "--bundle", folder, slice]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = ran(&["model", "verify", folder]);
    assert_eq!(code, Some(0), "{said}");
    let (code, said) = ran(&["model", "verify"]);
    assert!(
        code == Some(1) && said.contains("; run as root or as the user of the daemon"),
        "{said}"
    );
    mode(&appliance.state().join("models"), 0o700);
}

#[test]
fn signatures_that_openssl_makes_are_valid() {
    let mut appliance = Appliance::new(NO_BROKER);
    let folder = variant(&appliance, "2");
    let openssl = |arguments: &str| {
        let ran = Command::new("openssl")
            .args(arguments.split(' '))
            .current_dir(&folder)
            .output();
        ran.is_ok_and(|output| output.status.success())
    };
    // As models/README.md says.
    if !openssl("genpkey -algorithm ed25519 -out ../model-key.pem") {
        eprintln!("not run: there is no openssl that knows Ed25519");
        return;
    }
    assert!(openssl(
        "pkey -in ../model-key.pem -pubout -out ../model-key.pub.pem"
    ));
    assert!(openssl(
        "pkeyutl -sign -rawin -inkey ../model-key.pem -in manifest.toml -out manifest.toml.sig"
    ));
    assert!(openssl(
        "pkeyutl -verify -rawin -pubin -inkey ../model-key.pub.pem -in manifest.toml -sigfile manifest.toml.sig"
    ));
    let key = appliance.folder.path().join("model-key.pub.pem");
    appliance.set("SCANSENTRY__MODEL__PUBLIC_KEY", key.to_str().unwrap());
    install(&appliance, &folder);
    assert_eq!(show(&appliance)["signature"], "valid");
    std::fs::write(folder.join("manifest.toml.sig"), [0; 64]).unwrap();
    assert!(refused(&appliance, &folder).contains("is no signature"));
    // The secret half is no public key.
    let secret = appliance.folder.path().join("model-key.pem");
    appliance.set("SCANSENTRY__MODEL__PUBLIC_KEY", secret.to_str().unwrap());
    assert!(!model(&appliance, &["verify"]).status.success());
}

#[test]
fn installs_that_are_killed_leave_a_whole_bundle_and_no_rubbish() {
    const ROUNDS: u32 = 30;
    let appliance = Appliance::new(NO_BROKER);
    let start = Instant::now();
    install(&appliance, &variant(&appliance, "0"));
    // Until somewhat after its end, so that a kill falls into every step.
    let longest = start.elapsed() * 3 / 2;
    let mut done = 0;
    let mut left_behind = 0;
    for round in 1..=ROUNDS {
        let folder = variant(&appliance, &round.to_string());
        let mut installing = Process::spawn(
            appliance
                .command(&["model", "install", folder.to_str().unwrap()])
                .stdout(Stdio::null())
                .stderr(Stdio::null()),
        );
        pause(longest * round / ROUNDS);
        installing.kill();
        std::fs::remove_dir_all(folder).unwrap();
        left_behind += u32::from(installed(&appliance).contains(&"staging".to_owned()));
        let output = model(&appliance, &["verify"]);
        assert_eq!(
            output.status.code(),
            Some(0),
            "{round}: {}",
            stderr(&output)
        );
        let version = &versions(&appliance)[0].0;
        done += u32::from(*version == round.to_string());
    }
    println!("{ROUNDS} kills: {done} after the switch, {left_behind} left a copy behind");

    // Whatever a kill can leave: a copy, a bundle that nothing names, a link that was not renamed.
    let models = appliance.state().join("models");
    for name in ["staging", "braintumor-x-000000000000"] {
        copy_folder(&bundle(), &models.join(name));
    }
    let _ = std::fs::remove_file(models.join("current.new"));
    symlink("staging", models.join("current.new")).unwrap();
    install(&appliance, &variant(&appliance, "last"));
    let names = installed(&appliance);
    assert_eq!(names.len(), 5, "{names:?}");
    assert_eq!(versions(&appliance)[0].0, "last");
    // Between the two links: both name the bundle that runs.
    let current = std::fs::read_link(models.join("current")).unwrap();
    std::fs::remove_file(models.join("previous")).unwrap();
    symlink(&current, models.join("previous")).unwrap();
    assert_eq!(
        versions(&appliance),
        expected(("last", "installed"), (&shipped_version(), "configured"))
    );
    // One at a time.
    let lock = std::fs::File::open(models.join("lock")).unwrap();
    lock.lock().unwrap();
    let output = model(&appliance, &["rollback"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).ends_with("another change is on its way; wait until it is done\n"),
        "{}",
        stderr(&output)
    );
    drop(lock);
    // A link that is none any more.
    std::fs::remove_file(models.join("current")).unwrap();
    std::fs::write(models.join("current"), b"?").unwrap();
    let output = model(&appliance, &["verify"]);
    assert_eq!(output.status.code(), Some(78));
    assert!(stderr(&output).contains("which model is installed cannot be read"));
    assert_eq!(show(&appliance)["place"], "previous");
    rollback(&appliance);
    assert_eq!(
        versions(&appliance),
        expected(("last", "installed"), (&shipped_version(), "configured"))
    );
    rollback(&appliance);
    assert_eq!(installed(&appliance), ["lock"]);
}

/// Damages a file of the bundle that is to run.
fn damage(appliance: &Appliance, link: &str) {
    let model = appliance
        .state()
        .join("models")
        .join(link)
        .join("model.tflite");
    let mut bytes = std::fs::read(&model).unwrap();
    let end = bytes.len() - 4096;
    bytes[end..].fill(0);
    std::fs::write(model, bytes).unwrap();
}

#[test]
fn a_damaged_installed_bundle_does_not_keep_the_appliance_down() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    install(&appliance, &variant(&appliance, "2"));
    install(&appliance, &variant(&appliance, "3"));
    damage(&appliance, "current");
    let health = |code: &str| {
        let last = subscriber.of_kind("health").pop();
        last.is_some_and(|h| {
            let conditions = h.json()["conditions"].as_array().unwrap().clone();
            conditions.iter().any(|c| c["code"] == code)
        })
    };
    let results = |version: &str| {
        let results = subscriber.results();
        results.iter().any(|r| r["model"]["version"] == version)
    };
    let all = slices(5);
    appliance.start();
    wait_for("health that says so", || health("model_fallback"));
    appliance.rename_in("a.png", &all[0]);
    wait_for("a result of the previous model", || results("2"));
    let log = appliance.log();
    assert!(
        log.contains("ERROR")
            && log.contains("not the installed model: installed model braintumor-3-"),
        "{log}"
    );
    let check = appliance.command(&["check"]).output().unwrap();
    assert_eq!(check.status.code(), Some(78));
    assert!(stderr(&check).contains("installed model braintumor-3-"));
    // A hangup takes a changed configuration over all the same.
    let ready = || appliance.log().matches("ready").count();
    appliance.process.as_ref().unwrap().signal("HUP");
    // Either line will do: one of them, once in some forty runs, was not there (not found out why).
    wait_for("the reload", || {
        ready() >= 2 || appliance.log().contains("configuration read again")
    });

    assert_eq!(appliance.stop(), Some(0));
    damage(&appliance, "previous");
    appliance.start();
    appliance.rename_in("b.png", &all[1]);
    wait_for("a result of the configured model", || {
        results(&shipped_version())
    });
    wait_for("health that says so", || health("model_fallback"));

    // Installed again while the daemon runs: it recovers by itself.
    install(&appliance, &appliance.folder.path().join("bundle-3"));
    wait_for("good health", || !health("model_fallback"));
    appliance.rename_in("c.png", &all[2]);
    wait_for("a result of the installed model", || results("3"));
    assert!(!appliance.log().contains("not reloaded"));
    assert_eq!(
        versions(&appliance),
        expected(("3", "installed"), (&shipped_version(), "configured")),
        "what was damaged is nothing to go back to"
    );
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn a_running_daemon_refuses_a_bad_bundle_and_goes_on() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::new(&broker.url());
    install(&appliance, &variant(&appliance, "2"));
    appliance.start();
    let shown = || subscriber.of_kind("health").pop().unwrap().json();
    // Past the checks of install: as a bad sector between install and load would, or somebody by hand.
    let bad = appliance.state().join("models/bad");
    copy_folder(&appliance.folder.path().join("bundle-2"), &bad);
    edit_manifest(&bad, "version = \"2\"", "version = \"bad\"");
    std::fs::remove_file(bad.join(golden_image())).unwrap();
    let link = |target: &str| {
        let models = appliance.state().join("models");
        symlink(target, models.join("new")).unwrap();
        std::fs::rename(models.join("new"), models.join("current")).unwrap();
    };
    let good = std::fs::read_link(appliance.state().join("models/current")).unwrap();
    let all = slices(4);
    for (number, target) in ["bad", "../../export", "nowhere"].iter().enumerate() {
        let before = appliance.log().matches("not reloaded").count();
        link(target);
        wait_for("the refusal", || {
            appliance.log().matches("not reloaded").count() > before
        });
        wait_for("health that says so", || {
            shown()["conditions"][0]["code"] == "reload_refused"
        });
        appliance.rename_in(&format!("{number}.png"), &all[number]);
        let results = subscriber.wait_for_scans(number + 1);
        assert_eq!(results[number]["model"]["version"], "2");
    }
    assert!(
        appliance.log().contains("golden image 1: "),
        "{}",
        appliance.log()
    );
    assert!(
        !appliance.log().contains(&golden_image()),
        "a file's name in the log"
    );
    // The same one by a hangup.
    appliance.process.as_ref().unwrap().signal("HUP");
    wait_for("the refused reload", || {
        appliance.log().matches("not reloaded").count() > 3
    });
    link(good.to_str().unwrap());
    wait_for("good health", || shown()["state"] == "ok");
    appliance.rename_in("3.png", &all[3]);
    assert_eq!(subscriber.wait_for_scans(4)[3]["model"]["version"], "2");
    assert_always_online(&subscriber);
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn a_stop_does_not_wait_for_a_reload() {
    let mut appliance = Appliance::new(NO_BROKER);
    let folder = variant(&appliance, "slow");
    let path = folder.join("manifest.toml");
    let mut text = std::fs::read_to_string(&path).unwrap();
    let image = shipped_manifest().golden.image.remove(0);
    let (file, probability) = (image.file, image.probability);
    let entry = format!("\n[[golden.image]]\nfile = \"{file}\"\nprobability = {probability}\n");
    text.push_str(&entry.repeat(90));
    std::fs::write(path, text).unwrap();
    appliance.set("SCANSENTRY__MODEL__BUNDLE", folder.to_str().unwrap());
    appliance.start();
    appliance.process.as_ref().unwrap().signal("HUP");
    assert_eq!(appliance.stop(), Some(0));
    let log = appliance.log();
    assert!(
        log.contains("stopping") && !log.contains("configuration read again"),
        "{log}"
    );
}
