//! A model bundle, checked and made ready to run: the manifest, the engine and the imaging stages in one.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use image::RgbImage;
use serde::Serialize;

use crate::config::{Config, EngineChoice, Misfits, Quality};
use crate::engine::{
    self, AtWork, ElementType, Engine, EngineInfo, ModelBytes, Runtime, Shared, TensorSpec,
};
use crate::imaging::Picture;
use crate::imaging::decode::{DecodeNote, Limits, Source, SourceKind};
use crate::imaging::dicom::DicomHeader;
use crate::imaging::explain::explain;
use crate::imaging::heatmap::{self, Peak};
use crate::imaging::quality;
use crate::imaging::quantize::{Normalization, Quantizer};
use crate::imaging::resize::{ResizeSpec, Resizer};
use crate::imaging::roi::{BrainContour, CropSpec, RoiFinder};
use crate::manifest::{
    self, MANIFEST, MAX_GOLDEN, MAX_MODEL, MAX_TEXT, Manifest, SIGNATURE, read_bounded,
};
use crate::message::{ClassifiedPicture, ModelRef, millis};
use crate::prediction::{
    Classified, Decision, Heatmap, Prediction, RejectCode, RejectReason, Roi, RuleInForce, Timings,
};
use crate::preview;
use crate::scan::{hex, sha256};
use crate::signature::PublicKey;

/// Largest scores or heatmap tensor, in elements.
const MAX_OUTPUT: usize = 1 << 20;

/// Why a bundle is refused: every problem found, one line each.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}", .0.join("\n"))]
pub struct BundleError(pub Vec<String>);

/// What is known of a bundle's signature.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SignatureState {
    /// By the key that the configuration names.
    Valid,
    /// There is one; the configuration names no key.
    Unchecked,
    /// There is none; the configuration names no key.
    None,
}

/// A model bundle as read from the disk: the manifest is valid, signed where a key is given, and the model file is the one that it names.
#[derive(Debug)]
pub struct Bundle {
    dir: PathBuf,
    /// The manifest.
    pub manifest: Manifest,
    /// SHA-256 of the manifest's bytes: which bundle this is, because the manifest names the model by its hash.
    pub manifest_sha256: String,
    /// Whether it is signed.
    pub signature: SignatureState,
    /// Name, version and hash, as every result carries them.
    pub model_ref: Arc<ModelRef>,
    model: ModelBytes,
}

impl Bundle {
    /// Reads `dir`: the manifest, its signature by `key` if there is a key, then the model, whose SHA-256 must be the manifest's.
    pub fn read(dir: &Path, key: Option<&PublicKey>) -> Result<Self, BundleError> {
        let fail = |line: String| BundleError(vec![line]);
        let bytes = read_bounded(&dir.join(MANIFEST), MAX_TEXT)
            .map_err(|e| fail(format!("model.bundle: {}: {MANIFEST} cannot be read ({e}); give the folder of a model bundle", dir.display())))?;
        let mut problems = Vec::new();
        let signature = read_signature(dir, &bytes, key);
        let signature = signature.map_err(|line| problems.push(line));
        let manifest_sha256 = hex(&sha256(&bytes));
        let manifest = String::from_utf8(bytes)
            .map_err(|_| vec![format!("{MANIFEST}: is not UTF-8 text; write it again")])
            .and_then(|text| Manifest::parse(&text))
            .map_err(|lines| problems.extend(lines));
        let Ok(manifest) = manifest else {
            return Err(BundleError(problems));
        };
        let model = read_model(dir, &manifest).map_err(|line| problems.push(line));
        let (Ok(signature), Ok(model)) = (signature, model) else {
            return Err(BundleError(problems));
        };
        let model_ref = ModelRef {
            name: manifest.name.clone(),
            version: manifest.version.clone(),
            sha256: manifest.sha256.clone(),
        };
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
            manifest_sha256,
            signature,
            model_ref: Arc::new(model_ref),
            model,
        })
    }
}

fn read_signature(
    dir: &Path,
    manifest: &[u8],
    key: Option<&PublicKey>,
) -> Result<SignatureState, String> {
    let signature = read_bounded(&dir.join(SIGNATURE), MAX_TEXT);
    match (key, signature) {
        (None, Ok(_)) => Ok(SignatureState::Unchecked),
        (None, Err(_)) => Ok(SignatureState::None),
        (Some(key), Ok(signature)) if key.signed(manifest, &signature) => Ok(SignatureState::Valid),
        (Some(_), Ok(_)) => Err(format!(
            "model.bundle: {SIGNATURE} is no signature of {MANIFEST} by model.public_key; the bundle was changed after it was signed, or signed with another key"
        )),
        (Some(_), Err(error)) => Err(format!(
            "model.bundle: {SIGNATURE} cannot be read ({error}); model.public_key wants a signed bundle, see models/README.md"
        )),
    }
}

