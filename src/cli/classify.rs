//! `classify` and `preprocess`: single files, without daemon, broker or ledger.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use clap::Args;
use serde::Serialize;

use super::{Failure, Global};
use crate::classifier::{Bundle, BundleError, Classifier};
use crate::config::Config;
use crate::imaging::Picture;
use crate::imaging::decode::Source;
use crate::message::{ModelRef, Reason, millis};
use crate::pipeline::worker::decode_limits;
use crate::prediction::{Classified, Decision, RejectCode, RejectReason, Roi, Timings};

#[derive(Debug, Args)]
pub(super) struct ClassifyArgs {
    /// Image files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Model bundle; default: model.bundle of the configuration
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct PreprocessArgs {
    /// Image file
    file: PathBuf,
    /// Where to write the picture that the model sees
    #[arg(long, value_name = "PNG")]
    out: PathBuf,
    /// Model bundle; default: model.bundle of the configuration
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
}

/// One line of `classify`.
#[derive(Serialize)]
struct Line<'a> {
    file: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    frame: Option<u32>,
    decision: Option<Decision>,
    probability: Option<f64>,
    threshold: f64,
    label: Option<&'a str>,
    scores: Option<BTreeMap<&'a str, f64>>,
    roi: Option<Roi>,
    quality: Vec<&'static str>,
    model: &'a ModelRef,
    timings_ms: Option<Timings>,
    error: Option<Reason>,
}

fn load(global: &Global, bundle: Option<&PathBuf>) -> Result<(Config, Classifier), Failure> {
    let config = global.load()?;
    let refused = |BundleError(problems)| Failure::Configuration(problems);
    let bundle = Bundle::read(bundle.unwrap_or(&config.model.bundle)).map_err(refused)?;
    let classifier = Classifier::new(Arc::new(bundle), config.model.threads).map_err(refused)?;
    Ok((config, classifier))
}

pub(super) fn classify(global: &Global, args: &ClassifyArgs) -> Result<(), Failure> {
    let (config, mut classifier) = load(global, args.bundle.as_ref())?;
    let bundle = classifier.bundle().clone();
    let mut failed = false;
    let mut out = std::io::stdout().lock();
    for file in &args.files {
        for (frame, outcome) in classify_file(&mut classifier, &config, file) {
            failed |= outcome.is_err();
            let found = outcome.as_ref().ok();
            let prediction = found.map(|c| &c.prediction);
            let labels = &bundle.manifest.output.labels;
            let line = Line {
                file: file.display().to_string(),
                frame,
                decision: prediction.map(|p| p.decision),
                probability: prediction.map(|p| p.probability),
                threshold: bundle.manifest.decision.threshold,
                label: prediction.map(|p| labels[p.label].as_str()),
                scores: prediction.map(|p| {
                    labels
                        .iter()
                        .map(String::as_str)
                        .zip(p.scores.iter().copied())
                        .collect()
                }),
                roi: found.map(|c| c.roi),
                quality: found.map_or_else(Vec::new, |c| c.quality.clone()),
                model: &bundle.model_ref,
                timings_ms: found.map(|c| c.timings),
                error: outcome.as_ref().err().map(Reason::from),
            };
            let json =
                serde_json::to_string(&line).expect("a line holds only strings, numbers and lists");
            writeln!(out, "{json}")
                .map_err(|e| Failure::Runtime(format!("standard output: {e}")))?;
        }
    }
    if failed { Err(Failure::Said) } else { Ok(()) }
}

type Frames = Vec<(Option<u32>, Result<Classified, RejectReason>)>;

fn classify_file(classifier: &mut Classifier, config: &Config, file: &Path) -> Frames {
    let start = Instant::now();
    let limits = decode_limits(config);
    let bytes = match read_file(file, config.limits.file_bytes) {
        Ok(bytes) => bytes,
        Err(reason) => return vec![(None, Err(reason))],
    };
    let mut source = match Source::open(&bytes, &limits) {
        Ok(source) => source,
        Err(reason) => return vec![(None, Err(reason))],
    };
    let frames = source.frame_count();
    (0..frames)
        .map(|index| {
            let decoding = if index == 0 { start } else { Instant::now() };
            let outcome = source.frame(index).and_then(|picture| {
                let decode = millis(decoding.elapsed());
                let mut classified = classifier.classify(&picture)?;
                classified.timings.decode = decode;
                classified.timings.total = millis(decoding.elapsed());
                Ok(classified)
            });
            ((frames > 1).then_some(index + 1), outcome)
        })
        .collect()
}

fn read_file(file: &Path, limit: u64) -> Result<Vec<u8>, RejectReason> {
    let unreadable = |e: std::io::Error| {
        RejectReason::new(
            RejectCode::Unreadable,
            format!("the file cannot be read ({e})"),
        )
    };
    let metadata = file.metadata().map_err(unreadable)?;
    if !metadata.is_file() {
        return Err(RejectReason::new(
            RejectCode::NotAFile,
            "not a regular file",
        ));
    }
    if metadata.len() > limit {
        let message = format!(
            "{} bytes; at most {limit} are read (limits.file_bytes)",
            metadata.len()
        );
        return Err(RejectReason::new(RejectCode::FileTooLarge, message));
    }
    let bytes = std::fs::read(file).map_err(unreadable)?;
    if bytes.is_empty() {
        Err(RejectReason::new(RejectCode::Empty, "the file is empty"))
    } else {
        Ok(bytes)
    }
}

pub(super) fn preprocess(global: &Global, args: &PreprocessArgs) -> Result<(), Failure> {
    let (config, mut classifier) = load(global, args.bundle.as_ref())?;
    let seen = read_file(&args.file, config.limits.file_bytes).and_then(|bytes| {
        let picture = Source::open(&bytes, &decode_limits(&config))?.frame(0)?;
        classifier.preprocess(&picture)
    });
    let (_, picture) = seen.map_err(|reason| {
        Failure::Runtime(format!(
            "{}: {}; {} is the reason code",
            args.file.display(),
            reason.message,
            reason.code.as_str()
        ))
    })?;
    let saved = match &picture {
        Picture::Gray(image) => image.save_with_format(&args.out, image::ImageFormat::Png),
        Picture::Rgb(image) => image.save_with_format(&args.out, image::ImageFormat::Png),
    };
    saved.map_err(|e| {
        Failure::Runtime(format!(
            "{}: cannot be written ({e}); choose another --out",
            args.out.display()
        ))
    })
}
