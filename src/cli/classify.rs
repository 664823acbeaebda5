//! `classify` and `preprocess`: single files, without daemon, broker or ledger.

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::{Failure, Global};
use crate::classifier::Classifier;
use crate::config::Config;
use crate::daemon::bundles;
use crate::imaging::Picture;
use crate::imaging::decode::Source;
use crate::message::{self, ClassifiedPicture, ModelRef, QualityMessage, Reason, scores_by_label};
use crate::pipeline::worker::decode_limits;
use crate::prediction::{Decision, RejectCode, RejectReason, Roi, Timings};

#[derive(Debug, Args)]
pub(super) struct ClassifyArgs {
    /// Image files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Model bundle; default: the one that the daemon runs
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
    /// Write a picture of the steps instead: grey, mask, contour, rectangle, crop
    #[arg(long)]
    explain: bool,
    /// Model bundle; default: the one that the daemon runs
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
    misfit: Option<Reason>,
    quality: Option<QualityMessage<'a>>,
    model: &'a ModelRef,
    timings_ms: Option<Timings>,
    error: Option<Reason>,
}

/// The bundle in `dir`, or else the one that the daemon would run.
fn load(global: &Global, dir: Option<&PathBuf>) -> Result<(Config, Classifier), Failure> {
    let config = global.load()?;
    let found = match dir {
        Some(dir) => bundles::load(dir, &config).map(|classifier| (classifier, Vec::new())),
        None => bundles::first(&config, |candidate| candidate.load(&config))
            .map(|found| (found.loaded, found.refused)),
    };
    let (classifier, refused) = found.map_err(Failure::Configuration)?;
    for line in refused {
        eprintln!("{line}");
    }
    Ok((config, classifier))
}

pub(super) fn classify(global: &Global, args: &ClassifyArgs) -> Result<(), Failure> {
    let (config, mut classifier) = load(global, args.bundle.as_ref())?;
    let bundle = classifier.bundle().clone();
    let limits = decode_limits(&config);
    let labels = &bundle.manifest.output.labels;
    let mut failed = false;
    let mut out = std::io::stdout().lock();
    for file in &args.files {
        let classified = read_file(file, config.limits.file_bytes)
            .and_then(|bytes| classifier.classify_file(&bytes, &limits));
        let (notes, pictures) = match classified {
            Ok(found) => (found.notes, found.pictures),
            Err(reason) => {
                let outcome = Err(reason);
                (
                    Vec::new(),
                    vec![ClassifiedPicture {
                        frame: None,
                        outcome,
                    }],
                )
            }
        };
        for ClassifiedPicture { frame, outcome } in &pictures {
            failed |= outcome.is_err();
            let found = outcome.as_ref().ok();
            let prediction = found.map(|c| &c.prediction);
            let line = Line {
                file: file.display().to_string(),
                frame: *frame,
                decision: prediction.map(|p| p.decision),
                probability: prediction.map(|p| p.probability),
                threshold: bundle.manifest.decision.threshold,
                label: prediction.map(|p| labels[p.label].as_str()),
                scores: prediction.map(|p| scores_by_label(labels, &p.scores)),
                roi: found.map(|c| c.roi),
                misfit: found.and_then(message::misfit),
                quality: found.and_then(|c| QualityMessage::of(c, &notes)),
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
    let rejected = |reason: RejectReason| {
        let (file, code) = (args.file.display(), reason.code.as_str());
        Failure::Runtime(format!("{file}: {}; reason code {code}", reason.message))
    };
    let limits = decode_limits(&config);
    let bytes = read_file(&args.file, config.limits.file_bytes).map_err(rejected)?;
    let picture = Source::open(&bytes, &limits)
        .and_then(|mut source| source.frame(0))
        .map_err(rejected)?;
    if args.explain {
        let Some(steps) = classifier.explain(&picture) else {
            let line = "model.bundle: this model takes pictures uncropped; leave --explain out";
            return Err(Failure::Runtime(line.into()));
        };
        return save(&Picture::Rgb(steps), &args.out);
    }
    let seen = classifier.preprocess(&picture).map_err(rejected)?;
    save(&seen, &args.out)
}

fn save(picture: &Picture, out: &Path) -> Result<(), Failure> {
    let png = image::ImageFormat::Png;
    let saved = match picture {
        Picture::Gray(image) => image.save_with_format(out, png),
        Picture::Rgb(image) => image.save_with_format(out, png),
    };
    saved.map_err(|e| {
        let out = out.display();
        Failure::Runtime(format!(
            "{out}: cannot be written ({e}); choose another --out"
        ))
    })
}
