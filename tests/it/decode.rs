//! Image files into pictures: the same pixels as OpenCV's `imread`, and a reason for every bad file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use scansentry::imaging::Picture;
use scansentry::imaging::decode::{DecodeNote, Limits, Source, SourceKind};
use scansentry::prediction::{RejectCode, RejectReason};

use crate::support::files_in;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/decode")
}

/// Opens and decodes the first picture.
pub fn decode(bytes: &[u8]) -> Result<(Picture, Vec<DecodeNote>), RejectReason> {
    let mut source = Source::open(bytes, &Limits::default())?;
    let picture = source.frame(0)?;
    Ok((picture, source.notes().to_vec()))
}

pub fn rgb(picture: &Picture) -> Vec<u8> {
    match picture {
        Picture::Gray(image) => image
            .as_raw()
            .iter()
            .flat_map(|level| [*level; 3])
            .collect(),
        Picture::Rgb(image) => image.as_raw().clone(),
    }
}

/// Mean and largest difference of two pictures' levels.
pub fn difference(a: &[u8], b: &[u8]) -> (f64, u8) {
    assert_eq!(a.len(), b.len(), "the pictures have different sizes");
    let differences = || a.iter().zip(b).map(|(a, b)| a.abs_diff(*b));
    let sum: u64 = differences().map(u64::from).sum();
    (
        sum as f64 / a.len() as f64,
        differences().max().unwrap_or(0),
    )
}

/// Files that `imread` reads and this does not, or the other way round.
const DIFFERENT_BY_DESIGN: &[&str] = &[
    // `imread` takes the two's complement for unsigned levels, so that dark pixels come out white: refused here.
    "tiff-gray-i16.tif",
    // `imread` of OpenCV 4.14 trips over its own rotation of non-square TIFFs: rotated here.
    "tiff-orientation6.tif",
];

#[test]
fn pictures_are_those_of_imread() {
    let expected: serde_json::Value = serde_json::from_slice(
        &std::fs::read(golden().join("expected.json")).expect("golden files"),
    )
    .unwrap();
    let mut failures = BTreeMap::new();
    let files = expected["files"].as_object().unwrap();
    assert!(files.len() > 50, "only {} golden files", files.len());
    for (name, expected) in files {
        let bytes = std::fs::read(golden().join("files").join(name)).unwrap();
        let result = decode(&bytes);
        let (picture, _) = match (&result, expected.is_null()) {
            (Err(_), true) => continue,
            (Ok(result), false) => result,
            (Ok(_), true) => {
                failures.insert(name, "imread refuses it".to_owned());
                continue;
            }
            (Err(reason), false) => {
                failures.insert(name, reason.to_string());
                continue;
            }
        };
        let stem = Path::new(name).file_stem().unwrap().to_str().unwrap();
        let wanted = image::open(golden().join("expected").join(format!("{stem}.png")))
            .unwrap()
            .into_rgb8();
        if (picture.width(), picture.height()) != wanted.dimensions() {
            failures.insert(name, "another size".to_owned());
            continue;
        }
        let (mean, max) = difference(&rgb(picture), wanted.as_raw());
        let lossy = expected["lossy"].as_bool().unwrap();
        if if lossy {
            mean >= 0.5 || max > 8
        } else {
            max > 0
        } {
            failures.insert(name, format!("mean difference {mean:.3}, largest {max}"));
        }
        if expected["gray"] == true && !lossy && !matches!(picture, Picture::Gray(_)) {
            failures.insert(name, "a grey file became a colour picture".to_owned());
        }
    }
    for name in DIFFERENT_BY_DESIGN {
        assert!(
            files.contains_key(*name),
            "{name} is not among the golden files"
        );
    }
    failures.retain(|name, _| !DIFFERENT_BY_DESIGN.contains(&name.as_str()));
    assert!(failures.is_empty(), "{failures:#?}");
}

fn golden_file(name: &str) -> Vec<u8> {
    std::fs::read(golden().join("files").join(name)).unwrap()
}

fn golden_files() -> Vec<(String, Vec<u8>)> {
    files_in(&golden().join("files")).expect("golden files")
}

fn code(bytes: &[u8]) -> Result<(), RejectCode> {
    decode(bytes).map(|_| ()).map_err(|reason| reason.code)
}

#[test]
fn formats_are_told_by_content() {
    for (name, bytes) in golden_files() {
        let Ok(source) = Source::open(&bytes, &Limits::default()) else {
            continue;
        };
        let expected = match name.split('-').next().unwrap() {
            "jpeg" => SourceKind::Jpeg,
            "png" => SourceKind::Png,
            "bmp" => SourceKind::Bmp,
            _ => SourceKind::Tiff,
        };
        assert_eq!(source.kind(), expected, "{name}");
        assert_eq!(source.frame_count(), 1, "{name}");
        assert!(source.header().is_none(), "{name}");
    }
}

