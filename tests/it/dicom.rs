//! DICOM files into pictures: the pixels of pydicom, and a reason for every bad file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use scansentry::imaging::Picture;
use scansentry::imaging::decode::{DecodeNote, Limits, Source, SourceKind};
use scansentry::prediction::{RejectCode, RejectReason};

use crate::decode::{difference, rgb};

use crate::support::{files_in, shared_data};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dicom")
}

pub fn golden_file(name: &str) -> Vec<u8> {
    std::fs::read(golden().join("files").join(format!("{name}.dcm"))).unwrap()
}

/// The real files, where they are: `SCANSENTRY_DATA`, or `shared/data` beside the repository.
fn real_files() -> Option<Vec<(String, Vec<u8>)>> {
    files_in(&shared_data()?.join("dicom"))
}

struct Decoded {
    pictures: Vec<Picture>,
    notes: Vec<DecodeNote>,
}

fn decode_with(bytes: &[u8], limits: &Limits) -> Result<Decoded, RejectReason> {
    let mut source = Source::open(bytes, limits)?;
    let pictures = (0..source.frame_count())
        .map(|index| source.frame(index))
        .collect::<Result<_, _>>()?;
    Ok(Decoded {
        pictures,
        notes: source.notes().to_vec(),
    })
}

fn decode(bytes: &[u8]) -> Result<Decoded, RejectReason> {
    decode_with(bytes, &Limits::default())
}

fn code(bytes: &[u8]) -> Result<(), RejectCode> {
    decode(bytes).map(|_| ()).map_err(|reason| reason.code)
}

fn json<T: serde::Serialize>(value: T) -> serde_json::Value {
    serde_json::to_value(value).unwrap()
}

/// Compares one file with what `expected.json` says of it.
fn check(name: &str, expected: &serde_json::Value) -> Result<(), String> {
    let bytes = golden_file(name);
    let decoded = match (decode(&bytes), expected.get("code")) {
        (Err(reason), Some(code)) if json(reason.code) == *code => return Ok(()),
        (Err(reason), _) => return Err(format!("{:?}: {reason}", reason.code)),
        (Ok(_), Some(code)) => return Err(format!("decoded, not {code}")),
        (Ok(decoded), None) => decoded,
    };
    if json(decoded.pictures.len()) != expected["frames"] {
        return Err(format!("{} frames", decoded.pictures.len()));
    }
    if json(&decoded.notes) != expected["notes"] {
        return Err(format!("notes {:?}", decoded.notes));
    }
    for (index, picture) in decoded.pictures.iter().enumerate() {
        if json(picture.width()) != expected["width"]
            || json(picture.height()) != expected["height"]
        {
            return Err(format!("{} x {}", picture.width(), picture.height()));
        }
        let Some(tolerance) = expected["tolerance"].as_u64() else {
            continue;
        };
        let wanted = image::open(
            golden()
                .join("expected")
                .join(format!("{name}-{index}.png")),
        )
        .unwrap();
        let (mean, max) = difference(&rgb(picture), wanted.into_rgb8().as_raw());
        if u64::from(max) > tolerance || mean >= 1.0 {
            return Err(format!(
                "frame {index}: mean difference {mean:.3}, largest {max}"
            ));
        }
    }
    Ok(())
}

