//! TIFF through the `tiff` crate (the one behind `image`, which hides palettes and extra samples).
//!
//! `imread` hands 8-bit colour to libtiff's RGBA interface, so its rules are followed: unassociated alpha is multiplied
//! in, 16-bit colour is rounded to 8 bits, 16-bit grey is cut to its high byte.

use std::borrow::Cow;
use std::io::Cursor;

use image::metadata::Orientation;
use image::{GrayImage, RgbImage};
use tiff::decoder::{Decoder, DecodingResult};
use tiff::tags::Tag;
use tiff::{ColorType, TiffError};

use super::{
    DecodeNote, Limits, Picture, corrupt, jpeg, note, one_line, orient, truncated, unsupported,
    without_needless_colour,
};
use crate::prediction::{RejectCode, RejectReason};

/// `PhotometricInterpretation`: indices into `ColorMap`.
const PALETTE: u16 = 3;
/// `ExtraSamples`: alpha that is not multiplied in yet.
const UNASSOCIATED_ALPHA: u16 = 2;
/// `Compression`: JPEG inside the strips, old and new style.
const JPEG: [u16; 2] = [6, 7];

type Reader<'a> = Decoder<Cursor<&'a [u8]>>;

/// Refuses what is too large or cut off, notes further pages.
pub(super) fn check(
    bytes: &[u8],
    limits: &Limits,
    notes: &mut Vec<DecodeNote>,
) -> Result<(), RejectReason> {
    let plain = without_palette(bytes, &Directory::read(bytes, limits)?);
    let mut decoder = open(&plain.bytes, limits)?;
    check_strips(&mut decoder, bytes, limits)?;
    if decoder.more_images() {
        note(notes, DecodeNote::FirstPageOnly);
    }
    Ok(())
}

fn open<'a>(bytes: &'a [u8], limits: &Limits) -> Result<Reader<'a>, RejectReason> {
    let buffer = usize::try_from(limits.decode_bytes).unwrap_or(usize::MAX);
    let mut allowed = tiff::decoder::Limits::default();
    allowed.decoding_buffer_size = buffer;
    allowed.intermediate_buffer_size = buffer;
    let mut decoder = Decoder::new(Cursor::new(bytes))
        .map_err(|e| reason(&e))?
        .with_limits(allowed);
    let (width, height) = decoder.dimensions().map_err(|e| reason(&e))?;
    let color = decoder.colortype().map_err(|e| reason(&e))?;
    let sample_bytes = u64::from(color.bit_depth()).div_ceil(8);
    limits.check(
        width.into(),
        height.into(),
        u64::from(color.num_samples()).max(1) * sample_bytes + 3,
    )?;
    Ok(decoder)
}

/// Every strip or tile must lie inside the file, and a JPEG inside one must not claim more than the limits.
fn check_strips(
    decoder: &mut Reader<'_>,
    bytes: &[u8],
    limits: &Limits,
) -> Result<(), RejectReason> {
    let mut tag = |first, second| -> Result<Vec<u64>, RejectReason> {
        for tag in [first, second] {
            if let Some(values) = decoder.find_tag_unsigned_vec(tag).map_err(|e| reason(&e))? {
                return Ok(values);
            }
        }
        Err(corrupt("TIFF: the file does not say where its pixels are"))
    };
    let offsets = tag(Tag::StripOffsets, Tag::TileOffsets)?;
    let lengths = tag(Tag::StripByteCounts, Tag::TileByteCounts)?;
    let compression: Option<u16> = decoder
        .find_tag_unsigned(Tag::Compression)
        .map_err(|e| reason(&e))?;
    for (offset, length) in offsets.into_iter().zip(lengths) {
        let end = offset.saturating_add(length);
        if end > bytes.len() as u64 {
            return Err(truncated("TIFF: the data ends before the pixels do"));
        }
        if compression.is_some_and(|method| JPEG.contains(&method)) {
            let strip = &bytes[offset as usize..end as usize];
            jpeg::walk(strip, |frame| {
                limits.check(frame.width.into(), frame.height.into(), 3 + 2 * 4)
            })?;
        }
    }
    Ok(())
}

