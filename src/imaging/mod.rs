//! From the bytes of a file to what the model sees: decode, crop to the brain, resize, quantize.
//!
//! Everything here is pure: bytes and parameters in, pixels or a [`DecodeError`](crate::prediction::RejectReason) out.
//! The routine is that of the Flask application ScanSentry descends from (OpenCV's `imread`, `crop_imgs`,
//! `preprocess_imgs`), and its answers have to match it.

#![allow(
    clippy::inline_always,
    reason = "what `vectorized` compiles anew has to be inlined into it"
)]

pub mod decode;
pub mod dicom;
pub mod explain;
pub mod heatmap;
pub mod quality;
pub mod quantize;
pub mod resize;
pub mod roi;

use image::{GrayImage, RgbImage};

/// An 8-bit picture as OpenCV's `imread` would give it, without its channel reversal.
///
/// A single-channel file stays single-channel: `imread` would triple it, and the grey conversion of three equal
/// channels gives the same level back, so nothing is lost and two thirds of the work is saved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Picture {
    /// One channel, 0 black to 255 white.
    Gray(GrayImage),
    /// Three channels, red first.
    Rgb(RgbImage),
}

impl Picture {
    /// Width in pixels.
    pub fn width(&self) -> u32 {
        match self {
            Self::Gray(image) => image.width(),
            Self::Rgb(image) => image.width(),
        }
    }

    /// Height in pixels.
    pub fn height(&self) -> u32 {
        match self {
            Self::Gray(image) => image.height(),
            Self::Rgb(image) => image.height(),
        }
    }
}

/// Runs `kernel` compiled for AVX2 where the processor has it, else as everything else is compiled; the answer is the same. Only what is inlined into
/// `kernel` gains: loops, and functions that must be (`#[inline(always)]`). On ARM nothing is to be chosen: 64-bit processors all have NEON, and Debian's
/// 32-bit architecture does without.
#[inline(always)]
pub(crate) fn vectorized<R>(kernel: impl FnOnce() -> R) -> R {
    #[cfg(target_arch = "x86_64")]
    if let Some(avx2) = fearless_simd::Level::new().as_avx2() {
        return fearless_simd::Simd::vectorize(avx2, kernel);
    }
    kernel()
}

/// One pixel of full-range BT.601 `YCbCr` (JFIF) to red, green, blue.
pub(crate) fn ycbcr_to_rgb([y, cb, cr]: [u8; 3]) -> [u8; 3] {
    let (y, cb, cr) = (f32::from(y), f32::from(cb) - 128.0, f32::from(cr) - 128.0);
    // `as u8` saturates.
    [
        y + 1.402 * cr,
        y - 0.344_136 * cb - 0.714_136 * cr,
        y + 1.772 * cb,
    ]
    .map(|level| level.round() as u8)
}
