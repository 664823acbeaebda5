//! The domain: regions, predictions, decisions, outcomes and the reasons for which a file is rejected.

use serde::{Deserialize, Serialize};

use crate::imaging::Picture;
use crate::imaging::quality::Assessment;
use crate::manifest::{Activation, DecisionRule, Output};

/// A rectangle in the source picture, in pixels; half open (`x..x + width`, `y..y + height`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Roi {
    /// Left edge, 0 at the left of the picture.
    pub x: u32,
    /// Top edge, 0 at the top of the picture.
    pub y: u32,
    /// Width in pixels, at least 1.
    pub width: u32,
    /// Height in pixels, at least 1.
    pub height: u32,
}

/// Why a file got no prediction. `code` is part of the published contract.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct RejectReason {
    /// Stable machine-readable code.
    pub code: RejectCode,
    /// One line for a person; never a file name or anything out of a header.
    pub message: String,
}

impl RejectReason {
    /// A reason with its code and a one-line message.
    pub fn new(code: RejectCode, message: impl Into<String>) -> Self {
        Self {
            code,
            message: message.into(),
        }
    }
}

/// The published reason codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RejectCode {
    /// The file has no bytes.
    Empty,
    /// The file is larger than `limits.file_bytes`.
    FileTooLarge,
    /// The bytes are in no known image format.
    NotAnImage,
    /// A known image format in a variant that is not supported.
    Unsupported,
    /// A DICOM object without pixels (report, presentation state, DICOMDIR, ...): skipped, not a fault.
    NotAnImageObject,
    /// The data ends before the picture does.
    Truncated,
    /// The data contradicts itself.
    Corrupt,
    /// More pixels than `limits.pixels`, or more memory than `limits.decode_bytes`.
    TooManyPixels,
    /// Fewer pixels a side than the pipeline can work with.
    TooSmall,
    /// No pixel is brighter than the crop's threshold: nothing to look at.
    Blank,
    /// The file cannot be opened or read.
    Unreadable,
    /// A FIFO, socket or device, not a file.
    NotAFile,
    /// A symbolic link that leads out of the export folder.
    OutsideFolder,
    /// The process died each time it worked on this file.
    Crashed,
    /// The model did not run on this picture.
    InferenceFailed,
    /// A defect of the program on this file; it was contained.
    Internal,
}

impl RejectCode {
    /// Whether the file is no image on purpose (a report, an index), which is nothing to complain about.
    pub fn is_skip(self) -> bool {
        self == Self::NotAnImageObject
    }

    /// The code as it is published.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Empty => "empty",
            Self::FileTooLarge => "file_too_large",
            Self::NotAnImage => "not_an_image",
            Self::NotAnImageObject => "not_an_image_object",
            Self::Unsupported => "unsupported",
            Self::Truncated => "truncated",
            Self::Corrupt => "corrupt",
            Self::TooManyPixels => "too_many_pixels",
            Self::TooSmall => "too_small",
            Self::Blank => "blank",
            Self::Unreadable => "unreadable",
            Self::NotAFile => "not_a_file",
            Self::OutsideFolder => "outside_folder",
            Self::Crashed => "crashed",
            Self::InferenceFailed => "inference_failed",
            Self::Internal => "internal",
        }
    }
}

/// What the probability says against the threshold. Never a diagnosis.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Decision {
    /// Probability at or above the threshold.
    Positive,
    /// Probability below the threshold.
    Negative,
    /// Inside the model's band of doubt, or a picture that is not what the model was made for.
    Indeterminate,
}

impl Decision {
    /// The decision by `rule`: at or above the threshold is positive, inside the band indeterminate.
    pub fn by(rule: &DecisionRule, probability: f64) -> Self {
        match rule.indeterminate {
            Some([low, high]) if low <= probability && probability < high => Self::Indeterminate,
            _ if probability >= rule.threshold => Self::Positive,
            _ => Self::Negative,
        }
    }

    /// The decision as it is published.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Positive => "positive",
            Self::Negative => "negative",
            Self::Indeterminate => "indeterminate",
        }
    }

    /// The decision in words that promise nothing.
    pub fn statement(self) -> &'static str {
        match self {
            Self::Positive => "tumour pattern found by this model",
            Self::Negative => "no tumour pattern found by this model",
            Self::Indeterminate => "this model gives no clear answer for this image",
        }
    }
}

/// Whose rule decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum RuleOwner {
    /// The model's, as its manifest has it.
    Model,
    /// The appliance's: its configuration sets the threshold, the band, or both.
    Appliance,
}

/// The rule in force: the model's, or what the appliance's configuration makes of it.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RuleInForce {
    /// The rule.
    pub rule: DecisionRule,
    /// Whose it is.
    pub owner: RuleOwner,
}

impl std::fmt::Display for RuleInForce {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "threshold {}", self.rule.threshold)?;
        if let Some([low, high]) = self.rule.indeterminate {
            write!(f, ", indeterminate from {low} to {high}")?;
        }
        match self.owner {
            RuleOwner::Model => Ok(()),
            RuleOwner::Appliance => f.write_str(" (by [decision], not the model's own)"),
        }
    }
}

/// What the model said about one picture.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Probability of each label, in the manifest's order, 0-1.
    pub scores: Vec<f64>,
    /// Index of the most probable label.
    pub label: usize,
    /// Sum of the positive labels' probabilities, 0-1.
    pub probability: f64,
    /// The decision by the rule in force.
    pub decision: Decision,
    /// Class activation map, when the model has one.
    pub heatmap: Option<Heatmap>,
}

