//! `classify` and `preprocess`: single files, without daemon, broker or ledger.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;
use serde_json::{Value, json};

use super::{Failure, Global, become_owner, other_owner, say};
use crate::classifier::Classifier;
use crate::config::Config;
use crate::daemon::bundles::{self, Refusal};
use crate::imaging::Picture;
use crate::imaging::decode::{Limits, Source};
use crate::imaging::heatmap::{Peak, SCALE};
use crate::message::{
    self, ClassifiedPicture, ModelRef, QualityMessage, Reason, RuleMessage, scores_by_label,
};
use crate::pipeline::worker::decode_limits;
use crate::prediction::{Decision, RejectCode, RejectReason, Roi, Timings};
use crate::store::Models;

#[derive(Debug, Args)]
pub(super) struct ClassifyArgs {
    /// Image files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Model bundle; default: the one that the daemon runs
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// Also draw where the score came from: a PNG for one picture, or into a folder that is there
    ///
    /// The crop at its own resolution (at most 1024 pixels a side) under the model's activation map: vermilion speaks for a positive
    /// label, blue against it, the more the stronger, full at 16 of log-odds. The scale is the same in every picture, so a negative does
    /// not glow. It is where the score came from, no outline of anything. Into a folder, a picture is named after its file (and frame):
    /// NAME.heatmap.png.
    #[arg(long, value_name = "PNG|DIR")]
    heatmap: Option<PathBuf>,
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
    #[serde(flatten)]
    rule: RuleMessage,
    label: Option<&'a str>,
    scores: Option<BTreeMap<&'a str, f64>>,
    roi: Option<Roi>,
    misfit: Option<Reason>,
    quality: Option<QualityMessage<'a>>,
    model: &'a ModelRef,
    timings_ms: Option<Timings>,
    error: Option<Reason>,
    /// Only where it was asked for; null where there is no prediction.
    #[serde(skip_serializing_if = "Option::is_none")]
    heatmap: Option<Value>,
}

/// A map that was drawn.
#[derive(Serialize)]
struct Drawn {
    /// Where the picture was written to.
    file: String,
    columns: usize,
    rows: usize,
    /// The strongest cell: its centre in the source picture and its value; null in a map without numbers.
    peak: Option<Peak>,
    /// The value, for or against, at which the colour is full.
    scale: f32,
}

/// Which bundle is asked for.
pub(super) enum Asked {
    /// The one in this folder.
    Dir(PathBuf),
    /// The installed one, or what the daemon would run in its place.
    Installed,
}

impl Asked {
    /// The bundle in `dir`, or else the one that the daemon would run.
    pub(super) fn of(config: &Config, dir: Option<&PathBuf>) -> Result<Self, Failure> {
        if let Some(dir) = dir {
            return Ok(Self::Dir(dir.clone()));
        }
        match Models::of(&config.state.dir).current() {
            Ok(None) => Ok(Self::Dir(config.model.bundle.clone())),
            Err(error) if error.kind() == ErrorKind::PermissionDenied => {
                let dir = config.state.dir.display();
                Err(Failure::Runtime(format!(
                    "state.dir: {dir}: which model is installed cannot be read ({error}); give --bundle, or run as the user of the daemon"
                )))
            }
            _ => Ok(Self::Installed),
        }
    }

    /// Whether it is loaded as the owner of the state directory, who is not root: what that user can put there is not root's to run.
    fn as_owner(&self, config: &Config) -> bool {
        matches!(self, Self::Installed) && other_owner(&config.state.dir).is_some()
    }

    /// Loads it, as whom [`Self::as_owner`] says; from here on nothing is opened as root then.
    pub(super) fn load(&self, config: &Config) -> Result<Classifier, Failure> {
        if self.as_owner(config) {
            become_owner(&config.state.dir)?;
        }
        let found = match self {
            Self::Dir(dir) => bundles::load(dir, config)
                .map(|classifier| (classifier, Vec::new()))
                .map_err(Refusal::lines),
            Self::Installed => bundles::first(config, |candidate| candidate.load(config))
                .map(|found| (found.loaded, found.refused)),
        };
        let (classifier, refused) = found.map_err(Failure::Configuration)?;
        for line in refused {
            eprintln!("{line}");
        }
        Ok(classifier)
    }
}

/// As many files may be open as the system allows this process.
fn raise_open_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    let current = maximum;
    // Where it fails, the files beyond the limit are said to be unreadable.
    let _ = setrlimit(Resource::Nofile, Rlimit { current, maximum });
}

