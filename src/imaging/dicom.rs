//! DICOM into pictures: what a radiographer would see with the file's own window.
//!
//! Part 10 files with or without their preamble, and bare data sets. [`walk`] finds the wanted elements within bounds,
//! `dicom-object` reads their values, [`codec`] decompresses one frame, [`voi`] makes grey levels of it:
//!
//! 1. stored value → rescale slope and intercept (of the frame, where the file has functional groups);
//! 2. → the first window, with its function; a file without one gets a window from the 0.5th to the 99.5th percentile
//!    of the frame's values, padding left out, and a note. Unsigned 8-bit values without a window are levels already.
//!    A modality lookup table is not applied; where a file has one its window is left aside too, as it is in other units;
//! 3. → inverted for `MONOCHROME1`; padding black;
//! 4. → pixels that are not square are made square, by stretching the coarser side.
//!
//! Frames are decoded one at a time. Only [`DicomHeader`] leaves this module, for the pipeline alone.

mod codec;
mod jpegls;
mod voi;
mod walk;

use std::borrow::Cow;
use std::io::Read;
use std::ops::Range;

use dicom_core::dictionary::UidDictionary;
use dicom_dictionary_std::tags;
use dicom_object::{InMemDicomObject, Tag};
use dicom_transfer_syntax_registry::entries;
use image::imageops::{self, FilterType};
use image::{GrayImage, RgbImage};

use super::decode::{
    DecodeNote, Limits, corrupt, note, truncated, unsupported, without_needless_colour,
};
use super::{Picture, ycbcr_to_rgb};
use crate::prediction::{RejectCode, RejectReason};
use codec::{Codec, Decoded, Raw, Shape};
use voi::{Function, Stored, Transform, Window};
use walk::{Element, Encoding, Walk};

pub(crate) const PIXEL_DATA: Tag = tags::PIXEL_DATA;

/// The elements read from the top level. All are flat and small.
const WANTED: [Tag; 40] = [
    tags::SOP_CLASS_UID,
    tags::SOP_INSTANCE_UID,
    tags::STUDY_DATE,
    tags::CONTENT_DATE,
    tags::ACQUISITION_DATE,
    tags::ACQUISITION_DATE_TIME,
    tags::STUDY_TIME,
    tags::ACQUISITION_TIME,
    tags::CONTENT_TIME,
    tags::MODALITY,
    tags::TIMEZONE_OFFSET_FROM_UTC,
    tags::IMAGER_PIXEL_SPACING,
    tags::STUDY_INSTANCE_UID,
    tags::SERIES_INSTANCE_UID,
    tags::INSTANCE_NUMBER,
    tags::SAMPLES_PER_PIXEL,
    tags::PHOTOMETRIC_INTERPRETATION,
    tags::PLANAR_CONFIGURATION,
    tags::NUMBER_OF_FRAMES,
    tags::ROWS,
    tags::COLUMNS,
    tags::PIXEL_SPACING,
    tags::PIXEL_ASPECT_RATIO,
    tags::BITS_ALLOCATED,
    tags::BITS_STORED,
    tags::HIGH_BIT,
    tags::PIXEL_REPRESENTATION,
    tags::PIXEL_PADDING_VALUE,
    tags::PIXEL_PADDING_RANGE_LIMIT,
    tags::WINDOW_CENTER,
    tags::WINDOW_WIDTH,
    tags::VOILUT_FUNCTION,
    tags::RESCALE_INTERCEPT,
    tags::RESCALE_SLOPE,
    tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
    tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
    tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
    tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DATA,
    tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DATA,
];
/// Largest value read, in bytes: a palette of 65536 entries of 16 bits.
const MAX_VALUE: usize = 1 << 17;
/// Aspect ratios within this of square are taken for square; ratios beyond 10 for a mistake.
const SQUARE: f64 = 0.01;

/// What the pipeline needs from a DICOM header: for keyed hashes and grouping, never to be published as it is.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct DicomHeader {
    /// `Modality` (0008,0060), such as `MR`.
    pub modality: Option<String>,
    /// `StudyInstanceUID` (0020,000D).
    pub study_instance_uid: Option<String>,
    /// `SeriesInstanceUID` (0020,000E).
    pub series_instance_uid: Option<String>,
    /// `SOPInstanceUID` (0008,0018).
    pub sop_instance_uid: Option<String>,
    /// `InstanceNumber` (0020,0013).
    pub instance_number: Option<i32>,
    /// When the picture was acquired, by the scanner's clock: `2026-11-23T13:05:00`, no zone. From the acquisition's
    /// date and time, else the content's, else the study's; without a time, midnight.
    pub acquired: Option<String>,
    /// `TimezoneOffsetFromUTC` (0008,0201) in minutes east of UTC, where the file states it.
    pub utc_offset_minutes: Option<i16>,
}

/// The defined terms of `Modality` (0008,0060) for images, PS3.3 C.7.3.1.1.1.
const MODALITIES: [&str; 30] = [
    "BMD", "CR", "CT", "DG", "DX", "ES", "GM", "IO", "IVOCT", "IVUS", "LS", "MG", "MR", "NM",
    "OCT", "OP", "OPM", "OPT", "OT", "PT", "PX", "RF", "RG", "RTIMAGE", "SC", "SM", "TG", "US",
    "XA", "XC",
];

