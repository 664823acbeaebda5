//! A few seconds of what `fuzz/` does for hours: damaged golden files, and every file that a fuzzer once tripped over.
//!
//! The mutations are the same on every run.

use std::path::Path;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRng, TestRunner};
use scansentry::imaging::decode::{Limits, Source};

/// What `decode` says when a decoder panicked inside it.
const GAVE_UP: &str = "the decoder gave up";

const LIMITS: Limits = Limits {
    file_bytes: 1 << 20,
    pixels: 1 << 20,
    decode_bytes: 32 << 20,
    frames: 4,
};

/// Decodes everything that can be decoded; complains of panics only.
fn survives(bytes: &[u8]) -> Result<(), String> {
    let gave_up = |reason: scansentry::prediction::RejectReason| {
        if reason.message.contains(GAVE_UP) {
            Err(reason.message)
        } else {
            Ok(())
        }
    };
    let mut source = match Source::open(bytes, &LIMITS) {
        Ok(source) => source,
        Err(reason) => return gave_up(reason),
    };
    for index in 0..source.frame_count() {
        if let Err(reason) = source.frame(index) {
            gave_up(reason)?;
        }
    }
    Ok(())
}

/// One damage to a file; positions are fractions of its length.
#[derive(Debug, Clone)]
enum Damage {
    /// A byte becomes another one.
    Byte(f64, u8),
    /// Two or four bytes become a number that is on an edge.
    Number(f64, u32),
    /// The file ends here.
    Cut(f64),
    /// A stretch is taken out.
    Remove(f64, usize),
    /// A stretch is repeated.
    Repeat(f64, usize, usize),
}

fn damage() -> impl Strategy<Value = Damage> {
    let at = 0.0..1.0_f64;
    // Headers stand in front: half of the damage goes there.
    let at = prop_oneof![at.clone(), at.prop_map(|at| at * at * at)];
    let edges = prop::sample::select(vec![
        0,
        1,
        7,
        0xff,
        0x100,
        0x7fff,
        0x8000,
        0xffff,
        0x1_0000,
        0x7fff_ffff,
        0x8000_0000,
        u32::MAX,
    ]);
    prop_oneof![
        4 => (at.clone(), any::<u8>()).prop_map(|(at, byte)| Damage::Byte(at, byte)),
        3 => (at.clone(), edges).prop_map(|(at, number)| Damage::Number(at, number)),
        1 => at.clone().prop_map(Damage::Cut),
        1 => (at.clone(), 1..64_usize).prop_map(|(at, length)| Damage::Remove(at, length)),
        1 => (at, 1..64_usize, 1..40_usize).prop_map(|(at, length, times)| Damage::Repeat(at, length, times)),
    ]
}

fn apply(bytes: &mut Vec<u8>, damage: &Damage) {
    let place = |at: f64| (at * bytes.len() as f64) as usize;
    match *damage {
        Damage::Byte(at, byte) => {
            let at = place(at);
            bytes
                .get_mut(at..)
                .and_then(<[u8]>::first_mut)
                .into_iter()
                .for_each(|old| *old = byte);
        }
        Damage::Number(at, number) => {
            let at = place(at);
            let (little, big) = (number.to_le_bytes(), number.to_be_bytes());
            let new: &[u8] = if at % 2 == 0 { &little } else { &big };
            if let Some(old) = bytes.get_mut(at..at + 4) {
                old.copy_from_slice(new);
            }
        }
        Damage::Cut(at) => bytes.truncate(place(at)),
        Damage::Remove(at, length) => {
            let from = place(at);
            let to = (from + length).min(bytes.len());
            bytes.drain(from..to);
        }
        Damage::Repeat(at, length, times) => {
            let from = place(at);
            let to = (from + length).min(bytes.len());
            let again = bytes[from..to].repeat(times);
            bytes.splice(to..to, again);
        }
    }
}

fn files_below(folder: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut paths: Vec<_> = std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .map(|entry| entry.unwrap().path())
        .collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| std::fs::read(path).unwrap())
        .collect()
}

#[test]
fn damaged_files_never_panic() {
    let mut files = files_below("tests/golden/decode/files");
    files.extend(files_below("tests/golden/dicom/files"));
    assert!(files.len() > 100, "only {} golden files", files.len());
    let config = Config {
        cases: 3_000,
        failure_persistence: None,
        ..Config::default()
    };
    let rng = TestRng::deterministic_rng(config.rng_algorithm);
    let cases = (0..files.len(), prop::collection::vec(damage(), 1..6));
    TestRunner::new_with_rng(config, rng)
        .run(&cases, |(index, damages)| {
            let mut bytes = files[index].clone();
            for damage in &damages {
                apply(&mut bytes, damage);
            }
            survives(&bytes).map_err(TestCaseError::fail)
        })
        .unwrap();
}

#[test]
fn what_fuzzers_found_stays_fixed() {
    let files = ["decode", "dicom"]
        .map(|target| files_below(&format!("fuzz/regressions/{target}")))
        .concat();
    for bytes in files {
        survives(&bytes).unwrap();
        // The DICOM target prefixes what has no prefix.
        survives(&[&[0; 128], b"DICM".as_slice(), &bytes].concat()).unwrap();
    }
}
