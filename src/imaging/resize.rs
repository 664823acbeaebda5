//! Resizing as `cv2.resize` does it, on 8-bit pixels.
//!
//! OpenCV never widens its kernels on shrinking (except `Area`), its cubic has a = -0.75, and pixel centres lie at
//! `(i + 0.5) * scale - 0.5`. What differs between OpenCV's own builds decides how exact one can be:
//!
//! - **Cubic**: the x86-64 wheels use Intel IPP, which gives the exactly computed value rounded half to even; so does this
//!   module, up to the last bit of an `f32` sum. Builds without IPP (ARM) use coefficients of 11 bits, and differ from both
//!   by one level at a few percent of the pixels.
//! - **Linear**, **Nearest**, **Area**: all builds agree; so does this module.
//!
//! The kernels are our own. `fast_image_resize` with OpenCV's cubic as a custom filter and without antialiasing clamps to
//! 8 bits between its two passes, which loses the cubic's overshoot at sharp edges: up to 32 levels off on the golden head,
//! 63 on noise, and no faster. `image` widens its cubic on shrinking and uses a = -0.5. Here only one row at a time is
//! held in `f32`; loops are plain so that the compiler vectorises them on any architecture.

use image::{GrayImage, RgbImage};
use serde::Deserialize;

use super::{Picture, vectorized};
use crate::prediction::Roi;

/// Interpolation, in OpenCV's meaning of the names.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResizeFilter {
    /// `INTER_NEAREST`.
    Nearest,
    /// `INTER_LINEAR`: 2x2 taps, 11-bit coefficients.
    Linear,
    /// `INTER_CUBIC`: 4x4 taps, a = -0.75, no antialiasing.
    Cubic,
    /// `INTER_AREA`: mean over the covered area on shrinking, a kind of linear on enlarging.
    Area,
}

/// Size and manner of the model's input picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResizeSpec {
    /// Width in pixels, at least 1.
    pub width: u32,
    /// Height in pixels, at least 1.
    pub height: u32,
    /// Interpolation.
    pub filter: ResizeFilter,
    /// Keep the aspect and fill up with black, centred (the odd pixel goes right and below); else stretch.
    pub keep_aspect: bool,
}

impl ResizeSpec {
    /// Where in the result a picture of this size lies, whose sides are at least 1: everywhere, or centred between black.
    pub fn place(&self, width: u32, height: u32) -> Roi {
        let size = (self.width.max(1), self.height.max(1));
        let (width, height) = if self.keep_aspect {
            let wide = |(width, height): (u32, u32)| (width as usize, height as usize);
            let (width, height) = fit(wide((width, height)), wide(size));
            (width as u32, height as u32)
        } else {
            size
        };
        Roi {
            x: (size.0 - width) / 2,
            y: (size.1 - height) / 2,
            width,
            height,
        }
    }
}

/// Cuts a rectangle out of a picture and resizes it. Keeps its buffers and the last result.
#[derive(Debug, Clone)]
pub struct Resizer {
    spec: ResizeSpec,
    result: Picture,
    /// Tap tables for columns and rows with the geometry that they were made for.
    plan: Plan,
    floats: Vec<f32>,
    rows: [Vec<i32>; 2],
}

/// What the tables depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Geometry {
    from: (usize, usize),
    to: (usize, usize),
    channels: usize,
}

#[derive(Debug, Clone, Default)]
struct Plan {
    geometry: Option<Geometry>,
    columns: Taps,
    rows: Taps,
}

/// Which source elements make a destination element, and with which weights.
#[derive(Debug, Clone, Default)]
struct Taps {
    /// Source index of each tap, `taps` per destination element; columns are given as element offsets in a row.
    index: Vec<u32>,
    /// Cubic weights, 4 per destination element.
    cubic: Vec<[f32; 4]>,
    /// Where the four taps begin in a row that is padded as [`cubic`] does it.
    first: Vec<u32>,
    /// Linear weights in 1/2048, 2 per destination element.
    linear: Vec<[i32; 2]>,
    /// Area weights: destination index, source index, weight, in the order of the destination.
    area: Vec<(u32, u32, f32)>,
}