impl DicomHeader {
    /// The modality if it is a defined term; any other text stays inside, since it may say anything.
    pub fn modality_term(&self) -> Option<&'static str> {
        let modality = self.modality.as_deref()?;
        MODALITIES.into_iter().find(|term| *term == modality)
    }
}

/// A DICOM file whose header passed.
#[derive(Debug)]
pub(crate) struct DicomSource<'a> {
    bytes: Cow<'a, [u8]>,
    encoding: Encoding,
    codec: Codec,
    header: DicomHeader,
    attributes: Attributes,
    shape: Shape,
    stored: Stored,
    photometric: Photometric,
    /// The whole file has a modality lookup table, which is not applied.
    modality_table: bool,
    frames: Frames,
    /// 8-bit values were written as big-endian words.
    swapped: bool,
    shared_groups: Option<Attributes>,
    frame_groups: Vec<Range<usize>>,
}

/// Where the frames are.
#[derive(Debug)]
enum Frames {
    /// One after the other from here on.
    Native { start: usize, count: u32 },
    /// The pieces of each frame.
    Pieces(Vec<Vec<Range<usize>>>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Photometric {
    Monochrome { inverted: bool },
    Palette,
    Rgb,
    Ybr,
}

/// Whether the bytes are DICOM: the prefix after the preamble, or a data set that begins as one.
pub(crate) fn is_dicom(bytes: &[u8]) -> bool {
    bytes.get(128..132) == Some(b"DICM")
        || bytes.starts_with(b"DICM")
        || bare_encoding(bytes).is_some()
}

/// Whether the bytes could be the beginning of a DICOM file, being too short to tell.
pub(crate) fn may_become_dicom(bytes: &[u8]) -> bool {
    bytes.len() < 132
        && bytes.iter().take(128).all(|byte| *byte == 0)
        && b"DICM".starts_with(bytes.get(128..).unwrap_or_default())
}

/// The encoding of a data set without preamble, told by its first element: the meta group or the identifying group.
fn bare_encoding(bytes: &[u8]) -> Option<Encoding> {
    let [g0, g1, e0, e1, v0, v1, _, _] = *bytes.first_chunk::<8>()?;
    let little = matches!((g0, g1), (2 | 8, 0)) && e1 == 0;
    let big = (g0, g1) == (0, 8) && e0 == 0;
    let element = if big { e1 } else { e0 };
    // Group length, specific character set, image type, or what else opens these groups.
    let opens = matches!(element, 0 | 1 | 2 | 5 | 8 | 0x10 | 0x12 | 0x16 | 0x18);
    let vr = [v0, v1];
    let explicit = [b"UL", b"OB", b"CS", b"UI", b"DA", b"SH", b"LO", b"TM"].contains(&&vr);
    match (little || big, explicit) {
        (true, true) if opens => Some(Encoding {
            explicit: true,
            big,
        }),
        (true, false) if opens && little && g0 == 8 => {
            // Implicit: the length stands here, and of the first elements it is small and even.
            let length = u32::from_le_bytes([v0, v1, bytes[6], bytes[7]]);
            (length <= 1024 && length.is_multiple_of(2) && length > 0)
                .then_some(Encoding::IMPLICIT_LITTLE)
        }
        _ => None,
    }
}

impl<'a> DicomSource<'a> {
    pub fn open(
        bytes: &'a [u8],
        limits: &Limits,
        notes: &mut Vec<DecodeNote>,
    ) -> Result<Self, RejectReason> {
        let start = if bytes.get(128..132) == Some(b"DICM") {
            132
        } else if bytes.starts_with(b"DICM") {
            4
        } else {
            0
        };
        let (syntax, media_class, start) = meta_group(bytes, start)?;
        let (bytes, start) = if syntax.deflated {
            (Cow::Owned(inflate(&bytes[start..], limits)?), 0)
        } else {
            (Cow::Borrowed(bytes), start)
        };
        let encoding = syntax.encoding;

        let mut walk = Walk::new(&bytes, start..bytes.len(), encoding);
        let mut flat = Flat::new(&bytes, encoding);
        let mut pixels = None;
        let mut modality_table = false;
        let mut shared_groups = None;
        let mut frame_groups = Vec::new();
        let mut any = false;
        while let Some(element) = walk.next_element()? {
            any = true;
            match element.tag {
                PIXEL_DATA => {
                    pixels = Some(element);
                    break;
                }
                tags::FLOAT_PIXEL_DATA | tags::DOUBLE_FLOAT_PIXEL_DATA => {
                    return Err(not_an_image("a DICOM object with floating-point values"));
                }
                tags::MODALITY_LUT_SEQUENCE => {
                    modality_table |= !walk.items(&element, 1)?.is_empty();
                }
                tags::SHARED_FUNCTIONAL_GROUPS_SEQUENCE => {
                    if let Some(item) = walk.items(&element, 1)?.pop() {
                        shared_groups = Some(groups(&bytes, item, encoding)?);
                    }
                }
                tags::PER_FRAME_FUNCTIONAL_GROUPS_SEQUENCE => {
                    frame_groups = walk.items(&element, limits.frames as usize)?;
                }
                tag if WANTED.contains(&tag) => flat.add(&element),
                _ => {}
            }
        }
        let attributes = flat.read()?;
        let class = attributes.text(tags::SOP_CLASS_UID).or(media_class);
        let Some(pixels) = pixels else {
            return Err(without_pixels(any, class.as_deref(), &attributes));
        };
        refuse_derived(class.as_deref())?;

        let (shape, stored, photometric) = image_pixel_module(&attributes, syntax.codec)?;
        let sample_bytes = u64::from(shape.bits_allocated / 8) * shape.channels as u64;
        limits.check(shape.width as u64, shape.height as u64, sample_bytes + 3)?;
        let claimed = attributes
            .integer(tags::NUMBER_OF_FRAMES)
            .unwrap_or(1)
            .clamp(1, i64::from(u32::MAX)) as u32;
        let count = claimed.min(limits.frames.max(1));
        if count < claimed {
            note(notes, DecodeNote::FramesDropped);
        }
        let frames = match (syntax.codec, pixels.undefined) {
            (Codec::Native, false) => {
                let needed = (shape.frame_bytes() as u64).saturating_mul(claimed.into());
                if needed > pixels.value.len() as u64 {
                    return Err(corrupt(
                        "DICOM: less pixel data than Rows, Columns and NumberOfFrames claim",
                    ));
                }
                Frames::Native {
                    start: pixels.value.start,
                    count,
                }
            }
            (Codec::Native, true) => {
                return Err(corrupt(
                    "DICOM: pixel data in pieces though it is not compressed",
                ));
            }
            (_, false) => return Err(corrupt("DICOM: compressed pixel data is not in pieces")),
            (_, true) => Frames::Pieces(pieces(&mut walk, &pixels, &bytes, claimed, count)?),
        };
        let swapped = encoding.big && shape.bits_allocated == 8 && &pixels.vr == b"OW";
        let header = header(&attributes);
        Ok(Self {
            bytes,
            encoding,
            codec: syntax.codec,
            header,
            attributes,
            shape,
            stored,
            photometric,
            modality_table,
            frames,
            swapped,
            shared_groups,
            frame_groups,
        })
    }

    pub fn frame_count(&self) -> u32 {
        match &self.frames {
            Frames::Native { count, .. } => *count,
            Frames::Pieces(pieces) => pieces.len() as u32,
        }
    }

    pub fn header(&self) -> &DicomHeader {
        &self.header
    }

    pub fn frame(
        &mut self,
        index: u32,
        limits: &Limits,
        notes: &mut Vec<DecodeNote>,
    ) -> Result<Picture, RejectReason> {
        let data: Cow<'_, [u8]> = match &self.frames {
            Frames::Native { start, .. } => {
                let length = self.shape.frame_bytes();
                let start = start + length * index as usize;
                Cow::Borrowed(
                    self.bytes
                        .get(start..start + length)
                        .ok_or_else(|| corrupt("DICOM: a frame is missing"))?,
                )
            }
            Frames::Pieces(pieces) => match pieces[index as usize].as_slice() {
                [piece] => Cow::Borrowed(&self.bytes[piece.clone()]),
                pieces => Cow::Owned(
                    pieces
                        .iter()
                        .flat_map(|piece| &self.bytes[piece.clone()])
                        .copied()
                        .collect(),
                ),
            },
        };
        let groups = match self.frame_groups.get(index as usize) {
            Some(item) => Some(groups(&self.bytes, item.clone(), self.encoding)?),
            None => None,
        };
        let scopes: Vec<&Attributes> = groups
            .iter()
            .chain(&self.shared_groups)
            .chain([&self.attributes])
            .collect();
        let decoded = codec::decode(
            self.codec,
            data,
            &self.shape,
            self.encoding.big,
            self.swapped,
            limits,
        )?;
        let samples = match &decoded.raw {
            Raw::Bytes(data) => data.len(),
            Raw::Words(data) => data.len(),
        };
        if samples < self.shape.samples() {
            return Err(corrupt(
                "DICOM: less pixel data than Rows and Columns claim",
            ));
        }
        let picture = match self.photometric {
            Photometric::Monochrome { inverted } => self.gray(&decoded, &scopes, inverted, notes),
            Photometric::Palette => self.palette(&decoded)?,
            Photometric::Rgb | Photometric::Ybr => {
                without_needless_colour(self.colour(&decoded, notes))
            }
        };
        square_pixels(picture, &scopes, limits, notes)
    }

    fn gray(
        &self,
        decoded: &Decoded<'_>,
        scopes: &[&Attributes],
        inverted: bool,
        notes: &mut Vec<DecodeNote>,
    ) -> Picture {
        let number = |tag| {
            scopes
                .iter()
                .find_map(|scope| scope.number(tag, 0))
                .filter(|value| value.is_finite())
        };
        let transform = Transform {
            slope: number(tags::RESCALE_SLOPE)
                .filter(|slope| *slope != 0.0)
                .unwrap_or(1.0),
            intercept: number(tags::RESCALE_INTERCEPT).unwrap_or(0.0),
            window: if self.modality_table {
                None
            } else {
                window(scopes)
            },
            inverted,
            padding: self.padding(),
        };
        let stored = self.stored;
        let levels_already = stored.bits <= 8
            && !stored.signed
            && (transform.slope, transform.intercept) == (1.0, 0.0);
        if stored.bits > 8 {
            note(notes, DecodeNote::SixteenBitReduced);
        }
        let window = match transform.window {
            Some(window) => Some(window),
            None if levels_already && stored.bits == 8 => None,
            None => {
                note(notes, DecodeNote::PercentileWindow);
                Some(match &decoded.raw {
                    Raw::Bytes(data) => transform.percentile_window(
                        stored,
                        data.iter().map(|raw| stored.index(u16::from(*raw))),
                    ),
                    Raw::Words(data) => transform
                        .percentile_window(stored, data.iter().map(|raw| stored.index(*raw))),
                })
            }
        };
        let table = transform.table(stored, window);
        let pixels = self.shape.samples();
        let levels = match &decoded.raw {
            Raw::Bytes(data) => data[..pixels]
                .iter()
                .map(|raw| table[stored.index(u16::from(*raw))])
                .collect(),
            Raw::Words(data) => data[..pixels]
                .iter()
                .map(|raw| table[stored.index(*raw)])
                .collect(),
        };
        Picture::Gray(self.gray_image(levels))
    }

    fn gray_image(&self, levels: Vec<u8>) -> GrayImage {
        GrayImage::from_raw(self.shape.width as u32, self.shape.height as u32, levels)
            .expect("one level for each pixel")
    }

    fn rgb_image(&self, levels: Vec<u8>) -> RgbImage {
        RgbImage::from_raw(self.shape.width as u32, self.shape.height as u32, levels)
            .expect("three levels for each pixel")
    }

    /// `PixelPaddingValue` and its range, as stored values.
    fn padding(&self) -> Option<(i32, i32)> {
        let stored = |tag| {
            let value = self.attributes.integer(tag)?;
            // Written as US or SS; compared by its bits, as the samples are.
            Some(
                self.stored
                    .value(usize::from(value as u16) & (self.stored.values() - 1)),
            )
        };
        let first = stored(tags::PIXEL_PADDING_VALUE)?;
        let second = stored(tags::PIXEL_PADDING_RANGE_LIMIT).unwrap_or(first);
        Some((first.min(second), first.max(second)))
    }

    fn colour(&self, decoded: &Decoded<'_>, notes: &mut Vec<DecodeNote>) -> Picture {
        let mut levels: Vec<u8> = match &decoded.raw {
            Raw::Bytes(data) => data[..self.shape.samples()].to_vec(),
            Raw::Words(data) => {
                if self.stored.bits > 8 {
                    note(notes, DecodeNote::SixteenBitReduced);
                }
                let down = self.stored.shift + self.stored.bits.saturating_sub(8);
                data[..self.shape.samples()]
                    .iter()
                    .map(|sample| (sample >> down) as u8)
                    .collect()
            }
        };
        if self.photometric == Photometric::Ybr && !decoded.is_rgb {
            for pixel in levels.as_chunks_mut::<3>().0 {
                *pixel = ycbcr_to_rgb(*pixel);
            }
        }
        Picture::Rgb(self.rgb_image(levels))
    }

    fn palette(&self, decoded: &Decoded<'_>) -> Result<Picture, RejectReason> {
        let table = |descriptor, data| self.palette_table(descriptor, data);
        let tables = [
            table(
                tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
                tags::RED_PALETTE_COLOR_LOOKUP_TABLE_DATA,
            )?,
            table(
                tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
                tags::GREEN_PALETTE_COLOR_LOOKUP_TABLE_DATA,
            )?,
            table(
                tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DESCRIPTOR,
                tags::BLUE_PALETTE_COLOR_LOOKUP_TABLE_DATA,
            )?,
        ];
        let pixels = self.shape.samples();
        let look_up = |raw: u16| {
            let index = self.stored.index(raw);
            [tables[0][index], tables[1][index], tables[2][index]]
        };
        let levels = match &decoded.raw {
            Raw::Bytes(data) => data[..pixels]
                .iter()
                .flat_map(|raw| look_up(u16::from(*raw)))
                .collect(),
            Raw::Words(data) => data[..pixels]
                .iter()
                .flat_map(|raw| look_up(*raw))
                .collect(),
        };
        Ok(without_needless_colour(Picture::Rgb(
            self.rgb_image(levels),
        )))
    }

    /// One colour's level for every stored value (PS3.3, C.7.6.3.1.5, C.7.6.3.1.6).
    fn palette_table(&self, descriptor: Tag, data: Tag) -> Result<Vec<u8>, RejectReason> {
        let missing = || {
            unsupported(
                "DICOM: PALETTE COLOR without a plain lookup table (segmented ones are not supported)",
            )
        };
        let words = self.attributes.words(descriptor).ok_or_else(missing)?;
        let &[entries, first, bits] = words.as_slice() else {
            return Err(corrupt("DICOM: a palette's descriptor is damaged"));
        };
        let entries = if entries == 0 {
            65536
        } else {
            usize::from(entries)
        };
        let values = self.attributes.words(data).ok_or_else(missing)?;
        let levels: Vec<u8> = if values.len() >= entries {
            let down = if bits > 8 { 8 } else { 0 };
            values[..entries]
                .iter()
                .map(|value| (value >> down) as u8)
                .collect()
        } else if values.len() * 2 >= entries {
            values
                .iter()
                .flat_map(|value| value.to_le_bytes())
                .take(entries)
                .collect()
        } else {
            return Err(corrupt("DICOM: a palette has fewer entries than it claims"));
        };
        let first = if self.stored.signed {
            i32::from(first as i16)
        } else {
            i32::from(first)
        };
        let last = entries as i32 - 1;
        Ok((0..self.stored.values())
            .map(|index| levels[(self.stored.value(index) - first).clamp(0, last) as usize])
            .collect())
    }
}

/// Reads the file meta group. Gives the transfer syntax, the media storage SOP class, and where the data set begins.
fn meta_group(
    bytes: &[u8],
    start: usize,
) -> Result<(codec::Syntax, Option<String>, usize), RejectReason> {
    let is_meta = |at: usize| bytes.get(at..at + 2) == Some(&[2, 0]);
    if !is_meta(start) {
        let Some(encoding) = bytes.get(start..).and_then(bare_encoding) else {
            // Behind a prefix nothing, or something else.
            return Err(if bytes.len() < start + 8 {
                truncated("DICOM: the data ends before its first element")
            } else {
                corrupt("DICOM: no data set after the prefix")
            });
        };
        // No meta group: the syntax cannot be a compressed one.
        return Ok((
            codec::Syntax {
                encoding,
                deflated: false,
                codec: Codec::Native,
            },
            None,
            start,
        ));
    }
    let mut walk = Walk::new(bytes, start..bytes.len(), Encoding::EXPLICIT_LITTLE);
    let (mut transfer_syntax, mut class) = (None, None);
    let text = |range: Range<usize>| {
        let value = String::from_utf8_lossy(&bytes[range]);
        Some(value.trim_matches(['\0', ' ']).to_owned())
    };
    while is_meta(walk.position()) {
        let Some(element) = walk.next_element()? else {
            break;
        };
        match element.tag {
            tags::TRANSFER_SYNTAX_UID if element.value.len() <= 128 => {
                transfer_syntax = text(element.value);
            }
            tags::MEDIA_STORAGE_SOP_CLASS_UID if element.value.len() <= 128 => {
                class = text(element.value);
            }
            _ => {}
        }
    }
    // Fewer bytes than an element's header: what follows, another element of this group or the data set, is missing.
    if bytes.len() < walk.position() + 8 {
        return Err(truncated("DICOM: the data ends after the file meta group"));
    }
    // A DICOMDIR holds no pixels whatever its syntax: said before an unsupported syntax is.
    if class.as_deref() == Some("1.2.840.10008.1.3.10") {
        return Err(not_an_image("a DICOMDIR"));
    }
    let transfer_syntax = transfer_syntax
        .ok_or_else(|| corrupt("DICOM: the file meta group names no transfer syntax"))?;
    Ok((codec::syntax(&transfer_syntax)?, class, walk.position()))
}

/// Inflates a deflated data set, up to the memory limit.
fn inflate(deflated: &[u8], limits: &Limits) -> Result<Vec<u8>, RejectReason> {
    let mut data = Vec::new();
    let mut reader =
        flate2::read::DeflateDecoder::new(deflated).take(limits.decode_bytes.saturating_add(1));
    match reader.read_to_end(&mut data) {
        Ok(_) if data.len() as u64 > limits.decode_bytes => Err(RejectReason::new(
            RejectCode::TooManyPixels,
            format!(
                "DICOM: the deflated data set takes more than {} bytes",
                limits.decode_bytes
            ),
        )),
        Ok(_) => Ok(data),
        Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
            Err(truncated("DICOM: the deflated data set ends early"))
        }
        Err(_) => Err(corrupt("DICOM: the deflated data set is damaged")),
    }
}

