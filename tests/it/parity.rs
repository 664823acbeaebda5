//! Crop, resize and quantize against OpenCV: on the committed golden vectors always, on the real images under
//! `../shared/data/mri` when they and a Python with OpenCV are there.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use scansentry::engine::{ElementType, QuantParams};
use scansentry::imaging::Picture;
use scansentry::imaging::decode::{Limits, Source};
use scansentry::imaging::quality::{QualityRule, measure};
use scansentry::imaging::quantize::{ColorOrder, Normalization, Quantizer};
use scansentry::imaging::resize::{ResizeFilter, ResizeSpec, Resizer};
use scansentry::imaging::roi::{CropSpec, Fallback, RoiFinder};
use scansentry::prediction::{RejectCode, RejectReason, Roi};
use serde::Deserialize;

use crate::support::shared_data;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden")
}

#[derive(Deserialize)]
struct Vectors {
    crops: Vec<CropCase>,
    resizes: Vec<ResizeCase>,
    tensors: Vec<TensorCase>,
}

#[derive(Debug, Deserialize)]
struct CropCase {
    file: String,
    threshold: u8,
    erode: u32,
    dilate: u32,
    margin: i32,
    rect: Option<[u32; 4]>,
    area: Option<f64>,
    refused: Option<String>,
}

#[derive(Debug, Deserialize)]
struct ResizeCase {
    file: String,
    rect: [u32; 4],
    size: [u32; 2],
    filter: String,
    keep_aspect: bool,
}

#[derive(Debug, Deserialize)]
struct TensorCase {
    file: String,
    rect: [u32; 4],
    size: [u32; 2],
    normalization: String,
    dtype: String,
    scale: f32,
    zero_point: i32,
}