/// The part of the source to read: interleaved bytes and the rectangle in it.
#[derive(Clone, Copy)]
struct Source<'a> {
    data: &'a [u8],
    stride: usize,
    x: usize,
    y: usize,
    width: usize,
    height: usize,
    channels: usize,
}

impl<'a> Source<'a> {
    /// Row `y` of the rectangle, `width * channels` bytes.
    fn row(&self, y: usize) -> &'a [u8] {
        let start = (self.y + y) * self.stride + self.x * self.channels;
        &self.data[start..start + self.width * self.channels]
    }
}

/// Where the resized pixels go: a rectangle in the result.
struct Target<'a> {
    data: &'a mut [u8],
    stride: usize,
    x: usize,
    y: usize,
    width: usize,
    height: usize,
    channels: usize,
}

impl Target<'_> {
    fn row(&mut self, y: usize) -> &mut [u8] {
        let start = (self.y + y) * self.stride + self.x * self.channels;
        &mut self.data[start..start + self.width * self.channels]
    }
}

impl Resizer {
    /// A resizer to the size and in the manner of `spec`; sides of 0 are taken as 1.
    pub fn new(spec: ResizeSpec) -> Self {
        let spec = ResizeSpec {
            width: spec.width.max(1),
            height: spec.height.max(1),
            ..spec
        };
        Self {
            spec,
            result: Picture::Gray(GrayImage::new(0, 0)),
            plan: Plan::default(),
            floats: Vec::new(),
            rows: [Vec::new(), Vec::new()],
        }
    }

    /// The size and manner in use.
    pub fn spec(&self) -> ResizeSpec {
        self.spec
    }

    /// The pixels of `picture` in `roi`, resized; one channel stays one channel. `roi` is cut to the picture, and is the
    /// whole picture when nothing of it lies within.
    pub fn resize(&mut self, picture: &Picture, roi: Roi) -> &Picture {
        let (data, channels) = match picture {
            Picture::Gray(image) => (image.as_raw().as_slice(), 1),
            Picture::Rgb(image) => (image.as_raw().as_slice(), 3),
        };
        let size = (self.spec.width as usize, self.spec.height as usize);
        self.prepare_result(channels == 1);
        let roi = clamp(roi, picture.width(), picture.height());
        let source = Source {
            data,
            stride: picture.width() as usize * channels,
            x: roi.x as usize,
            y: roi.y as usize,
            width: roi.width as usize,
            height: roi.height as usize,
            channels,
        };
        let place = self.spec.place(roi.width.max(1), roi.height.max(1));
        let pixels: &mut [u8] = match &mut self.result {
            Picture::Gray(image) => image,
            Picture::Rgb(image) => image,
        };
        if (place.width as usize, place.height as usize) != size {
            pixels.fill(0);
        }
        let target = Target {
            data: pixels,
            stride: size.0 * channels,
            x: place.x as usize,
            y: place.y as usize,
            width: place.width as usize,
            height: place.height as usize,
            channels,
        };
        if source.width > 0 && source.height > 0 {
            self.plan.prepare(&source, &target, self.spec.filter);
            match Kernel::choose(&source, &target, self.spec.filter) {
                Kernel::Copy => copy(&source, target),
                Kernel::Nearest => nearest(&source, target, &self.plan),
                Kernel::Linear => linear(&source, target, &self.plan, &mut self.rows),
                Kernel::Cubic => vectorized(
                    #[inline(always)]
                    || cubic(&source, target, &self.plan, &mut self.floats),
                ),
                Kernel::AreaBlocks(x, y) => area_blocks(&source, target, (x, y), &mut self.rows[0]),
                Kernel::Area => area(&source, target, &self.plan, &mut self.floats),
            }
        }
        &self.result
    }