fn not_an_image(what: &str) -> RejectReason {
    RejectReason::new(
        RejectCode::NotAnImageObject,
        format!("{what}: nothing to classify"),
    )
}

/// The reason why a data set has no pixel data: it is no image, or it ends before them.
fn without_pixels(any: bool, class: Option<&str>, attributes: &Attributes) -> RejectReason {
    let ends = truncated("DICOM: the data ends before the pixels");
    if !any {
        return ends;
    }
    match class.and_then(class_name) {
        Some(name) if name.contains("Image Storage") => ends,
        Some(name) => not_an_image(&format!("a DICOM object without pixels ({name})")),
        None if attributes.integer(tags::ROWS).is_some() => ends,
        None => not_an_image("a DICOM object without pixels"),
    }
}

/// Objects with pixel data that is no picture of a patient: segmentations, dose, maps of values.
fn refuse_derived(class: Option<&str>) -> Result<(), RejectReason> {
    const DERIVED: [&str; 5] = [
        "1.2.840.10008.5.1.4.1.1.66.4",
        "1.2.840.10008.5.1.4.1.1.66.7",
        "1.2.840.10008.5.1.4.1.1.30",
        "1.2.840.10008.5.1.4.1.1.481.2",
        "1.2.840.10008.5.1.4.1.1.66",
    ];
    match class.filter(|class| DERIVED.contains(class)) {
        Some(class) => Err(not_an_image(&format!(
            "a DICOM object ({})",
            class_name(class).unwrap_or("derived")
        ))),
        None => Ok(()),
    }
}

