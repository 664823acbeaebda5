//! What the end-to-end tests share: a real Mosquitto, a real subscriber, the real daemon, generated slices.

use std::collections::{HashMap, HashSet};
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use scansentry::phantom::Phantom;
use scansentry::simulate::ExportFormat;
use serde_json::Value;

use crate::contract;

/// How long anything may take before a test gives up. Generous: these machines are slow and shared, and TensorFlow Lite 1.15 takes half a second
/// for a picture on x86.
pub const PATIENCE: Duration = Duration::from_mins(5);

/// The program under test: this build's, or the one that `SCANSENTRY_PROGRAM` names.
pub fn program() -> String {
    std::env::var("SCANSENTRY_PROGRAM").unwrap_or_else(|_| env!("CARGO_BIN_EXE_scansentry").into())
}

pub fn bundle() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/braintumor")
}

/// Every bundle that the project ships.
pub fn shipped_bundles() -> [PathBuf; 2] {
    [bundle(), bundle().with_file_name("braintumor-small")]
}

/// A bundle in `folder` of a model of `tests/fixtures/models` with inputs of `side` pixels, which sees whole pictures in raw levels; `output`
/// and what follows it is the rest of its manifest.
pub fn toy_bundle(folder: &Path, model: &str, side: u32, output: &str) -> PathBuf {
    let bundle = folder.join(model);
    let fixture = format!("tests/fixtures/models/{model}.tflite");
    let bytes = std::fs::read(Path::new(env!("CARGO_MANIFEST_DIR")).join(fixture)).unwrap();
    let hash = scansentry::scan::hex(&scansentry::scan::sha256(&bytes));
    let manifest = format!(
        "format = 1\nname = '{model}'\nversion = '1'\nfile = 'model.tflite'\nsha256 = '{hash}'\n\
         [input]\nwidth = {side}\nheight = {side}\n[preprocess]\ncrop.method = 'none'\nresize.filter = 'area'\n[output]\n{output}"
    );
    std::fs::create_dir_all(&bundle).unwrap();
    std::fs::write(bundle.join("model.tflite"), bytes).unwrap();
    std::fs::write(bundle.join("manifest.toml"), manifest).unwrap();
    bundle
}

/// The outputs of the models with four labels: see `tests/fixtures/models/generate.py`. The whiter the picture, the greater the sum of the
/// three positive labels, 0.2 to 0.6; the most probable one is always "none".
pub const FOUR_LABELS: &str = "activation = 'softmax'\nindex = 1\nlabels = ['glioma', 'meningioma', 'none', 'pituitary']\n\
    positive = ['glioma', 'meningioma', 'pituitary']\nheatmap.index = 0\n";

/// A PNG of one level everywhere.
pub fn plain(level: u8) -> Vec<u8> {
    png(|_, _| level)
}

/// A grey PNG of 84x56 pixels.
pub fn png(level: impl Fn(u32, u32) -> u8) -> Vec<u8> {
    let image = image::GrayImage::from_fn(84, 56, |x, y| image::Luma([level(x, y)]));
    let mut bytes = std::io::Cursor::new(Vec::new());
    image.write_to(&mut bytes, image::ImageFormat::Png).unwrap();
    bytes.into_inner()
}

/// A small picture for each number, all different.
pub fn numbered(number: usize) -> Vec<u8> {
    png(|x, y| match y {
        0 => (number >> (x % 32)) as u8 & 1,
        _ => (x * 3 + y * 4) as u8,
    })
}

pub fn copy_folder(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
        let target = to.join(entry.file_name());
        if entry.file_type().unwrap().is_dir() {
            copy_folder(&entry.path(), &target);
        } else {
            std::fs::copy(entry.path(), target).unwrap();
        }
    }
}

/// Names and bytes of the files in `folder`, by name; `None` if it is not there.
pub fn files_in(folder: &Path) -> Option<Vec<(String, Vec<u8>)>> {
    let read = |entry: std::fs::DirEntry| {
        let name = entry.file_name().into_string().unwrap();
        (name, std::fs::read(entry.path()).unwrap())
    };
    let entries = std::fs::read_dir(folder).ok()?;
    let mut files: Vec<_> = entries.map(|entry| read(entry.unwrap())).collect();
    files.sort();
    Some(files)
}