pub(super) fn classify(global: &Global, args: &ClassifyArgs) -> Result<(), Failure> {
    let config = global.load()?;
    let asked = Asked::of(&config, args.bundle.as_ref())?;
    let as_owner = asked.as_owner(&config);
    let target = args.heatmap.as_ref();
    let target = target.map(|path| HeatmapTarget::new(path, &args.files));
    let mut target = target.transpose()?;
    // Root may open what the owner may not.
    let files = args.files.iter().map(|file| open_file(file));
    let mut files: Box<dyn Iterator<Item = _>> = if as_owner {
        raise_open_files();
        let files: Vec<_> = files.collect();
        if let Some(HeatmapTarget::File(out)) = &mut target {
            out.open("--heatmap")?;
        }
        Box::new(files.into_iter())
    } else {
        Box::new(files)
    };
    let mut classifier = asked.load(&config)?;
    let bundle = classifier.bundle().clone();
    let limits = decode_limits(&config);
    let labels = &bundle.manifest.output.labels;
    let rule = RuleMessage::from(*classifier.rule());
    if target.is_some() && bundle.manifest.output.heatmap.is_none() {
        let line = "model.bundle: this model gives no activation map; leave --heatmap out";
        return Err(Failure::Runtime(line.into()));
    }
    let mut failed = false;
    for (file, opened) in args.files.iter().zip(&mut files) {
        let bytes = opened.and_then(|opened| read_file(opened, config.limits.file_bytes));
        let classified = bytes
            .as_ref()
            .map_err(Clone::clone)
            .and_then(|bytes| classifier.classify_file(bytes, &limits));
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
        let maps = match (&target, &bytes) {
            (Some(target), Ok(bytes)) => {
                target.draw(file, bytes, &pictures, &classifier, &limits)?
            }
            (Some(_), Err(_)) => vec![Value::Null],
            (None, _) => Vec::new(),
        };
        let mut maps = maps.into_iter();
        for ClassifiedPicture { frame, outcome } in &pictures {
            failed |= outcome.is_err();
            let found = outcome.as_ref().ok();
            let prediction = found.map(|c| &c.prediction);
            let line = Line {
                file: file.display().to_string(),
                frame: *frame,
                decision: prediction.map(|p| p.decision),
                probability: prediction.map(|p| p.probability),
                rule,
                label: prediction.map(|p| labels[p.label].as_str()),
                scores: prediction.map(|p| scores_by_label(labels, &p.scores)),
                roi: found.map(|c| c.roi),
                misfit: found.and_then(message::misfit),
                quality: found.and_then(|c| QualityMessage::of(c, &notes)),
                model: &bundle.model_ref,
                timings_ms: found.map(|c| c.timings),
                error: outcome.as_ref().err().map(Reason::from),
                heatmap: maps.next(),
            };
            let json =
                serde_json::to_string(&line).expect("a line holds only strings, numbers and lists");
            say!("{json}")?;
        }
    }
    if failed { Err(Failure::Said) } else { Ok(()) }
}