fn read_model(dir: &Path, manifest: &Manifest) -> Result<ModelBytes, String> {
    let model = read_bounded(&dir.join(&manifest.file), MAX_MODEL).map_err(|e| {
        format!(
            "model.bundle: {} cannot be read ({e}); install the bundle again",
            manifest.file
        )
    })?;
    let found = hex(&sha256(&model));
    if found != manifest.sha256 {
        return Err(format!(
            "model.bundle: {} has SHA-256 {found}, the manifest says {}; install the bundle again",
            manifest.file, manifest.sha256
        ));
    }
    Ok(ModelBytes::copy_of(&model))
}

/// The runtime that the configuration wants, if this build has it.
pub fn runtime(wanted: EngineChoice) -> Result<Runtime, BundleError> {
    let wanted = match wanted {
        EngineChoice::Auto => return Ok(engine::RUNTIMES[0]),
        EngineChoice::LiteRt => Runtime::LiteRt,
        EngineChoice::TfLite => Runtime::TfLite,
    };
    if engine::RUNTIMES.contains(&wanted) {
        return Ok(wanted);
    }
    let built: Vec<_> = engine::RUNTIMES.iter().map(|r| r.as_str()).collect();
    Err(BundleError(vec![format!(
        "model.engine: {} is not in this build; expected auto or {}",
        wanted.as_str(),
        built.join(" or ")
    )]))
}

/// What became of one file.
#[derive(Debug)]
pub struct ClassifiedFile {
    /// Its format.
    pub kind: SourceKind,
    /// What decoding had to do.
    pub notes: Vec<DecodeNote>,
    /// For keyed hashes and grouping only; never published as it is.
    pub header: Option<DicomHeader>,
    /// At least one.
    pub pictures: Vec<ClassifiedPicture>,
}

/// What the classifiers of all workers have in common.
#[derive(Clone)]
pub struct Recipe {
    /// The bundle.
    pub bundle: Arc<Bundle>,
    /// The rule by which they decide, see [`config::Decision::over`](crate::config::Decision::over).
    pub rule: RuleInForce,
    /// The engine for whoever has no other beside it.
    shared: Option<Arc<Shared>>,
}

/// Makes the classifier of a worker.
pub type Make = Box<dyn FnOnce() -> Result<Classifier, BundleError> + Send>;

/// A model ready to run, with all its buffers. One a worker thread.
pub struct Classifier {
    recipe: Recipe,
    engine: Box<dyn Engine>,
    finder: Option<RoiFinder>,
    resizer: Resizer,
    quantizer: Quantizer,
    quality: Quality,
    /// Whether to keep what the model saw, for previews.
    keep_seen: bool,
    outputs: Vec<Vec<u8>>,
}

impl Classifier {
    /// A classifier alone: loads the bundle's model with the threads that `config` gives it and checks that its tensors are what the manifest
    /// says. It decides by `rule`.
    pub fn new(
        bundle: Arc<Bundle>,
        rule: RuleInForce,
        config: &Config,
    ) -> Result<Self, BundleError> {
        let recipe = Recipe {
            bundle,
            rule,
            shared: None,
        };
        Self::of(recipe, config)
    }

    /// How many workers `config` wants for this model.
    pub fn worker_count(&self, config: &Config) -> usize {
        config.worker_count(self.bundle().model.len())
    }

    /// What makes the classifier of each worker that `config` wants, to be called by the worker: loading takes time. Where there are several, and
    /// an inference may have several threads, this one's engine becomes the one that they share. Also their recipe.
    pub fn for_workers(self, config: &Arc<Config>) -> (Recipe, Vec<Make>) {
        let (count, mut recipe) = (self.worker_count(config), self.recipe.clone());
        let mut makes: Vec<Make> = Vec::with_capacity(count);
        if count > 1 && config.model.inference_threads() > 1 {
            let (bundle, model) = (recipe.bundle.clone(), config.model.clone());
            let load = move || {
                let runtime = runtime(model.engine).expect("the first engine was loaded with it");
                engine::load(runtime, &bundle.model, model.inference_threads())
            };
            recipe.shared = Some(Shared::new(self.engine, load));
        } else {
            makes.push(Box::new(|| Ok(self)));
        }
        while makes.len() < count {
            let (recipe, config) = (recipe.clone(), config.clone());
            makes.push(Box::new(move || Self::of(recipe, &config)));
        }
        (recipe, makes)
    }