/// The real images, where they are: `../shared/data` beside the checkout, or `SCANSENTRY_DATA`.
pub fn shared_data() -> Option<PathBuf> {
    let folder = std::env::var_os("SCANSENTRY_DATA").map_or_else(
        || Path::new(env!("CARGO_MANIFEST_DIR")).join("../shared/data"),
        PathBuf::from,
    );
    folder.join("mri/index.csv").exists().then_some(folder)
}

/// `count` of them with distinct content, spread over all sources.
pub fn real_images(count: usize) -> Option<Vec<Vec<u8>>> {
    let folder = shared_data()?.join("mri");
    let index = std::fs::read_to_string(folder.join("index.csv")).unwrap();
    let files: Vec<_> = index
        .lines()
        .skip(1)
        .filter_map(|line| line.split(',').next())
        .collect();
    let mut seen = HashSet::new();
    // A stride that shares no factor with the list visits every file once, in a mixed order.
    let stride = 1009;
    let images = (0..files.len())
        .map(|i| std::fs::read(folder.join(files[i * stride % files.len()])).unwrap())
        .filter(|bytes| seen.insert(bytes.clone()))
        .take(count);
    Some(images.collect())
}

pub fn free_port() -> u16 {
    TcpListener::bind(("127.0.0.1", 0))
        .unwrap()
        .local_addr()
        .unwrap()
        .port()
}

/// Polls `condition` until it holds.
#[track_caller]
pub fn wait_for(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < PATIENCE, "waited too long for {what}");
        pause(Duration::from_millis(20));
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "a test waits for other processes"
)]
pub fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// A child process that does not outlive its test.
pub struct Process(pub Child);

