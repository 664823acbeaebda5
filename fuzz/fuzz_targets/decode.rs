//! Any bytes into pictures: no panic, no more memory than the limits allow, every picture within them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use scansentry::imaging::decode::{Limits, Source};

fuzz_target!(|bytes: &[u8]| {
    // Small, so that a run gets through many files and memory that goes astray shows against libFuzzer's limit.
    let limits = Limits {
        file_bytes: 1 << 20,
        pixels: 1 << 20,
        decode_bytes: 32 << 20,
        frames: 4,
    };
    let Ok(mut source) = Source::open(bytes, &limits) else {
        return;
    };
    for index in 0..source.frame_count() {
        if let Ok(picture) = source.frame(index) {
            assert!(u64::from(picture.width()) * u64::from(picture.height()) <= limits.pixels);
        }
    }
});