#[test]
fn pictures_are_those_of_pydicom() {
    let expected = std::fs::read(golden().join("expected.json")).expect("golden files");
    let expected: BTreeMap<String, serde_json::Value> = serde_json::from_slice(&expected).unwrap();
    assert!(expected.len() > 60, "only {} golden files", expected.len());
    let failures: BTreeMap<_, _> = expected
        .iter()
        .filter_map(|(name, expected)| check(name, expected).err().map(|failure| (name, failure)))
        .collect();
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Real files against pydicom, where both are there:
/// `python tests/golden/generate_dicom.py --reference ../shared/data/dicom target/dicom-reference`.
#[test]
fn real_pictures_are_those_of_pydicom() {
    let reference = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/dicom-reference");
    let Some(files) = real_files().filter(|_| reference.is_dir()) else {
        println!("skipped: no real DICOM files, or no target/dicom-reference");
        return;
    };
    let mut compared = 0;
    for (name, mut bytes) in files {
        // pydicom does not make pixels square: PixelSpacing (0028,0030) becomes an element that nobody knows.
        let spacing = bytes.windows(4).position(|tag| tag == [0x28, 0, 0x30, 0]);
        if let Some(at) = spacing.filter(|_| name.starts_with("datalad")) {
            bytes[at + 2] = 0x3f;
        }
        let Ok(decoded) = decode_with(
            &bytes,
            &Limits {
                pixels: 10_000_000,
                ..Limits::default()
            },
        ) else {
            continue;
        };
        for (index, picture) in decoded.pictures.iter().enumerate() {
            let Ok(wanted) = image::open(reference.join(format!("{name}-{index}.png"))) else {
                continue;
            };
            let (mean, max) = difference(&rgb(picture), wanted.into_rgb8().as_raw());
            println!("{name} frame {index}: mean difference {mean:.4}, largest {max}");
            // A level where a value lies between two. One stored value of this file is a level: decoders of lossy JPEG 2000 may round to another one.
            let tolerance = if name == "MR4_J2KI" { 2 } else { 1 };
            assert!(
                max <= tolerance && mean < 0.05,
                "{name} frame {index}: mean difference {mean:.4}, largest {max}"
            );
            compared += 1;
        }
    }
    assert!(compared > 10, "only {compared} pictures compared");
}

/// The same slice in several transfer syntaxes, and the file cut short by its publisher.
#[test]
fn real_files_agree_with_each_other() {
    let Some(files) = real_files() else {
        println!("skipped: no real DICOM files");
        return;
    };
    let files: BTreeMap<_, _> = files.into_iter().collect();
    let picture = |name: &str| decode(&files[name]).unwrap().pictures.remove(0);
    let lossless = picture("MR4_RLE");
    for name in ["MR4_J2KR", "MR4_JPLL", "MR4_JLSL"] {
        assert_eq!(picture(name), lossless, "{name}");
    }
    let (mean, _) = difference(&rgb(&picture("MR4_J2KI")), &rgb(&lossless));
    assert!(mean < 5.0, "lossy JPEG 2000 is {mean} levels off");
    let reason = decode(&files["MR4_JPLY"]).map(|_| ()).unwrap_err();
    assert_eq!(reason.code, RejectCode::Unsupported);
    assert!(
        reason.message.contains("JPEG Extended with 12 bits"),
        "{reason}"
    );
    assert_eq!(
        code(&files["emri_small_jpeg_2k_lossless_too_short.dcm"]),
        Err(RejectCode::Truncated)
    );
    assert_eq!(decode(&files["emri_small.dcm"]).unwrap().pictures.len(), 10);
}

#[test]
fn the_header_gives_what_grouping_needs() {
    let bytes = golden_file("explicit-little");
    let source = Source::open(&bytes, &Limits::default()).unwrap();
    assert_eq!(source.kind(), SourceKind::Dicom);
    let header = source.header().unwrap();
    assert_eq!(header.modality.as_deref(), Some("MR"));
    assert_eq!(header.instance_number, Some(7));
    assert_eq!(header.acquired.as_deref(), Some("2026-01-02T04:05:06"));
    assert_eq!(
        header.study_instance_uid.as_deref(),
        Some("1.2.826.0.1.3680043.8.498.99.1")
    );
    assert_eq!(
        header.series_instance_uid.as_deref(),
        Some("1.2.826.0.1.3680043.8.498.99.1.1")
    );
    assert_eq!(
        header.sop_instance_uid.as_deref(),
        Some("1.2.826.0.1.3680043.8.498.99.1.1.1")
    );
    assert!(!format!("{header:?}").contains("CANARY"), "{header:?}");
}

#[test]
fn rejections_repeat_nothing_of_the_header() {
    let unsupported = |name: &str| decode(&golden_file(name)).map(|_| ()).unwrap_err().message;
    assert!(
        unsupported("mpeg4").contains("MPEG-4"),
        "{}",
        unsupported("mpeg4")
    );
    assert!(
        !unsupported("private-syntax").contains("3680043"),
        "{}",
        unsupported("private-syntax")
    );
}

#[test]
fn frames_are_bounded() {
    let limits = Limits {
        frames: 2,
        ..Limits::default()
    };
    for name in ["frames", "rle-frames", "jpeg2000-frames", "enhanced"] {
        let bytes = golden_file(name);
        let all = decode(&bytes).unwrap();
        let some = decode_with(&bytes, &limits).unwrap();
        assert_eq!(some.pictures, all.pictures[..2], "{name}");
        assert!(some.notes.contains(&DecodeNote::FramesDropped), "{name}");
        assert!(!all.notes.contains(&DecodeNote::FramesDropped), "{name}");
    }
}

#[test]
fn a_file_that_ends_early_is_truncated_at_every_length() {
    let names = [
        "explicit-little",
        "implicit-little",
        "explicit-big",
        "deflated",
        "rle",
        "jpeg2000-lossless",
        "enhanced",
    ];
    for name in names {
        let bytes = golden_file(name);
        let whole = decode(&bytes).unwrap().pictures;
        let lengths = (1..bytes.len()).filter(|n| *n < 2200 || bytes.len() - n < 60 || n % 31 == 0);
        for length in lengths {
            match decode(&bytes[..length]) {
                Err(reason) if reason.code == RejectCode::Truncated => {}
                Ok(decoded) if decoded.pictures == whole => {}
                result => panic!(
                    "{name}, {length} of {} bytes: {:?}",
                    bytes.len(),
                    result
                        .map(|_| "other pictures")
                        .map_err(|reason| reason.to_string())
                ),
            }
        }
    }
}

/// An explicit little endian file with `elements` between its header and its pixel data.
fn with_elements(elements: &[u8]) -> Vec<u8> {
    let bytes = golden_file("gray8");
    let at = bytes
        .windows(4)
        .rposition(|window| window == [0xe0, 0x7f, 0x10, 0x00])
        .unwrap();
    [&bytes[..at], elements, &bytes[at..]].concat()
}

/// A sequence of undefined length around an item of undefined length, opened `depth` times.
fn nested(depth: usize, closed: bool) -> Vec<u8> {
    let open: &[u8] = b"\x09\x00\x10\x00SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xff\xff\xff\xff";
    let close: &[u8] = b"\xfe\xff\x0d\xe0\0\0\0\0\xfe\xff\xdd\xe0\0\0\0\0";
    [
        open.repeat(depth),
        close.repeat(if closed { depth } else { 0 }),
    ]
    .concat()
}

#[test]
fn nested_sequences_do_not_overflow_the_stack() {
    assert_eq!(code(&with_elements(&nested(3, true))), Ok(()));
    assert_eq!(
        code(&with_elements(&nested(100_000, true))),
        Err(RejectCode::Corrupt)
    );
    assert_eq!(
        code(&with_elements(&nested(1_000_000, false))),
        Err(RejectCode::Corrupt)
    );
}

#[test]
fn claims_without_data_are_refused() {
    // A private element of 4 GB; one whose length is odd and beyond; items that claim more than there is.
    for (elements, expected) in [
        (
            b"\x09\x00\x10\x00OB\0\0\xfe\xff\xff\xff".to_vec(),
            RejectCode::Truncated,
        ),
        (
            b"\x09\x00\x10\x00SQ\0\0\xff\xff\xff\xff\xfe\xff\x00\xe0\xf0\xff\xff\xff".to_vec(),
            RejectCode::Truncated,
        ),
        (
            b"\x09\x00\x10\x00\0\0\x04\0abcd".to_vec(),
            RejectCode::Corrupt,
        ),
        (
            b"\x09\x00\x10\x00SQ\0\0\xff\xff\xff\xff\x09\x00\x10\x00\0\0\0\0".to_vec(),
            RejectCode::Corrupt,
        ),
        (
            b"\x09\x00\x10\x00LO\0\0".repeat(2_000_000),
            RejectCode::Corrupt,
        ),
    ] {
        assert_eq!(
            code(&with_elements(&elements)),
            Err(expected),
            "{:?}",
            &elements[..12]
        );
    }
}

#[test]
fn a_deflate_bomb_is_refused() {
    // The meta group of a deflated file, then half a gigabyte of zeros in half a megabyte.
    let bytes = golden_file("deflated");
    let length = u32::from_le_bytes(bytes[140..144].try_into().unwrap()) as usize;
    let mut bomb = bytes[..144 + length].to_vec();
    let mut encoder = flate2::write::DeflateEncoder::new(&mut bomb, flate2::Compression::best());
    for _ in 0..512 {
        std::io::Write::write_all(&mut encoder, &vec![0; 1 << 20]).unwrap();
    }
    encoder.finish().unwrap();
    assert!(bomb.len() < 1 << 20);
    assert_eq!(code(&bomb), Err(RejectCode::TooManyPixels));
}
