//! `bench`: what this board can do: the time of each stage, pictures a second, and the bound that decoding and inference set.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use clap::Args;
use serde::Serialize;
use tokio::sync::{Notify, mpsc};

use super::classify::{Asked, open_file, read_file};
use super::{Failure, Global, say};
use crate::classifier::{BundleError, Classifier, Recipe};
use crate::config::{self, Config};
use crate::engine::EngineInfo;
use crate::health::Health;
use crate::message::{ModelRef, Reporter, Sender, millis};
use crate::metrics::Metrics;
use crate::phantom::Phantom;
use crate::pipeline::worker::{self, Context, decode_limits};
use crate::pipeline::{Candidate, Disposition};
use crate::progress::Stopwatch;
use crate::scan::{ScanFile, Stamp, sha256};
use crate::simulate::ExportFormat;
use crate::store::{FLUSHES_APART, Opened, StateDir, Store, Survives};

/// Generated slices, where no files are given.
const PHANTOMS: u64 = 24;

/// Files on their way through the pipeline, at most.
const FILES: usize = 4000;

/// Commits that are timed one by one.
const COMMITS: i64 = 50;

#[derive(Debug, Args)]
pub(super) struct BenchArgs {
    /// Image files; default: generated slices
    #[arg(value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Model bundle; default: the one that the daemon runs
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Where the ledger and files of the measurement go for its time; default: state.dir, whose disk is the one that counts
    #[arg(long, value_name = "DIR")]
    dir: Option<PathBuf>,
    /// Seconds for each of the three parts
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=3600))]
    seconds: u64,
    /// One JSON object instead of a table
    #[arg(long)]
    json: bool,
}

/// What was measured.
#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    processor: String,
    cores: usize,
    workers: usize,
    engine: &'a EngineInfo,
    model: &'a ModelRef,
    images: ImagesReport,
    /// From nothing to a model that has reproduced its golden outputs.
    load_ms: f64,
    stages_ms: Stages,
    images_per_second: Throughput,
    /// Null where the folder cannot be written.
    ledger: Option<LedgerReport>,
    peak_memory_bytes: Option<u64>,
}

#[derive(Serialize)]
struct ImagesReport {
    count: usize,
    source: &'static str,
    mean_bytes: usize,
}

/// One worker alone.
#[derive(Serialize)]
struct Stages {
    identify: Spread,
    decode: Spread,
    roi: Spread,
    resize: Spread,
    infer: Spread,
    total: Spread,
}

#[derive(Debug, Clone, Copy, Serialize)]
struct Spread {
    median: f64,
    p95: f64,
}

#[derive(Serialize)]
struct Throughput {
    /// Decoding to prediction in one worker.
    one_worker: f64,
    /// The same in all workers at once.
    all_workers: f64,
    /// The same with one thread for an inference and a worker for each core: what the machine can do at most.
    bound: f64,
    /// From a file to a committed outcome with its messages, in all workers; null where the folder cannot be written.
    recorded: Option<f64>,
}

/// One call at a time, with pauses: a claim, which survives the process; a commit, which survives a power cut.
#[derive(Serialize)]
struct LedgerReport {
    claim_ms: Spread,
    commit_ms: Spread,
}

impl Spread {
    /// Milliseconds.
    fn of(mut times: Vec<f64>) -> Self {
        times.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let last = times.len().saturating_sub(1) as f64;
            times.get((last * share).round() as usize).copied()
        };
        Self {
            median: at(0.5).unwrap_or_default(),
            p95: at(0.95).unwrap_or_default(),
        }
    }
}

/// A folder that goes when this does.
struct Scratch(PathBuf);

