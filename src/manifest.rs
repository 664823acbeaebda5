//! The model bundle: its files, and its `manifest.toml`: what a `.tflite` file does not say about itself.
//!
//! ```text
//! models/<name>/manifest.toml       this file
//!              /manifest.toml.sig   its Ed25519 signature, where one is wanted
//!              /model.tflite        the model, named by `file`, pinned by `sha256`
//!              /golden/*.png        generated images with the probability that the model gives
//!              /MODEL_CARD.md       for people
//! ```

use std::fs::{File, OpenOptions};
use std::io::Read as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::imaging::quantize::ColorOrder;
use crate::imaging::resize::ResizeFilter;

/// The only manifest format so far.
pub const FORMAT: u32 = 1;

/// Name of the manifest inside a bundle.
pub const MANIFEST: &str = "manifest.toml";

/// Name of the manifest's signature inside a bundle.
pub const SIGNATURE: &str = "manifest.toml.sig";

/// Name of the page for people inside a bundle.
pub const MODEL_CARD: &str = "MODEL_CARD.md";

/// Largest manifest, signature and model card, in bytes.
pub const MAX_TEXT: u64 = 1 << 20;

/// Largest model file, in bytes: VGG16 as float32 is 550 MB.
pub const MAX_MODEL: u64 = 1 << 30;

/// Largest golden image, in bytes.
pub const MAX_GOLDEN: u64 = 64 << 20;

/// Most golden images.
const MAX_GOLDEN_IMAGES: usize = 100;

/// Largest side of a model's input, in pixels; a limit against absurd manifests.
const MAX_SIDE: u32 = 4096;

/// A parsed and checked manifest.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// Format of this file: [`FORMAT`].
    pub format: u32,
    /// Name of the model; letters, digits, `-`, `_`, `.`.
    pub name: String,
    /// Version of the model, free text.
    pub version: String,
    /// File name of the model inside the bundle.
    pub file: String,
    /// SHA-256 of the model file, 64 lower-case hex digits.
    pub sha256: String,
    /// One line about the model.
    #[serde(default)]
    pub description: String,
    /// What the model may be used for.
    #[serde(default)]
    pub intended_use: String,
    /// What the model takes.
    pub input: Input,
    /// How a picture is prepared.
    #[serde(default)]
    pub preprocess: Preprocess,
    /// What the model gives.
    pub output: Output,
    /// How a probability becomes a decision.
    #[serde(default)]
    pub decision: DecisionRule,
    /// Images whose outputs must be reproduced at load.
    #[serde(default)]
    pub golden: Golden,
}

/// The model's input picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Input {
    /// Pixels.
    pub width: u32,
    /// Pixels.
    pub height: u32,
    /// Order of the channels in the tensor.
    #[serde(default)]
    pub color_order: ColorOrder,
}

/// The steps between the decoded picture and the tensor.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Preprocess {
    /// Finding the brain.
    pub crop: Crop,
    /// Scaling to the input size.
    pub resize: Resize,
    /// From 8-bit levels to the real numbers that the network was trained on.
    pub normalize: Normalize,
}

/// The crop: the reference application's `crop_imgs`, or none.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Crop {
    /// Which routine.
    pub method: CropMethod,
    /// Grey level above which a pixel is foreground, 0-254.
    pub threshold: u8,
    /// Iterations of a 3x3 erosion, 0-32.
    pub erode: u32,
    /// Iterations of a 3x3 dilation, 0-32.
    pub dilate: u32,
    /// Pixels added on every side of the extreme points (`add_pixels_value`), -256 to 256.
    pub margin: i32,
}

impl Default for Crop {
    fn default() -> Self {
        Self {
            method: CropMethod::BrainContour,
            threshold: 45,
            erode: 2,
            dilate: 2,
            margin: 0,
        }
    }
}

/// Names of the crop routines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CropMethod {
    /// To the extreme points of the largest outer contour.
    BrainContour,
    /// The whole picture.
    None,
}

/// Scaling to the input size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Resize {
    /// Interpolation, with OpenCV's meaning of the name.
    pub filter: ResizeFilter,
    /// Keep the aspect ratio and fill with black; otherwise stretch.
    pub keep_aspect: bool,
}

impl Default for Resize {
    fn default() -> Self {
        Self {
            filter: ResizeFilter::Cubic,
            keep_aspect: false,
        }
    }
}

/// From levels 0-255 to real numbers.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Normalize {
    /// Which formula.
    pub mode: NormalizeMode,
    /// For `mean-std`: subtracted, in levels, in the tensor's channel order.
    pub mean: [f32; 3],
    /// For `mean-std`: divided by, in levels, above 0.
    pub std: [f32; 3],
}

impl Default for Normalize {
    fn default() -> Self {
        Self {
            mode: NormalizeMode::None,
            mean: [0.0; 3],
            std: [1.0; 3],
        }
    }
}