pub(super) fn decode(
    bytes: &[u8],
    limits: &Limits,
    notes: &mut Vec<DecodeNote>,
) -> Result<Picture, RejectReason> {
    let plain = without_palette(bytes, &Directory::read(bytes, limits)?);
    let mut decoder = open(&plain.bytes, limits)?;
    let (width, height) = decoder.dimensions().map_err(|e| reason(&e))?;
    let color = decoder.colortype().map_err(|e| reason(&e))?;
    let orientation: Option<u16> = decoder
        .find_tag_unsigned(Tag::Orientation)
        .map_err(|e| reason(&e))?;
    let extra: Option<Vec<u16>> = decoder
        .find_tag_unsigned_vec(Tag::ExtraSamples)
        .map_err(|e| reason(&e))?;
    let map: Option<Vec<u16>> = decoder
        .find_tag_unsigned_vec(Tag::ColorMap)
        .map_err(|e| reason(&e))?;

    let mut buffer = DecodingResult::U8(Vec::new());
    let layout = decoder
        .read_image_to_buffer(&mut buffer)
        .map_err(|e| reason(&e))?;
    let samples = Samples {
        width: width as usize,
        height: height as usize,
        channels: usize::from(color.num_samples()),
        planar: layout.planes > 1,
        depth: color.bit_depth(),
    };
    let data = match buffer {
        DecodingResult::U8(data) if color.bit_depth() < 8 => samples.unpack(&data)?,
        DecodingResult::U8(data) => samples.interleave(data)?,
        DecodingResult::U16(data) => {
            note(notes, DecodeNote::SixteenBitReduced);
            let rounds = matches!(color, ColorType::RGB(_) | ColorType::RGBA(_));
            let data = samples.interleave(data)?;
            // libtiff's rounding for colour, the high byte for grey: see the module's doc.
            let reduce = |v: u16| {
                if rounds {
                    ((u32::from(v) + 128) / 257) as u8
                } else {
                    (v >> 8) as u8
                }
            };
            data.into_iter().map(reduce).collect()
        }
        _ => {
            return Err(unsupported(
                "TIFF: signed, 32-bit and floating-point samples are not supported",
            ));
        }
    };

    let gray = |data| GrayImage::from_raw(width, height, data).map(Picture::Gray);
    let rgb = |data| RgbImage::from_raw(width, height, data).map(Picture::Rgb);
    let picture = match color {
        ColorType::Gray(depth) => match map {
            Some(map) if plain.palette => rgb(through_palette(&data, depth, &map)?),
            None if plain.palette => {
                return Err(corrupt("TIFF: a palette image without its palette"));
            }
            _ => gray(data),
        },
        // Grey and something else, most likely alpha.
        ColorType::GrayA(_) => gray(data.chunks_exact(2).map(|p| p[0]).collect()),
        ColorType::Multiband {
            num_samples: n @ 2..,
            ..
        } => gray(data.chunks_exact(usize::from(n)).map(|p| p[0]).collect()),
        ColorType::RGB(_) => rgb(data),
        ColorType::RGBA(_) => {
            let multiply = extra.is_some_and(|extra| extra.first() == Some(&UNASSOCIATED_ALPHA));
            let over = |v: u8, a: u8| ((u32::from(v) * u32::from(a) + 127) / 255) as u8;
            let (pixels, _) = data.as_chunks::<4>();
            rgb(pixels
                .iter()
                .flat_map(|&[r, g, b, a]| {
                    if multiply {
                        [over(r, a), over(g, a), over(b, a)]
                    } else {
                        [r, g, b]
                    }
                })
                .collect())
        }
        ColorType::CMYK(_) => {
            let (pixels, _) = data.as_chunks::<4>();
            let channel = |ink: u8, k: u8| (u32::from(255 - ink) * u32::from(255 - k) / 255) as u8;
            rgb(pixels
                .iter()
                .flat_map(|&[c, m, y, k]| [channel(c, k), channel(m, k), channel(y, k)])
                .collect())
        }
        ColorType::YCbCr(8) => {
            let (pixels, _) = data.as_chunks::<3>();
            rgb(pixels
                .iter()
                .flat_map(|&ycc| crate::imaging::ycbcr_to_rgb(ycc))
                .collect())
        }
        _ => return Err(unsupported("TIFF: this colour space is not supported")),
    };
    let picture =
        picture.ok_or_else(|| corrupt("TIFF: the picture is smaller than its header says"))?;
    let orientation =
        orientation.and_then(|value| Orientation::from_exif(u8::try_from(value).ok()?));
    Ok(orient(
        without_needless_colour(picture),
        orientation.unwrap_or(Orientation::NoTransforms),
        notes,
    ))
}