/// Where the maps are drawn to.
enum HeatmapTarget<'a> {
    /// The only picture's.
    File(Out<'a>),
    /// Named after the files.
    Folder(&'a Path),
}

impl<'a> HeatmapTarget<'a> {
    fn new(path: &'a Path, files: &[PathBuf]) -> Result<Self, Failure> {
        let refused = |line: String| Err(Failure::Runtime(format!("--heatmap: {line}")));
        if path.is_dir() {
            let mut names: Vec<_> = files.iter().filter_map(|file| file.file_name()).collect();
            names.sort_unstable();
            return match names.windows(2).find(|pair| pair[0] == pair[1]) {
                None => Ok(Self::Folder(path)),
                Some(pair) => refused(format!(
                    "two FILEs are named {}; draw them one at a time",
                    pair[0].display()
                )),
            };
        }
        if files.len() > 1 {
            return refused(format!(
                "{} is one picture for {} FILEs; give a folder that is there",
                path.display(),
                files.len()
            ));
        }
        if let (Ok(target), Ok(file)) = (path.canonicalize(), files[0].canonicalize())
            && target == file
        {
            return refused(format!(
                "{} is FILE itself; give another name",
                path.display()
            ));
        }
        Ok(Self::File(Out::new(path)))
    }

    /// Draws the map of each picture of a file that has a prediction; what is said of each of them, in their order.
    fn draw(
        &self,
        file: &Path,
        bytes: &[u8],
        pictures: &[ClassifiedPicture],
        classifier: &Classifier,
        limits: &Limits,
    ) -> Result<Vec<Value>, Failure> {
        if matches!(self, Self::File(_)) && pictures.len() > 1 {
            let (file, frames) = (file.display(), pictures.len());
            return Err(Failure::Runtime(format!(
                "--heatmap: {file} has {frames} frames; give a folder that is there"
            )));
        }
        // Decoded once more: a file's pictures are classified one at a time, and none is kept.
        let mut source = Source::open(bytes, limits).ok();
        let mut drawn = Vec::with_capacity(pictures.len());
        for (index, ClassifiedPicture { frame, outcome }) in (0..).zip(pictures) {
            let picture = source.as_mut().and_then(|s| s.frame(index).ok());
            let (Ok(found), Some(picture)) = (outcome, picture) else {
                drawn.push(Value::Null);
                continue;
            };
            let Some((image, peak)) = classifier.overlay(&picture, found) else {
                drawn.push(Value::Null);
                continue;
            };
            let path;
            let out = match self {
                Self::File(out) => out,
                Self::Folder(folder) => {
                    let mut name = file.file_name().unwrap_or_default().to_owned();
                    if let Some(frame) = frame {
                        name.push(format!(".{frame}"));
                    }
                    name.push(".heatmap.png");
                    path = folder.join(name);
                    &Out::new(&path)
                }
            };
            out.save(&Picture::Rgb(image), "--heatmap")?;
            let map = found.prediction.heatmap.as_ref();
            drawn.push(json!(Drawn {
                file: out.path.display().to_string(),
                columns: map.map_or(0, |map| map.width),
                rows: map.map_or(0, |map| map.height),
                peak,
                scale: SCALE,
            }));
        }
        Ok(drawn)
    }
}

fn unreadable(error: &std::io::Error) -> RejectReason {
    let message = format!("the file cannot be read ({error})");
    RejectReason::new(RejectCode::Unreadable, message)
}

pub(super) fn open_file(file: &Path) -> Result<File, RejectReason> {
    // A pipe would keep the opener waiting for ever.
    if !file.metadata().map_err(|e| unreadable(&e))?.is_file() {
        return Err(RejectReason::new(
            RejectCode::NotAFile,
            "not a regular file",
        ));
    }
    File::open(file).map_err(|e| unreadable(&e))
}

pub(super) fn read_file(mut file: File, limit: u64) -> Result<Vec<u8>, RejectReason> {
    let length = file.metadata().map_err(|e| unreadable(&e))?.len();
    if length > limit {
        let message = format!("{length} bytes; at most {limit} are read (limits.file_bytes)");
        return Err(RejectReason::new(RejectCode::FileTooLarge, message));
    }
    let mut bytes = Vec::new();
    file.read_to_end(&mut bytes).map_err(|e| unreadable(&e))?;
    if bytes.is_empty() {
        Err(RejectReason::new(RejectCode::Empty, "the file is empty"))
    } else {
        Ok(bytes)
    }
}

pub(super) fn preprocess(global: &Global, args: &PreprocessArgs) -> Result<(), Failure> {
    let config = global.load()?;
    let asked = Asked::of(&config, args.bundle.as_ref())?;
    let rejected = |reason: RejectReason| {
        let (file, code) = (args.file.display(), reason.code.as_str());
        Failure::Runtime(format!("{file}: {}; reason code {code}", reason.message))
    };
    let limits = decode_limits(&config);
    let file = open_file(&args.file).map_err(rejected)?;
    let mut out = Out::new(&args.out);
    if asked.as_owner(&config) {
        out.open("--out")?;
    }
    let mut classifier = asked.load(&config)?;
    let bytes = read_file(file, config.limits.file_bytes).map_err(rejected)?;
    let picture = Source::open(&bytes, &limits)
        .and_then(|mut source| source.frame(0))
        .map_err(rejected)?;
    if args.explain {
        let Some(steps) = classifier.explain(&picture) else {
            let line = "model.bundle: this model takes pictures uncropped; leave --explain out";
            return Err(Failure::Runtime(line.into()));
        };
        return out.save(&Picture::Rgb(steps), "--out");
    }
    let seen = classifier.preprocess(&picture).map_err(rejected)?;
    out.save(&seen, "--out")
}

/// Where a picture is written to.
struct Out<'a> {
    path: &'a Path,
    /// Where it was opened as somebody else than who writes it.
    opened: Option<File>,
}

impl<'a> Out<'a> {
    fn new(path: &'a Path) -> Self {
        Self { path, opened: None }
    }

    /// Opens it now, with what it holds; `option` is what named it.
    fn open(&mut self, option: &str) -> Result<(), Failure> {
        let mut how = OpenOptions::new();
        let file = how.write(true).create(true).truncate(false).open(self.path);
        self.opened = Some(file.map_err(|e| self.unwritable(&e, option))?);
        Ok(())
    }

    fn save(&self, picture: &Picture, option: &str) -> Result<(), Failure> {
        let png = image::ImageFormat::Png;
        let saved = match &self.opened {
            None => match picture {
                Picture::Gray(image) => image.save_with_format(self.path, png),
                Picture::Rgb(image) => image.save_with_format(self.path, png),
            },
            Some(file) => {
                let mut out = BufWriter::new(file);
                let emptied = file.set_len(0).map_err(image::ImageError::IoError);
                let written = emptied.and_then(|()| match picture {
                    Picture::Gray(image) => image.write_to(&mut out, png),
                    Picture::Rgb(image) => image.write_to(&mut out, png),
                });
                written.and_then(|()| out.flush().map_err(image::ImageError::IoError))
            }
        };
        saved.map_err(|e| self.unwritable(&e, option))
    }

    fn unwritable(&self, error: &dyn std::fmt::Display, option: &str) -> Failure {
        let out = self.path.display();
        Failure::Runtime(format!(
            "{out}: cannot be written ({error}); choose another {option}"
        ))
    }
}