impl Process {
    pub fn spawn(command: &mut Command) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        Self(
            command
                .spawn()
                .unwrap_or_else(|e| panic!("{name} does not start ({e}); run `make setup`")),
        )
    }

    pub fn kill(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }

    pub fn signal(&self, signal: &str) {
        let pid = self.0.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-s", signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    /// A number of `/proc/PID/status`: `VmRSS`, `VmHWM` (kB), `Threads`.
    pub fn figure(&self, key: &str) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.0.id())).unwrap();
        let line = status.lines().find(|l| l.starts_with(key)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse().unwrap()
    }

    /// Processor time so far, seconds.
    pub fn cpu_seconds(&self) -> f64 {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.0.id())).unwrap();
        let fields = stat.rsplit_once(')').unwrap().1.split_whitespace();
        // User and system time are the fields 14 and 15, the first after the name is the third.
        let ticks = fields.skip(11).take(2).map(|f| f.parse::<u64>().unwrap());
        ticks.sum::<u64>() as f64 / rustix::param::clock_ticks_per_second() as f64
    }

    pub fn exit_code(&mut self) -> Option<i32> {
        let start = Instant::now();
        loop {
            if let Some(status) = self.0.try_wait().unwrap() {
                return status.code();
            }
            assert!(start.elapsed() < PATIENCE, "the process does not end");
            pause(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// A Mosquitto on a loopback port that keeps sessions on the disk, so that a killed one comes back with its subscribers.
pub struct Mosquitto {
    folder: tempfile::TempDir,
    pub port: u16,
    pub process: Process,
}

impl Mosquitto {
    pub fn start() -> Self {
        Self::start_with("allow_anonymous true\n", |_| {})
    }

    /// With more configuration lines; `{dir}` in them is the broker's own folder, which `prepare` may fill first.
    pub fn start_with(lines: &str, prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        let port = free_port();
        let dir = folder.path().display().to_string();
        let lines = lines.replace("{dir}", &dir);
        let config = format!(
            "listener {port} 127.0.0.1\npersistence true\npersistence_location {dir}/\nautosave_interval 1\nautosave_on_changes true\n\
             max_queued_messages 0\n{}{lines}",
            if is_root() { "user root\n" } else { "" }
        );
        std::fs::write(folder.path().join("mosquitto.conf"), config).unwrap();
        let process = Self::spawn(folder.path());
        let broker = Self {
            folder,
            port,
            process,
        };
        broker.wait_up();
        broker
    }

    fn spawn(folder: &Path) -> Process {
        let log = File::options()
            .create(true)
            .append(true)
            .open(folder.join("log"))
            .unwrap();
        // Debian keeps it in /usr/sbin, which is not on everybody's path.
        let program = if Path::new("/usr/sbin/mosquitto").exists() {
            "/usr/sbin/mosquitto"
        } else {
            "mosquitto"
        };
        Process::spawn(
            Command::new(program)
                .arg("-c")
                .arg(folder.join("mosquitto.conf"))
                .stdout(Stdio::null())
                .stderr(log),
        )
    }

    /// The broker's own folder.
    pub fn folder(&self) -> &Path {
        self.folder.path()
    }

    fn wait_up(&self) {
        wait_for("Mosquitto", || {
            std::net::TcpStream::connect(("127.0.0.1", self.port)).is_ok()
        });
    }

    pub fn kill(&mut self) {
        self.process.kill();
    }

    /// An orderly stop: what was acknowledged is on its disk.
    pub fn stop(&mut self) {
        self.process.signal("TERM");
        self.process.exit_code();
    }

    /// Restarts it with other lines in its configuration.
    pub fn reconfigure(&mut self, lines: &str, by: &str) {
        let path = self.folder.path().join("mosquitto.conf");
        let config = std::fs::read_to_string(&path).unwrap();
        assert!(config.contains(lines));
        std::fs::write(&path, config.replace(lines, by)).unwrap();
        self.stop();
        self.restart();
    }

    pub fn restart(&mut self) {
        self.process = Self::spawn(self.folder.path());
        self.wait_up();
    }

    pub fn url(&self) -> String {
        format!("mqtt://127.0.0.1:{}", self.port)
    }

    /// Publishes a message as another program would.
    pub fn publish(&self, topic: &str, payload: &str, more: &[&str]) {
        let port = self.port.to_string();
        let published = Command::new("mosquitto_pub")
            .args(["-h", "127.0.0.1", "-p", &port, "-V", "5", "-q", "1"])
            .args(["-t", topic, "-m", payload])
            .args(more)
            .status();
        assert!(published.unwrap().success());
    }

    pub fn subscribe(&self) -> Subscriber {
        Subscriber::start(self.port, false)
    }

    /// Somebody who comes later, and another one than the subscriber.
    pub fn subscribe_late(&self) -> Subscriber {
        Subscriber::start(self.port, true)
    }
}

/// Runs a program to its good end.
pub fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output();
    let output =
        output.unwrap_or_else(|e| panic!("{program} does not start ({e}); run `make setup`"));
    assert!(
        output.status.success(),
        "{program}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

/// Two authorities, and of the first a client's certificate and a server's: a good one, one of yesterday and one for another name.
pub fn certificates(folder: &Path) {
    let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
    let openssl = |line: &str| run("openssl", &line.split(' ').collect::<Vec<_>>());
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    for ca in ["ca", "other-ca"] {
        let (cert, secret) = (path(&format!("{ca}.pem")), path(&format!("{ca}.key")));
        openssl(&format!(
            "req -x509 {key} -days 2 -subj /CN={ca} -out {cert} -keyout {secret}"
        ));
    }
    let of_server = |host| format!("subjectAltName=DNS:{host}");
    for (name, subject, extension, days) in [
        ("server", "localhost", of_server("localhost"), 2),
        ("expired", "localhost", of_server("localhost"), -1),
        ("other-name", "elsewhere", of_server("elsewhere"), 2),
        ("client", "mri-1", "extendedKeyUsage=clientAuth".into(), 2),
    ] {
        let of = |end: &str| path(&format!("{name}.{end}"));
        openssl(&format!(
            "req {key} -subj /CN={subject} -addext {extension} -addext basicConstraints=critical,CA:false -out {} -keyout {}",
            of("csr"),
            of("key")
        ));
        openssl(&format!(
            "x509 -req -in {} -CA {} -CAkey {} -CAcreateserial -copy_extensions copyall -days {days} -out {}",
            of("csr"),
            path("ca.pem"),
            path("ca.key"),
            of("pem")
        ));
    }
}

pub fn is_root() -> bool {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata("/proc/self").is_ok_and(|m| m.uid() == 0)
}

/// Mounts of its own, for a daemon that is run in it; they are gone with it.
pub struct Namespace {
    holder: Process,
}

impl Namespace {
    /// `None`, and a line that says so, where that is not allowed.
    pub fn new() -> Option<Self> {
        let holder = Command::new("unshare")
            .args(["-m", "--propagation", "private", "sleep", "900"])
            .stderr(Stdio::null())
            .spawn();
        let mut space = Self {
            holder: Process(holder.ok()?),
        };
        let ours = std::fs::read_link("/proc/self/ns/mnt").unwrap();
        let its = format!("/proc/{}/ns/mnt", space.holder.0.id());
        let mut ended = false;
        wait_for("a mount namespace", || {
            ended = space.holder.0.try_wait().unwrap().is_some();
            ended || std::fs::read_link(&its).is_ok_and(|its| its != ours)
        });
        if ended {
            println!("skipped: no mounts allowed (not root)");
        }
        (!ended).then_some(space)
    }

    /// `path` as the daemon in it sees it.
    pub fn path(&self, path: &Path) -> PathBuf {
        let root = format!("/proc/{}/root", self.holder.0.id());
        Path::new(&root).join(path.strip_prefix("/").unwrap())
    }

    /// Lets the programs of `appliance` run in it.
    pub fn confine(&self, appliance: &mut Appliance) {
        let pid = self.holder.0.id().to_string();
        let enter = ["nsenter".to_owned(), "-t".to_owned(), pid, "-m".to_owned()];
        appliance.program.splice(0..0, enter);
    }

    /// Runs a command in it; whether it succeeds.
    pub fn try_run(&self, command: &[&str]) -> bool {
        let pid = self.holder.0.id().to_string();
        let status = Command::new("nsenter")
            .args(["-t", &pid, "-m"])
            .args(command)
            .status();
        status.is_ok_and(|status| status.success())
    }

    #[track_caller]
    pub fn run(&self, command: &[&str]) {
        assert!(self.try_run(command), "{command:?}");
    }

    pub fn mount_tmpfs(&self, at: &Path, size: &str) {
        let options = format!("size={size},mode=700");
        let at = at.to_str().unwrap();
        self.run(&["mount", "-t", "tmpfs", "-o", &options, "none", at]);
    }
}

/// One message as it arrived, with its MQTT 5 properties.
#[derive(Debug, Clone)]
pub struct Arrived {
    pub topic: String,
    pub retained: bool,
    pub content_type: String,
    /// Seconds until it would have expired.
    pub expiry: Option<u32>,
    /// `name:value`, with spaces between.
    pub user: String,
    pub payload: String,
}

impl Arrived {
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.payload)
            .unwrap_or_else(|e| panic!("{} is not JSON ({e}): {}", self.topic, self.payload))
    }

    /// What follows prefix, site and device in the topic.
    pub fn kind(&self) -> &str {
        self.topic.splitn(4, '/').last().unwrap()
    }
}

/// `mosquitto_sub` with a session that the broker keeps, writing to a file.
pub struct Subscriber {
    file: PathBuf,
    _folder: tempfile::TempDir,
    _process: Process,
}

impl Subscriber {
    /// With a session that the broker keeps, under one name; or another one a late comer, which gets what is retained.
    fn start(port: u16, late: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("messages");
        let session = ["-c", "-i", "subscriber", "-x", "3600"];
        let process = Process::spawn(
            Command::new("mosquitto_sub")
                .args(["-h", "127.0.0.1", "-p", &port.to_string()])
                .args(["-V", "5", "-q", "1"])
                .args(if late { &[][..] } else { &session })
                .args(["-t", "scansentry/#", "-t", "homeassistant/#"])
                .args(["-F", "%t\t%r\t%C\t%E\t%P\t%p"])
                .stdout(File::create(&file).unwrap())
                .stderr(Stdio::null()),
        );
        // Its subscription is in place when a message comes through.
        let probe = Self {
            file,
            _folder: folder,
            _process: process,
        };
        if !late {
            wait_for("the subscriber", || {
                Command::new("mosquitto_pub")
                    .args([
                        "-h",
                        "127.0.0.1",
                        "-p",
                        &port.to_string(),
                        "-t",
                        "scansentry/probe",
                        "-m",
                        "{}",
                    ])
                    .status()
                    .unwrap();
                !probe.messages().is_empty()
            });
        }
        probe
    }

    /// All messages so far, the probe's included.
    pub fn messages(&self) -> Vec<Arrived> {
        BufReader::new(File::open(&self.file).unwrap())
            .lines()
            .map_while(Result::ok)
            .filter_map(|line| {
                let mut parts = line.splitn(6, '\t').map(str::to_owned);
                Some(Arrived {
                    topic: parts.next()?,
                    retained: parts.next()? == "1",
                    content_type: parts.next()?,
                    expiry: parts.next()?.parse().ok(),
                    user: parts.next()?,
                    payload: parts.next()?,
                })
            })
            .collect()
    }

    pub fn of_kind(&self, kind: &str) -> Vec<Arrived> {
        self.messages()
            .into_iter()
            .filter(|m| m.kind() == kind)
            .collect()
    }

    pub fn results(&self) -> Vec<Value> {
        self.of_kind("result").iter().map(Arrived::json).collect()
    }

    #[track_caller]
    pub fn wait_for_scans(&self, count: usize) -> Vec<Value> {
        let distinct = || {
            self.results()
                .iter()
                .map(|r| r["scan_id"].as_str().unwrap().to_owned())
                .collect::<HashSet<_>>()
                .len()
        };
        let start = Instant::now();
        while distinct() < count {
            assert!(
                start.elapsed() < PATIENCE,
                "{} of {count} scans arrived",
                distinct()
            );
            pause(Duration::from_millis(50));
        }
        self.results()
    }
}

/// No test can forget it: whatever was published is held against the schemas.
impl Drop for Subscriber {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            self.messages().iter().for_each(contract::check);
        }
    }
}