    /// A classifier by the recipe of another.
    pub fn of(recipe: Recipe, config: &Config) -> Result<Self, BundleError> {
        let (runtime, model) = (runtime(config.model.engine)?, &recipe.bundle.model);
        let engine = match &recipe.shared {
            Some(shared) => engine::load_beside(runtime, model, shared.clone()),
            None => {
                engine::load(runtime, model, config.model.inference_threads()).map_err(|e| {
                    BundleError(vec![format!("model.bundle: {e}; install another bundle")])
                })?
            }
        };
        let manifest = &recipe.bundle.manifest;
        let problems = tensor_problems(manifest, engine.inputs(), engine.outputs());
        if !problems.is_empty() {
            return Err(BundleError(problems));
        }
        let crop = &manifest.preprocess.crop;
        let finder = (crop.method == manifest::CropMethod::BrainContour).then(|| {
            RoiFinder::new(CropSpec {
                threshold: crop.threshold,
                erode: crop.erode,
                dilate: crop.dilate,
                margin: crop.margin,
            })
        });
        // Uncropped, the picture could show anything: names burned into it, for one.
        let keep_seen = config.preview.enabled && finder.is_some();
        let resize = &manifest.preprocess.resize;
        let resizer = Resizer::new(ResizeSpec {
            width: manifest.input.width,
            height: manifest.input.height,
            filter: resize.filter,
            keep_aspect: resize.keep_aspect,
        });
        let normalize = &manifest.preprocess.normalize;
        let normalization = match normalize.mode {
            manifest::NormalizeMode::None => Normalization::None,
            manifest::NormalizeMode::ZeroOne => Normalization::ZeroOne,
            manifest::NormalizeMode::MinusOneOne => Normalization::MinusOneOne,
            manifest::NormalizeMode::Caffe => Normalization::Caffe,
            manifest::NormalizeMode::MeanStd => Normalization::MeanStd {
                mean: normalize.mean,
                std: normalize.std,
            },
        };
        let order = manifest.input.color_order;
        let input = &engine.inputs()[0];
        let quantizer = Quantizer::new(normalization, order, input.element, input.quant)
            .map_err(|e| BundleError(vec![format!("model.bundle: {e}; correct the manifest")]))?;
        Ok(Self {
            recipe,
            engine,
            finder,
            resizer,
            quantizer,
            quality: config.quality,
            keep_seen,
            outputs: Vec::new(),
        })
    }

    /// Runs the bundle's golden images, which must give their recorded probabilities within the manifest's tolerance.
    /// A problem names them by their number in the manifest, from 1: it goes into the log, which holds no file names.
    pub fn verify_golden(&mut self) -> Result<(), BundleError> {
        let bundle = self.bundle().clone();
        let golden = &bundle.manifest.golden;
        let limits = Limits::default();
        let mut problems = Vec::new();
        for (number, image) in (1..).zip(&golden.image) {
            let outcome = read_bounded(&bundle.dir.join(&image.file), MAX_GOLDEN)
                .map_err(|e| e.to_string())
                .and_then(|bytes| {
                    let picture = Source::open(&bytes, &limits)
                        .and_then(|mut s| s.frame(0))
                        .map_err(|e| e.message)?;
                    self.classify(&picture).map_err(|e| e.message)
                });
            match outcome {
                Ok(found) if (found.prediction.probability - image.probability).abs() <= golden.tolerance => {}
                Ok(found) => problems.push(format!(
                    "model.bundle: golden image {number} gives {:.4}, recorded {:.4} with tolerance {}; the model does not work as it should here",
                    found.prediction.probability, image.probability, golden.tolerance
                )),
                Err(error) => problems.push(format!("model.bundle: golden image {number}: {error}; install the bundle again")),
            }
        }
        if problems.is_empty() {
            Ok(())
        } else {
            Err(BundleError(problems))
        }
    }

    /// The bundle behind this.
    pub fn bundle(&self) -> &Arc<Bundle> {
        &self.recipe.bundle
    }

