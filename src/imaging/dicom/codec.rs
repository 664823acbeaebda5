//! The transfer syntaxes: which are supported, and one frame's bytes into raw samples.
//!
//! dicom-rs has adapters for some of these codecs. They are not used: its RLE reader allocates what a fragment's first
//! four bytes claim and indexes without checks, and its JPEG reader collects all frames for each one. The decoders behind are
//! the same or better ones, each called with the header compared to `Rows` and `Columns` first.

use std::borrow::Cow;

use dicom_transfer_syntax_registry::{TransferSyntaxIndex, TransferSyntaxRegistry};

use super::super::decode::{Limits, corrupt, jpeg, unsupported};
use super::jpegls;
use super::walk::Encoding;
use crate::imaging::Picture;
use crate::prediction::RejectReason;

/// How the pixel data is compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Codec {
    /// Not at all.
    Native,
    /// Not at all, but in fragments (1.2.840.10008.1.2.1.98).
    EncapsulatedNative,
    /// Run lengths of byte planes.
    Rle,
    /// JPEG: baseline, extended with 8 bits, progressive.
    JpegDct,
    /// JPEG lossless, any predictor.
    JpegLossless,
    /// JPEG-LS, lossless or nearly so.
    JpegLs,
    /// JPEG 2000, lossless or not.
    Jpeg2000,
}

/// What a transfer syntax UID means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Syntax {
    pub encoding: Encoding,
    pub deflated: bool,
    pub codec: Codec,
}

/// Looks up a transfer syntax.
pub(super) fn syntax(uid: &str) -> Result<Syntax, RejectReason> {
    let plain = |explicit, big| Syntax {
        encoding: Encoding { explicit, big },
        deflated: false,
        codec: Codec::Native,
    };
    let compressed = |codec| Syntax {
        encoding: Encoding::EXPLICIT_LITTLE,
        deflated: false,
        codec,
    };
    Ok(match uid {
        "1.2.840.10008.1.2" => plain(false, false),
        "1.2.840.10008.1.2.1" => plain(true, false),
        "1.2.840.10008.1.2.2" => plain(true, true),
        "1.2.840.10008.1.2.1.98" => compressed(Codec::EncapsulatedNative),
        "1.2.840.10008.1.2.1.99" => Syntax {
            deflated: true,
            ..plain(true, false)
        },
        "1.2.840.10008.1.2.5" => compressed(Codec::Rle),
        "1.2.840.10008.1.2.4.50" | "1.2.840.10008.1.2.4.51" => compressed(Codec::JpegDct),
        "1.2.840.10008.1.2.4.57" | "1.2.840.10008.1.2.4.70" => compressed(Codec::JpegLossless),
        "1.2.840.10008.1.2.4.80" | "1.2.840.10008.1.2.4.81" => compressed(Codec::JpegLs),
        "1.2.840.10008.1.2.4.90" | "1.2.840.10008.1.2.4.91" => compressed(Codec::Jpeg2000),
        _ => return Err(unsupported(name(uid))),
    })
}

/// The name of an unsupported syntax. An unknown UID is not repeated: it may tell whose device wrote it.
fn name(uid: &str) -> String {
    match TransferSyntaxRegistry.get(uid) {
        Some(known) => format!(
            "DICOM: transfer syntax {} ({uid}) is not supported",
            known.name()
        ),
        None => "DICOM: an unknown or private transfer syntax is not supported".to_owned(),
    }
}

/// What the header says of the samples of one frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Shape {
    pub width: usize,
    pub height: usize,
    /// Samples a pixel, 1 or 3.
    pub channels: usize,
    /// 8 or 16.
    pub bits_allocated: u16,
    /// Colours in planes, not pixel by pixel.
    pub planar: bool,
    /// `YBR_FULL_422` without compression: two pixels share their colour.
    pub subsampled: bool,
    /// The photometric interpretation is `RGB`: a JPEG's colours are not to be converted.
    pub rgb: bool,
}

impl Shape {
    pub fn samples(&self) -> usize {
        self.width * self.height * self.channels
    }

    /// Bytes of one uncompressed frame.
    pub fn frame_bytes(&self) -> usize {
        let samples = if self.subsampled {
            self.width * self.height * 2
        } else {
            self.samples()
        };
        samples * usize::from(self.bits_allocated / 8)
    }
}

