//! Security: what strangers and hostile parties get to see or do. Who they are: docs/threat-model.md.

use std::collections::BTreeSet;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::Path;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use scansentry::store::StateDir;
use serde_json::Value;

use crate::broker_faults::packet;
use crate::dashboard::{daemon_url, get, post};
use crate::dicom::golden_file;
use crate::support::{Appliance, Mosquitto, certificates, free_port, pause, run, slices, wait_for};

/// What a patient could be known by, as it is planted in headers (`tests/golden/generate_dicom.py`) and names of files and folders.
const PLANTED: [&str; 5] = ["CANARY", "Canary", "19010203", "1.2.826", "7.7.7.7.777"];

/// The forms in which `planted` could come out again.
fn forms(planted: &str) -> Vec<(String, String)> {
    let bytes = planted.as_bytes();
    let each = |form: &dyn Fn(&u8) -> String, between| {
        bytes.iter().map(form).collect::<Vec<_>>().join(between)
    };
    let mut forms = vec![
        ("as it is", planted.to_owned()),
        ("in small letters", planted.to_lowercase()),
        ("in hex", each(&|b| format!("{b:02x}"), "")),
        ("in capital hex", each(&|b| format!("{b:02X}"), "")),
        ("as numbers", each(&|b| format!("{b}"), ", ")),
        ("as numbers, dense", each(&|b| format!("{b}"), ",")),
        ("percent-encoded", each(&|b| format!("%{b:02X}"), "")),
        ("in UTF-16", each(&|b| format!("{}\0", *b as char), "")),
    ];
    // Base64 of it in any text: three places to begin, without the digits that the neighbours have a part in.
    for before in 0..3 {
        let mut text = vec![0; before];
        text.extend(bytes);
        let digits = STANDARD.encode(&text);
        let begin = [0, 2, 3][before];
        forms.push(("in base64", digits[begin..text.len() * 8 / 6].to_owned()));
    }
    forms
        .into_iter()
        .map(|(how, form)| (how.to_owned(), form))
        .collect()
}

#[track_caller]
fn assert_nothing_planted(place: &str, text: &[u8]) {
    let found = |form: &str| {
        let form = form.as_bytes();
        text.windows(form.len()).position(|window| window == form)
    };
    for planted in PLANTED {
        for (how, form) in forms(planted) {
            if let Some(at) = found(&form) {
                let near = &text[at.saturating_sub(200)..text.len().min(at + 200)];
                panic!(
                    "{planted} {how} is in {place}: {}",
                    String::from_utf8_lossy(near)
                );
            }
        }
    }
}

#[test]
fn the_search_finds_what_is_planted_in_every_form() {
    for (text, there) in [
        ("a Canary^Doe".to_owned(), true),
        (format!("x{}", STANDARD.encode("..Canary^Doe")), true),
        (STANDARD.encode("abc 1.2.826.0.1"), true),
        ("%43%61%6E%61%72%79".to_owned(), true),
        ("[67, 97, 110, 97, 114, 121]".to_owned(), true),
        ("43616e617279".to_owned(), true),
        ("nothing".to_owned(), false),
    ] {
        let search =
            std::panic::catch_unwind(|| assert_nothing_planted("the text", text.as_bytes()));
        assert_eq!(search.is_err(), there, "{text}");
    }
}

/// A JPEG with a comment.
fn commented(jpeg: &[u8], comment: &str) -> Vec<u8> {
    let length = (comment.len() as u16 + 2).to_be_bytes();
    [
        &jpeg[..2],
        &[0xff, 0xfe],
        &length,
        comment.as_bytes(),
        &jpeg[2..],
    ]
    .concat()
}

