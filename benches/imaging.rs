//! The stages between decoding and inference, one thread.
//!
//! `cargo bench --bench imaging` times each on generated heads of three sizes. With `SCANSENTRY_SIDE_BY_SIDE=DIR` it
//! instead answers `compare_opencv.py`: it reads the decoded pictures in DIR and the JPEG files in DIR/jpeg, and for each
//! line on its input passes over all of them once and prints the nanoseconds that decoding, crop, resize and
//! quantization took.

use std::hint::black_box;
use std::io::{BufRead, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use image::{GrayImage, Luma, RgbImage};
use scansentry::engine::{ElementType, QuantParams};
use scansentry::imaging::Picture;
use scansentry::imaging::decode::{Limits, Source};
use scansentry::imaging::quality::measure;
use scansentry::imaging::quantize::{ColorOrder, Normalization, Quantizer};
use scansentry::imaging::resize::{ResizeFilter, ResizeSpec, Resizer};
use scansentry::imaging::roi::{CropSpec, RoiFinder};

struct Stages {
    finder: RoiFinder,
    resizer: Resizer,
    quantizer: Quantizer,
    tensor: Vec<u8>,
}

impl Stages {
    fn new() -> Self {
        let spec = ResizeSpec {
            width: 224,
            height: 224,
            filter: ResizeFilter::Cubic,
            keep_aspect: false,
        };
        let quant = Some(QuantParams {
            scale: 1.0078,
            zero_point: 118,
        });
        Self {
            finder: RoiFinder::new(CropSpec::default()),
            resizer: Resizer::new(spec),
            quantizer: Quantizer::new(
                Normalization::Caffe,
                ColorOrder::Rgb,
                ElementType::UInt8,
                quant,
            )
            .expect("valid parameters"),
            tensor: vec![0; 224 * 224 * 3],
        }
    }
}

/// A bright ring around a textured disc, `side` pixels wide and high.
fn head(side: u32) -> GrayImage {
    GrayImage::from_fn(side, side, |x, y| {
        let at = |v: u32| f64::from(v) / f64::from(side) - 0.5;
        let radius = (at(x) / 0.38).hypot(at(y) / 0.45);
        let texture = (x * 7 + y * 13) % 23 + (x ^ y) % 11;
        Luma([match radius {
            r if r < 0.85 => 80 + texture as u8,
            r if r < 0.92 => 25,
            r if r < 1.0 => 190 + (texture % 30) as u8,
            _ => (texture / 6) as u8,
        }])
    })
}

fn benches(criterion: &mut Criterion) {
    let mut stages = Stages::new();
    for side in [256, 512, 1024] {
        let gray = Picture::Gray(head(side));
        let rgb = Picture::Rgb(RgbImage::from_fn(side, side, |x, y| {
            let Picture::Gray(image) = &gray else {
                unreachable!()
            };
            let level = image.get_pixel(x, y).0[0];
            image::Rgb([level, level.saturating_sub(9), level / 2])
        }));
        for (name, picture) in [("gray", &gray), ("rgb", &rgb)] {
            let id = |stage| BenchmarkId::new(stage, format!("{name}-{side}"));
            let mut group = criterion.benchmark_group("imaging");
            group.throughput(Throughput::Elements(u64::from(side) * u64::from(side)));
            let roi = stages.finder.find(picture).expect("a head").roi;
            group.bench_function(id("roi"), |b| {
                b.iter(|| black_box(stages.finder.find(black_box(picture))));
            });
            group.bench_function(id("resize"), |b| {
                b.iter(|| {
                    black_box(stages.resizer.resize(black_box(picture), roi));
                });
            });
            let contour = stages.finder.find(picture).expect("a head");
            group.bench_function(id("quality"), |b| {
                b.iter(|| measure(black_box(picture), &stages.finder, &contour));
            });
            let resized = stages.resizer.resize(picture, roi).clone();
            group.bench_function(id("quantize"), |b| {
                b.iter(|| {
                    stages
                        .quantizer
                        .quantize(black_box(&resized), &mut stages.tensor);
                });
            });
            group.finish();
        }
    }
}

/// The files of a folder in the order of their names.
fn files(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).expect("a folder");
    let mut files: Vec<PathBuf> = entries
        .map(|e| e.expect("an entry").path())
        .filter(|p| p.is_file())
        .collect();
    files.sort();
    files
}

fn decode(bytes: &[u8]) -> Picture {
    let mut source = Source::open(bytes, &Limits::default()).expect("a picture");
    source.frame(0).expect("a whole picture")
}

fn side_by_side(folder: &Path) {
    let read = |file: &PathBuf| std::fs::read(file).expect("a readable file");
    let pictures: Vec<Picture> = files(folder)
        .iter()
        .map(|file| decode(&read(file)))
        .collect();
    let jpegs: Vec<Vec<u8>> = files(&folder.join("jpeg")).iter().map(read).collect();
    let mut stages = Stages::new();
    println!("{} pictures", pictures.len());
    for _ in std::io::stdin().lock().lines() {
        let start = Instant::now();
        for jpeg in &jpegs {
            black_box(decode(jpeg));
        }
        let decoding = start.elapsed();
        let [mut roi, mut resize, mut quantize] = [Duration::ZERO; 3];
        for picture in &pictures {
            let start = Instant::now();
            let Ok(found) = stages.finder.find(picture) else {
                continue;
            };
            let cropped = Instant::now();
            let input = stages.resizer.resize(picture, found.roi);
            let resized = Instant::now();
            stages.quantizer.quantize(input, &mut stages.tensor);
            black_box(&stages.tensor);
            roi += cropped - start;
            resize += resized - cropped;
            quantize += resized.elapsed();
        }
        println!(
            "{} {} {} {}",
            decoding.as_nanos(),
            roi.as_nanos(),
            resize.as_nanos(),
            quantize.as_nanos()
        );
        std::io::stdout().flush().expect("an open output");
    }
}

fn main() {
    if let Some(folder) = std::env::var_os("SCANSENTRY_SIDE_BY_SIDE") {
        return side_by_side(Path::new(&folder));
    }
    let mut criterion = Criterion::default().configure_from_args();
    benches(&mut criterion);
    criterion.final_summary();
}