/// The standard's name of a SOP class.
fn class_name(uid: &str) -> Option<&'static str> {
    dicom_dictionary_std::sop_class::registry()
        .by_uid(uid)
        .map(|class| class.name)
}

/// Checks the Image Pixel module.
fn image_pixel_module(
    attributes: &Attributes,
    codec: Codec,
) -> Result<(Shape, Stored, Photometric), RejectReason> {
    let missing = |name| corrupt(format!("DICOM: {name} is missing"));
    let unsigned = |tag, name| {
        attributes
            .integer(tag)
            .and_then(|value| u16::try_from(value).ok())
            .ok_or_else(|| missing(name))
    };
    let (rows, columns) = (
        unsigned(tags::ROWS, "Rows")?,
        unsigned(tags::COLUMNS, "Columns")?,
    );
    let bits_allocated = unsigned(tags::BITS_ALLOCATED, "BitsAllocated")?;
    if !matches!(bits_allocated, 8 | 16) {
        return Err(unsupported(format!(
            "DICOM: {bits_allocated} bits allocated for a sample; only 8 and 16 are supported"
        )));
    }
    let bits = unsigned(tags::BITS_STORED, "BitsStored").unwrap_or(bits_allocated);
    let high = unsigned(tags::HIGH_BIT, "HighBit").unwrap_or(bits.saturating_sub(1));
    if bits == 0 || bits > bits_allocated || high >= bits_allocated || high + 1 < bits {
        return Err(corrupt(
            "DICOM: BitsAllocated, BitsStored and HighBit contradict each other",
        ));
    }
    let channels = unsigned(tags::SAMPLES_PER_PIXEL, "SamplesPerPixel").unwrap_or(1);
    let name = attributes
        .text(tags::PHOTOMETRIC_INTERPRETATION)
        .ok_or_else(|| missing("PhotometricInterpretation"))?;
    let photometric = match name.as_str() {
        "MONOCHROME1" => Photometric::Monochrome { inverted: true },
        "MONOCHROME2" => Photometric::Monochrome { inverted: false },
        "PALETTE COLOR" => Photometric::Palette,
        "RGB" => Photometric::Rgb,
        "YBR_FULL" | "YBR_FULL_422" | "YBR_RCT" | "YBR_ICT" => Photometric::Ybr,
        "YBR_PARTIAL_420" | "YBR_PARTIAL_422" | "HSV" | "ARGB" | "CMYK" | "XYB" => {
            return Err(unsupported(format!(
                "DICOM: photometric interpretation {name} is not supported"
            )));
        }
        _ => {
            return Err(unsupported(
                "DICOM: an unknown photometric interpretation is not supported",
            ));
        }
    };
    let expected = if matches!(photometric, Photometric::Rgb | Photometric::Ybr) {
        3
    } else {
        1
    };
    if channels != expected {
        return Err(corrupt(
            "DICOM: SamplesPerPixel does not fit the photometric interpretation",
        ));
    }
    let native = matches!(codec, Codec::Native | Codec::EncapsulatedNative);
    let shape = Shape {
        width: columns.into(),
        height: rows.into(),
        channels: channels.into(),
        bits_allocated,
        planar: attributes.integer(tags::PLANAR_CONFIGURATION) == Some(1),
        subsampled: native && name == "YBR_FULL_422",
        rgb: photometric == Photometric::Rgb,
    };
    if shape.subsampled && (columns % 2 == 1 || bits_allocated != 8 || shape.planar) {
        return Err(corrupt(
            "DICOM: YBR_FULL_422 with an odd width, planes, or more than 8 bits",
        ));
    }
    let signed = attributes.integer(tags::PIXEL_REPRESENTATION) == Some(1);
    Ok((
        shape,
        Stored {
            bits,
            signed,
            shift: high + 1 - bits,
        },
        photometric,
    ))
}