#[test]
fn nothing_that_names_a_patient_gets_out_by_any_way() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let mut appliance = Appliance::with(
        &broker.url(),
        "[dashboard]\nenabled = true\n[http]\nlisten = '127.0.0.1:0'\n[preview]\nenabled = true\n[command]\nenabled = true\n\
         [home_assistant]\nenabled = true\n[alert]\nquiet_s = 2\n[health]\ninterval_s = 1\n",
    );
    appliance.set("SCANSENTRY__LOG__LEVEL", "trace");
    appliance.set("SCANSENTRY__WATCH__INCOMPLETE_S", "0");
    appliance.set("SCANSENTRY__PIPELINE__ATTEMPTS", "1");
    appliance.set("SCANSENTRY__PIPELINE__WORKERS", "1");
    let slices = slices(8);
    let (panics, kills) = (&slices[0], &slices[1]);
    let faults = format!("infer@{}:panic,infer@{}:kill", panics.len(), kills.len());
    appliance.set("SCANSENTRY_FAIL", &faults);

    let export = appliance.export();
    let folder = export.join("Canary^Doe^Jane 19010203");
    std::fs::create_dir(&folder).unwrap();
    let dicom = golden_file("explicit-little");
    let mut garbled = golden_file("rle");
    let half = garbled.len() / 2;
    garbled[half..].fill(0xff);
    let black = {
        let mut bytes = std::io::Cursor::new(Vec::new());
        let image = image::GrayImage::new(64, 64);
        image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
        bytes.into_inner()
    };
    for (place, name, bytes) in [
        (&folder, &b"Canary^Doe.dcm"[..], dicom.clone()),
        (&folder, b"Canary rle", golden_file("rle")),
        (&folder, b"7.7.7.7.777.dcm", golden_file("frames")),
        (&export, b"Canary^SR", golden_file("report")),
        (&export, b"Canary video.dcm", golden_file("mpeg4")),
        (
            &export,
            b"Canary half.dcm",
            dicom[..dicom.len() / 2].to_vec(),
        ),
        (&export, b"Canary garbled.dcm", garbled),
        (&export, b"Canary\xff\xfe\n\x1b[2J.png", slices[4].clone()),
        (
            &export,
            b"Canary.jpeg",
            commented(&slices[2], "Canary 19010203"),
        ),
        (
            &export,
            b"Canary cut.jpeg",
            commented(&slices[3], "Canary")[..900].to_vec(),
        ),
        (
            &export,
            b"Canary letter.txt",
            b"Dear Mrs Canary, born 19010203".to_vec(),
        ),
        (&export, b"Canary panic.png", panics.clone()),
        (&export, b"Canary kill.png", kills.clone()),
        (&export, b"Canary black.png", black),
        (&export, b"Canary empty.dcm", Vec::new()),
    ] {
        std::fs::write(place.join(std::ffi::OsStr::from_bytes(name)), bytes).unwrap();
    }
    symlink("/etc/hostname", export.join("Canary link")).unwrap();
    symlink("Canary nowhere", export.join("Canary dangling")).unwrap();
    run("mkfifo", &[export.join("Canary pipe").to_str().unwrap()]);

    appliance.spawn();
    assert_eq!(
        appliance.process.as_mut().unwrap().exit_code(),
        None,
        "killed"
    );
    appliance.start();
    let codes = || -> BTreeSet<String> {
        let codes = subscriber.results();
        let code = |r: &Value| r["rejected"]["code"].as_str().map(str::to_owned);
        codes.iter().filter_map(code).collect()
    };
    let expected = [
        "blank",
        "crashed",
        "internal",
        "not_a_file",
        "not_an_image",
        "not_an_image_object",
        "outside_folder",
        "truncated",
        "unsupported",
    ];
    wait_for("the rejections", || {
        let codes = codes();
        let missing: Vec<_> = expected.iter().filter(|c| !codes.contains(**c)).collect();
        println!("still to come: {missing:?}");
        missing.is_empty()
    });
    wait_for("the other outcomes", || {
        let status = appliance.status();
        status["backlog"]["messages"] == 0 && status["counts"]["classified"].as_u64() >= Some(5)
    });

    // Uploads, commands good and bad, and both ways to do it all again.
    assert_eq!(appliance.stop(), Some(0));
    appliance.set("SCANSENTRY_FAIL", &format!("infer@{}:panic", panics.len()));
    appliance.start();
    let url = daemon_url(&appliance);
    let state: Value = serde_json::from_str(&get(&url, "/api/state", &[]).1).unwrap();
    let headers = [
        ("origin", url.as_str()),
        ("x-scansentry-token", state["token"].as_str().unwrap()),
        ("content-type", "application/octet-stream"),
    ];
    let mut said: Vec<(String, Vec<u8>)> = Vec::new();
    for (extension, bytes) in [
        ("dcm", &dicom[..dicom.len() - 2]),
        ("jpeg", &commented(&slices[6], "Canary")),
        ("Canary", b"Canary"),
    ] {
        let path = format!("/api/upload?extension={extension}&name=Canary");
        let (status, answer) = post(&url, &path, &headers, bytes);
        assert_eq!(status, 200, "{answer}");
        said.push(("the answer to an upload".into(), answer.into()));
    }
    let topic = "scansentry/radiology/mri-1/command";
    let command = r#"{"schema":"scansentry/command/1","id":"a","command":"reprocess","since":"2020-01-01T00:00:00Z"}"#;
    broker.publish(topic, command, &[]);
    wait_for("the answer", || {
        !subscriber.of_kind("command/result").is_empty()
    });
    wait_for("second revisions", || {
        let again = |r: &Value| r["revision"] == 2;
        subscriber.results().iter().any(again)
    });
    let retried = appliance
        .command(&["quarantine", "retry", "--all"])
        .output()
        .unwrap();
    assert!(
        retried.status.success(),
        "{}",
        String::from_utf8_lossy(&retried.stderr)
    );
    std::fs::rename(&export, appliance.folder.path().join("Canary aside")).unwrap();
    wait_for("the loss of the folder", || {
        appliance.log().contains("condition=\"folder_away\"")
    });
    std::fs::rename(appliance.folder.path().join("Canary aside"), &export).unwrap();
    wait_for("a study and an alert", || {
        !subscriber.of_kind("study").is_empty() && !subscriber.of_kind("alert").is_empty()
    });
    wait_for("quiet", || {
        let status = appliance.status();
        status["backlog"]["messages"] == 0 && status["state"] == "ok"
    });

    // Every page and every question that it can ask.
    let mut paths: Vec<String> = [
        "/",
        "/healthz",
        "/readyz",
        "/metrics",
        "/login",
        "/api/state",
        "/api/results?limit=200",
        "/api/alerts",
        "/api/charts",
        "/api/none",
    ]
    .map(str::to_owned)
    .into();
    for result in subscriber.results() {
        let id = |key: &str| result[key].as_str().unwrap().to_owned();
        let (site, device) = (id("site"), id("device"));
        paths.push(format!("/api/study/{site}/{device}/{}", id("study_id")));
        paths.push(format!("/api/scan/{site}/{device}/{}", id("scan_id")));
        paths.push(format!("/api/preview/{site}/{device}/{}", id("scan_id")));
    }
    paths.sort();
    paths.dedup();
    for path in paths {
        if path.starts_with("/api/preview") {
            // Bytes, which are those of the message.
            continue;
        }
        let (_, text) = get(&url, &path, &[]);
        said.push((path, text.into()));
    }
    for arguments in [&["status"][..], &["status", "--json"], &["check"]] {
        let output = appliance.command(arguments).output().unwrap();
        said.push((arguments.join(" "), [output.stdout, output.stderr].concat()));
    }
    assert_eq!(appliance.stop(), Some(0));
    said.push((
        "the log".into(),
        std::fs::read(appliance.folder.path().join("log")).unwrap(),
    ));
    assert!(
        appliance.log().contains(" TRACE ") || appliance.log().contains("DEBUG"),
        "it was detailed"
    );
    let mut pictures = 0;
    for message in subscriber.messages() {
        if message.kind() == "preview" {
            let preview = message.json();
            let picture = STANDARD
                .decode(preview["image"]["base64"].as_str().unwrap())
                .unwrap();
            said.push(("a preview's picture".into(), picture));
            pictures += 1;
        }
        said.push((
            format!("a payload of {}", message.kind()),
            message.payload.into(),
        ));
        said.push(("a topic".into(), message.topic.into()));
        said.push(("a property".into(), message.user.into()));
    }
    assert!(pictures > 4);
    for (place, text) in &said {
        assert_nothing_planted(place, text);
    }
    // Where it is needed, on the appliance, it can be had.
    let listed = appliance.command(&["quarantine", "list"]).output().unwrap();
    assert!(String::from_utf8_lossy(&listed.stdout).contains("Canary panic.png"));
}