    /// The rule by which it decides.
    pub fn rule(&self) -> &RuleInForce {
        &self.recipe.rule
    }

    /// A file is in work here until the answer is dropped, and while there are others too, each is worked on with one thread. `None` where no
    /// others share an engine with this one.
    pub fn at_work(&self) -> Option<AtWork> {
        self.recipe.shared.as_ref().map(Shared::begin)
    }

    /// To be called when there has been nothing to do for a while: gives memory back that only several files at a time need. Whether it could.
    pub fn settle(&mut self) -> bool {
        self.engine.settle()
    }

    /// The runtime behind this.
    pub fn engine_info(&self) -> &EngineInfo {
        self.engine.info()
    }

    /// The part of `picture` that the model sees, and the contour by which it was found.
    fn roi(&mut self, picture: &Picture) -> Result<(Roi, Option<BrainContour>), RejectReason> {
        if let Some(finder) = &mut self.finder {
            let contour = finder.find(picture)?;
            return Ok((contour.roi, Some(contour)));
        }
        let whole = Roi {
            x: 0,
            y: 0,
            width: picture.width(),
            height: picture.height(),
        };
        Ok((whole, None))
    }

    /// Decodes and classifies every picture in the bytes of a file, one at a time.
    pub fn classify_file(
        &mut self,
        bytes: &[u8],
        limits: &Limits,
    ) -> Result<ClassifiedFile, RejectReason> {
        let mut start = Instant::now();
        let mut source = Source::open(bytes, limits)?;
        let frames = source.frame_count();
        let mut pictures = Vec::with_capacity(frames as usize);
        for index in 0..frames {
            let outcome = source.frame(index).and_then(|picture| {
                let decode = millis(start.elapsed());
                let mut classified = self.classify(&picture)?;
                classified.timings.decode = decode;
                classified.timings.total = millis(start.elapsed());
                if index >= preview::QUEUE as u32 {
                    // A file of thousands of frames must not fill the memory.
                    classified.seen = None;
                }
                Ok(classified)
            });
            let frame = (frames > 1).then_some(index + 1);
            pictures.push(ClassifiedPicture { frame, outcome });
            start = Instant::now();
        }
        Ok(ClassifiedFile {
            kind: source.kind(),
            notes: source.notes().to_vec(),
            header: source.header().cloned(),
            pictures,
        })
    }

    /// Crop, resize, quantize, run, interpret.
    pub fn classify(&mut self, picture: &Picture) -> Result<Classified, RejectReason> {
        let start = Instant::now();
        let (roi, contour) = self.roi(picture)?;
        let quality = self.finder.as_ref().zip(contour).map(|(finder, contour)| {
            let measured = quality::measure(picture, finder, &contour);
            self.quality.rule().assess(measured)
        });
        let roi_done = Instant::now();
        let resized = self.resizer.resize(picture, roi);
        let seen = self.keep_seen.then(|| resized.clone());
        let resize_done = Instant::now();
        // In the midst of the engine's time, which includes waiting for it and loading it.
        let mut quantizing = Duration::ZERO;
        let mut fill = |tensor: &mut [u8]| {
            let start = Instant::now();
            self.quantizer.quantize(resized, tensor);
            quantizing = start.elapsed();
        };
        let failed = |e: String| RejectReason::new(RejectCode::InferenceFailed, e);
        self.engine
            .run_filled(&mut fill, &mut self.outputs)
            .map_err(|e| failed(e.to_string()))?;
        let manifest = &self.recipe.bundle.manifest;
        let specs = self.engine.outputs();
        let values = real_values(
            &specs[manifest.output.index],
            &self.outputs[manifest.output.index],
        );
        let heatmap = manifest.output.heatmap.map(|h| {
            let (height, width) =
                map_size(&specs[h.index]).expect("checked when the model was loaded");
            Heatmap {
                width,
                height,
                cells: real_values(&specs[h.index], &self.outputs[h.index]),
            }
        });
        let mut prediction =
            Prediction::interpret(&manifest.output, &self.recipe.rule.rule, &values, heatmap)
                .map_err(failed)?;
        let misfit = quality.as_ref().is_some_and(|q| q.misfit.is_some());
        if misfit && self.quality.misfits == Misfits::Indeterminate {
            prediction.decision = Decision::Indeterminate;
        }
        let infer_done = Instant::now();
        let timings = Timings {
            roi: millis(roi_done - start),
            resize: millis(resize_done - roi_done + quantizing),
            infer: millis((infer_done - resize_done).saturating_sub(quantizing)),
            ..Timings::default()
        };
        Ok(Classified {
            prediction,
            roi,
            seen,
            quality,
            timings,
        })
    }