/// The shape of a decoded buffer.
struct Samples {
    width: usize,
    height: usize,
    channels: usize,
    planar: bool,
    depth: u8,
}

impl Samples {
    /// Samples of 1, 2 or 4 bits, rows padded to bytes, stretched to 0..=255.
    fn unpack(&self, data: &[u8]) -> Result<Vec<u8>, RejectReason> {
        if self.channels != 1 || !matches!(self.depth, 1 | 2 | 4) {
            return Err(unsupported(
                "TIFF: colour of fewer than 8 bits a sample is not supported",
            ));
        }
        let depth = usize::from(self.depth);
        let stride = (self.width * depth).div_ceil(8);
        let top = (1_u8 << depth) - 1;
        let rows = data.chunks_exact(stride.max(1));
        if rows.len() < self.height {
            return Err(corrupt("TIFF: the picture is smaller than its header says"));
        }
        let level = |row: &[u8], x: usize| {
            let bit = x * depth;
            ((row[bit / 8] >> (8 - depth - bit % 8)) & top) * (255 / top)
        };
        Ok(rows
            .take(self.height)
            .flat_map(|row| (0..self.width).map(move |x| level(row, x)))
            .collect())
    }

    /// Whole samples, plane after plane or pixel after pixel, into pixel after pixel.
    fn interleave<T: Copy>(&self, data: Vec<T>) -> Result<Vec<T>, RejectReason> {
        let plane = self.width * self.height;
        if data.len() < plane * self.channels {
            return Err(corrupt("TIFF: the picture is smaller than its header says"));
        }
        if !self.planar {
            return Ok(data);
        }
        Ok((0..plane)
            .flat_map(|i| (0..self.channels).map(move |c| (i, c)))
            .map(|(i, c)| data[c * plane + i])
            .collect())
    }
}

/// Stretched indices through the palette (all reds, all greens, all blues, 16 bits each).
fn through_palette(levels: &[u8], depth: u8, map: &[u16]) -> Result<Vec<u8>, RejectReason> {
    if depth > 8 || map.len() < 3 << depth {
        return Err(unsupported("TIFF: a palette of this size is not supported"));
    }
    let size = 1_usize << depth;
    let step = if depth == 8 { 1 } else { 255 / (size - 1) };
    // libtiff takes a palette without any value above 255 for one of 8 bits.
    let shift = if map.iter().any(|v| *v >= 256) { 8 } else { 0 };
    let entry = |index: usize, channel: usize| (map[channel * size + index] >> shift) as u8;
    Ok(levels
        .iter()
        .flat_map(|level| {
            let index = usize::from(*level) / step;
            [entry(index, 0), entry(index, 1), entry(index, 2)]
        })
        .collect())
}

struct Plain<'a> {
    bytes: Cow<'a, [u8]>,
    palette: bool,
}

/// The `tiff` crate refuses palette images, though it can read their indices: in a copy of the file the first
/// directory calls them grey levels, and the palette is applied here.
fn without_palette<'a>(bytes: &'a [u8], directory: &Directory) -> Plain<'a> {
    let photometric = directory
        .entries
        .iter()
        .find(|entry| entry.tag == Tag::PhotometricInterpretation.to_u16());
    let order = directory.order;
    let palette =
        |entry: &&Entry| entry.kind == SHORT && order.short(bytes, entry.value) == Some(PALETTE);
    let Some(entry) = photometric.filter(palette) else {
        return Plain {
            bytes: Cow::Borrowed(bytes),
            palette: false,
        };
    };
    let mut copy = bytes.to_vec();
    let gray = if order.little {
        1_u16.to_le_bytes()
    } else {
        1_u16.to_be_bytes()
    };
    copy[entry.value..entry.value + 2].copy_from_slice(&gray);
    Plain {
        bytes: Cow::Owned(copy),
        palette: true,
    }
}