#[test]
fn tls_is_verified_unless_the_configuration_says_otherwise() {
    let (tls_port, mutual_port) = (free_port(), free_port());
    let listener = |port| {
        format!(
            "listener {port} 127.0.0.1\ncafile {{dir}}/ca.pem\ncertfile {{dir}}/server.pem\nkeyfile {{dir}}/server.key\n"
        )
    };
    let lines = format!(
        "per_listener_settings false\nallow_anonymous true\n{}{}require_certificate true\n",
        listener(tls_port),
        listener(mutual_port)
    );
    let broker = Mosquitto::start_with(&lines, certificates);
    let subscriber = broker.subscribe();
    let file = |name: &str| broker.folder().join(name).to_str().unwrap().to_owned();
    let (ca, other) = (file("ca.pem"), file("other-ca.pem"));
    let (cert, key) = (file("client.pem"), file("client.key"));
    let refused = "does not accept us";
    for (host, port, settings, problem, warning) in [
        ("localhost", tls_port, vec![("CA_FILE", &*ca)], "", ""),
        (
            "localhost",
            tls_port,
            vec![("CA_FILE", &other)],
            refused,
            "",
        ),
        ("127.0.0.1", tls_port, vec![("CA_FILE", &ca)], refused, ""),
        ("localhost", tls_port, vec![], "", ""),
        (
            "127.0.0.1",
            tls_port,
            vec![("INSECURE", "true")],
            "",
            "mqtt.insecure: true",
        ),
        (
            "localhost",
            tls_port,
            vec![("INSECURE", "true"), ("CA_FILE", &ca)],
            "mqtt.ca_file is set",
            "",
        ),
        (
            "localhost",
            mutual_port,
            vec![("CA_FILE", &ca)],
            refused,
            "",
        ),
        (
            "localhost",
            mutual_port,
            vec![("CA_FILE", &ca), ("CERT_FILE", &cert), ("KEY_FILE", &key)],
            "",
            "",
        ),
    ] {
        let mut appliance = Appliance::new(&format!("mqtts://{host}:{port}"));
        for (name, value) in &settings {
            appliance.set(&format!("SCANSENTRY__MQTT__{name}"), value);
        }
        let output = appliance.command(&["check"]).output().unwrap();
        let text = String::from_utf8(output.stderr).unwrap();
        let case = format!("{host} {settings:?}: {text}");
        // The system's authorities did not sign this certificate, and there may be none.
        let fails = !problem.is_empty() || settings.is_empty();
        assert_eq!(
            output.status.code(),
            Some(if fails { 78 } else { 0 }),
            "{case}"
        );
        assert!(text.contains(problem), "{case}");
        assert_eq!(text.contains("warning: "), !warning.is_empty(), "{case}");
        assert!(text.contains(warning), "{case}");
    }

    let mut appliance = Appliance::new(&format!("mqtts://127.0.0.1:{tls_port}"));
    appliance.set("SCANSENTRY__MQTT__INSECURE", "true");
    appliance.start();
    appliance.rename_in("a.png", &slices(1)[0]);
    subscriber.wait_for_scans(1);
    let warned = |appliance: &Appliance| appliance.log().matches("mqtt.insecure: true").count();
    assert_eq!(warned(&appliance), 1);
    assert!(
        appliance.status()["warnings"][0]
            .as_str()
            .unwrap()
            .starts_with("mqtt.insecure: true")
    );
    assert_eq!(appliance.stop(), Some(0));
    appliance.start();
    assert_eq!(warned(&appliance), 2, "at every start");
}