/// One frame's samples, pixel by pixel.
#[derive(Debug)]
pub(super) enum Raw<'a> {
    Bytes(Cow<'a, [u8]>),
    Words(Vec<u16>),
}

/// A decoded frame.
#[derive(Debug)]
pub(super) struct Decoded<'a> {
    pub raw: Raw<'a>,
    /// The decoder already turned the colours into RGB.
    pub is_rgb: bool,
}

/// Decodes one frame.
///
/// # Errors
/// When the compressed header and `shape` do not agree, or the data is damaged.
pub(super) fn decode<'a>(
    codec: Codec,
    data: Cow<'a, [u8]>,
    shape: &Shape,
    big: bool,
    swapped: bool,
    limits: &Limits,
) -> Result<Decoded<'a>, RejectReason> {
    match codec {
        Codec::Native | Codec::EncapsulatedNative => native(data, shape, big, swapped),
        Codec::Rle => rle(&data, shape),
        Codec::JpegDct => jpeg_dct(&data, shape, limits),
        Codec::JpegLossless => jpeg_lossless(&data, shape, limits),
        Codec::JpegLs => jpeg_ls(&data, shape),
        Codec::Jpeg2000 => jpeg2000(&data, shape, limits),
    }
}

fn too_little() -> RejectReason {
    corrupt("DICOM: less pixel data than Rows and Columns claim")
}

fn disagrees(codec: &str) -> RejectReason {
    corrupt(format!(
        "DICOM: the {codec} data has another shape than Rows, Columns and SamplesPerPixel claim"
    ))
}

fn native<'a>(
    data: Cow<'a, [u8]>,
    shape: &Shape,
    big: bool,
    swapped: bool,
) -> Result<Decoded<'a>, RejectReason> {
    let data = match data {
        Cow::Borrowed(data) => {
            Cow::Borrowed(data.get(..shape.frame_bytes()).ok_or_else(too_little)?)
        }
        Cow::Owned(mut data) => {
            if data.len() < shape.frame_bytes() {
                return Err(too_little());
            }
            data.truncate(shape.frame_bytes());
            Cow::Owned(data)
        }
    };
    let raw = if shape.bits_allocated == 16 {
        let word = |pair: &[u8; 2]| {
            if big {
                u16::from_be_bytes(*pair)
            } else {
                u16::from_le_bytes(*pair)
            }
        };
        Raw::Words(interleave(
            data.as_chunks::<2>().0.iter().map(word).collect(),
            shape,
        ))
    } else if swapped {
        // Bytes written as big-endian words.
        let mut data = data.into_owned();
        data.as_chunks_mut::<2>()
            .0
            .iter_mut()
            .for_each(|pair| pair.swap(0, 1));
        Raw::Bytes(Cow::Owned(interleave(data, shape)))
    } else if shape.planar && shape.channels > 1 {
        Raw::Bytes(Cow::Owned(interleave(data.into_owned(), shape)))
    } else {
        Raw::Bytes(data)
    };
    let raw = match raw {
        Raw::Bytes(data) if shape.subsampled => {
            // Y Y Cb Cr for two pixels (PS3.3, C.7.6.3.1.2).
            let pairs = data
                .as_chunks::<4>()
                .0
                .iter()
                .flat_map(|&[y0, y1, cb, cr]| [y0, cb, cr, y1, cb, cr]);
            Raw::Bytes(Cow::Owned(pairs.collect()))
        }
        raw => raw,
    };
    Ok(Decoded { raw, is_rgb: false })
}

/// Planes into pixels.
fn interleave<T: Copy>(data: Vec<T>, shape: &Shape) -> Vec<T> {
    if !shape.planar || shape.channels == 1 {
        return data;
    }
    let plane = shape.width * shape.height;
    (0..plane)
        .flat_map(|i| (0..shape.channels).map(move |c| c * plane + i))
        .map(|at| data[at])
        .collect()
}