    fn prepare_result(&mut self, gray: bool) {
        let (width, height) = (self.spec.width, self.spec.height);
        let fits = match &self.result {
            Picture::Gray(image) => gray && image.dimensions() == (width, height),
            Picture::Rgb(image) => !gray && image.dimensions() == (width, height),
        };
        if !fits {
            self.result = if gray {
                Picture::Gray(GrayImage::new(width, height))
            } else {
                Picture::Rgb(RgbImage::new(width, height))
            };
        }
    }
}

fn clamp(roi: Roi, width: u32, height: u32) -> Roi {
    if roi.x >= width || roi.y >= height || roi.width == 0 || roi.height == 0 {
        return Roi {
            x: 0,
            y: 0,
            width,
            height,
        };
    }
    Roi {
        width: roi.width.min(width - roi.x),
        height: roi.height.min(height - roi.y),
        ..roi
    }
}

/// The largest size of `from`'s aspect within `to`, each side at least 1 (halves rounded up).
fn fit(from: (usize, usize), to: (usize, usize)) -> (usize, usize) {
    let scaled = |length: usize, by: usize, of: usize| ((2 * length * by + of) / (2 * of)).max(1);
    if from.0 * to.1 >= from.1 * to.0 {
        (to.0, scaled(from.1, to.0, from.0).min(to.1))
    } else {
        (scaled(from.0, to.1, from.1).min(to.0), to.1)
    }
}

/// The routine that `cv2.resize` would choose.
#[derive(Clone, Copy)]
enum Kernel {
    Copy,
    Nearest,
    Linear,
    Cubic,
    /// Area with whole-numbered factors.
    AreaBlocks(usize, usize),
    Area,
}

impl Kernel {
    fn choose(source: &Source, target: &Target, filter: ResizeFilter) -> Self {
        let (from, to) = ((source.width, source.height), (target.width, target.height));
        let blocks = (from.0 / to.0, from.1 / to.1);
        let whole = from.0 % to.0 == 0 && from.1 % to.1 == 0;
        match filter {
            _ if from == to => Self::Copy,
            ResizeFilter::Nearest => Self::Nearest,
            // OpenCV takes halving in both directions as an area mean.
            ResizeFilter::Linear if whole && blocks == (2, 2) => Self::AreaBlocks(2, 2),
            ResizeFilter::Linear => Self::Linear,
            ResizeFilter::Cubic => Self::Cubic,
            ResizeFilter::Area if from.0 < to.0 || from.1 < to.1 => Self::Linear,
            ResizeFilter::Area if whole => Self::AreaBlocks(blocks.0, blocks.1),
            ResizeFilter::Area => Self::Area,
        }
    }
}

impl Plan {
    fn prepare(&mut self, source: &Source, target: &Target, filter: ResizeFilter) {
        let geometry = Geometry {
            from: (source.width, source.height),
            to: (target.width, target.height),
            channels: source.channels,
        };
        if self.geometry == Some(geometry) {
            return;
        }
        self.columns
            .prepare(geometry.from.0, geometry.to.0, geometry.channels, filter);
        // OpenCV sets the fraction to 0 beyond the outermost columns, and leaves it beyond the outermost rows, where both
        // taps then read the same row; the rounding of the two parts shows the difference.
        for weights in self
            .columns
            .linear
            .iter_mut()
            .zip(self.columns.index.as_chunks::<2>().0)
        {
            if let (weights, [a, b]) = weights
                && a == b
            {
                *weights = [2048, 0];
            }
        }
        self.rows.prepare(geometry.from.1, geometry.to.1, 1, filter);
        self.geometry = Some(geometry);
    }
}