/// A class activation map: how much each cell of the model's input spoke for a positive label.
#[derive(Debug, Clone, PartialEq)]
pub struct Heatmap {
    /// Cells across.
    pub width: usize,
    /// Cells down.
    pub height: usize,
    /// Row by row: above 0 speaks for a positive label, below 0 against. The unit is the model's affair: of a linear map it is log-odds, of the
    /// shipped one four times a cell's log-odds of showing a lesion, and nothing below 0.
    pub cells: Vec<f32>,
}

/// How long each stage took, milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Timings {
    /// From bytes to pixels.
    pub decode: f64,
    /// Finding the brain.
    pub roi: f64,
    /// Scaling and quantizing.
    pub resize: f64,
    /// Running the model.
    pub infer: f64,
    /// All of it.
    pub total: f64,
}

/// What became of one picture that could be classified.
#[derive(Debug, Clone, PartialEq)]
pub struct Classified {
    /// What the model said.
    pub prediction: Prediction,
    /// Where in the picture it looked.
    pub roi: Roi,
    /// What it saw there, cropped and resized; kept only for previews.
    pub seen: Option<Picture>,
    /// What was measured on the picture; `None` where the model takes pictures uncropped.
    pub quality: Option<Assessment>,
    /// How long the stages took.
    pub timings: Timings,
}

impl Prediction {
    /// Interprets the score tensor's real values and, if there is one, the heatmap tensor's.
    ///
    /// One value with two labels is the second label's probability (or log-odds); otherwise there is a value for each
    /// label. `Err` names what does not fit.
    pub fn interpret(
        output: &Output,
        rule: &DecisionRule,
        values: &[f32],
        heatmap: Option<Heatmap>,
    ) -> Result<Self, String> {
        if values.iter().any(|v| !v.is_finite()) {
            return Err("the model's output is not a finite number".into());
        }
        let real = |v: f32| f64::from(v);
        let sigmoid = |x: f64| 1.0 / (1.0 + (-x).exp());
        let scores: Vec<f64> = match (values, output.labels.len(), output.activation) {
            ([value], 2, activation) => {
                let p = if activation == Activation::Logit {
                    sigmoid(real(*value))
                } else {
                    real(*value)
                };
                let p = p.clamp(0.0, 1.0);
                vec![1.0 - p, p]
            }
            (values, labels, activation) if values.len() == labels => match activation {
                Activation::Logit => {
                    let top = values
                        .iter()
                        .copied()
                        .map(real)
                        .fold(f64::NEG_INFINITY, f64::max);
                    let powers: Vec<f64> = values.iter().map(|v| (real(*v) - top).exp()).collect();
                    let sum: f64 = powers.iter().sum();
                    powers.iter().map(|p| p / sum).collect()
                }
                Activation::Sigmoid | Activation::Softmax => {
                    values.iter().map(|v| real(*v).clamp(0.0, 1.0)).collect()
                }
            },
            (values, labels, _) => {
                return Err(format!(
                    "the model gives {} scores for {labels} labels",
                    values.len()
                ));
            }
        };
        let label =
            (0..scores.len()).fold(0, |best, i| if scores[i] > scores[best] { i } else { best });
        let probability = output
            .labels
            .iter()
            .zip(&scores)
            .filter(|(label, _)| output.positive.contains(label))
            .map(|(_, score)| score)
            .sum::<f64>()
            .min(1.0);
        let decision = Decision::by(rule, probability);
        Ok(Self {
            scores,
            label,
            probability,
            decision,
            heatmap,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(activation: Activation, labels: &[&str], positive: &[&str]) -> Output {
        let own = |names: &[&str]| names.iter().map(|n| (*n).to_owned()).collect();
        Output {
            activation,
            index: 0,
            labels: own(labels),
            positive: own(positive),
            heatmap: None,
        }
    }

    #[test]
    fn half_is_positive_as_in_the_reference_application() {
        let rule = DecisionRule::default();
        assert_eq!(Decision::by(&rule, 0.5), Decision::Positive);
        assert_eq!(Decision::by(&rule, 0.499_999), Decision::Negative);
        let band = DecisionRule {
            threshold: 0.5,
            indeterminate: Some([0.4, 0.6]),
        };
        assert_eq!(Decision::by(&band, 0.4), Decision::Indeterminate);
        assert_eq!(Decision::by(&band, 0.6), Decision::Positive);
    }

    #[test]
    fn one_score_softmax_and_logits() {
        let rule = DecisionRule::default();
        let binary = output(Activation::Sigmoid, &["no", "yes"], &["yes"]);
        let p = Prediction::interpret(&binary, &rule, &[0.75], None).unwrap();
        assert_eq!(
            (p.label, p.decision, p.scores.clone()),
            (1, Decision::Positive, vec![0.25, 0.75])
        );

        let four = output(
            Activation::Softmax,
            &["glioma", "meningioma", "none", "pituitary"],
            &["glioma", "meningioma", "pituitary"],
        );
        let p = Prediction::interpret(&four, &rule, &[0.25, 0.25, 0.375, 0.125], None).unwrap();
        assert_eq!((p.label, p.decision), (2, Decision::Positive));
        assert!((p.probability - 0.625).abs() < 1e-9);

        let logit = output(Activation::Logit, &["no", "yes"], &["yes"]);
        let p = Prediction::interpret(&logit, &rule, &[0.0], None).unwrap();
        assert!((p.probability - 0.5).abs() < 1e-12);
        assert!(Prediction::interpret(&logit, &rule, &[0.0, 1.0, 2.0], None).is_err());
        assert!(Prediction::interpret(&logit, &rule, &[f32::NAN], None).is_err());
    }
}