/// RLE Lossless (PS3.5, annex G): a header of 16 words, then one `PackBits` segment for each byte plane, high bytes
/// first.
fn rle(data: &[u8], shape: &Shape) -> Result<Decoded<'static>, RejectReason> {
    let word = |index: usize| {
        let bytes = data.get(index * 4..index * 4 + 4).ok_or_else(too_little)?;
        Ok::<_, RejectReason>(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize)
    };
    let bytes_per_sample = usize::from(shape.bits_allocated / 8);
    let segments = shape.channels * bytes_per_sample;
    if word(0)? != segments {
        return Err(disagrees("RLE"));
    }
    let pixels = shape.width * shape.height;
    let mut planes = Vec::with_capacity(pixels * segments);
    for segment in 0..segments {
        let from = word(1 + segment)?;
        let to = if segment + 1 < segments {
            word(2 + segment)?
        } else {
            data.len()
        };
        let packed = data
            .get(from..to)
            .ok_or_else(|| corrupt("DICOM: an RLE segment lies outside the frame"))?;
        unpack(packed, pixels, &mut planes)?;
    }
    let raw = if bytes_per_sample == 1 {
        Raw::Bytes(Cow::Owned(interleave(
            planes,
            &Shape {
                planar: true,
                ..*shape
            },
        )))
    } else {
        let sample = |pixel: usize, channel: usize| {
            let high = planes[(channel * 2) * pixels + pixel];
            u16::from_be_bytes([high, planes[(channel * 2 + 1) * pixels + pixel]])
        };
        Raw::Words(
            (0..pixels)
                .flat_map(|p| (0..shape.channels).map(move |c| (p, c)))
                .map(|(p, c)| sample(p, c))
                .collect(),
        )
    };
    Ok(Decoded { raw, is_rgb: false })
}

/// Appends exactly `count` bytes out of `PackBits` runs.
fn unpack(mut packed: &[u8], count: usize, out: &mut Vec<u8>) -> Result<(), RejectReason> {
    let end = out.len() + count;
    while out.len() < end {
        let (&control, rest) = packed.split_first().ok_or_else(too_little)?;
        let room = end - out.len();
        match control {
            0..=127 => {
                let length = usize::from(control) + 1;
                let literal = rest.get(..length).ok_or_else(too_little)?;
                out.extend_from_slice(&literal[..length.min(room)]);
                packed = &rest[length..];
            }
            128 => packed = rest,
            129.. => {
                let (&value, rest) = rest.split_first().ok_or_else(too_little)?;
                out.resize(out.len() + (257 - usize::from(control)).min(room), value);
                packed = rest;
            }
        }
    }
    Ok(())
}

/// Walks a JPEG's markers and compares its frame header with the DICOM header.
fn jpeg_header(data: &[u8], shape: &Shape, limits: &Limits) -> Result<jpeg::Frame, RejectReason> {
    if !data.starts_with(&[0xff, 0xd8]) {
        return Err(corrupt(
            "DICOM: the pixel data is no JPEG though the transfer syntax says so",
        ));
    }
    let as_corrupt = |reason: RejectReason| corrupt(reason.message);
    jpeg::walk(data, |frame| {
        let claimed = (
            usize::from(frame.width),
            usize::from(frame.height),
            usize::from(frame.components),
        );
        if claimed != (shape.width, shape.height, shape.channels) {
            return Err(disagrees("JPEG"));
        }
        limits.check(
            frame.width.into(),
            frame.height.into(),
            3 + 2 * u64::from(frame.components),
        )
    })
    .map_err(|reason| {
        if reason.code == crate::prediction::RejectCode::Truncated {
            as_corrupt(reason)
        } else {
            reason
        }
    })
}

fn jpeg_dct(data: &[u8], shape: &Shape, limits: &Limits) -> Result<Decoded<'static>, RejectReason> {
    let frame = jpeg_header(data, shape, limits)?;
    if frame.precision != 8 {
        return Err(unsupported(format!(
            "DICOM: transfer syntax JPEG Extended with {} bits a sample is not supported, only with 8",
            frame.precision
        )));
    }
    if !(0xc0..=0xc2).contains(&frame.marker) {
        return Err(unsupported(
            "DICOM: this kind of JPEG (lossless or arithmetic-coded) is not supported here",
        ));
    }
    let adobe = data
        .windows(9)
        .take(4096)
        .any(|w| w.starts_with(&[0xff, 0xee]) && w.ends_with(b"Adobe"));
    let (picture, _) = jpeg::decode_raw(data, !shape.rgb || adobe)?;
    let (bytes, channels) = match picture {
        Picture::Gray(image) => (image.into_raw(), 1),
        Picture::Rgb(image) => (image.into_raw(), 3),
    };
    if channels != shape.channels {
        return Err(disagrees("JPEG"));
    }
    Ok(Decoded {
        raw: widen(bytes, shape),
        is_rgb: true,
    })
}