impl Taps {
    /// Tables for `from` source elements made into `to`; source indexes are multiplied by `stride`.
    fn prepare(&mut self, from: usize, to: usize, stride: usize, filter: ResizeFilter) {
        self.index.clear();
        self.cubic.clear();
        self.first.clear();
        self.linear.clear();
        self.area.clear();
        let inverse = to as f64 / from as f64;
        let scale = 1.0 / inverse;
        let at = |index: i64| (index.clamp(0, from as i64 - 1) as usize * stride) as u32;
        match filter {
            ResizeFilter::Nearest => {
                self.index
                    .extend((0..to).map(|i| at((i as f64 * scale).floor() as i64)));
            }
            ResizeFilter::Cubic => {
                for i in 0..to {
                    let position = (i as f64 + 0.5) * scale - 0.5;
                    let first = position.floor();
                    self.cubic.push(cubic_weights(position - first));
                    let first = first as i64;
                    self.first
                        .push(((first - 1 + PAD_LEFT as i64) as usize * stride) as u32);
                    self.index.extend((-1..3).map(|tap| at(first + tap)));
                }
            }
            ResizeFilter::Linear | ResizeFilter::Area => {
                for i in 0..to {
                    let (first, fraction) = if filter == ResizeFilter::Linear {
                        let position = ((i as f64 + 0.5) * scale - 0.5) as f32;
                        (position.floor() as i64, position - position.floor())
                    } else {
                        let first = (i as f64 * scale).floor();
                        let fraction = ((i + 1) as f64 - (first + 1.0) * inverse) as f32;
                        (
                            first as i64,
                            if fraction <= 0.0 {
                                0.0
                            } else {
                                fraction - fraction.floor()
                            },
                        )
                    };
                    let weight = |w: f32| (w * 2048.0).round_ties_even() as i32;
                    self.linear.push([weight(1.0 - fraction), weight(fraction)]);
                    self.index.extend([at(first), at(first + 1)]);
                }
                if filter == ResizeFilter::Area && scale >= 1.0 {
                    self.prepare_area(from, to, stride, scale);
                }
            }
        }
    }

    /// OpenCV's `computeResizeAreaTab`.
    fn prepare_area(&mut self, from: usize, to: usize, stride: usize, scale: f64) {
        for i in 0..to {
            let begin = i as f64 * scale;
            let end = begin + scale;
            let cell = scale.min(from as f64 - begin);
            let last = (end.floor() as usize).min(from - 1);
            let first = (begin.ceil() as usize).min(last);
            let mut push = |index: usize, weight: f64| {
                self.area
                    .push((i as u32, (index * stride) as u32, weight as f32));
            };
            if first as f64 - begin > 1e-3 {
                push(first - 1, (first as f64 - begin) / cell);
            }
            for index in first..last {
                push(index, 1.0 / cell);
            }
            if end - last as f64 > 1e-3 {
                push(last, (end - last as f64).min(1.0).min(cell) / cell);
            }
        }
    }
}

/// Weights of the four pixels around a position `x` (0 to 1) past the second one: Keys' cubic with a = -0.75.
fn cubic_weights(x: f64) -> [f32; 4] {
    const A: f64 = -0.75;
    let far = |d: f64| ((A * d - 5.0 * A) * d + 8.0 * A) * d - 4.0 * A;
    let near = |d: f64| ((A + 2.0) * d - (A + 3.0)) * d * d + 1.0;
    let (w0, w1, w2) = (far(x + 1.0), near(x), near(1.0 - x));
    [w0 as f32, w1 as f32, w2 as f32, (1.0 - w0 - w1 - w2) as f32]
}

/// Rounds half to even and clamps to 0..=255: adding 2^23 leaves no bits below one.
#[inline(always)]
fn to_level(value: f32) -> u8 {
    (value.clamp(0.0, 255.0) + 8_388_608.0).to_bits() as u8
}

fn copy(source: &Source, mut target: Target) {
    for y in 0..target.height {
        target.row(y).copy_from_slice(source.row(y));
    }
}