impl Scratch {
    fn make(below: &Path) -> std::io::Result<Self> {
        let path = below.join(format!("bench-{}", std::process::id()));
        std::fs::create_dir(&path)?;
        Ok(Self(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub(super) fn bench(global: &Global, args: &BenchArgs) -> Result<(), Failure> {
    let config = Arc::new(global.load()?);
    let asked = Asked::of(&config, args.bundle.as_ref())?;
    // Before this process becomes somebody else.
    let images = images(&args.files, config.limits.file_bytes)?;
    let start = Instant::now();
    let first = asked.load(&config)?;
    let load_ms = millis(start.elapsed());
    let time = Duration::from_secs(args.seconds);
    let (recipe, makes) = first.for_workers(&config);
    let made: Result<Vec<_>, _> = makes.into_iter().map(|make| make()).collect();
    let mut classifiers = made.map_err(|e| Failure::Configuration(e.0))?;
    let (workers, bundle) = (classifiers.len(), &recipe.bundle);
    let (stages_ms, one_worker) = stages(&mut classifiers[0], &images, &config, time)?;
    let all_workers = at_once(&mut classifiers, &images, &config, time);
    let engine = classifiers[0].engine_info().clone();

    let below = args.dir.as_ref().unwrap_or(&config.state.dir).clone();
    let (recorded, ledger) = match Scratch::make(&below) {
        Ok(scratch) => {
            let files = ((all_workers * time.as_secs_f64()) as usize)
                .max(images.len())
                .min(FILES);
            let recorded = recorded(&scratch, &config, classifiers, &images, files)?;
            (Some(recorded), Some(ledger(&scratch)?))
        }
        Err(error) => {
            eprintln!(
                "{}: cannot be written ({error}), so nothing is measured there; run as the user of the daemon, or give --dir",
                below.display()
            );
            (None, None)
        }
    };
    let peak_memory_bytes = peak_memory();
    let bound = match flat_out(&recipe, &config, workers) {
        Ok(Some(mut others)) => at_once(&mut others, &images, &config, time),
        Ok(None) => all_workers,
        Err(refused) => return Err(Failure::Configuration(refused.0)),
    };
    let report = Report {
        version: env!("CARGO_PKG_VERSION"),
        processor: processor(),
        cores: config::cores(),
        workers,
        engine: &engine,
        model: &bundle.model_ref,
        images: ImagesReport {
            count: images.len(),
            source: if args.files.is_empty() {
                "generated"
            } else {
                "files"
            },
            mean_bytes: images.iter().map(Vec::len).sum::<usize>() / images.len(),
        },
        load_ms,
        stages_ms,
        images_per_second: Throughput {
            one_worker,
            all_workers,
            bound,
            recorded,
        },
        ledger,
        peak_memory_bytes,
    };
    if args.json {
        say!("{}", serde_json::json!(report))?;
    } else {
        print(&report)?;
    }
    Ok(())
}

fn images(files: &[PathBuf], most: u64) -> Result<Vec<Vec<u8>>, Failure> {
    if files.is_empty() {
        let draw = |number| {
            let phantom = Phantom::draw(number, number % 2 == 1);
            let format = if number % 4 < 2 {
                ExportFormat::Png
            } else {
                ExportFormat::Jpeg
            };
            format.encode(&phantom)
        };
        return (0..PHANTOMS)
            .map(draw)
            .collect::<Result<_, _>>()
            .map_err(|e| Failure::Runtime(format!("phantom: {e}")));
    }
    let read = |path: &PathBuf| {
        let bytes = open_file(path).and_then(|file| read_file(file, most));
        bytes.map_err(|reason| {
            let (path, why) = (path.display(), reason.message);
            Failure::Runtime(format!("{path}: {why}; give image files"))
        })
    };
    files.iter().map(read).collect()
}

/// One picture after the other for some time; at least each once. Also pictures a second.
fn stages(
    classifier: &mut Classifier,
    images: &[Vec<u8>],
    config: &Config,
    time: Duration,
) -> Result<(Stages, f64), Failure> {
    let limits = decode_limits(config);
    let mut times: [Vec<f64>; 6] = Default::default();
    // The first pass warms up.
    for (number, bytes) in images.iter().enumerate() {
        let outcome = classifier.classify_file(bytes, &limits);
        let first = outcome.and_then(|file| {
            file.pictures
                .into_iter()
                .next()
                .map_or(Ok(()), |p| p.outcome.map(|_| ()))
        });
        first.map_err(|reason| {
            Failure::Runtime(format!(
                "image {}: {}; give files that can be classified",
                number + 1,
                reason.message
            ))
        })?;
    }
    let start = Instant::now();
    let mut done = 0_u32;
    while start.elapsed() < time {
        for bytes in images {
            let begin = Instant::now();
            std::hint::black_box(sha256(bytes));
            times[0].push(millis(begin.elapsed()));
            let begin = Instant::now();
            let Ok(file) = classifier.classify_file(bytes, &limits) else {
                continue;
            };
            times[5].push(millis(begin.elapsed()));
            for picture in file.pictures.iter().filter_map(|p| p.outcome.as_ref().ok()) {
                let t = &picture.timings;
                for (all, one) in times[1..5]
                    .iter_mut()
                    .zip([t.decode, t.roi, t.resize, t.infer])
                {
                    all.push(one);
                }
            }
            done += 1;
        }
    }
    let rate = f64::from(done) / start.elapsed().as_secs_f64();
    let [identify, decode, roi, resize, infer, total] = times.map(Spread::of);
    let stages = Stages {
        identify,
        decode,
        roi,
        resize,
        infer,
        total,
    };
    Ok((stages, rate))
}

/// A classifier with one thread for each core, unless that is what all workers at once are: waiting for each other costs threads of one inference
/// more than workers of their own.
fn flat_out(
    recipe: &Recipe,
    config: &Config,
    workers: usize,
) -> Result<Option<Vec<Classifier>>, BundleError> {
    let cores = config::cores();
    let one_thread_each = workers > 1 || config.model.inference_threads() == 1;
    if one_thread_each && workers == cores {
        return Ok(None);
    }
    let mut config = config.clone();
    config.model.threads = 1;
    let one = |_| Classifier::new(recipe.bundle.clone(), recipe.rule, &config);
    (0..cores).map(one).collect::<Result<_, _>>().map(Some)
}

/// All of them, each with every picture in turn, without files or ledger. Pictures a second.
fn at_once(
    classifiers: &mut [Classifier],
    images: &[Vec<u8>],
    config: &Config,
    time: Duration,
) -> f64 {
    let limits = decode_limits(config);
    let at_work: Vec<_> = classifiers.iter().map(Classifier::at_work).collect();
    for classifier in &mut *classifiers {
        // Beside others it runs on an engine of its own, which takes time to load.
        let _ = classifier.classify_file(&images[0], &limits);
    }
    let start = Instant::now();
    let done: usize = std::thread::scope(|scope| {
        let run = |classifier: &mut Classifier| {
            let mut done = 0;
            while start.elapsed() < time {
                for bytes in images {
                    let _ = std::hint::black_box(classifier.classify_file(bytes, &limits));
                    done += 1;
                }
            }
            done
        };
        let threads: Vec<_> = classifiers
            .iter_mut()
            .map(|classifier| scope.spawn(move || run(classifier)))
            .collect();
        threads.into_iter().filter_map(|t| t.join().ok()).sum()
    });
    let took = start.elapsed();
    drop(at_work);
    done as f64 / took.as_secs_f64()
}

/// The daemon's own workers: files in a folder to committed outcomes. Files a second.
fn recorded(
    scratch: &Scratch,
    config: &Config,
    classifiers: Vec<Classifier>,
    images: &[Vec<u8>],
    files: usize,
) -> Result<f64, Failure> {
    let at =
        |e: std::io::Error| Failure::Runtime(format!("{}: {e}; give --dir", scratch.0.display()));
    let mut config = config.clone();
    config.watch.folder = scratch.0.join("export");
    config.state.dir = scratch.0.join("state");
    std::fs::create_dir(&config.watch.folder).map_err(at)?;
    let name = |number: usize| PathBuf::from(format!("{number}.img"));
    for number in 0..files {
        // Behind its end, so that no two are the same.
        let mut bytes = images[number % images.len()].clone();
        bytes.extend_from_slice(&(number as u64).to_le_bytes());
        std::fs::write(config.watch.folder.join(name(number)), bytes).map_err(at)?;
    }
    let state = StateDir::open(&config.state.dir)?;
    let Opened { store, thread, .. } = Store::open(state.path())?;
    let store = Arc::new(store);
    let bundle = classifiers[0].bundle().clone();
    let context = Context {
        reporter: Arc::new(Reporter {
            sender: Sender::new(&config),
            key: state.key().clone(),
            model: bundle.model_ref.clone(),
            labels: bundle.manifest.output.labels.clone(),
            rule: *classifiers[0].rule(),
        }),
        config: Arc::new(config),
        store: Arc::downgrade(&store),
        health: Health::default(),
        outbox: Arc::new(Notify::new()),
        previews: None,
        stopping: Arc::new(AtomicBool::new(false)),
        metrics: Metrics::default(),
    };
    let (reports_tx, mut reports) = mpsc::unbounded_channel();
    let mut workers = Vec::new();
    for (index, classifier) in classifiers.into_iter().enumerate() {
        let (context, reports) = (context.clone(), reports_tx.clone());
        let started = worker::start(
            index,
            context,
            || Ok(classifier),
            reports,
            Stopwatch::default(),
        );
        workers.push(started.map_err(at)?);
    }
    let stopping = context.stopping.clone();
    drop((context, reports_tx));

    let start = Instant::now();
    let mut next = 0..files;
    let candidate = |number| Candidate {
        path: name(number),
        last_chance: true,
    };
    for worker in &workers {
        if let Some(number) = next.next() {
            let _ = worker.queue.send(candidate(number));
        }
    }
    let mut done = 0;
    while done < files
        && let Some(report) = reports.blocking_recv()
    {
        if report.disposition != Disposition::Done {
            stopping.store(true, Ordering::Relaxed);
            return Err(Failure::Runtime(format!(
                "{}: outcomes cannot be recorded; look for room there, or give --dir",
                scratch.0.display()
            )));
        }
        done += 1;
        if let Some(number) = next.next() {
            let _ = workers[report.worker].queue.send(candidate(number));
        }
    }
    let rate = files as f64 / start.elapsed().as_secs_f64();
    let ended: Vec<_> = workers.into_iter().map(|worker| worker.thread).collect();
    // The store's thread ends when the workers have, and nobody else holds the store.
    drop(store);
    for thread in ended.into_iter().chain([thread]) {
        let _ = thread.join();
    }
    drop(state);
    Ok(rate)
}

/// One call at a time, as for a picture that comes alone.
fn ledger(scratch: &Scratch) -> Result<LedgerReport, Failure> {
    let dir = scratch.0.join("commits");
    let state = StateDir::open(&dir)?;
    let Opened { store, thread, .. } = Store::open(state.path())?;
    let (mut claims, mut commits) = (Vec::new(), Vec::new());
    for number in 0..COMMITS {
        // So that the disk is timed, and not what the ledger keeps flushes apart.
        #[allow(
            clippy::disallowed_methods,
            reason = "this thread has nothing else to do"
        )]
        std::thread::sleep(FLUSHES_APART);
        let scan_id = state.key().scan_id(&sha256(&number.to_le_bytes()));
        let stamp = Stamp {
            size: 1,
            mtime_ns: number,
            ctime_ns: number,
            inode: number as u64,
        };
        let path = PathBuf::from(format!("{number}.img"));
        let begin = Instant::now();
        let file = ScanFile { path, stamp };
        store.call_blocking_that(Survives::Process, move |l| {
            l.claim(scan_id, &file, number, 1)
        })?;
        claims.push(millis(begin.elapsed()));
        let begin = Instant::now();
        store.call_blocking(move |l| l.set_note("bench", Some(&number.to_string())))?;
        commits.push(millis(begin.elapsed()));
    }
    drop(store);
    let _ = thread.join();
    Ok(LedgerReport {
        claim_ms: Spread::of(claims),
        commit_ms: Spread::of(commits),
    })
}

/// The processor's name as the system has it; ARM boards say "Model".
fn processor() -> String {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    ["model name", "Model", "Hardware"]
        .iter()
        .find_map(|key| {
            let line = text.lines().find(|line| line.starts_with(key))?;
            Some(line.split_once(':')?.1.trim().to_owned())
        })
        .unwrap_or_else(|| std::env::consts::ARCH.to_owned())
}

/// The most memory that this process had, from /proc.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    let kb: u64 = line.split_whitespace().nth(1)?.parse().ok()?;
    Some(kb * 1024)
}

fn print(report: &Report<'_>) -> Result<(), Failure> {
    let Report {
        engine,
        model,
        images,
        stages_ms,
        images_per_second: rate,
        ..
    } = report;
    say!(
        "ScanSentry {}, {}, {} core(s), {} worker(s)",
        report.version,
        report.processor,
        report.cores,
        report.workers
    )?;
    say!(
        "{} {} on {} {}, {}, {} thread(s); loaded and checked in {:.0} ms",
        model.name,
        model.version,
        engine.runtime,
        engine.version,
        engine.delegate,
        engine.threads,
        report.load_ms
    )?;
    say!(
        "{} {} image(s), {} bytes on average\n",
        images.count,
        images.source,
        images.mean_bytes
    )?;
    say!("{:<34}{:>9}{:>9}", "milliseconds", "median", "p95")?;
    let line =
        |name: &str, spread: &Spread| say!("{name:<34}{:>9.2}{:>9.2}", spread.median, spread.p95);
    line("identify (SHA-256)", &stages_ms.identify)?;
    line("decode", &stages_ms.decode)?;
    line("crop", &stages_ms.roi)?;
    line("resize, quantize", &stages_ms.resize)?;
    line("infer", &stages_ms.infer)?;
    line("decode to prediction", &stages_ms.total)?;
    if let Some(ledger) = &report.ledger {
        line("ledger: claim", &ledger.claim_ms)?;
        line("ledger: commit, on the disk", &ledger.commit_ms)?;
    }
    say!("\n{:<34}{:>9}", "images a second", "")?;
    say!("{:<34}{:>9.1}", "one worker", rate.one_worker)?;
    say!("{:<34}{:>9.1}", "all workers", rate.all_workers)?;
    say!(
        "{:<34}{:>9.1}   the bound",
        "a worker with one thread a core",
        rate.bound
    )?;
    if let Some(recorded) = rate.recorded {
        say!(
            "{:<34}{recorded:>9.1}   {:.0} % of the bound",
            "file to committed outcome",
            recorded / rate.bound * 100.0
        )?;
    }
    if let Some(bytes) = report.peak_memory_bytes {
        say!("\npeak memory of this run {:.0} MB", bytes as f64 / 1e6)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::Spread;

    #[test]
    fn a_spread_has_median_and_95th_percentile() {
        let spread = Spread::of((0..=100).rev().map(f64::from).collect());
        assert!((spread.median - 50.0).abs() < 1e-9 && (spread.p95 - 95.0).abs() < 1e-9);
        assert!(Spread::of(Vec::new()).median.abs() < 1e-9);
    }
}
