//! Any bytes as a DICOM file: whatever has no prefix gets one.
#![no_main]

use std::borrow::Cow;

use libfuzzer_sys::fuzz_target;
use scansentry::imaging::decode::{Limits, Source, SourceKind};

fuzz_target!(|bytes: &[u8]| {
    let bytes = if bytes.get(128..132) == Some(b"DICM") {
        Cow::Borrowed(bytes)
    } else {
        Cow::Owned([&[0; 128], b"DICM".as_slice(), bytes].concat())
    };
    let limits = Limits {
        file_bytes: 1 << 20,
        pixels: 1 << 20,
        decode_bytes: 32 << 20,
        frames: 4,
    };
    let Ok(mut source) = Source::open(&bytes, &limits) else {
        return;
    };
    assert_eq!(source.kind(), SourceKind::Dicom);
    assert!((1..=limits.frames).contains(&source.frame_count()));
    for index in 0..source.frame_count() {
        if let Ok(picture) = source.frame(index) {
            assert!(u64::from(picture.width()) * u64::from(picture.height()) <= limits.pixels);
        }
    }
});