/// The pieces of the first `count` of `claimed` frames.
fn pieces(
    walk: &mut Walk<'_>,
    pixels: &Element,
    bytes: &[u8],
    claimed: u32,
    count: u32,
) -> Result<Vec<Vec<Range<usize>>>, RejectReason> {
    let mut fragments = walk.fragments(pixels)?.into_iter();
    let table = fragments
        .next()
        .ok_or_else(|| corrupt("DICOM: the compressed pixel data has no offset table"))?;
    let fragments: Vec<_> = fragments.collect();
    let (claimed, count) = (claimed as usize, count as usize);
    if claimed == 1 && !fragments.is_empty() {
        return Ok(vec![fragments]);
    }
    if fragments.len() == claimed {
        return Ok(fragments
            .into_iter()
            .take(count)
            .map(|fragment| vec![fragment])
            .collect());
    }
    // Offsets of the frames' first items, from the first fragment's header on.
    let offsets: Vec<usize> = bytes[table]
        .as_chunks::<4>()
        .0
        .iter()
        .map(|offset| u32::from_le_bytes(*offset) as usize)
        .collect();
    if fragments.len() < claimed || offsets.len() != claimed || !offsets.is_sorted() {
        return Err(corrupt(
            "DICOM: the pieces of the pixel data do not fit NumberOfFrames",
        ));
    }
    let base = fragments[0].start - 8;
    let mut frames = vec![Vec::new(); count];
    for fragment in fragments {
        let offset = fragment.start - 8 - base;
        let frame = offsets.partition_point(|start| *start <= offset);
        if let Some(frame) = frame.checked_sub(1).and_then(|frame| frames.get_mut(frame)) {
            frame.push(fragment);
        }
    }
    if frames.iter().any(Vec::is_empty) {
        return Err(corrupt(
            "DICOM: the offset table leaves a frame without data",
        ));
    }
    Ok(frames)
}