#[test]
fn a_login_in_the_clear_is_warned_of() {
    let warning = "mqtt.username: is sent in the clear";
    for (url, warned) in [("mqtt://192.0.2.7", true), ("mqtt://localhost", false)] {
        let mut appliance = Appliance::new(url);
        appliance.set("SCANSENTRY__MQTT__USERNAME", "mri-1");
        let output = appliance.command(&["check", "--offline"]).output().unwrap();
        assert_eq!(output.status.code(), Some(0));
        assert_eq!(
            String::from_utf8_lossy(&output.stderr).contains(warning),
            warned
        );
        appliance.start();
        assert_eq!(
            appliance.log().matches(warning).count(),
            usize::from(warned)
        );
    }
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path)
        .unwrap()
        .permissions()
        .mode()
        & 0o777
}

/// Everything below `folder`, itself included, that is open to others.
fn open_to_others(folder: &Path) -> Vec<std::path::PathBuf> {
    let mut waiting = vec![folder.to_owned()];
    let mut found = Vec::new();
    while let Some(path) = waiting.pop() {
        if path.is_symlink() {
            continue;
        }
        if path.is_dir() {
            waiting.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        }
        if mode(&path) & 0o077 != 0 {
            found.push(path);
        }
    }
    found
}

#[test]
fn what_is_in_the_state_directory_is_for_the_daemon_alone_whatever_the_umask_was() {
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let more = "[dashboard]\nenabled = true\n[http]\nlisten = '127.0.0.1:0'\n";
    let mut appliance = Appliance::with(&broker.url(), more);
    let state = appliance.state();
    let bundle = crate::support::bundle();
    let installed = |appliance: &Appliance| {
        let arguments = ["model", "install", bundle.to_str().unwrap()];
        let output = appliance.command(&arguments).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    };
    // As from a shell with the usual umask.
    appliance.program = [
        "sh",
        "-c",
        "umask 022; exec \"$0\" \"$@\"",
        env!("CARGO_BIN_EXE_scansentry"),
    ]
    .map(str::to_owned)
    .into();
    appliance.start();
    installed(&appliance);
    appliance.rename_in("a.png", &slices(1)[0]);
    subscriber.wait_for_scans(1);
    daemon_url(&appliance);
    wait_for("the history", || {
        state.join("dashboard/history.sqlite3-wal").exists()
    });
    assert_eq!(open_to_others(&state), Vec::<std::path::PathBuf>::new());
    let names: BTreeSet<_> = std::fs::read_dir(&state)
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    for name in [
        "ledger.sqlite3",
        "ledger.sqlite3-wal",
        "ledger.sqlite3-shm",
        "lock",
        "pseudonym.key",
        "models",
        "dashboard",
    ] {
        assert!(names.contains(name), "{name} in {names:?}");
    }
    assert_eq!(appliance.stop(), Some(0));
    assert!(!appliance.log().contains("open to other users"));

    // Somebody copied it, or an earlier version made it: closed again, and said once.
    std::fs::write(state.join("ledger.sqlite3.damaged-1"), "x").unwrap();
    let aside = appliance.folder.path().join("secret");
    std::fs::write(&aside, "x").unwrap();
    symlink(&aside, state.join("models/link")).unwrap();
    run(
        "chmod",
        &[
            "-R",
            "a+rX",
            state.to_str().unwrap(),
            aside.to_str().unwrap(),
        ],
    );
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o755)).unwrap();
    appliance.start();
    // The directory itself could be another's.
    assert_eq!(open_to_others(&state), std::slice::from_ref(&state));
    assert!(appliance.log().contains("other users may look into it"));
    assert_eq!(
        appliance.log().matches("were open to other users").count(),
        1
    );
    assert_eq!(mode(&aside), 0o644, "links are not followed");
    std::fs::set_permissions(&state, std::fs::Permissions::from_mode(0o700)).unwrap();
    assert_eq!(appliance.stop(), Some(0));
    appliance.start();
    assert_eq!(appliance.log().matches("open to other users").count(), 1);
    assert_eq!(appliance.log().matches("other users may look").count(), 1);
}