/// Names of the normalisation formulas.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum NormalizeMode {
    /// The levels themselves.
    None,
    /// `level / 255`.
    ZeroOne,
    /// `level / 127.5 - 1`.
    MinusOneOne,
    /// VGG16's `preprocess_input`: minus 103.939, 116.779 and 123.68 in the first, second and third channel of the tensor. The reference
    /// application gives it RGB, so there red loses 103.939: `rgb` with `caffe` is that; `bgr` with `caffe` is what VGG16 was trained on.
    Caffe,
    /// `(level - mean) / std`.
    MeanStd,
}

/// The output tensor with the scores.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Output {
    /// What the numbers are.
    pub activation: Activation,
    /// Which output tensor holds the scores.
    #[serde(default)]
    pub index: usize,
    /// Names of the labels. One score means two labels: the second one's probability is the score.
    pub labels: Vec<String>,
    /// The labels that make a positive decision.
    pub positive: Vec<String>,
    /// The class activation map, if the model has one.
    #[serde(default)]
    pub heatmap: Option<HeatmapOutput>,
}

/// What the output numbers are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activation {
    /// Probabilities, each for itself.
    Sigmoid,
    /// Probabilities that add up to 1.
    Softmax,
    /// Log-odds; ScanSentry applies the sigmoid (one score) or the softmax (several).
    Logit,
}

/// The output tensor with the class activation map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HeatmapOutput {
    /// Which output tensor.
    pub index: usize,
}

/// How a probability becomes a decision.
#[derive(Debug, Clone, Copy, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
pub struct DecisionRule {
    /// At or above this the decision is positive, 0-1. The reference application's is 0.5.
    pub threshold: f64,
    /// From (included) and to (excluded) which probability the decision is `indeterminate`; the band holds the threshold.
    pub indeterminate: Option<[f64; 2]>,
}

impl DecisionRule {
    /// What is wrong with the rule: the threshold lies between 0 and 1, and the band around it within 0 to 1.
    pub fn problems(&self) -> Vec<String> {
        let Self {
            threshold,
            indeterminate,
        } = *self;
        let mut problems = Vec::new();
        if !(threshold > 0.0 && threshold < 1.0) {
            problems.push(format!(
                "decision.threshold: {threshold} is out of range; expected above 0 and below 1"
            ));
        } else if let Some([low, high]) = indeterminate
            && !(0.0 <= low && low <= threshold && threshold <= high && high <= 1.0)
        {
            problems.push(format!(
                "decision.indeterminate: [{low}, {high}] does not hold the threshold {threshold}; expected [low, high] around it, from 0 to 1"
            ));
        }
        problems
    }
}

impl Default for DecisionRule {
    fn default() -> Self {
        Self {
            threshold: 0.5,
            indeterminate: None,
        }
    }
}

/// Golden images.
#[derive(Debug, Clone, PartialEq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Golden {
    /// Largest accepted difference of the probability, 0-1.
    pub tolerance: f64,
    /// The images.
    pub image: Vec<GoldenImage>,
}

/// One golden image.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GoldenImage {
    /// Path inside the bundle.
    pub file: String,
    /// Probability of the positive labels, as recorded.
    pub probability: f64,
}

