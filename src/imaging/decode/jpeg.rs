//! JPEG through `zune-jpeg`, whose levels are those of libjpeg-turbo (OpenCV's decoder) to within a few.
//!
//! A decoder that meets the end of its data fills the rest with grey and may not say so; and a file that is still being
//! written is exactly that. So the markers are walked first: a JPEG is complete when its end-of-image marker is there.

use image::metadata::Orientation;
use image::{GrayImage, RgbImage};
use zune_core::bytestream::ZCursor;
use zune_core::colorspace::ColorSpace;
use zune_core::options::DecoderOptions;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;

use super::{
    DecodeNote, Limits, Picture, corrupt, one_line, orient, truncated, unsupported,
    without_needless_colour,
};
use crate::prediction::RejectReason;

/// What the frame header (SOF) says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Frame {
    /// The SOF marker's low byte, 0xC0 to 0xCF.
    pub marker: u8,
    /// Bits a sample.
    pub precision: u8,
    /// Width in pixels.
    pub width: u16,
    /// Height in pixels.
    pub height: u16,
    /// Number of components.
    pub components: u8,
    /// Number of scans up to the end of the image.
    pub scans: u32,
}

/// Walks the markers from start to end of image.
///
/// `on_frame` sees the frame header before the rest of the file is looked at, so that a claim beyond the limits is
/// refused even when the file ends early.
pub(crate) fn walk(
    bytes: &[u8],
    mut on_frame: impl FnMut(&Frame) -> Result<(), RejectReason>,
) -> Result<Frame, RejectReason> {
    let ends = || truncated("JPEG: the data ends before the end-of-image marker");
    let mut frame: Option<Frame> = None;
    let mut at = 2; // behind the start-of-image marker
    loop {
        // The next marker: 0xFF, any number of fill bytes 0xFF, a byte that is neither 0 nor 0xFF.
        let skipped = memchr::memchr(0xff, bytes.get(at..).ok_or_else(ends)?).ok_or_else(ends)?;
        at += skipped;
        while *bytes.get(at).ok_or_else(ends)? == 0xff {
            at += 1;
        }
        let marker = bytes[at];
        at += 1;
        match marker {
            0x00 | 0x01 | 0xd0..=0xd8 => continue,
            0xd9 => {
                return frame.ok_or_else(|| corrupt("JPEG: the image ends without a frame header"));
            }
            _ => {}
        }
        let length = match bytes.get(at..at + 2) {
            Some(&[high, low]) => usize::from(u16::from_be_bytes([high, low])),
            _ => return Err(ends()),
        };
        if length < 2 {
            return Err(corrupt(
                "JPEG: a segment is shorter than its own length field",
            ));
        }
        let segment = bytes.get(at + 2..at + length).ok_or_else(ends)?;
        at += length;
        match marker {
            0xc0..=0xc3 | 0xc5..=0xc7 | 0xc9..=0xcb | 0xcd..=0xcf => {
                let &[precision, h1, h0, w1, w0, components, ..] = segment else {
                    return Err(corrupt("JPEG: the frame header is too short"));
                };
                if frame.is_some() {
                    return Err(corrupt("JPEG: a second frame header"));
                }
                let found = Frame {
                    marker,
                    precision,
                    width: u16::from_be_bytes([w1, w0]),
                    height: u16::from_be_bytes([h1, h0]),
                    components,
                    scans: 0,
                };
                on_frame(&found)?;
                frame = Some(found);
            }
            0xda => {
                let Some(frame) = frame.as_mut() else {
                    return Err(corrupt("JPEG: pixel data before the frame header"));
                };
                frame.scans += 1;
            }
            _ => {}
        }
    }
}