    /// What the model sees of `picture`: cropped and resized, before normalisation.
    pub fn preprocess(&mut self, picture: &Picture) -> Result<Picture, RejectReason> {
        let (roi, _) = self.roi(picture)?;
        Ok(self.resizer.resize(picture, roi).clone())
    }

    /// A picture of the steps from `picture` to what the model sees; `None` where the model takes pictures uncropped.
    pub fn explain(&mut self, picture: &Picture) -> Option<RgbImage> {
        let found = self.roi(picture).ok();
        let seen = found
            .as_ref()
            .map(|(roi, _)| self.resizer.resize(picture, *roi));
        let contour = found.as_ref().and_then(|(_, contour)| contour.as_ref());
        Some(explain(picture, self.finder.as_ref()?, contour, seen))
    }

    /// The crop of `picture` with the map of what was `found` in it, and the map's strongest place; `None` where the model gives no map.
    pub fn overlay(
        &self,
        picture: &Picture,
        found: &Classified,
    ) -> Option<(RgbImage, Option<Peak>)> {
        let (map, input) = (found.prediction.heatmap.as_ref()?, self.resizer.spec());
        let image = heatmap::overlay(picture, found.roi, map, input);
        Some((image, heatmap::peak(found.roi, map, input)))
    }
}

/// Real values of a tensor's bytes: `(q - zero_point) * scale`, or the floats themselves.
fn real_values(spec: &TensorSpec, bytes: &[u8]) -> Vec<f32> {
    let (scale, zero) = spec
        .quant
        .map_or((1.0, 0.0), |q| (q.scale, q.zero_point as f32));
    match spec.element {
        ElementType::UInt8 => bytes
            .iter()
            .map(|&b| (f32::from(b) - zero) * scale)
            .collect(),
        ElementType::Int8 => bytes
            .iter()
            .map(|&b| (f32::from(b.cast_signed()) - zero) * scale)
            .collect(),
        ElementType::Float32 => bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_ne_bytes(*b))
            .collect(),
    }
}

/// Height and width of a heatmap tensor: `[1, h, w]` or `[1, h, w, 1]`.
fn map_size(spec: &TensorSpec) -> Option<(usize, usize)> {
    match spec.shape[..] {
        [1, height, width] | [1, height, width, 1] => Some((height, width)),
        _ => None,
    }
}

fn tensor_problems(
    manifest: &Manifest,
    inputs: &[TensorSpec],
    outputs: &[TensorSpec],
) -> Vec<String> {
    let mut problems = Vec::new();
    let (width, height) = (
        manifest.input.width as usize,
        manifest.input.height as usize,
    );
    let channels = manifest.input.color_order.channels();
    match inputs {
        [input] if input.shape == [1, height, width, channels] => {}
        [input] => problems.push(format!(
            "model.bundle: the model's input is {:?}, the manifest says {:?}; correct [input]",
            input.shape,
            [1, height, width, channels]
        )),
        _ => problems.push(format!(
            "model.bundle: the model has {} inputs; only models with one image input can be used",
            inputs.len()
        )),
    }
    let output = &manifest.output;
    match outputs.get(output.index) {
        None => problems.push(format!(
            "model.bundle: output.index is {}, the model has {} outputs; correct [output]",
            output.index,
            outputs.len()
        )),
        Some(spec) => {
            let elements = spec.elements();
            if elements != output.labels.len() && !(elements == 1 && output.labels.len() == 2) {
                problems.push(format!("model.bundle: the model gives {elements} scores for {} labels; correct output.labels", output.labels.len()));
            }
        }
    }
    if let Some(heatmap) = output.heatmap {
        match outputs.get(heatmap.index) {
            None => problems.push(format!(
                "model.bundle: output.heatmap.index is {}, the model has {} outputs; correct it",
                heatmap.index,
                outputs.len()
            )),
            Some(spec) if map_size(spec).is_none() || spec.elements() > MAX_OUTPUT => {
                problems.push(format!(
                    "model.bundle: the heatmap output is {:?}; expected [1, height, width, 1]",
                    spec.shape
                ));
            }
            Some(_) => {}
        }
    }
    problems
}