/// Reads a file of a bundle: a regular one of at most `limit` bytes.
pub fn read_bounded(path: &Path, limit: u64) -> std::io::Result<Vec<u8>> {
    // A pipe would keep the reader waiting for ever.
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(rustix::fs::OFlags::NONBLOCK.bits().cast_signed())
        .open(path)?;
    check_file(&file, limit)?;
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// The size of a regular file in bytes; an error for anything else, and beyond `limit`.
pub fn check_file(file: &File, limit: u64) -> std::io::Result<u64> {
    let metadata = file.metadata()?;
    if !metadata.is_file() {
        return Err(std::io::Error::other("not a regular file"));
    }
    if metadata.len() > limit {
        return Err(std::io::Error::other(format!("larger than {limit} bytes")));
    }
    Ok(metadata.len())
}

impl Manifest {
    /// Parses and checks a manifest; every problem is one line `key: value; hint`.
    pub fn parse(text: &str) -> Result<Self, Vec<String>> {
        let manifest: Self = toml::from_str(text).map_err(|error| {
            let (line, message) = crate::config::line_and_message(text, &error);
            vec![format!(
                "manifest.toml:{line}: {message}; the format is described in models/README.md"
            )]
        })?;
        let problems = manifest.problems();
        if problems.is_empty() {
            Ok(manifest)
        } else {
            Err(problems)
        }
    }

    fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        let mut check = |ok: bool, line: String| {
            if !ok {
                problems.push(format!("manifest.toml: {line}"));
            }
        };
        let plain = |name: &str| {
            !name.is_empty()
                && name.len() <= 64
                && name
                    .chars()
                    .all(|c| c.is_ascii_alphanumeric() || "-_.+".contains(c))
        };
        let inside = |path: &str| {
            let path = Path::new(path);
            path.components().next().is_some()
                && path
                    .components()
                    .all(|c| matches!(c, std::path::Component::Normal(_)))
        };
        let side = 1..=MAX_SIDE;
        check(
            self.format == FORMAT,
            format!(
                "format: {} is not known; this version reads format {FORMAT}",
                self.format
            ),
        );
        check(
            plain(&self.name),
            format!(
                "name: {:?} is not valid; use 1-64 letters, digits, - _ . +",
                self.name
            ),
        );
        check(
            plain(&self.version),
            format!(
                "version: {:?} is not valid; use 1-64 letters, digits, - _ . +",
                self.version
            ),
        );
        check(
            inside(&self.file),
            format!(
                "file: {:?} is not a path inside the bundle; give a file name",
                self.file
            ),
        );
        check(
            self.sha256.len() == 64
                && self
                    .sha256
                    .bytes()
                    .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b)),
            format!(
                "sha256: {:?} is not 64 lower-case hex digits; use sha256sum",
                self.sha256
            ),
        );
        check(
            side.contains(&self.input.width) && side.contains(&self.input.height),
            format!(
                "input: {}x{} is out of range; expected 1-{MAX_SIDE}",
                self.input.width, self.input.height
            ),
        );
        let crop = &self.preprocess.crop;
        check(
            crop.threshold < 255,
            "preprocess.crop.threshold: 255 leaves no foreground; expected 0-254".into(),
        );
        check(
            crop.erode <= 32 && crop.dilate <= 32,
            format!(
                "preprocess.crop: {} erosions and {} dilations; expected 0-32 each",
                crop.erode, crop.dilate
            ),
        );
        check(
            (-256..=256).contains(&crop.margin),
            format!(
                "preprocess.crop.margin: {} is out of range; expected -256 to 256",
                crop.margin
            ),
        );
        let normalize = &self.preprocess.normalize;
        check(
            normalize.mean.iter().all(|m| m.is_finite()) && normalize.std.iter().all(|s| s.is_finite() && *s > 0.0),
            "preprocess.normalize: mean and std must be finite, std above 0; give three numbers each".into(),
        );
        let output = &self.output;
        let mut sorted = output.labels.clone();
        sorted.sort();
        sorted.dedup();
        check(
            (2..=1000).contains(&output.labels.len()) && sorted.len() == output.labels.len() && output.labels.iter().all(|l| plain(l)),
            "output.labels: need 2-1000 different names of letters, digits, - _ . +; one score still has two labels".into(),
        );
        check(
            !output.positive.is_empty()
                && output.positive.iter().all(|p| output.labels.contains(p)),
            format!(
                "output.positive: {:?} must name at least one of output.labels; check the spelling",
                output.positive
            ),
        );
        check(
            output.heatmap.is_none_or(|h| h.index != output.index),
            "output.heatmap.index: is the same tensor as the scores; give another index".into(),
        );
        for line in self.decision.problems() {
            check(false, line);
        }
        check(
            (0.0..=1.0).contains(&self.golden.tolerance),
            format!(
                "golden.tolerance: {} is out of range; expected 0-1",
                self.golden.tolerance
            ),
        );
        check(
            self.golden.image.len() <= MAX_GOLDEN_IMAGES,
            format!(
                "golden.image: {} images; expected at most {MAX_GOLDEN_IMAGES}",
                self.golden.image.len()
            ),
        );
        for golden in &self.golden.image {
            check(
                inside(&golden.file),
                format!(
                    "golden.image.file: {:?} is not a path inside the bundle; give a relative path",
                    golden.file
                ),
            );
            check(
                (0.0..=1.0).contains(&golden.probability),
                format!(
                    "golden.image.probability: {} is out of range; expected 0-1",
                    golden.probability
                ),
            );
        }
        problems
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MINIMAL: &str = r#"
        format = 1
        name = "m"
        version = "1"
        file = "model.tflite"
        sha256 = "0000000000000000000000000000000000000000000000000000000000000000"
        [input]
        width = 224
        height = 224
        [output]
        activation = "sigmoid"
        labels = ["no_tumor", "tumor"]
        positive = ["tumor"]
    "#;

    #[test]
    fn a_minimal_manifest_means_the_reference_application() {
        let manifest = Manifest::parse(MINIMAL).unwrap();
        assert_eq!(
            manifest.preprocess.crop,
            Crop {
                method: CropMethod::BrainContour,
                threshold: 45,
                erode: 2,
                dilate: 2,
                margin: 0
            }
        );
        assert_eq!(manifest.preprocess.resize.filter, ResizeFilter::Cubic);
        assert_eq!(manifest.decision.threshold.to_bits(), 0.5_f64.to_bits());
    }

    #[test]
    fn all_problems_are_listed() {
        let text = MINIMAL
            .replace("format = 1", "format = 2")
            .replace("\"model.tflite\"", "\"../model.tflite\"")
            .replace("[\"tumor\"]", "[\"tumour\"]");
        let problems = Manifest::parse(&text).unwrap_err();
        insta::assert_snapshot!(problems.join("\n"), @r#"
        manifest.toml: format: 2 is not known; this version reads format 1
        manifest.toml: file: "../model.tflite" is not a path inside the bundle; give a file name
        manifest.toml: output.positive: ["tumour"] must name at least one of output.labels; check the spelling
        "#);
        let problems = Manifest::parse("format = 1\nnmae = 'x'\n").unwrap_err();
        assert!(
            problems[0].starts_with("manifest.toml:2: unknown field `nmae`"),
            "{problems:?}"
        );
    }
}