/// The flat elements inside the functional groups of one frame, or shared by all, that change its levels or its shape.
fn groups(
    bytes: &[u8],
    item: Range<usize>,
    encoding: Encoding,
) -> Result<Attributes, RejectReason> {
    const GROUPS: [Tag; 3] = [
        tags::PIXEL_MEASURES_SEQUENCE,
        tags::FRAME_VOILUT_SEQUENCE,
        tags::PIXEL_VALUE_TRANSFORMATION_SEQUENCE,
    ];
    let mut walk = Walk::new(bytes, item, encoding);
    let mut flat = Flat::new(bytes, encoding);
    while let Some(group) = walk.next_element()? {
        if !GROUPS.contains(&group.tag) {
            continue;
        }
        for item in walk.items(&group, 1)? {
            let mut inner = Walk::new(bytes, item, encoding);
            while let Some(element) = inner.next_element()? {
                if WANTED.contains(&element.tag) {
                    flat.add(&element);
                }
            }
        }
    }
    flat.read()
}

/// The first usable window, from the innermost scope that has one.
fn window(scopes: &[&Attributes]) -> Option<Window> {
    scopes.iter().find_map(|scope| {
        let function = match scope.text(tags::VOILUT_FUNCTION).as_deref() {
            Some("LINEAR_EXACT") => Function::LinearExact,
            Some("SIGMOID") => Function::Sigmoid,
            _ => Function::Linear,
        };
        Window::new(
            scope.number(tags::WINDOW_CENTER, 0)?,
            scope.number(tags::WINDOW_WIDTH, 0)?,
            function,
        )
    })
}