#[test]
fn a_key_is_random_and_a_strange_one_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let keys: BTreeSet<_> = (0..8)
        .map(|n| {
            let dir = folder.path().join(n.to_string());
            StateDir::open(&dir).unwrap();
            std::fs::read(dir.join("pseudonym.key")).unwrap()
        })
        .collect();
    assert_eq!(keys.len(), 8);
    assert!(
        keys.iter()
            .all(|key| key.len() == 32 && key.iter().collect::<BTreeSet<_>>().len() > 10)
    );

    let dir = folder.path().join("0");
    let key = dir.join("pseudonym.key");
    let good = std::fs::read(&key).unwrap();
    let refusal = |what: &str| {
        let error = StateDir::open(&dir).unwrap_err().to_string();
        assert!(
            error.contains(what) && error.contains("restore it from a backup"),
            "{error}"
        );
    };
    for bytes in [&good[..31], &[&good[..], b"\n"].concat(), b""] {
        std::fs::write(&key, bytes).unwrap();
        refusal("does not hold 32 bytes");
    }
    std::fs::remove_file(&key).unwrap();
    let elsewhere = folder.path().join("elsewhere");
    std::fs::write(&elsewhere, &good).unwrap();
    symlink(&elsewhere, &key).unwrap();
    refusal("is a link");
    std::fs::remove_file(&key).unwrap();
    run("mkfifo", &[key.to_str().unwrap()]);
    refusal("no file");
    std::fs::remove_file(&key).unwrap();
    std::fs::write(&key, &good).unwrap();
    StateDir::open(&dir).unwrap();
}

