//! BMP through `image`.

use std::io::Cursor;

use image::codecs::bmp::BmpDecoder;
use image::{DynamicImage, ImageDecoder};

use super::{Limits, Picture, from_image_error, reduce, without_needless_colour};
use crate::prediction::RejectReason;

pub(super) fn check(bytes: &[u8], limits: &Limits) -> Result<(), RejectReason> {
    open(bytes, limits).map(|_| ())
}

fn open<'a>(
    bytes: &'a [u8],
    limits: &Limits,
) -> Result<BmpDecoder<Cursor<&'a [u8]>>, RejectReason> {
    let decoder =
        BmpDecoder::new(Cursor::new(bytes)).map_err(|error| from_image_error("BMP", &error))?;
    let (width, height) = decoder.dimensions();
    limits.check(width.into(), height.into(), 4 + 3)?;
    Ok(decoder)
}

pub(super) fn decode(bytes: &[u8], limits: &Limits) -> Result<Picture, RejectReason> {
    let decoder = open(bytes, limits)?;
    let image =
        DynamicImage::from_decoder(decoder).map_err(|error| from_image_error("BMP", &error))?;
    let mut picture = reduce(image, &mut Vec::new())?;
    if let (Some(masks), Picture::Rgb(image)) = (sixteen_bit_masks(bytes), &mut picture) {
        for pixel in image.pixels_mut() {
            for (level, mask) in pixel.0.iter_mut().zip(masks) {
                *level &= mask;
            }
        }
    }
    Ok(without_needless_colour(picture))
}

/// For 16 bits a pixel: which high bits of red, green and blue the file holds.
///
/// `imread` leaves the missing low bits 0, where `image` stretches 5 and 6 bits to the full range; keeping the high
/// bits of the latter gives the former exactly.
fn sixteen_bit_masks(bytes: &[u8]) -> Option<[u8; 3]> {
    let word = |at: usize| {
        bytes
            .get(at..at + 4)
            .map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]))
    };
    let bits = bytes
        .get(28..30)
        .map(|b| u16::from_le_bytes([b[0], b[1]]))?;
    if bits != 16 || word(14)? < 40 {
        return None;
    }
    let kept = |mask: u32| {
        0xff_u8
            .checked_shl(8 - mask.count_ones().min(8))
            .unwrap_or(0)
    };
    match word(30)? {
        3 => Some([kept(word(54)?), kept(word(58)?), kept(word(62)?)]),
        _ => Some([0xf8; 3]),
    }
}
