//! From the bytes of a file to 8-bit pictures.
//!
//! What a file is, is decided by its content, never by its name. The pixels are those of OpenCV's `imread` with its
//! default flags, which is what the Flask application fed to its model: palettes expanded, alpha dropped, 16 bits
//! reduced, EXIF orientation applied. Where `imread` would return a half-grey picture of a damaged file, this module
//! refuses it with a reason.
//!
//! Files come from a scanner's export folder and may be anything. So the order is always: read the header, compare what
//! it claims with the [`Limits`], and only then allocate. [`Source::open`] does the first two for every format and finds
//! a file that ends early; [`Source::frame`] decodes one picture. Nothing here panics: the third-party decoders run
//! inside a `guarded` call that turns a panic of theirs into [`RejectCode::Corrupt`].

mod bmp;
pub(crate) mod jpeg;
mod png;
mod tiff;

use std::panic::{AssertUnwindSafe, catch_unwind};

use image::metadata::Orientation;
use image::{DynamicImage, GrayImage, ImageError, RgbImage};
use serde::{Deserialize, Serialize};

use super::dicom::{DicomHeader, DicomSource};
use super::{Picture, vectorized};
use crate::prediction::{RejectCode, RejectReason};

/// What one file may cost. The defaults fit a board with 1 GB of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Limits {
    /// Largest file, in bytes.
    pub file_bytes: u64,
    /// Most pixels in one picture, width times height.
    pub pixels: u64,
    /// Most memory that decoding one picture may take beside the file itself, in bytes, the picture included.
    pub decode_bytes: u64,
    /// Most frames taken from one multi-frame DICOM file; the rest is dropped and noted.
    pub frames: u32,
}

impl Default for Limits {
    /// 64 MiB, 40 million pixels (a 5000 x 8000 film), 256 MiB, 64 frames.
    fn default() -> Self {
        Self {
            file_bytes: 64 << 20,
            pixels: 40_000_000,
            decode_bytes: 256 << 20,
            frames: 64,
        }
    }
}

impl Limits {
    /// Refuses a picture of `width` x `height` whose decoding takes `bytes_per_pixel`, before anything is allocated.
    pub(crate) fn check(
        &self,
        width: u64,
        height: u64,
        bytes_per_pixel: u64,
    ) -> Result<(), RejectReason> {
        if width == 0 || height == 0 {
            return Err(RejectReason::new(
                RejectCode::Corrupt,
                "the header claims a picture without pixels",
            ));
        }
        let pixels = width.saturating_mul(height);
        if pixels > self.pixels {
            return Err(RejectReason::new(
                RejectCode::TooManyPixels,
                format!(
                    "the header claims {width} x {height} pixels; the limit is {} in all",
                    self.pixels
                ),
            ));
        }
        let bytes = pixels.saturating_mul(bytes_per_pixel);
        if bytes > self.decode_bytes {
            return Err(RejectReason::new(
                RejectCode::TooManyPixels,
                format!(
                    "decoding {width} x {height} pixels takes {bytes} bytes; the limit is {}",
                    self.decode_bytes
                ),
            ));
        }
        Ok(())
    }

    /// The same limits in the form that `image`'s decoders take.
    fn for_image(&self) -> image::Limits {
        let mut limits = image::Limits::no_limits();
        limits.max_alloc = Some(self.decode_bytes);
        limits
    }
}

/// The file formats, by content.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SourceKind {
    /// JPEG, baseline or progressive, 8 bits.
    Jpeg,
    /// PNG; of an animated one the default image.
    Png,
    /// Windows bitmap.
    Bmp,
    /// TIFF or `BigTIFF`; of several pages the first.
    Tiff,
    /// DICOM Part 10, or a bare data set.
    Dicom,
}

/// Something that was done to a picture and that a reader of its result should know.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DecodeNote {
    /// The file is animated or has several pages: only the first was looked at.
    FirstPageOnly,
    /// The DICOM file has more frames than `limits.frames`: the rest was not looked at.
    FramesDropped,
    /// Samples of more than 8 bits were reduced to 8.
    SixteenBitReduced,
    /// Rotated or mirrored as the file's orientation tag says.
    ExifRotated,
    /// The DICOM file states no window: grey levels span its 0.5th to 99.5th percentile.
    PercentileWindow,
    /// Pixels are not square: the picture was stretched along its coarser side.
    AspectCorrected,
}

/// A file that was recognised and passed its header checks.
#[derive(Debug)]
pub struct Source<'a> {
    inner: Inner<'a>,
    limits: Limits,
    notes: Vec<DecodeNote>,
}