/// A web server of the daemon with eight connections and a token.
fn small_server() -> (Appliance, String) {
    let mut appliance = Appliance::with(
        &format!("mqtt://127.0.0.1:{}", free_port()),
        "[http]\nenabled = true\nlisten = '127.0.0.1:0'\nconnections = 8\n",
    );
    let token = appliance.folder.path().join("token");
    std::fs::write(&token, "correct-horse-battery-staple").unwrap();
    appliance.set("SCANSENTRY__HTTP__TOKEN_FILE", token.to_str().unwrap());
    appliance.start();
    let url = daemon_url(&appliance);
    (appliance, url)
}

fn connect(url: &str) -> TcpStream {
    TcpStream::connect(url.trim_start_matches("http://")).unwrap()
}

#[test]
fn clients_that_are_slow_are_dropped_and_others_get_their_turn() {
    let (mut appliance, url) = small_server();
    let slow: Vec<_> = (0..8)
        .map(|_| {
            let mut stream = connect(&url);
            write!(stream, "GET /healthz HTTP/1.1\r\nhost: localhost\r\nx: ").unwrap();
            stream
        })
        .collect();
    // A byte now and then does not help.
    let mut dripping = slow[0].try_clone().unwrap();
    std::thread::spawn(move || {
        while dripping.write_all(b"x").is_ok() {
            pause(Duration::from_millis(200));
        }
    });
    assert_eq!(
        get(&url, "/healthz", &[]).0,
        200,
        "after those before it were dropped"
    );
    for mut stream in slow {
        let mut answer = String::new();
        // Closed, with an answer or without.
        let _ = stream.read_to_string(&mut answer);
        assert!(!answer.contains("200 OK"), "{answer}");
    }
    // Larger than a request may be.
    let mut large = connect(&url);
    let line = format!("x: {}\r\n", "x".repeat(8000));
    let _ = write!(large, "GET /healthz HTTP/1.1\r\nhost: localhost\r\n");
    while large.write_all(line.as_bytes()).is_ok() {}
    let form = [("content-type", "application/x-www-form-urlencoded")];
    let (status, _) = post(&url, "/login", &form, &vec![b'x'; 100_000]);
    assert!([401, 413].contains(&status), "{status}");
    assert_eq!(get(&url, "/healthz", &[]).0, 200);
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
#[ignore = "long: make faults"]
fn clients_that_do_not_read_are_dropped() {
    let (mut appliance, url) = small_server();
    let deaf: Vec<_> = (0..8)
        .map(|_| {
            let mut stream = connect(&url);
            stream
                .set_write_timeout(Some(Duration::from_millis(500)))
                .unwrap();
            let requests = "GET /login HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(1000);
            while stream.write_all(requests.as_bytes()).is_ok() {}
            stream
        })
        .collect();
    assert_eq!(
        get(&url, "/healthz", &[]).0,
        200,
        "after those before it were dropped"
    );
    drop(deaf);
    assert_eq!(appliance.stop(), Some(0));
}

#[test]
fn tokens_cannot_be_tried_out_quickly() {
    let (appliance, url) = small_server();
    let start = std::time::Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| {
                let guess = [("authorization", "Bearer correct-horse-battery-stable")];
                assert_eq!(get(&url, "/metrics", &guess).0, 401);
            });
            scope.spawn(|| {
                let form = [("content-type", "application/x-www-form-urlencoded")];
                assert_eq!(post(&url, "/login", &form, b"token=wrong").0, 401);
            });
        }
    });
    assert!(
        start.elapsed() >= Duration::from_secs(4),
        "half a second each, one at a time"
    );
    assert!(!appliance.log().contains("correct-horse"));
}