/// 8-bit samples where the header allocates 16 bits.
fn widen(bytes: Vec<u8>, shape: &Shape) -> Raw<'static> {
    if shape.bits_allocated == 16 {
        Raw::Words(bytes.into_iter().map(u16::from).collect())
    } else {
        Raw::Bytes(Cow::Owned(bytes))
    }
}

fn jpeg_lossless(
    data: &[u8],
    shape: &Shape,
    limits: &Limits,
) -> Result<Decoded<'static>, RejectReason> {
    let frame = jpeg_header(data, shape, limits)?;
    if frame.marker != 0xc3 {
        return Err(corrupt(
            "DICOM: the JPEG data is not lossless though the transfer syntax says so",
        ));
    }
    let mut decoder = jpeg_decoder::Decoder::new(data);
    decoder
        .set_max_decoding_buffer_size(usize::try_from(limits.decode_bytes).unwrap_or(usize::MAX));
    let bytes = decoder.decode().map_err(|error| match error {
        jpeg_decoder::Error::Unsupported(_) => {
            unsupported("DICOM: this variant of lossless JPEG is not supported")
        }
        _ => corrupt("DICOM: the lossless JPEG data is damaged"),
    })?;
    let raw = if frame.precision > 8 {
        Raw::Words(
            bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|pair| u16::from_ne_bytes(*pair))
                .collect(),
        )
    } else {
        widen(bytes, shape)
    };
    Ok(Decoded { raw, is_rgb: false })
}

fn jpeg_ls(data: &[u8], shape: &Shape) -> Result<Decoded<'static>, RejectReason> {
    let reason = |fault| match fault {
        jpegls::Fault::Damaged => corrupt("DICOM: the JPEG-LS data is damaged"),
        jpegls::Fault::Unsupported => {
            unsupported("DICOM: JPEG-LS with colour or restart markers is not supported")
        }
    };
    let header = jpegls::Header::read(data).map_err(reason)?;
    if (header.width, header.height, 1) != (shape.width, shape.height, shape.channels) {
        return Err(disagrees("JPEG-LS"));
    }
    let samples = header.decode(data).map_err(reason)?;
    let raw = if shape.bits_allocated == 16 {
        Raw::Words(samples)
    } else if header.precision <= 8 {
        Raw::Bytes(Cow::Owned(
            samples.into_iter().map(|sample| sample as u8).collect(),
        ))
    } else {
        return Err(disagrees("JPEG-LS"));
    };
    Ok(Decoded { raw, is_rgb: false })
}

/// JPEG 2000 through `hayro-jpeg2000` (pure Rust, no unsafe code of its own).
fn jpeg2000(data: &[u8], shape: &Shape, limits: &Limits) -> Result<Decoded<'static>, RejectReason> {
    let damaged = || corrupt("DICOM: the JPEG 2000 data is damaged");
    // Some writers wrap the codestream in a JP2 file; its boxes say nothing that DICOM does not.
    let start = memchr::memmem::find(data, b"\xff\x4f\xff\x51").ok_or_else(damaged)?;
    let codestream = &data[start..];
    let header = J2kHeader::read(codestream).ok_or_else(damaged)?;
    if (header.width, header.height, header.channels) != (shape.width, shape.height, shape.channels)
    {
        return Err(disagrees("JPEG 2000"));
    }
    if header.precision > 16 || header.subsampled {
        return Err(unsupported(
            "DICOM: JPEG 2000 with more than 16 bits or subsampled colours is not supported",
        ));
    }
    // The decoder works on f32: coefficients, wavelet output and samples of every channel, and a record for every
    // code block and precinct.
    let per_pixel = 12 * shape.channels as u64
        + 8
        + (200 * shape.channels as u64).div_ceil(header.block_pixels);
    limits.check(shape.width as u64, shape.height as u64, per_pixel)?;
    let settings = hayro_jpeg2000::DecodeSettings {
        strict: true,
        ..Default::default()
    };
    let image = hayro_jpeg2000::Image::new(codestream, &settings).map_err(|_| damaged())?;
    let mut context = hayro_jpeg2000::DecoderContext::default();
    let decoded = image.decode(&mut context).map_err(|_| damaged())?;
    let planes: Vec<&[f32]> = decoded
        .components()
        .iter()
        .map(hayro_jpeg2000::ComponentData::samples)
        .collect();
    let pixels = shape.width * shape.height;
    if planes.len() != shape.channels || planes.iter().any(|plane| plane.len() < pixels) {
        return Err(disagrees("JPEG 2000"));
    }
    // The decoder lifts every sample to the unsigned range, signed ones too.
    let top = f32::from(u16::MAX >> (16 - header.precision));
    let lift = if header.signed {
        1_i32 << (header.precision - 1)
    } else {
        0
    };
    let sample = |value: f32| value.round().clamp(0.0, top) as i32 - lift;
    let samples = (0..pixels)
        .flat_map(|i| planes.iter().map(move |plane| plane[i]))
        .map(sample);
    let raw = if shape.bits_allocated == 16 {
        Raw::Words(samples.map(|value| value as u16).collect())
    } else {
        Raw::Bytes(Cow::Owned(samples.map(|value| value as u8).collect()))
    };
    Ok(Decoded { raw, is_rgb: true })
}