/// Refuses what is too large, not supported or cut off.
pub(super) fn check(bytes: &[u8], limits: &Limits) -> Result<(), RejectReason> {
    let frame = walk(bytes, |frame| {
        if !(0xc0..=0xc2).contains(&frame.marker) {
            return Err(unsupported(
                "JPEG: lossless, hierarchical and arithmetic-coded files are not supported",
            ));
        }
        if frame.precision != 8 {
            return Err(unsupported(format!(
                "JPEG: {} bits a sample; only 8 are supported",
                frame.precision
            )));
        }
        limits.check(frame.width.into(), frame.height.into(), 3)
    })?;
    // A block of 8 x 8 pixels takes a code for its mean and, in a sequential file, one for the end of the block: a bit each
    // at the very least. Decoders fill what is missing with grey.
    let blocks = u64::from(frame.width).div_ceil(8) * u64::from(frame.height).div_ceil(8);
    let bits = blocks * if frame.marker == 0xc2 { 1 } else { 2 };
    if bits > bytes.len() as u64 * 8 {
        return Err(corrupt(
            "JPEG: too little data for a picture of the size that the header claims",
        ));
    }
    // A decoder keeps all 16-bit coefficients where components come in scans of their own.
    let components = u64::from(frame.components);
    let bytes_per_pixel = if frame.scans > 1 {
        3 + 2 * components
    } else {
        3
    };
    limits.check(frame.width.into(), frame.height.into(), bytes_per_pixel)
}

/// Decodes the picture and applies its EXIF orientation.
pub(super) fn decode(bytes: &[u8], notes: &mut Vec<DecodeNote>) -> Result<Picture, RejectReason> {
    let (decoded, exif) = decode_raw(bytes, true)?;
    let orientation = exif
        .and_then(|exif| Orientation::from_exif_chunk(&exif))
        .unwrap_or(Orientation::NoTransforms);
    Ok(orient(without_needless_colour(decoded), orientation, notes))
}

/// Decodes the picture as stored, and gives its EXIF block; `rgb` false leaves the colour space of the file
/// (`YCbCr` samples in an [`RgbImage`]).
pub(crate) fn decode_raw(
    bytes: &[u8],
    rgb: bool,
) -> Result<(Picture, Option<Vec<u8>>), RejectReason> {
    // Lenient about what stands between the headers, strict from the first coefficient on.
    let options = DecoderOptions::default()
        .set_max_width(65535)
        .set_max_height(65535)
        .set_strict_mode(false);
    let mut decoder = JpegDecoder::new_with_options(ZCursor::new(bytes), options);
    decoder.decode_headers().map_err(|error| reason(&error))?;
    let input = decoder
        .input_colorspace()
        .ok_or_else(|| corrupt("JPEG: no colour space"))?;
    let output = match input {
        ColorSpace::Luma | ColorSpace::CMYK => input,
        ColorSpace::YCbCr if !rgb => input,
        _ => ColorSpace::RGB,
    };
    decoder.set_options(
        options
            .jpeg_set_out_colorspace(output)
            .set_strict_mode(true),
    );
    let (width, height) = decoder
        .dimensions()
        .ok_or_else(|| corrupt("JPEG: no dimensions"))?;
    let (width, height) = (width as u32, height as u32);
    let data = decoder.decode().map_err(|error| reason(&error))?;
    let picture = match output {
        ColorSpace::Luma => GrayImage::from_raw(width, height, data).map(Picture::Gray),
        ColorSpace::CMYK => {
            // The formula of OpenCV's `icvCvt_CMYK2BGR`.
            let (pixels, _) = data.as_chunks::<4>();
            let channel = |ink: u8, k: u8| {
                (u32::from(k) - ((u32::from(255 - ink) * u32::from(k)) >> 8)) as u8
            };
            let rgb = pixels
                .iter()
                .flat_map(|[c, m, y, k]| [channel(*c, *k), channel(*m, *k), channel(*y, *k)]);
            RgbImage::from_raw(width, height, rgb.collect()).map(Picture::Rgb)
        }
        _ => RgbImage::from_raw(width, height, data).map(Picture::Rgb),
    };
    let picture =
        picture.ok_or_else(|| corrupt("JPEG: the picture is smaller than its header says"))?;
    Ok((picture, decoder.exif().cloned()))
}

fn reason(error: &DecodeErrors) -> RejectReason {
    match error {
        DecodeErrors::Unsupported(_) => unsupported(one_line("JPEG", error)),
        _ => corrupt(one_line("JPEG", error)),
    }
}