fn nearest(source: &Source, mut target: Target, plan: &Plan) {
    let channels = source.channels;
    for y in 0..target.height {
        let from = source.row(plan.rows.index[y] as usize);
        for (pixel, &at) in target
            .row(y)
            .chunks_exact_mut(channels)
            .zip(&plan.columns.index)
        {
            pixel.copy_from_slice(&from[at as usize..at as usize + channels]);
        }
    }
}

/// Rows first, over all source columns (one pass over contiguous bytes, which vectorises), then columns.
///
/// The blended row repeats its first pixel on the left and its last on the right, so that the four taps of a column
/// always lie side by side.
#[inline(always)]
fn cubic(source: &Source, mut target: Target, plan: &Plan, buffer: &mut Vec<f32>) {
    let channels = source.channels;
    let length = source.width * channels;
    let (left, right) = (PAD_LEFT * channels, PAD_RIGHT * channels);
    buffer.clear();
    buffer.resize(left + length + right + target.width * channels, 0.0);
    let (blended, sums) = buffer.split_at_mut(left + length + right);
    for y in 0..target.height {
        let weights = plan.rows.cubic[y];
        let rows: [&[u8]; 4] =
            std::array::from_fn(|tap| source.row(plan.rows.index[4 * y + tap] as usize));
        let pixels = rows[0].iter().zip(rows[1]).zip(rows[2]).zip(rows[3]);
        for (sum, (((&p0, &p1), &p2), &p3)) in blended[left..left + length].iter_mut().zip(pixels) {
            *sum = (f32::from(p0) * weights[0] + f32::from(p1) * weights[1])
                + (f32::from(p2) * weights[2] + f32::from(p3) * weights[3]);
        }
        for pixel in 0..PAD_LEFT {
            blended.copy_within(left..left + channels, pixel * channels);
        }
        for pixel in 0..PAD_RIGHT {
            blended.copy_within(
                left + length - channels..left + length,
                left + length + pixel * channels,
            );
        }
        match channels {
            1 => cubic_columns::<1, 4>(blended, sums, &plan.columns),
            _ => cubic_columns::<3, 12>(blended, sums, &plan.columns),
        }
        write_levels(target.row(y), sums);
    }
}

/// How many pixels of padding the taps can reach into: the first tap lies at most 2 before, the last 2 behind.
const PAD_LEFT: usize = 2;
const PAD_RIGHT: usize = 2;

/// `WINDOW` is four pixels of `CHANNELS`.
#[inline(always)]
fn cubic_columns<const CHANNELS: usize, const WINDOW: usize>(
    blended: &[f32],
    sums: &mut [f32],
    taps: &Taps,
) {
    let pixels = sums.as_chunks_mut::<CHANNELS>().0;
    for ((pixel, w), &first) in pixels.iter_mut().zip(&taps.cubic).zip(&taps.first) {
        let Some(part) = blended[first as usize..].first_chunk::<WINDOW>() else {
            continue;
        };
        *pixel = std::array::from_fn(|c| {
            (part[c] * w[0] + part[CHANNELS + c] * w[1])
                + (part[2 * CHANNELS + c] * w[2] + part[3 * CHANNELS + c] * w[3])
        });
    }
}

/// Columns first in 1/2048, two source rows held, then rows with OpenCV's `VResizeLinear` rounding.
fn linear(source: &Source, mut target: Target, plan: &Plan, held: &mut [Vec<i32>; 2]) {
    let channels = source.channels;
    let mut holds = [usize::MAX; 2];
    for y in 0..target.height {
        let wanted = [
            plan.rows.index[2 * y] as usize,
            plan.rows.index[2 * y + 1] as usize,
        ];
        if holds[0] != wanted[0] && holds[1] == wanted[0] {
            held.swap(0, 1);
            holds.swap(0, 1);
        }
        for tap in 0..2 {
            if holds[tap] != wanted[tap] {
                linear_columns(
                    source.row(wanted[tap]),
                    channels,
                    target.width,
                    plan,
                    &mut held[tap],
                );
                holds[tap] = wanted[tap];
            }
        }
        let [w0, w1] = plan.rows.linear[y];
        for ((level, &a), &b) in target.row(y).iter_mut().zip(&held[0]).zip(&held[1]) {
            *level = ((((w0 * (a >> 4)) >> 16) + ((w1 * (b >> 4)) >> 16) + 2) >> 2) as u8;
        }
    }
}