fn publish(topic: &[u8], payload: &[u8]) -> Vec<u8> {
    let length = (topic.len() as u16).to_be_bytes();
    packet(0x30, &[&length, topic, &[0], payload].concat())
}

#[test]
fn a_hostile_broker_gets_nothing_but_reconnections() {
    let connack = packet(0x20, &[0, 0, 0]);
    let command = b"scansentry/radiology/mri-1/command";
    let after_hello = |bytes: &[u8]| [&connack[..], bytes].concat();
    let reason = "evil\n\u{1b}[2J ".repeat(3000);
    let reason_property = [
        &[0x1f][..],
        &(reason.len() as u16).to_be_bytes(),
        reason.as_bytes(),
    ]
    .concat();
    // The length of properties is written as that of a packet is.
    let properties = packet(0x81, &reason_property);
    let disconnect = packet(0xe0, &properties);
    let mut scripts = vec![
        Vec::new(),
        b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec(),
        packet(0x20, &[0, 0x55, 0]),
        packet(0x20, &[0, 0, 200, 1, 2]),
        // It says that it takes packets of one byte, and none at a time.
        packet(0x20, &[0, 0, 8, 0x27, 0, 0, 0, 1, 0x21, 0, 0]),
        after_hello(&[0xff; 64]),
        after_hello(&packet(0x30, &[0xff, 0xff, b'a'])),
        after_hello(&publish(b"\xff\xfe\0", b"x")),
        after_hello(&packet(0xf0, &[0x18, 0])),
        after_hello(&disconnect),
        after_hello(&packet(0x40, &[0, 9, 0, 0]).repeat(1000)),
        after_hello(
            &[
                packet(0x50, &[0, 9]),
                packet(0x62, &[0, 9]),
                packet(0x70, &[0, 9]),
            ]
            .concat(),
        ),
        after_hello(&packet(0x90, &[0xff, 0xff, 0, 0, 0x80])),
        // A quarter of a gigabyte is announced, and as much as will go comes.
        [
            &connack[..],
            &[0x30, 0xff, 0xff, 0xff, 0x7f],
            &vec![0; 4 << 20],
        ]
        .concat(),
        after_hello(&publish(command, &b"[".repeat(60_000))),
        after_hello(&publish(
            command,
            br#"{"schema":"scansentry/command/1","id":"x","command":"pause","command":"run"}"#,
        )),
    ];
    // Many commands of nearly the largest size, in one go.
    let large = publish(command, &vec![b' '; 1_000_000]);
    scripts.push(after_hello(&large.repeat(48)));
    let births = publish(b"homeassistant/status", b"online");
    scripts.push(after_hello(&births.repeat(20_000)));

    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let broker = Mosquitto::start();
    let subscriber = broker.subscribe();
    let count = scripts.len();
    let good = broker.port;
    let (done, script_done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let mut scripts = scripts.into_iter();
        for stream in listener.incoming().map_while(Result::ok) {
            if let Some(script) = scripts.next() {
                play(stream, &script);
                let _ = done.send(());
            } else {
                join(stream, good);
            }
        }
    });
    let mut appliance = Appliance::with(
        &format!("mqtt://127.0.0.1:{port}"),
        "[command]\nenabled = true\n[home_assistant]\nenabled = true\n",
    );
    appliance.start();
    appliance.rename_in("a.png", &slices(1)[0]);
    for _ in 0..count {
        script_done
            .recv_timeout(crate::support::PATIENCE)
            .expect("it comes back each time");
    }
    // The last ones pretended to be a broker that works.
    subscriber.wait_for_scans(1);
    appliance.rename_in("b.png", &slices(2)[1]);
    subscriber.wait_for_scans(2);
    let pid = appliance.process.as_ref().unwrap().0.id();
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let peak = status.lines().find(|l| l.starts_with("VmHWM")).unwrap();
    let kilobytes: u64 = peak.split_whitespace().nth(1).unwrap().parse().unwrap();
    println!("peak resident memory {kilobytes} kB");
    assert!(kilobytes < 300_000, "{peak}");
    let log = appliance.log();
    assert!(!log.contains("a defect in the program"), "{log}");
    let longest = log.lines().map(str::len).max().unwrap();
    assert!(longest < 1000, "a line of {longest} bytes");
    assert!(
        !log.contains('\u{1b}'),
        "what it says cannot order a terminal about"
    );
    assert_eq!(appliance.stop(), Some(0));
}