#[test]
fn what_is_no_image_is_named_as_such() {
    assert_eq!(code(b""), Err(RejectCode::Empty));
    assert_eq!(code(b"a report, not an image"), Err(RejectCode::NotAnImage));
    assert_eq!(code(b"a letter"), Err(RejectCode::NotAnImage));
    assert_eq!(code(&[0; 4096]), Err(RejectCode::NotAnImage));
    assert_eq!(code(b"%PDF-1.7\n"), Err(RejectCode::NotAnImage));
    assert_eq!(
        code(b"GIF89a\x01\0\x01\0\0\0\0"),
        Err(RejectCode::Unsupported)
    );
    assert_eq!(code(b"RIFF\0\0\0\0WEBPVP8 "), Err(RejectCode::Unsupported));
    let limits = Limits {
        file_bytes: 100,
        ..Limits::default()
    };
    assert_eq!(
        Source::open(&[0; 101], &limits).unwrap_err().code,
        RejectCode::FileTooLarge
    );
}

#[test]
fn a_file_that_ends_early_is_truncated_at_every_length() {
    for (name, bytes) in golden_files() {
        let Ok((whole, _)) = decode(&bytes) else {
            continue;
        };
        // Every length near both ends, some in between.
        let lengths = (1..bytes.len()).filter(|n| *n < 200 || bytes.len() - n < 40 || n % 37 == 0);
        for length in lengths {
            match decode(&bytes[..length]) {
                Err(reason) if reason.code == RejectCode::Truncated => {}
                // The pixels were all there: what is missing is padding or a trailer that no decoder needs.
                Ok((picture, _)) if picture == whole => {}
                result => panic!(
                    "{name}, {length} of {} bytes: {:?}",
                    bytes.len(),
                    result.map(|_| "another picture")
                ),
            }
        }
    }
}

fn crc(bytes: &[u8]) -> [u8; 4] {
    let step = |crc: u32, byte: &u8| {
        (0..8).fold(crc ^ u32::from(*byte), |c, _| {
            if c & 1 == 1 {
                c >> 1 ^ 0xedb8_8320
            } else {
                c >> 1
            }
        })
    };
    (!bytes.iter().fold(u32::MAX, step)).to_be_bytes()
}

/// The PNG with its header chunk's first bytes (width, height) replaced.
fn png_claiming(mut png: Vec<u8>, width: u32, height: u32) -> Vec<u8> {
    png[16..20].copy_from_slice(&width.to_be_bytes());
    png[20..24].copy_from_slice(&height.to_be_bytes());
    let sum = crc(&png[12..29]);
    png[29..33].copy_from_slice(&sum);
    png
}

fn jpeg_claiming(mut jpeg: Vec<u8>, width: u16, height: u16) -> Vec<u8> {
    let sof = jpeg
        .windows(2)
        .position(|w| w == [0xff, 0xc0] || w == [0xff, 0xc2])
        .unwrap();
    jpeg[sof + 5..sof + 7].copy_from_slice(&height.to_be_bytes());
    jpeg[sof + 7..sof + 9].copy_from_slice(&width.to_be_bytes());
    jpeg
}

fn bmp_claiming(mut bmp: Vec<u8>, width: i32, height: i32) -> Vec<u8> {
    bmp[18..22].copy_from_slice(&width.to_le_bytes());
    bmp[22..26].copy_from_slice(&height.to_le_bytes());
    bmp
}

/// A little-endian TIFF with the 16- or 32-bit values of the first directory's `tag` replaced.
fn tiff_claiming(mut tiff: Vec<u8>, claims: &[(u16, u32)]) -> Vec<u8> {
    let short = |tiff: &[u8], at: usize| u16::from_le_bytes([tiff[at], tiff[at + 1]]);
    let directory = u32::from_le_bytes(tiff[4..8].try_into().unwrap()) as usize;
    for entry in 0..usize::from(short(&tiff, directory)) {
        let at = directory + 2 + entry * 12;
        let tag = short(&tiff, at);
        if let Some((_, value)) = claims.iter().find(|(claimed, _)| *claimed == tag) {
            tiff[at + 2..at + 4].copy_from_slice(&4_u16.to_le_bytes());
            tiff[at + 8..at + 12].copy_from_slice(&value.to_le_bytes());
        }
    }
    tiff
}

/// TIFF tags.
const WIDTH: u16 = 256;
const HEIGHT: u16 = 257;
const ROWS: u16 = 278;