/// What bounds the work on a JPEG 2000 codestream: its SIZ segment and the COD segments.
struct J2kHeader {
    width: usize,
    height: usize,
    channels: usize,
    precision: u8,
    signed: bool,
    subsampled: bool,
    /// Pixels of the smallest code block or precinct.
    block_pixels: u64,
}

impl J2kHeader {
    fn read(codestream: &[u8]) -> Option<Self> {
        let long = |at: usize| {
            Some(u32::from_be_bytes(codestream.get(at..at + 4)?.try_into().ok()?) as usize)
        };
        let short = |at: usize| {
            Some(u16::from_be_bytes(
                codestream.get(at..at + 2)?.try_into().ok()?,
            ))
        };
        // SOC, SIZ marker, length, capabilities, then the grid.
        let (right, bottom, left, top) = (long(8)?, long(12)?, long(16)?, long(20)?);
        let (tile_width, tile_height) = (long(24)?, long(28)?);
        let channels = usize::from(short(40)?);
        let components = codestream.get(42..42 + channels * 3)?.as_chunks::<3>().0;
        let first = *components.first()?;
        if components.iter().any(|component| component[0] != first[0])
            || tile_width == 0
            || tile_height == 0
        {
            return None;
        }
        let (width, height) = (right.checked_sub(left)?, bottom.checked_sub(top)?);
        let mut header = Self {
            width,
            height,
            channels,
            precision: (first[0] & 0x7f) + 1,
            signed: first[0] & 0x80 != 0,
            subsampled: components.iter().any(|component| component[1..] != [1, 1]),
            block_pixels: (tile_width as u64).saturating_mul(tile_height as u64),
        };
        // COD, and COC for single components, in the main header and in those of tiles.
        for marker in memchr::memchr_iter(0xff, codestream) {
            let at = match codestream.get(marker + 1) {
                Some(0x52) => marker + 9,
                Some(0x53) => marker + 6,
                _ => continue,
            };
            // Levels, code block width and height, style, transformation, precincts.
            let Some(style) = codestream.get(at..at + 5) else {
                continue;
            };
            let (levels, exponents) = (
                usize::from(style[0]),
                u32::from(style[1] & 15) + u32::from(style[2] & 15) + 4,
            );
            if short(marker + 2).is_none_or(|length| length > 80) || levels > 32 || exponents > 12 {
                continue; // compressed data that looks like a marker
            }
            header.block_pixels = header.block_pixels.min(1 << exponents);
            let precincts = codestream.get(at + 5..at + 6 + levels).unwrap_or_default();
            let has_precincts = codestream
                .get(marker + 4)
                .is_some_and(|flags| flags & 1 == 1);
            // The two finest levels hold nearly all of the pixels.
            for precinct in precincts
                .iter()
                .rev()
                .take(if has_precincts { 2 } else { 0 })
            {
                header.block_pixels = header
                    .block_pixels
                    .min(1 << (precinct & 15) << (precinct >> 4));
            }
        }
        Some(header)
    }
}