/// Stretches the picture along its coarser side, bilinearly, where its pixels are not square.
fn square_pixels(
    picture: Picture,
    scopes: &[&Attributes],
    limits: &Limits,
    notes: &mut Vec<DecodeNote>,
) -> Result<Picture, RejectReason> {
    let pair = |tag| {
        scopes
            .iter()
            .find_map(|scope| Some((scope.number(tag, 0)?, scope.number(tag, 1)?)))
    };
    // All three hold the vertical distance first.
    let spacing = pair(tags::PIXEL_SPACING)
        .or_else(|| pair(tags::IMAGER_PIXEL_SPACING))
        .or_else(|| pair(tags::PIXEL_ASPECT_RATIO));
    let ratio = spacing.map_or(1.0, |(vertical, horizontal)| vertical / horizontal);
    if !ratio.is_finite() || !(0.1..=10.0).contains(&ratio) || (ratio - 1.0).abs() <= SQUARE {
        return Ok(picture);
    }
    let (width, height) = (picture.width(), picture.height());
    let stretched = |side: u32, factor: f64| (f64::from(side) * factor).round() as u32;
    let (width, height) = if ratio > 1.0 {
        (width, stretched(height, ratio))
    } else {
        (stretched(width, 1.0 / ratio), height)
    };
    // `imageops` keeps a copy of the picture in f32.
    limits.check(width.into(), height.into(), 3 + 3 * 4)?;
    note(notes, DecodeNote::AspectCorrected);
    Ok(match picture {
        Picture::Gray(image) => Picture::Gray(imageops::resize(
            &image,
            width,
            height,
            FilterType::Triangle,
        )),
        Picture::Rgb(image) => Picture::Rgb(imageops::resize(
            &image,
            width,
            height,
            FilterType::Triangle,
        )),
    })
}

fn header(attributes: &Attributes) -> DicomHeader {
    let date_time = || {
        if let Some(both) = attributes.text(tags::ACQUISITION_DATE_TIME) {
            return both
                .split_at_checked(8)
                .and_then(|(date, time)| iso(date, Some(time)));
        }
        let pairs = [
            (tags::ACQUISITION_DATE, tags::ACQUISITION_TIME),
            (tags::CONTENT_DATE, tags::CONTENT_TIME),
            (tags::STUDY_DATE, tags::STUDY_TIME),
        ];
        pairs
            .into_iter()
            .find_map(|(date, time)| iso(&attributes.text(date)?, attributes.text(time).as_deref()))
    };
    let offset = attributes
        .text(tags::TIMEZONE_OFFSET_FROM_UTC)
        .and_then(|text| {
            let (sign, digits) = text.split_at_checked(1)?;
            let (hours, minutes) = digits.split_at_checked(2)?;
            let minutes =
                i16::from(hours.parse::<u8>().ok()?) * 60 + i16::from(minutes.parse::<u8>().ok()?);
            match sign {
                "+" => Some(minutes),
                "-" => Some(-minutes),
                _ => None,
            }
        });
    DicomHeader {
        modality: attributes.text(tags::MODALITY),
        study_instance_uid: attributes.text(tags::STUDY_INSTANCE_UID),
        series_instance_uid: attributes.text(tags::SERIES_INSTANCE_UID),
        sop_instance_uid: attributes.text(tags::SOP_INSTANCE_UID),
        instance_number: attributes
            .integer(tags::INSTANCE_NUMBER)
            .and_then(|number| i32::try_from(number).ok()),
        acquired: date_time(),
        utc_offset_minutes: offset.filter(|minutes| minutes.abs() <= 14 * 60),
    }
}