/// Hears a CONNECT, says `script`, and waits a little for what comes of it.
fn play(mut stream: TcpStream, script: &[u8]) {
    let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
    let _ = stream.set_write_timeout(Some(Duration::from_secs(5)));
    let mut hello = [0; 4096];
    let _ = stream.read(&mut hello);
    let mut heard = stream.try_clone().unwrap();
    let hearing = std::thread::spawn(move || {
        let mut bytes = [0; 4096];
        while matches!(heard.read(&mut bytes), Ok(1..)) {}
    });
    let _ = stream.write_all(script);
    let _ = stream.set_read_timeout(Some(Duration::from_millis(500)));
    pause(Duration::from_millis(300));
    let _ = stream.shutdown(std::net::Shutdown::Both);
    let _ = hearing.join();
}

/// Joins a connection to the broker on `port`.
fn join(client: TcpStream, port: u16) {
    let broker = TcpStream::connect(("127.0.0.1", port)).unwrap();
    for (mut from, mut to) in [
        (client.try_clone().unwrap(), broker.try_clone().unwrap()),
        (broker, client),
    ] {
        std::thread::spawn(move || {
            let _ = std::io::copy(&mut from, &mut to);
            let _ = to.shutdown(std::net::Shutdown::Both);
        });
    }
}
