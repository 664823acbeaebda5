//! PNG through `image`. Of an animated PNG the default image is taken, as `imread` does.

use std::io::Cursor;

use image::codecs::png::PngDecoder;
use image::{DynamicImage, ImageDecoder};

use super::{
    DecodeNote, Limits, Picture, corrupt, from_image_error, note, orient, reduce, truncated,
    without_needless_colour,
};
use crate::prediction::RejectReason;

/// Walks the chunks: refuses what is too large or cut off, notes an animation.
///
/// Only lengths and types are read. The checksums are the decoder's work.
pub(super) fn check(
    bytes: &[u8],
    limits: &Limits,
    notes: &mut Vec<DecodeNote>,
) -> Result<(), RejectReason> {
    let ends = || truncated("PNG: the data ends before the end chunk");
    let mut rest = &bytes[8..];
    let mut first = true;
    loop {
        let ([l3, l2, l1, l0, kind @ ..], body) = rest.split_first_chunk::<8>().ok_or_else(ends)?;
        let length = u32::from_be_bytes([*l3, *l2, *l1, *l0]) as usize;
        if first != (kind == b"IHDR") {
            return Err(corrupt(
                "PNG: the header chunk is not the first one, or not the only one",
            ));
        }
        let data = body.get(..length);
        match kind {
            b"IHDR" => {
                let Some(&[w3, w2, w1, w0, h3, h2, h1, h0, depth, color, ..]) = data else {
                    return Err(if body.len() < 13 {
                        ends()
                    } else {
                        corrupt("PNG: the header chunk is too short")
                    });
                };
                let width = u32::from_be_bytes([w3, w2, w1, w0]);
                let height = u32::from_be_bytes([h3, h2, h1, h0]);
                // A palette may carry alpha; so may any of the others, through a tRNS chunk.
                let samples = if color == 0 { 2 } else { 4 };
                let decoded = samples * if depth == 16 { 2 } else { 1 };
                limits.check(width.into(), height.into(), decoded + 3)?;
            }
            b"acTL" => note(notes, DecodeNote::FirstPageOnly),
            b"IEND" => return Ok(()),
            _ => {}
        }
        first = false;
        // The body is followed by its checksum.
        rest = length
            .checked_add(4)
            .and_then(|skip| body.get(skip..))
            .ok_or_else(ends)?;
    }
}

pub(super) fn decode(
    bytes: &[u8],
    limits: &Limits,
    notes: &mut Vec<DecodeNote>,
) -> Result<Picture, RejectReason> {
    let reason = |error| from_image_error("PNG", &error);
    let mut decoder =
        PngDecoder::with_limits(Cursor::new(bytes), limits.for_image()).map_err(reason)?;
    let orientation = decoder.orientation().map_err(reason)?;
    let image = DynamicImage::from_decoder(decoder).map_err(reason)?;
    Ok(orient(
        without_needless_colour(reduce(image, notes)?),
        orientation,
        notes,
    ))
}