fn linear_columns(from: &[u8], channels: usize, width: usize, plan: &Plan, out: &mut Vec<i32>) {
    out.resize(width * channels, 0);
    let taps = plan
        .columns
        .linear
        .iter()
        .zip(plan.columns.index.as_chunks::<2>().0);
    for (pixel, (w, at)) in out.chunks_exact_mut(channels).zip(taps) {
        for (c, sum) in pixel.iter_mut().enumerate() {
            *sum = i32::from(from[at[0] as usize + c]) * w[0]
                + i32::from(from[at[1] as usize + c]) * w[1];
        }
    }
}

/// Mean over blocks of whole pixels.
fn area_blocks(
    source: &Source,
    mut target: Target,
    (across, down): (usize, usize),
    sums: &mut Vec<i32>,
) {
    let channels = source.channels;
    let count = across * down;
    let scale = 1.0 / count as f32;
    for y in 0..target.height {
        sums.clear();
        sums.resize(target.width * channels, 0);
        for line in 0..down {
            let from = source.row(y * down + line);
            for (sum, block) in sums
                .chunks_exact_mut(channels)
                .zip(from.chunks_exact(across * channels))
            {
                for pixel in block.chunks_exact(channels) {
                    for (s, &level) in sum.iter_mut().zip(pixel) {
                        *s += i32::from(level);
                    }
                }
            }
        }
        for (level, &sum) in target.row(y).iter_mut().zip(sums.iter()) {
            // 2x2 has its own rounding in OpenCV: half up instead of half to even.
            *level = if (across, down) == (2, 2) {
                ((sum + 2) >> 2) as u8
            } else {
                to_level(sum as f32 * scale)
            };
        }
    }
}

/// Weighted mean over the covered area, in OpenCV's order of additions (`ResizeArea_Invoker`).
fn area(source: &Source, mut target: Target, plan: &Plan, buffers: &mut Vec<f32>) {
    let channels = source.channels;
    let length = target.width * channels;
    buffers.clear();
    buffers.resize(2 * length, 0.0);
    let (line, sums) = buffers.split_at_mut(length);
    let mut current = 0;
    for &(y, from, weight) in &plan.rows.area {
        line.fill(0.0);
        let row = source.row(from as usize);
        for &(x, at, across) in &plan.columns.area {
            for c in 0..channels {
                line[x as usize * channels + c] += f32::from(row[at as usize + c]) * across;
            }
        }
        if y as usize == current {
            for (sum, part) in sums.iter_mut().zip(line.iter()) {
                *sum += weight * part;
            }
        } else {
            write_levels(target.row(current), sums);
            current = y as usize;
            for (sum, part) in sums.iter_mut().zip(line.iter()) {
                *sum = weight * part;
            }
        }
    }
    write_levels(target.row(current), sums);
}

#[inline(always)]
fn write_levels(row: &mut [u8], sums: &[f32]) {
    for (level, &sum) in row.iter_mut().zip(sums) {
        *level = to_level(sum);
    }
}

#[cfg(test)]
mod tests {
    use image::Luma;
    use proptest::prelude::*;

    use super::*;

    const FILTERS: [ResizeFilter; 4] = [
        ResizeFilter::Nearest,
        ResizeFilter::Linear,
        ResizeFilter::Cubic,
        ResizeFilter::Area,
    ];

    fn texture(width: u32, height: u32) -> Picture {
        Picture::Gray(GrayImage::from_fn(width, height, |x, y| {
            Luma([(x * 31 + y * 17 + x * y) as u8])
        }))
    }

    fn levels(picture: &Picture) -> &[u8] {
        match picture {
            Picture::Gray(image) => image.as_raw(),
            Picture::Rgb(image) => image.as_raw(),
        }
    }