/// `20261123` and `130500.123` to `2026-11-23T13:05:00`; a time may be short or missing.
fn iso(date: &str, time: Option<&str>) -> Option<String> {
    let digits = |text: &str, count: usize| {
        (text.len() >= count && text.as_bytes()[..count].iter().all(u8::is_ascii_digit))
            .then_some(())
    };
    digits(date, 8)?;
    let (year, month, day) = (&date[..4], &date[4..6], &date[6..8]);
    if !("01"..="12").contains(&month) || !("01"..="31").contains(&day) {
        return None;
    }
    let time: String = time
        .unwrap_or_default()
        .chars()
        .take_while(char::is_ascii_digit)
        .take(6)
        .collect();
    let part = |at: usize, most: &str| {
        time.get(at..at + 2)
            .filter(|part| *part <= most)
            .unwrap_or("00")
    };
    Some(format!(
        "{year}-{month}-{day}T{}:{}:{}",
        part(0, "23"),
        part(2, "59"),
        part(4, "59")
    ))
}

/// Collects flat elements, bytes as they stand, for `dicom-object`.
struct Flat<'a> {
    bytes: &'a [u8],
    encoding: Encoding,
    data: Vec<u8>,
    seen: Vec<Tag>,
}

impl<'a> Flat<'a> {
    fn new(bytes: &'a [u8], encoding: Encoding) -> Self {
        Self {
            bytes,
            encoding,
            data: Vec::new(),
            seen: Vec::new(),
        }
    }

    /// Takes an element, the first of its tag, if it is of a kind that a wanted element may be.
    ///
    /// `dicom-object` reads whole numbers and believes a length that is no multiple of theirs: what follows would be
    /// read out of step, as headers with any length in them, for which it makes room.
    fn add(&mut self, element: &Element) {
        let length = element.value.len();
        let fits = match &element.vr {
            b"CS" | b"UI" | b"DA" | b"TM" | b"DT" | b"SH" | b"LO" | b"IS" | b"DS" | b"OB" => true,
            // Implicit: whatever the dictionary says, no wanted element has numbers of more than two bytes.
            b"US" | b"SS" | b"OW" | [0, 0] => length.is_multiple_of(2),
            _ => false,
        };
        if fits && !element.undefined && length <= MAX_VALUE && !self.seen.contains(&element.tag) {
            self.seen.push(element.tag);
            self.data
                .extend_from_slice(&self.bytes[element.whole.clone()]);
        }
    }

    fn read(self) -> Result<Attributes, RejectReason> {
        let syntax = match self.encoding {
            Encoding {
                explicit: false, ..
            } => entries::IMPLICIT_VR_LITTLE_ENDIAN.erased(),
            Encoding { big: true, .. } => entries::EXPLICIT_VR_BIG_ENDIAN.erased(),
            _ => entries::EXPLICIT_VR_LITTLE_ENDIAN.erased(),
        };
        InMemDicomObject::read_dataset_with_ts(self.data.as_slice(), &syntax)
            .map(Attributes)
            .map_err(|_| corrupt("DICOM: an element's value does not fit its kind"))
    }
}

/// The values that were read.
#[derive(Debug)]
struct Attributes(InMemDicomObject);

impl Attributes {
    /// The first value as text, trimmed; `None` when empty.
    fn text(&self, tag: Tag) -> Option<String> {
        let value = self.0.get(tag)?.to_str().ok()?;
        let first = value.split('\\').next()?.trim_matches(['\0', ' ']);
        (!first.is_empty()).then(|| first.to_owned())
    }

    fn integer(&self, tag: Tag) -> Option<i64> {
        self.0.get(tag)?.to_int().ok()
    }

    /// Value number `index`.
    fn number(&self, tag: Tag, index: usize) -> Option<f64> {
        self.0
            .get(tag)?
            .to_multi_float64()
            .ok()?
            .get(index)
            .copied()
    }

    /// 16-bit values by their bits, whether written as US, SS or OW.
    fn words(&self, tag: Tag) -> Option<Vec<u16>> {
        let element = self.0.get(tag)?;
        match element.vr().to_string() {
            "OB" => Some(
                element
                    .to_bytes()
                    .ok()?
                    .as_chunks::<2>()
                    .0
                    .iter()
                    .map(|pair| u16::from_le_bytes(*pair))
                    .collect(),
            ),
            _ => Some(
                element
                    .to_multi_int::<i32>()
                    .ok()?
                    .into_iter()
                    .map(|value| value as u16)
                    .collect(),
            ),
        }
    }
}