#[derive(Debug)]
enum Inner<'a> {
    Still(SourceKind, &'a [u8]),
    Dicom(Box<DicomSource<'a>>),
}

impl<'a> Source<'a> {
    /// Recognises the file and reads its header: no pixel is decoded yet.
    ///
    /// # Errors
    /// [`RejectCode::Empty`], [`RejectCode::FileTooLarge`], [`RejectCode::NotAnImage`], [`RejectCode::Unsupported`],
    /// [`RejectCode::NotAnImageObject`] (DICOM without pixels), [`RejectCode::Truncated`],
    /// [`RejectCode::Corrupt`] or [`RejectCode::TooManyPixels`]. For a file that is still being written this or
    /// [`Self::frame`] says [`RejectCode::Truncated`].
    pub fn open(bytes: &'a [u8], limits: &Limits) -> Result<Self, RejectReason> {
        if bytes.is_empty() {
            return Err(RejectReason::new(
                RejectCode::Empty,
                "the file has no bytes",
            ));
        }
        if bytes.len() as u64 > limits.file_bytes {
            return Err(RejectReason::new(
                RejectCode::FileTooLarge,
                format!(
                    "the file has {} bytes; the limit is {}",
                    bytes.len(),
                    limits.file_bytes
                ),
            ));
        }
        let kind = recognise(bytes)?;
        guarded(|| {
            let mut notes = Vec::new();
            let inner = match kind {
                SourceKind::Jpeg => jpeg::check(bytes, limits).map(|()| Inner::Still(kind, bytes)),
                SourceKind::Png => {
                    png::check(bytes, limits, &mut notes).map(|()| Inner::Still(kind, bytes))
                }
                SourceKind::Bmp => bmp::check(bytes, limits).map(|()| Inner::Still(kind, bytes)),
                SourceKind::Tiff => {
                    tiff::check(bytes, limits, &mut notes).map(|()| Inner::Still(kind, bytes))
                }
                SourceKind::Dicom => DicomSource::open(bytes, limits, &mut notes)
                    .map(|dicom| Inner::Dicom(Box::new(dicom))),
            }?;
            Ok(Self {
                inner,
                limits: *limits,
                notes,
            })
        })
    }

    /// The format, as the content shows it.
    pub fn kind(&self) -> SourceKind {
        match &self.inner {
            Inner::Still(kind, _) => *kind,
            Inner::Dicom(_) => SourceKind::Dicom,
        }
    }

    /// How many pictures [`Self::frame`] can give, 1 to `limits.frames`; above 1 only for multi-frame DICOM.
    pub fn frame_count(&self) -> u32 {
        match &self.inner {
            Inner::Still(..) => 1,
            Inner::Dicom(dicom) => dicom.frame_count(),
        }
    }

    /// Decodes picture number `index`, counted from 0. Each call decodes anew and keeps nothing.
    ///
    /// # Errors
    /// As [`Self::open`], for what only the pixel data shows.
    ///
    /// # Panics
    /// When `index` is not below [`Self::frame_count`].
    pub fn frame(&mut self, index: u32) -> Result<Picture, RejectReason> {
        assert!(
            index < self.frame_count(),
            "frame {index} of {}",
            self.frame_count()
        );
        let Self {
            inner,
            limits,
            notes,
        } = self;
        guarded(|| match inner {
            Inner::Still(SourceKind::Jpeg, bytes) => jpeg::decode(bytes, notes),
            Inner::Still(SourceKind::Png, bytes) => png::decode(bytes, limits, notes),
            Inner::Still(SourceKind::Bmp, bytes) => bmp::decode(bytes, limits),
            Inner::Still(SourceKind::Tiff | SourceKind::Dicom, bytes) => {
                tiff::decode(bytes, limits, notes)
            }
            Inner::Dicom(dicom) => dicom.frame(index, limits, notes),
        })
    }

    /// What was done to the pictures so far, each kind once.
    pub fn notes(&self) -> &[DecodeNote] {
        &self.notes
    }

    /// What the pipeline needs from a DICOM header; `None` for the other formats.
    pub fn header(&self) -> Option<&DicomHeader> {
        match &self.inner {
            Inner::Still(..) => None,
            Inner::Dicom(dicom) => Some(dicom.header()),
        }
    }
}

/// Adds a note once.
pub(crate) fn note(notes: &mut Vec<DecodeNote>, note: DecodeNote) {
    if !notes.contains(&note) {
        notes.push(note);
    }
}

/// Runs a decoder; a panic inside it is a damaged file, not the end of the daemon.
///
/// No panic of a decoder is known; years of unattended files are a long time.
fn guarded<T>(decode: impl FnOnce() -> Result<T, RejectReason>) -> Result<T, RejectReason> {
    catch_unwind(AssertUnwindSafe(decode)).unwrap_or_else(|_| {
        Err(RejectReason::new(
            RejectCode::Corrupt,
            "the decoder gave up on contradictory data",
        ))
    })
}

/// Decides the format by the first bytes.
fn recognise(bytes: &[u8]) -> Result<SourceKind, RejectReason> {
    const KNOWN: [(&[u8], SourceKind); 7] = [
        (&[0xff, 0xd8, 0xff], SourceKind::Jpeg),
        (b"\x89PNG\r\n\x1a\n", SourceKind::Png),
        (b"BM", SourceKind::Bmp),
        (b"II*\0", SourceKind::Tiff),
        (b"MM\0*", SourceKind::Tiff),
        (b"II+\0\x08\0\0\0", SourceKind::Tiff),
        (b"MM\0+\0\x08\0\0", SourceKind::Tiff),
    ];
    const OTHER: [(usize, &[u8], &str); 8] = [
        (0, b"GIF8", "a GIF"),
        (8, b"WEBP", "a WebP"),
        (4, b"jP  \r\n", "a JPEG 2000"),
        (0, b"\xff\x4f\xff\x51", "a JPEG 2000"),
        (4, b"ftyp", "a HEIF or AVIF"),
        (0, b"\xff\x0a", "a JPEG XL"),
        (344, b"n+1\0", "a NIfTI"),
        (0, b"\x76\x2f\x31\x01", "an OpenEXR"),
    ];
    // DICOM first: its 128 bytes of preamble are free and may look like a TIFF (dual-personality files).
    if super::dicom::is_dicom(bytes) {
        return Ok(SourceKind::Dicom);
    }
    if let Some((_, kind)) = KNOWN.iter().find(|(magic, _)| bytes.starts_with(magic)) {
        return Ok(*kind);
    }
    // A first block of a file still being written: too short to tell, but nothing speaks against it.
    if KNOWN.iter().any(|(magic, _)| magic.starts_with(bytes))
        || super::dicom::may_become_dicom(bytes)
    {
        return Err(truncated("the file ends inside its first bytes"));
    }
    for (at, magic, name) in OTHER {
        if bytes.get(at..).is_some_and(|rest| rest.starts_with(magic)) {
            return Err(RejectReason::new(
                RejectCode::Unsupported,
                format!("{name} file; supported are JPEG, PNG, BMP, TIFF and DICOM"),
            ));
        }
    }
    Err(RejectReason::new(
        RejectCode::NotAnImage,
        "the content is no known image format; supported are JPEG, PNG, BMP, TIFF and DICOM",
    ))
}

pub(crate) fn truncated(message: impl Into<String>) -> RejectReason {
    RejectReason::new(RejectCode::Truncated, message)
}

pub(crate) fn corrupt(message: impl Into<String>) -> RejectReason {
    RejectReason::new(RejectCode::Corrupt, message)
}

pub(crate) fn unsupported(message: impl Into<String>) -> RejectReason {
    RejectReason::new(RejectCode::Unsupported, message)
}

/// One line for a person out of a decoder's error: printable ASCII, bounded.
fn one_line(format: &str, error: &dyn std::fmt::Display) -> String {
    let text: String = error
        .to_string()
        .chars()
        .map(|c| if c.is_ascii_graphic() { c } else { ' ' })
        .take(160)
        .collect();
    format!("{format}: {}", text.trim())
}

/// The reason behind an error of one of `image`'s decoders.
fn from_image_error(format: &str, error: &ImageError) -> RejectReason {
    let code = match error {
        ImageError::Limits(_) => RejectCode::TooManyPixels,
        ImageError::Unsupported(_) => RejectCode::Unsupported,
        ImageError::IoError(io) if io.kind() == std::io::ErrorKind::UnexpectedEof => {
            RejectCode::Truncated
        }
        _ => RejectCode::Corrupt,
    };
    RejectReason::new(code, one_line(format, error))
}

/// `imread`'s reduction of a decoded image: alpha dropped (not blended), 16 bits reduced by dropping the low byte.
fn reduce(image: DynamicImage, notes: &mut Vec<DecodeNote>) -> Result<Picture, RejectReason> {
    let (width, height) = (image.width(), image.height());
    let gray = |data| GrayImage::from_raw(width, height, data).map(Picture::Gray);
    let rgb = |data| RgbImage::from_raw(width, height, data).map(Picture::Rgb);
    let picture = match image {
        DynamicImage::ImageLuma8(image) => Some(Picture::Gray(image)),
        DynamicImage::ImageRgb8(image) => Some(Picture::Rgb(image)),
        DynamicImage::ImageLumaA8(image) => gray(image.pixels().map(|p| p.0[0]).collect()),
        DynamicImage::ImageRgba8(image) => rgb(image
            .pixels()
            .flat_map(|p| [p.0[0], p.0[1], p.0[2]])
            .collect()),
        image => {
            note(notes, DecodeNote::SixteenBitReduced);
            let high = |v: u16| (v >> 8) as u8;
            match image {
                DynamicImage::ImageLuma16(image) => {
                    gray(image.pixels().map(|p| high(p.0[0])).collect())
                }
                DynamicImage::ImageLumaA16(image) => {
                    gray(image.pixels().map(|p| high(p.0[0])).collect())
                }
                DynamicImage::ImageRgb16(image) => {
                    rgb(image.pixels().flat_map(|p| p.0.map(high)).collect())
                }
                DynamicImage::ImageRgba16(image) => rgb(image
                    .pixels()
                    .flat_map(|p| [high(p.0[0]), high(p.0[1]), high(p.0[2])])
                    .collect()),
                _ => None,
            }
        }
    };
    picture.ok_or_else(|| unsupported("samples of this type are not supported"))
}

/// Turns the picture as its orientation tag says.
fn orient(picture: Picture, orientation: Orientation, notes: &mut Vec<DecodeNote>) -> Picture {
    if orientation == Orientation::NoTransforms {
        return picture;
    }
    note(notes, DecodeNote::ExifRotated);
    let mut image = match picture {
        Picture::Gray(image) => DynamicImage::ImageLuma8(image),
        Picture::Rgb(image) => DynamicImage::ImageRgb8(image),
    };
    image.apply_orientation(orientation);
    match image {
        DynamicImage::ImageLuma8(image) => Picture::Gray(image),
        image => Picture::Rgb(image.into_rgb8()),
    }
}

/// A colour picture whose three channels are equal everywhere becomes a grey one.
///
/// Scanners and converters often save grey images as colour. Both stand for the same picture (three equal channels
/// convert to the same grey level), and one channel is a third of the work for everything that follows. A truly coloured
/// picture costs a look at its first coloured pixel.
pub(crate) fn without_needless_colour(picture: Picture) -> Picture {
    /// Pixels that are looked at, and copied, at a time.
    const PART: usize = 1024;
    let Picture::Rgb(image) = picture else {
        return picture;
    };
    let (pixels, _) = image.as_raw().as_chunks();
    let all_gray = vectorized(
        #[inline(always)]
        || {
            pixels.chunks(PART).all(|part| {
                let apart = part.iter().map(|[r, g, b]| (r ^ g) | (g ^ b));
                apart.fold(0, |all, apart| all | apart) == 0
            })
        },
    );
    if !all_gray {
        return Picture::Rgb(image);
    }
    let (width, height) = image.dimensions();
    let mut levels = image.into_raw();
    let pixels = levels.len() / 3;
    // In their own memory: this is when a large picture needs most of it. By parts that are copied out first: what is read and what is written overlap,
    // and pixel by pixel that takes four times as long.
    vectorized(
        #[inline(always)]
        || {
            let mut part = [0; 3 * PART];
            for from in (0..pixels).step_by(PART) {
                let to = pixels.min(from + PART);
                let part = &mut part[..3 * (to - from)];
                part.copy_from_slice(&levels[3 * from..3 * to]);
                let (part, _) = part.as_chunks();
                for (level, [r, _, _]) in levels[from..to].iter_mut().zip(part) {
                    *level = *r;
                }
            }
        },
    );
    levels.truncate(pixels);
    levels.shrink_to_fit();
    Picture::Gray(GrayImage::from_raw(width, height, levels).expect("one level for each pixel"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_loses_its_colour_only_if_no_pixel_has_any() {
        for pixels in [1, 1023, 1024, 1025, 3000] {
            let rgb = |data| Picture::Rgb(RgbImage::from_raw(pixels, 1, data).unwrap());
            let levels: Vec<u8> = (0..pixels).map(|i| (i * 7 % 251) as u8).collect();
            let colour: Vec<u8> = levels.iter().flat_map(|&level| [level; 3]).collect();
            let gray = GrayImage::from_raw(pixels, 1, levels).unwrap();
            let found = without_needless_colour(rgb(colour.clone()));
            assert!(found == Picture::Gray(gray), "{pixels}");
            for coloured in [0, colour.len() / 2, colour.len() - 1] {
                let mut colour = colour.clone();
                colour[coloured] ^= 1;
                let found = without_needless_colour(rgb(colour.clone()));
                assert!(found == rgb(colour), "{pixels}, {coloured}");
            }
        }
    }
}