/// Checks that duplicates share their event id and bytes, and that nothing but resends is doubled; returns how many messages were resends.
#[track_caller]
pub fn assert_no_double_outcome(results: &[Value]) -> usize {
    let mut by_scan: HashMap<&str, &Value> = HashMap::new();
    let mut resends = 0;
    for result in results {
        if let Some(first) = by_scan.insert(result["scan_id"].as_str().unwrap(), result) {
            assert_eq!(first, result, "two different messages for one scan");
            resends += 1;
        }
    }
    resends
}

/// An appliance in a temporary folder.
pub struct Appliance {
    pub folder: tempfile::TempDir,
    pub process: Option<Process>,
    /// What to run: a program and what stands before the arguments.
    pub program: Vec<String>,
    environment: Vec<(String, String)>,
    /// How long the log was before the latest start.
    before: usize,
}

impl Appliance {
    pub fn new(broker_url: &str) -> Self {
        Self::with(broker_url, "")
    }

    /// With more configuration text.
    pub fn with(broker_url: &str, more: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path();
        std::fs::create_dir(root.join("export")).unwrap();
        let text = format!(
            "[watch]\nfolder = '{}'\nsettle_ms = 200\n[model]\nbundle = '{}'\n[state]\ndir = '{}'\n[log]\nformat = \"text\"\nlevel = \"debug\"\n{more}\n",
            root.join("export").display(),
            bundle().display(),
            root.join("state").display()
        );
        std::fs::write(root.join("config.toml"), text).unwrap();
        let environment = vec![
            ("SCANSENTRY__MQTT__URL".to_owned(), broker_url.to_owned()),
            (
                "SCANSENTRY__MQTT__BACKOFF_MIN_MS".to_owned(),
                "50".to_owned(),
            ),
            ("SCANSENTRY__MQTT__BACKOFF_MAX_S".to_owned(), "1".to_owned()),
        ];
        Self {
            folder,
            process: None,
            program: vec![env!("CARGO_BIN_EXE_scansentry").to_owned()],
            environment,
            before: 0,
        }
    }