fn vectors() -> Vectors {
    let text = std::fs::read_to_string(golden().join("crop/vectors.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn read(path: &Path) -> Picture {
    let image = image::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    if image.color().has_color() {
        Picture::Rgb(image.into_rgb8())
    } else {
        Picture::Gray(image.into_luma8())
    }
}

fn golden_picture(name: &str) -> Picture {
    read(&golden().join(format!("crop/files/{name}.png")))
}

fn expected(name: &str) -> Picture {
    read(&golden().join(format!("crop/expected/{name}.png")))
}

fn roi([x, y, width, height]: [u32; 4]) -> Roi {
    Roi {
        x,
        y,
        width,
        height,
    }
}

fn bytes(picture: &Picture) -> &[u8] {
    match picture {
        Picture::Gray(image) => image.as_raw(),
        Picture::Rgb(image) => image.as_raw(),
    }
}

/// Greatest difference, how many differ, and the sum of differences.
fn difference(one: &[u8], other: &[u8]) -> (u8, usize, u64) {
    assert_eq!(one.len(), other.len());
    one.iter()
        .zip(other)
        .map(|(a, b)| a.abs_diff(*b))
        .fold((0, 0, 0), |(most, count, sum), d| {
            (most.max(d), count + usize::from(d > 0), sum + u64::from(d))
        })
}

fn resizer(width: u32, height: u32, filter: &str, keep_aspect: bool) -> Resizer {
    let filter = match filter {
        "nearest" => ResizeFilter::Nearest,
        "linear" => ResizeFilter::Linear,
        "cubic" => ResizeFilter::Cubic,
        "area" => ResizeFilter::Area,
        other => panic!("{other}"),
    };
    Resizer::new(ResizeSpec {
        width,
        height,
        filter,
        keep_aspect,
    })
}

#[test]
fn rectangles_and_areas_are_those_of_opencv() {
    let mut wrong = Vec::new();
    let cases = vectors().crops;
    for case in &cases {
        let picture = golden_picture(&case.file);
        let CropCase {
            threshold,
            erode,
            dilate,
            margin,
            ..
        } = *case;
        let mut finder = RoiFinder::new(CropSpec {
            threshold,
            erode,
            dilate,
            margin,
        })
        .with_min_side(1);
        let whole = Roi {
            x: 0,
            y: 0,
            width: picture.width(),
            height: picture.height(),
        };
        let fits = match (finder.find(&picture), case.refused.as_deref()) {
            (Ok(found), None) => {
                found.fallback.is_none()
                    && Some(found.roi) == case.rect.map(roi)
                    && Some(found.area) == case.area
            }
            (Ok(found), Some("empty_crop")) => {
                found.fallback == Some(Fallback::EmptyCrop) && found.roi == whole
            }
            (Ok(found), Some("negative_index")) => {
                found.fallback == Some(Fallback::NegativeIndex) && found.roi == whole
            }
            (Err(reason), Some("blank")) => reason.code == RejectCode::Blank,
            _ => false,
        };
        if !fits {
            wrong.push(format!("{case:?}: {:?}", finder.find(&picture)));
        }
    }
    assert!(
        wrong.is_empty(),
        "{} of {} differ:\n{}",
        wrong.len(),
        cases.len(),
        wrong.join("\n")
    );
}

#[test]
fn resized_pictures_are_those_of_opencv() {
    let mut wrong = Vec::new();
    for (i, case) in vectors().resizes.iter().enumerate() {
        let picture = golden_picture(&case.file);
        let mut resizer = resizer(case.size[0], case.size[1], &case.filter, case.keep_aspect);
        let found = resizer.resize(&picture, roi(case.rect));
        let (most, count, _) = difference(bytes(found), bytes(&expected(&format!("{i}.resized"))));
        // Linear, nearest and area are integers or sums in OpenCV's own order; cubic is computed exactly by OpenCV's x86-64
        // build and to the last bit of an f32 here.
        // Below 4 pixels a side it falls back to the routine of its other builds.
        let tiny = case.rect[2].min(case.rect[3]) < 4;
        if most > u8::from(case.filter == "cubic") || count > 2 && !tiny {
            wrong.push(format!("{i} {case:?}: {count} differ, by up to {most}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn tensors_are_those_of_the_reference() {
    for (i, case) in vectors().tensors.iter().enumerate() {
        let normalization = match case.normalization.as_str() {
            "none" => Normalization::None,
            "zero_one" => Normalization::ZeroOne,
            "minus_one_one" => Normalization::MinusOneOne,
            "caffe" => Normalization::Caffe,
            "mean_std" => Normalization::MeanStd {
                mean: [123.675, 116.28, 103.53],
                std: [58.395, 57.12, 57.375],
            },
            other => panic!("{other}"),
        };
        let element = if case.dtype == "int8" {
            ElementType::Int8
        } else {
            ElementType::UInt8
        };
        let quant = Some(QuantParams {
            scale: case.scale,
            zero_point: case.zero_point,
        });
        let quantizer = Quantizer::new(normalization, ColorOrder::Rgb, element, quant).unwrap();
        let picture = golden_picture(&case.file);
        let mut resizer = resizer(case.size[0], case.size[1], "cubic", false);
        let expected = expected(&format!("{i}.tensor"));
        let mut tensor = vec![0; bytes(&expected).len()];
        quantizer.quantize(resizer.resize(&picture, roi(case.rect)), &mut tensor);
        // Two's complement, moved so that neighbours in value are neighbours in bytes.
        let order = |bytes: &[u8]| -> Vec<u8> {
            let flip = if element == ElementType::Int8 {
                0x80
            } else {
                0
            };
            bytes.iter().map(|b| b ^ flip).collect()
        };
        let (most, count, _) = difference(&order(&tensor), &order(bytes(&expected)));
        assert!(
            most <= 1 && count * 100 <= tensor.len(),
            "{i} {case:?}: {count} differ, by up to {most}"
        );
    }
}

#[derive(Deserialize)]
struct Real {
    opencv: String,
    images: Vec<RealImage>,
}

#[derive(Deserialize)]
struct RealImage {
    source: String,
    file: PathBuf,
    rect: Option<[u32; 4]>,
    area: Option<f64>,
    refused: Option<String>,
}

#[derive(Default)]
struct Tally {
    images: usize,
    rectangles: usize,
    near: usize,
    most: u8,
    pixels: usize,
    differing: usize,
    sum: u64,
}

impl Tally {
    fn rectangle(&mut self, found: Option<Roi>, wanted: Option<[u32; 4]>) {
        self.images += 1;
        let edges = |r: Roi| [r.x, r.y, r.x + r.width, r.y + r.height];
        let distance = match (found.map(edges), wanted.map(roi).map(edges)) {
            (None, None) => 0,
            (Some(a), Some(b)) => a
                .iter()
                .zip(b)
                .map(|(a, b)| a.abs_diff(b))
                .max()
                .unwrap_or(0),
            _ => u32::MAX,
        };
        self.rectangles += usize::from(distance == 0);
        self.near += usize::from(distance <= 1);
    }

    fn picture(&mut self, one: &[u8], other: &[u8]) {
        let (most, count, sum) = difference(one, other);
        self.most = self.most.max(most);
        self.pixels += one.len();
        self.differing += count;
        self.sum += sum;
    }

    fn show(&self, name: &str) -> String {
        format!(
            "{name:<20} {:>5} images  rectangle same {:>5}  within 1 px {:>5}  resized: greatest difference {} levels, {} of {} values differ, mean {:.5}",
            self.images,
            self.rectangles,
            self.near,
            self.most,
            self.differing,
            self.pixels,
            self.sum as f64 / self.pixels.max(1) as f64
        )
    }
}

/// The Python that has OpenCV: `SCANSENTRY_PYTHON`, or the reference's own environment.
fn python() -> Option<PathBuf> {
    let python = std::env::var_os("SCANSENTRY_PYTHON")
        .map_or_else(|| golden().join(".venv/bin/python"), PathBuf::from);
    let runs = Command::new(&python)
        .args(["-c", "import cv2, numpy"])
        .output()
        .is_ok_and(|out| out.status.success());
    runs.then_some(python)
}

fn data() -> Option<PathBuf> {
    shared_data().map(|folder| folder.join("mri"))
}

#[test]
fn real_images_give_what_opencv_gives() {
    let Some(data) = data() else {
        eprintln!("skipped: no ../shared/data (or SCANSENTRY_DATA)");
        return;
    };
    let Some(python) = python() else {
        eprintln!(
            "skipped: no Python with OpenCV; make tests/golden/.venv from requirements.txt or set SCANSENTRY_PYTHON"
        );
        return;
    };
    let step = std::env::var("SCANSENTRY_PARITY_STEP").unwrap_or_else(|_| "1".into());
    let out = std::env::temp_dir().join(format!("scansentry-parity-{}", std::process::id()));
    let made = Command::new(python)
        .arg(golden().join("reference.py"))
        .arg("real")
        .args([data.as_os_str(), out.as_os_str()])
        .arg(step)
        .status()
        .unwrap();
    assert!(made.success());
    let real: Real =
        serde_json::from_slice(&std::fs::read(out.join("index.json")).unwrap()).unwrap();

    let mut finder = RoiFinder::new(CropSpec::default());
    let mut resizer = resizer(224, 224, "cubic", false);
    let (mut lossless, mut jpeg) = (
        BTreeMap::<String, Tally>::new(),
        BTreeMap::<String, Tally>::new(),
    );
    let mut wrong = Vec::new();
    for (i, image) in real.images.iter().enumerate() {
        let wanted = image
            .rect
            .map(|_| read(&out.join(format!("resized/{i}.png"))));
        let picture = read(&out.join(format!("png/{i}.png")));
        let found = finder.find(&picture);
        let is_jpeg = image.file.extension().is_none_or(|e| e != "png");
        let tally = lossless.entry(image.source.clone()).or_default();
        tally.rectangle(found.as_ref().ok().map(|f| f.roi), image.rect);
        match (&found, &image.refused) {
            (Ok(found), None)
                if Some(found.roi) == image.rect.map(roi) && Some(found.area) == image.area => {}
            (Err(reason), Some(refused))
                if refused == "blank" && reason.code == RejectCode::Blank => {}
            _ => wrong.push(format!(
                "{}: {found:?}, not {:?}",
                image.file.display(),
                image.rect
            )),
        }
        if let (Ok(found), Some(wanted)) = (found, &wanted) {
            tally.picture(bytes(resizer.resize(&picture, found.roi)), bytes(wanted));
        }
        if is_jpeg {
            let picture = decoded(&image.file).unwrap();
            let found = finder.find(&picture).ok();
            let tally = jpeg.entry(image.source.clone()).or_default();
            tally.rectangle(found.map(|f| f.roi), image.rect);
            if found.map(|f| f.roi) != image.rect.map(roi) {
                let file = image.file.display();
                println!(
                    "jpeg {file}: {:?}, OpenCV {:?}",
                    found.map(|f| f.roi),
                    image.rect
                );
            }
            if let (Some(found), Some(wanted)) = (found, &wanted) {
                tally.picture(
                    &in_color(resizer.resize(&picture, found.roi)),
                    &in_color(wanted),
                );
            }
        }
    }
    std::fs::remove_dir_all(&out).unwrap();
    println!("OpenCV {} on {} images", real.opencv, real.images.len());
    for (source, tally) in &lossless {
        println!("{}", tally.show(&format!("png  {source}")));
    }
    for (source, tally) in &jpeg {
        println!("{}", tally.show(&format!("jpeg {source}")));
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(lossless.values().all(|t| t.most <= 1));
    let (images, near) = jpeg.values().fold((0, 0), |(images, near), t| {
        (images + t.images, near + t.near)
    });
    assert!(
        near * 100 >= images * 99,
        "JPEG rectangles: {near} of {images} within a pixel"
    );
    assert!(
        jpeg.values().all(|t| t.sum < t.pixels as u64),
        "JPEG: mean difference above one level"
    );
}

/// Three channels, whether the picture has them or not: decoders may disagree on a trace of colour.
fn in_color(picture: &Picture) -> Vec<u8> {
    match picture {
        Picture::Gray(image) => image
            .as_raw()
            .iter()
            .flat_map(|&level| [level; 3])
            .collect(),
        Picture::Rgb(image) => image.as_raw().clone(),
    }
}

/// The original file by our own decoder.
fn decoded(file: &Path) -> Result<Picture, RejectReason> {
    Source::open(&std::fs::read(file).unwrap(), &Limits::default())?.frame(0)
}

#[test]
fn the_rule_spares_real_slices_and_catches_a_chest_film() {
    let Some(data) = data() else {
        eprintln!("skipped: no ../shared/data (or SCANSENTRY_DATA)");
        return;
    };
    let rule = QualityRule::default();
    let mut finder = RoiFinder::new(CropSpec::default());
    let mut assess = |file: &Path| {
        let picture = decoded(file).ok()?;
        let contour = finder.find(&picture).ok()?;
        Some(rule.assess(measure(&picture, &finder, &contour)))
    };
    let mut counts = BTreeMap::<String, BTreeMap<String, usize>>::new();
    let index = std::fs::read_to_string(data.join("index.csv")).unwrap();
    let (mut images, mut misfits) = (0, 0);
    for row in index.lines().skip(1) {
        let fields: Vec<&str> = row.split(',').collect();
        let source = counts.entry(fields[2].to_owned()).or_default();
        let mut add = |what: String| *source.entry(what).or_default() += 1;
        add("images".into());
        images += 1;
        let Some(assessment) = assess(&data.join(fields[0])) else {
            add("rejected".into());
            continue;
        };
        for flag in assessment.flags {
            add(format!("flag {flag:?}"));
        }
        if let Some(misfit) = assessment.misfit {
            misfits += 1;
            add(format!("misfit {:?}", misfit.flag));
        }
    }
    for (source, counts) in &counts {
        println!("{source:<10} {counts:?}");
    }
    println!("{misfits} of {images} misfits");
    assert!(misfits * 100 <= images);
    let chest = data.join("../dicom/gdcm-CR-MONO1-10-chest.dcm");
    if chest.exists() {
        let assessment = assess(&chest);
        println!("chest film: {assessment:?}");
        // No assessment: rejected, as by a build that cannot decode it.
        assert!(assessment.is_none_or(|a| a.misfit.is_some()));
    }
}