/// `Type` of a directory entry: 16 bits.
const SHORT: u16 = 3;

/// The first directory, headers only.
///
/// The `tiff` crate makes room for as many values as an entry claims before it reads one, and does so before it can be
/// given limits; so the claims are checked here first.
struct Directory {
    order: Order,
    entries: Vec<Entry>,
}

struct Entry {
    tag: u16,
    kind: u16,
    /// Where the value, or its offset, stands.
    value: usize,
}

#[derive(Clone, Copy)]
struct Order {
    little: bool,
}

impl Order {
    fn short(self, bytes: &[u8], at: usize) -> Option<u16> {
        let bytes = bytes.get(at..at.checked_add(2)?)?.try_into().ok()?;
        Some(if self.little {
            u16::from_le_bytes(bytes)
        } else {
            u16::from_be_bytes(bytes)
        })
    }

    /// 4 or 8 bytes, the width of an offset.
    fn offset(self, bytes: &[u8], at: usize, big: bool) -> Option<u64> {
        let bytes = bytes.get(at..at.checked_add(if big { 8 } else { 4 })?)?;
        let step = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
        Some(if self.little {
            bytes.iter().rev().fold(0, step)
        } else {
            bytes.iter().fold(0, step)
        })
    }
}

impl Directory {
    fn read(bytes: &[u8], limits: &Limits) -> Result<Self, RejectReason> {
        let ends = || truncated("TIFF: the data ends before its directory does");
        let order = Order {
            little: bytes.starts_with(b"II"),
        };
        let big = order.short(bytes, 2) == Some(43);
        let (width, entry_bytes) = if big { (8, 20) } else { (4, 12) };
        let at = order
            .offset(bytes, if big { 8 } else { 4 }, big)
            .ok_or_else(ends)?;
        let at = usize::try_from(at).map_err(|_| ends())?;
        let count = if big {
            order.offset(bytes, at, true)
        } else {
            order.short(bytes, at).map(u64::from)
        };
        let count = count.ok_or_else(ends)?;
        let first = at + if big { 8 } else { 2 };
        if count > 4096 {
            return Err(corrupt(
                "TIFF: the directory has more entries than there are tags",
            ));
        }
        let mut entries = Vec::new();
        for index in 0..count as usize {
            let at = first + index * entry_bytes;
            let tag = order.short(bytes, at).ok_or_else(ends)?;
            let kind = order.short(bytes, at + 2).ok_or_else(ends)?;
            let count = order.offset(bytes, at + 4, big).ok_or_else(ends)?;
            let value = at + 4 + width;
            let offset = order.offset(bytes, value, big).ok_or_else(ends)?;
            let size = count.saturating_mul(match kind {
                3 | 8 => 2,
                4 | 9 | 11 | 13 => 4,
                5 | 10 | 12 | 16..=18 => 8,
                _ => 1,
            });
            if size > width as u64 && offset.saturating_add(size) > bytes.len() as u64 {
                return Err(ends());
            }
            // A value takes 32 bytes in the crate, and a list is copied once.
            if count.saturating_mul(64) > limits.decode_bytes {
                return Err(RejectReason::new(
                    RejectCode::TooManyPixels,
                    format!(
                        "TIFF: a list of {count} values takes more than {} bytes",
                        limits.decode_bytes
                    ),
                ));
            }
            entries.push(Entry { tag, kind, value });
        }
        Ok(Self { order, entries })
    }
}

fn reason(error: &TiffError) -> RejectReason {
    let code = match error {
        TiffError::IoError(io) if io.kind() == std::io::ErrorKind::UnexpectedEof => {
            RejectCode::Truncated
        }
        TiffError::LimitsExceeded => RejectCode::TooManyPixels,
        TiffError::UnsupportedError(_) => RejectCode::Unsupported,
        _ => RejectCode::Corrupt,
    };
    RejectReason::new(code, one_line("TIFF", error))
}