    /// With a model for which inference costs next to nothing.
    pub fn toy(broker_url: &str) -> Self {
        let mut appliance = Self::new(broker_url);
        let bundle = toy_bundle(appliance.folder.path(), "int8-four-labels", 28, FOUR_LABELS);
        appliance.set("SCANSENTRY__MODEL__BUNDLE", bundle.to_str().unwrap());
        appliance
    }

    pub fn set(&mut self, variable: &str, value: &str) {
        self.environment
            .push((variable.to_owned(), value.to_owned()));
    }

    pub fn export(&self) -> PathBuf {
        self.folder.path().join("export")
    }

    pub fn state(&self) -> PathBuf {
        self.folder.path().join("state")
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.path().join("log")).unwrap_or_default()
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program[0]);
        command
            .args(&self.program[1..])
            .env("SCANSENTRY_CONFIG", self.folder.path().join("config.toml"))
            .envs(self.environment.iter().cloned())
            .args(arguments);
        command
    }

    /// Starts the daemon and waits until it says that it is ready.
    pub fn start(&mut self) {
        self.spawn();
        wait_for("the daemon", || {
            if let Some(status) = self.process.as_mut().and_then(|p| p.0.try_wait().unwrap()) {
                panic!("the daemon ended with {status}:\n{}", self.log());
            }
            self.latest_log().contains("ready")
        });
    }

    /// The log since the latest start.
    pub fn latest_log(&self) -> String {
        self.log().split_off(self.before)
    }

    /// Starts the daemon without waiting.
    pub fn spawn(&mut self) {
        self.before = self.log().len();
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.folder.path().join("log"))
            .unwrap();
        self.process = Some(Process::spawn(
            self.command(&["run"])
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(log),
        ));
    }

    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Asks the daemon to stop and returns its exit code.
    pub fn stop(&mut self) -> Option<i32> {
        let mut process = self.process.take().expect("the daemon runs");
        process.signal("TERM");
        process.exit_code()
    }

    /// Freezes the threads whose names begin with `prefix`, until the result is dropped.
    pub fn freeze(&self, prefix: &str) -> Process {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/freeze.py");
        let pid = self.process.as_ref().unwrap().0.id().to_string();
        let mut freezer = Process::spawn(
            Command::new("python3")
                .arg(script)
                .args([&pid, prefix])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped()),
        );
        let mut held = String::new();
        BufReader::new(freezer.0.stdout.as_mut().unwrap())
            .read_line(&mut held)
            .unwrap();
        let held: usize = held
            .trim()
            .parse()
            .expect("threads can be stopped: as root, or with kernel.yama.ptrace_scope = 0");
        assert!(held > 0, "there is no thread {prefix}");
        freezer
    }

    /// `status --json`.
    pub fn status(&self) -> Value {
        let output = self.command(&["status", "--json"]).output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// Waits until nothing waits for the broker.
    #[track_caller]
    pub fn wait_until_delivered(&self) {
        wait_for("an empty outbox", || self.status()["counts"]["outbox"] == 0);
    }

    /// How often the log says that a condition begins, and that it ends.
    pub fn began_and_ended(&self, condition: &str) -> (usize, usize) {
        let log = self.log();
        let of = |word: &str| {
            log.lines()
                .filter(|l| l.contains(word) && l.contains(condition))
                .count()
        };
        (of("degraded: "), of("recovered"))
    }

    /// A number of `/proc/PID/status` of the daemon.
    pub fn process_figure(&self, key: &str) -> u64 {
        self.process.as_ref().unwrap().figure(key)
    }

    /// `status --json`, once there is a ledger.
    pub fn try_status(&self) -> Option<Value> {
        let output = self.command(&["status", "--json"]).output().unwrap();
        serde_json::from_slice(&output.stdout).ok()
    }

    /// Puts bytes into the export folder as scanners do: under a temporary name, then renamed.
    pub fn rename_in(&self, name: &str, bytes: &[u8]) {
        let temporary = self.export().join(format!("{name}.part"));
        std::fs::write(&temporary, bytes).unwrap();
        std::fs::rename(&temporary, self.export().join(name)).unwrap();
    }
}