    proptest! {
        #[test]
        fn colour_is_three_times_grey(
            (width, height) in (1..60u32, 1..60u32),
            (to_width, to_height) in (1..60u32, 1..60u32),
            keep_aspect in any::<bool>(),
        ) {
            let gray = texture(width, height);
            let rgb = Picture::Rgb(RgbImage::from_fn(width, height, |x, y| {
                let Picture::Gray(image) = &gray else { unreachable!() };
                image::Rgb([image.get_pixel(x, y).0[0]; 3])
            }));
            let whole = Roi { x: 0, y: 0, width, height };
            for filter in FILTERS {
                let spec = ResizeSpec { width: to_width, height: to_height, filter, keep_aspect };
                let one = Resizer::new(spec).resize(&gray, whole).clone();
                let three = Resizer::new(spec).resize(&rgb, whole).clone();
                let tripled: Vec<u8> = levels(&one).iter().flat_map(|&level| [level; 3]).collect();
                prop_assert_eq!(levels(&three), tripled.as_slice());
            }
        }

        #[test]
        fn a_flat_picture_stays_flat_and_any_rectangle_is_cut_to_the_picture(
            (level, width, height) in (any::<u8>(), 1..40u32, 1..40u32),
            (x, y, roi_width, roi_height) in (0..60u32, 0..60u32, 0..60u32, 0..60u32),
        ) {
            let flat = Picture::Gray(GrayImage::from_pixel(width, height, Luma([level])));
            let roi = Roi { x, y, width: roi_width, height: roi_height };
            for filter in FILTERS {
                let spec = ResizeSpec { width: 23, height: 31, filter, keep_aspect: false };
                prop_assert!(levels(Resizer::new(spec).resize(&flat, roi)).iter().all(|&l| l.abs_diff(level) <= 1));
            }
        }
    }

    #[test]
    fn the_same_size_is_a_copy() {
        let picture = texture(40, 30);
        for filter in FILTERS {
            let spec = ResizeSpec {
                width: 40,
                height: 30,
                filter,
                keep_aspect: true,
            };
            assert_eq!(
                Resizer::new(spec).resize(
                    &picture,
                    Roi {
                        x: 0,
                        y: 0,
                        width: 40,
                        height: 30
                    }
                ),
                &picture
            );
        }
    }

    #[test]
    fn a_kept_aspect_is_centred_on_black() {
        let white = Picture::Gray(GrayImage::from_pixel(100, 50, Luma([255])));
        let spec = ResizeSpec {
            width: 41,
            height: 40,
            filter: ResizeFilter::Cubic,
            keep_aspect: true,
        };
        let mut resizer = Resizer::new(spec);
        let Picture::Gray(image) = resizer.resize(
            &white,
            Roi {
                x: 0,
                y: 0,
                width: 100,
                height: 50,
            },
        ) else {
            unreachable!()
        };
        let rows: Vec<u8> = (0..40).map(|y| image.get_pixel(20, y).0[0]).collect();
        assert!(
            rows[..9].iter().chain(&rows[30..]).all(|&l| l == 0),
            "{rows:?}"
        );
        assert!(rows[9..30].iter().all(|&l| l == 255), "{rows:?}");
    }

    #[test]
    fn a_reused_resizer_forgets_the_picture_before() {
        for filter in FILTERS {
            let spec = ResizeSpec {
                width: 24,
                height: 20,
                filter,
                keep_aspect: true,
            };
            let mut reused = Resizer::new(spec);
            for (width, height) in [(50, 40), (40, 50), (7, 3), (24, 20), (48, 40), (50, 40)] {
                let picture = texture(width, height);
                let whole = Roi {
                    x: 0,
                    y: 0,
                    width,
                    height,
                };
                assert_eq!(
                    reused.resize(&picture, whole),
                    Resizer::new(spec).resize(&picture, whole)
                );
            }
        }
    }
}
