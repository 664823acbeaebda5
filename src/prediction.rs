//! The domain: regions, predictions, decisions, outcomes and the reasons for which a file is rejected.

use serde::{Deserialize, Serialize};

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
}