/// Generated slices as files, every second one with a lesion, PNG and JPEG in turn; all different.
pub fn slices(count: usize) -> Vec<Vec<u8>> {
    (0..count)
        .map(|number| {
            let phantom = Phantom::draw(number as u64, number % 2 == 1);
            let format = if number % 4 < 2 {
                ExportFormat::Png
            } else {
                ExportFormat::Jpeg
            };
            format.encode(&phantom).unwrap()
        })
        .collect()
}

/// How far two engines, or one on two processors, are apart on a list of pictures, in steps of the model's uint8 probability.
#[derive(Default)]
pub struct Steps(Vec<u8>);

impl Steps {
    pub fn add(&mut self, steps: u8) {
        self.0.push(steps);
        self.0.sort_unstable();
    }

    /// Every picture within two steps: of the shipped model all engines make the same, but for the last layer's sigmoid
    /// (`models/training/exact.py`).
    pub fn assert_close(&self) {
        assert!(self.0.last().is_some_and(|&steps| steps <= 2), "{self}");
    }
}

impl std::fmt::Display for Steps {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let within = |most| self.0.iter().filter(|&&steps| steps <= most).count();
        write!(
            f,
            "{} pictures, {} equal, {} within 1 step of 1/256, {} within 2, largest {}",
            self.0.len(),
            within(0),
            within(1),
            within(2),
            self.0.last().copied().unwrap_or_default()
        )
    }
}