#[test]
fn bombs_are_refused_by_their_headers() {
    const WIDTH: u16 = 256;
    const HEIGHT: u16 = 257;
    const ROWS: u16 = 278;
    let many = Err(RejectCode::TooManyPixels);
    for name in [
        "png-gray8.png",
        "png-rgba16.png",
        "png-palette8.png",
        "png-rgb8-interlaced.png",
    ] {
        assert_eq!(
            code(&png_claiming(golden_file(name), 60_000, 60_000)),
            many,
            "{name}"
        );
        assert_eq!(
            code(&png_claiming(
                golden_file(name),
                u32::MAX >> 1,
                u32::MAX >> 1
            )),
            many,
            "{name}"
        );
        assert_eq!(
            code(&png_claiming(golden_file(name), 0, 7)),
            Err(RejectCode::Corrupt),
            "{name}"
        );
    }
    for name in ["jpeg-420.jpg", "jpeg-gray-progressive.jpg", "jpeg-cmyk.jpg"] {
        assert_eq!(
            code(&jpeg_claiming(golden_file(name), 60_000, 60_000)),
            many,
            "{name}"
        );
    }
    // Half a file of a bomb is already refused: it need not arrive first.
    assert_eq!(
        code(&jpeg_claiming(golden_file("jpeg-420.jpg"), 60_000, 60_000)[..600]),
        many
    );
    for name in ["bmp-24.bmp", "bmp-8-rle.bmp", "bmp-1.bmp"] {
        assert_eq!(
            code(&bmp_claiming(golden_file(name), 60_000, 60_000)),
            many,
            "{name}"
        );
        for (width, height) in [(i32::MAX, i32::MAX), (-1, 1), (1, i32::MIN), (0, 0)] {
            assert!(
                code(&bmp_claiming(golden_file(name), width, height)).is_err(),
                "{name}: {width} x {height}"
            );
        }
    }
    for name in [
        "tiff-gray8.tif",
        "tiff-rgb8-lzw.tif",
        "tiff-rgb8-deflate.tif",
        "tiff-palette8.tif",
        "tiff-gray1.tif",
    ] {
        let large = tiff_claiming(
            golden_file(name),
            &[(WIDTH, 60_000), (HEIGHT, 60_000), (ROWS, 60_000)],
        );
        assert_eq!(code(&large), many, "{name}");
        let silly = tiff_claiming(
            golden_file(name),
            &[(WIDTH, u32::MAX), (HEIGHT, u32::MAX), (ROWS, u32::MAX)],
        );
        assert!(code(&silly).is_err(), "{name}");
    }
}

/// A header within the limits may still promise more than the file holds; memory stays within `decode_bytes`.
#[test]
fn claims_within_the_limits_without_data_are_refused() {
    assert!(code(&png_claiming(golden_file("png-gray8.png"), 5_000, 5_000)).is_err());
    assert!(code(&jpeg_claiming(golden_file("jpeg-420.jpg"), 5_000, 5_000)).is_err());
    assert!(code(&bmp_claiming(golden_file("bmp-24.bmp"), 5_000, 5_000)).is_err());
    let tiff = tiff_claiming(
        golden_file("tiff-gray8.tif"),
        &[(WIDTH, 5_000), (HEIGHT, 5_000), (ROWS, 5_000)],
    );
    assert!(code(&tiff).is_err());
    // Four 16-bit channels of 36 million pixels take more memory than allowed, though the pixel count is not.
    let wide = png_claiming(golden_file("png-rgba16.png"), 6_000, 6_000);
    assert_eq!(code(&wide), Err(RejectCode::TooManyPixels));
}

#[test]
fn further_pages_and_animations_are_noted() {
    let notes = |bytes: &[u8]| decode(bytes).unwrap().1;
    assert_eq!(
        notes(&golden_file("tiff-pages.tif")),
        [DecodeNote::FirstPageOnly]
    );
    assert_eq!(notes(&golden_file("tiff-rgb8.tif")), []);
    assert_eq!(
        notes(&golden_file("png-gray16.png")),
        [DecodeNote::SixteenBitReduced]
    );
    assert_eq!(
        notes(&golden_file("jpeg-exif6.jpg")),
        [DecodeNote::ExifRotated]
    );

    let still = golden_file("png-rgb8.png");
    let mut control = b"acTL".to_vec();
    control.extend([0, 0, 0, 2, 0, 0, 0, 0]);
    let sum = crc(&control);
    let animated = [&still[..33], &[0, 0, 0, 8], &control, &sum, &still[33..]].concat();
    let (picture, notes) = decode(&animated).unwrap();
    assert_eq!(notes, [DecodeNote::FirstPageOnly]);
    assert_eq!(picture, decode(&still).unwrap().0);
}

#[test]
fn damaged_data_is_corrupt_not_a_picture() {
    // Inside the compressed data: the checksum tells.
    let mut png = golden_file("png-rgb8.png");
    let middle = png.len() / 2;
    png[middle] ^= 0x10;
    assert_eq!(code(&png), Err(RejectCode::Corrupt));
    // A code that no table holds, in the middle of the coefficients; libjpeg would go on and paint something.
    let mut jpeg = golden_file("jpeg-444.jpg");
    let middle = jpeg.len() * 3 / 4;
    jpeg[middle..middle + 8].copy_from_slice(&[0xff, 0, 0xff, 0, 0xff, 0, 0xff, 0]);
    assert_eq!(code(&jpeg), Err(RejectCode::Corrupt));
}
