//! The crop to the brain: `crop_imgs` of the Flask application, to the pixel.
//!
//! Grey, 5x5 Gaussian blur, threshold, erosion, dilation, the outer contour of largest area, its extreme points.
//! Each step gives what OpenCV (4.5 to 5.0 agree) gives:
//!
//! - **Grey** is `RGB2GRAY` applied to a picture in `imread`'s BGR order, as the application does: blue gets the
//!   weight meant for red. In 1/32768: 9798 blue, 19235 green, 3735 red, rounded half up.
//! - **Blur** is `GaussianBlur((5, 5), 0)` on 8 bits: the kernel `[1 4 6 4 1] / 16` both ways, one rounding at the end,
//!   borders mirrored without repeating the edge (`BORDER_REFLECT_101`).
//! - **Threshold** keeps what is above the level.
//! - **Erosion and dilation** with the 3x3 square; outside the picture counts as neutral.
//! - **Contours**: 8-connected outer borders; the area is that of the polygon through the border pixels' centres
//!   (`contourArea`); of equal areas the one whose first pixel comes last in reading order wins, because `findContours`
//!   lists contours from the bottom up and `max` keeps the first.
//! - **Rectangle**: half open at the extreme points, so the contour's last row and column are left out, as in
//!   `img[top:bottom, left:right]`.
//!
//! The kernels are our own. `imageproc`'s morphology (a distance transform) and `find_contours` alone take seven times what
//! OpenCV needs for all steps, and miss OpenCV's rectangle where a head touches the picture's edge. Here the mask is one
//! bit a pixel from the threshold on: morphology is a few word operations for 64 pixels, components are joined run by run,
//! and only components whose bounding box `(w - 1)(h - 1)` could hold the largest polygon are traced.

use super::{Picture, vectorized};
use crate::prediction::{RejectCode, RejectReason, Roi};

/// Pictures with a shorter side than this are rejected: there is no anatomy to see in them.
pub const MIN_SIDE: u32 = 16;

/// Parameters of the crop, as the model manifest gives them. The defaults are the application's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CropSpec {
    /// Grey level, 0 to 255, that a blurred pixel must exceed.
    pub threshold: u8,
    /// Rounds of 3x3 erosion.
    pub erode: u32,
    /// Rounds of 3x3 dilation.
    pub dilate: u32,
    /// Pixels added on every side of the rectangle (`add_pixels_value`); may be negative.
    pub margin: i32,
}

impl Default for CropSpec {
    fn default() -> Self {
        Self {
            threshold: 45,
            erode: 2,
            dilate: 2,
            margin: 0,
        }
    }
}

/// Why the rectangle is the whole picture although a contour was found: cases where the application crashes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fallback {
    /// The contour is one pixel wide or high (or a negative margin ate it): the half-open rectangle is empty.
    EmptyCrop,
    /// The margin reaches over the left or top edge: a negative index in `NumPy`.
    NegativeIndex,
}

/// The brain's outline in one picture. Its points are in [`RoiFinder::contour`].
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct BrainContour {
    /// The rectangle to cut out, never empty and inside the picture.
    pub roi: Roi,
    /// The pixels that the contour spans, last row and column included, without the margin.
    pub bounds: Roi,
    /// Area of the polygon through the border pixels' centres in square pixels (`cv2.contourArea`), a multiple of 0.5.
    pub area: f64,
    /// Set when `roi` is the whole picture because the application's rectangle cannot be cut.
    pub fallback: Option<Fallback>,
}

/// A point of the contour: column and row in pixels.
pub type Point = (u32, u32);

/// Finds the brain. Keeps its buffers, so one instance per thread is used for picture after picture.
#[derive(Debug, Clone)]
pub struct RoiFinder {
    spec: CropSpec,
    min_side: u32,
    gray: Vec<u8>,
    column_sums: Vec<u16>,
    above: Vec<u8>,
    mask: BitMask,
    scratch: BitMask,
    components: Components,
    contour: Vec<Point>,
    traced: Vec<Point>,
}

impl RoiFinder {
    /// A finder with the parameters of `spec`.
    pub fn new(spec: CropSpec) -> Self {
        Self {
            spec,
            min_side: MIN_SIDE,
            gray: Vec::new(),
            column_sums: Vec::new(),
            above: Vec::new(),
            mask: BitMask::default(),
            scratch: BitMask::default(),
            components: Components::default(),
            contour: Vec::new(),
            traced: Vec::new(),
        }
    }

    /// The same finder with another smallest side than [`MIN_SIDE`], in pixels.
    #[must_use]
    pub fn with_min_side(mut self, pixels: u32) -> Self {
        self.min_side = pixels;
        self
    }

    /// The parameters in use.
    pub fn spec(&self) -> CropSpec {
        self.spec
    }

    /// Finds the brain's contour and rectangle in `picture`.
    ///
    /// Rejects with [`RejectCode::TooSmall`] below [`MIN_SIDE`], and with [`RejectCode::Blank`] when nothing is left above
    /// the threshold (the application crashes on both).
    pub fn find(&mut self, picture: &Picture) -> Result<BrainContour, RejectReason> {
        let (width, height) = (picture.width(), picture.height());
        let min_side = self.min_side.max(1);
        if width < min_side || height < min_side {
            return Err(RejectReason::new(
                RejectCode::TooSmall,
                format!(
                    "the picture is {width}x{height}; each side needs at least {min_side} pixels"
                ),
            ));
        }
        let gray: &[u8] = match picture {
            Picture::Gray(image) => image.as_raw(),
            Picture::Rgb(image) => {
                vectorized(
                    #[inline(always)]
                    || app_gray(image.as_raw(), &mut self.gray),
                );
                &self.gray
            }
        };
        self.mask.reset(width, height);
        vectorized(
            #[inline(always)]
            || {
                threshold_blurred(
                    gray,
                    self.spec.threshold,
                    &mut self.column_sums,
                    &mut self.above,
                    &mut self.mask,
                );
            },
        );
        let bright = !self.mask.is_empty();
        // More rounds than the longer side change nothing any more.
        let longest = width.max(height);
        for _ in 0..self.spec.erode.min(longest) {
            self.mask.erode_into(&mut self.scratch);
            std::mem::swap(&mut self.mask, &mut self.scratch);
        }
        for _ in 0..self.spec.dilate.min(longest) {
            self.mask.dilate_into(&mut self.scratch);
            std::mem::swap(&mut self.mask, &mut self.scratch);
        }
        let Some((area, bounds)) = self.largest_contour() else {
            let level = self.spec.threshold;
            return Err(RejectReason::new(
                RejectCode::Blank,
                if bright {
                    format!("only specks of the picture are brighter than {level} of 255")
                } else {
                    format!("no part of the picture is brighter than {level} of 255")
                },
            ));
        };
        let (roi, fallback) = match crop(bounds, self.spec.margin, width, height) {
            Ok(roi) => (roi, None),
            Err(fallback) => (
                Roi {
                    x: 0,
                    y: 0,
                    width,
                    height,
                },
                Some(fallback),
            ),
        };
        Ok(BrainContour {
            roi,
            bounds,
            area,
            fallback,
        })
    }

    /// The corner points of the contour that the last successful [`find`](Self::find) chose, clockwise from its first
    /// pixel in reading order (`CHAIN_APPROX_SIMPLE`: points within straight runs are left out).
    pub fn contour(&self) -> &[Point] {
        &self.contour
    }

    /// The grey levels that the last [`find`](Self::find) worked on, row by row; `picture` is the one given to it.
    pub fn gray<'a>(&'a self, picture: &'a Picture) -> &'a [u8] {
        match picture {
            Picture::Gray(image) => image.as_raw(),
            Picture::Rgb(_) => &self.gray,
        }
    }

    /// The mask after erosion and dilation of the last [`find`](Self::find): 255 inside, 0 outside.
    pub fn mask(&self) -> image::GrayImage {
        image::GrayImage::from_fn(self.mask.width, self.mask.height, |x, y| {
            image::Luma([if self.mask.get(i64::from(x), i64::from(y)) {
                255
            } else {
                0
            }])
        })
    }

    /// How much of the picture's four corner blocks, each an eighth of the width and height (at least a pixel), is in the
    /// mask of the last [`find`](Self::find); 0 to 1.
    pub fn corner_share(&self) -> f32 {
        let (width, height) = (self.mask.width, self.mask.height);
        if width == 0 || height == 0 {
            return 0.0;
        }
        let (across, down) = ((width / 8).max(1), (height / 8).max(1));
        let mut set = 0;
        for y in (0..down).chain(height - down..height) {
            set += self.mask.count(y, 0..across) + self.mask.count(y, width - across..width);
        }
        set as f32 / (4 * across * down) as f32
    }

    /// Traces what can be the largest component; its points go to `self.contour`.
    fn largest_contour(&mut self) -> Option<(f64, Roi)> {
        self.components.collect(&self.mask);
        let candidates = &mut self.components.found;
        candidates.sort_unstable_by_key(|c| std::cmp::Reverse((c.area_bound(), c.first)));
        let mut best: Option<(i64, &Component)> = None;
        for component in candidates.iter() {
            if best.is_some_and(|(area, _)| component.area_bound() * 2 < area) {
                break;
            }
            let area = trace(&self.mask, component.first, &mut self.traced);
            // Reading order decides between equals: the last one wins.
            if best.is_none_or(|(most, chosen)| (area, component.first) > (most, chosen.first)) {
                best = Some((area, component));
                std::mem::swap(&mut self.contour, &mut self.traced);
            }
        }
        best.map(|(doubled, component)| (doubled as f64 / 2.0, component.bounds()))
    }
}

/// `img[top - m : bottom + m, left - m : right + m]` with `NumPy`'s rules, as far as they make sense.
fn crop(bounds: Roi, margin: i32, width: u32, height: u32) -> Result<Roi, Fallback> {
    let span = |start: u32, length: u32, limit: u32| {
        let margin = i64::from(margin);
        let from = i64::from(start) - margin;
        let to = i64::from(start + length - 1) + margin;
        if from < 0 || to < 0 {
            return Err(Fallback::NegativeIndex);
        }
        let to = to.min(i64::from(limit));
        if to > from {
            Ok((from as u32, (to - from) as u32))
        } else {
            Err(Fallback::EmptyCrop)
        }
    };
    let (x, width) = span(bounds.x, bounds.width, width)?;
    let (y, height) = span(bounds.y, bounds.height, height)?;
    Ok(Roi {
        x,
        y,
        width,
        height,
    })
}

/// `cvtColor(imread(file), COLOR_RGB2GRAY)` of interleaved RGB: OpenCV's 15-bit weights with red and blue exchanged.
#[inline(always)]
fn app_gray(rgb: &[u8], gray: &mut Vec<u8>) {
    gray.clear();
    gray.extend(rgb.chunks_exact(3).map(|p| {
        ((3735 * u32::from(p[0]) + 19235 * u32::from(p[1]) + 9798 * u32::from(p[2]) + (1 << 14))
            >> 15) as u8
    }));
}

/// Mirrors an index around the first and last element (`BORDER_REFLECT_101`).
fn reflect(index: i64, length: usize) -> usize {
    let last = length as i64 - 1;
    if last == 0 {
        return 0;
    }
    let folded = index.rem_euclid(2 * last);
    (if folded > last {
        2 * last - folded
    } else {
        folded
    }) as usize
}

/// Sets the bits of `mask` (already reset to the picture's size) where the blurred picture exceeds `threshold`.
///
/// The blurred level is `(s + 128) >> 8` with `s` the weighted sum, weights adding up to 256; so `level > t` is
/// `s >= (t + 1) * 256 - 128`, and all sums fit 16 bits (255 * 256 = 65280).
#[inline(always)]
fn threshold_blurred(
    gray: &[u8],
    threshold: u8,
    columns: &mut Vec<u16>,
    above: &mut Vec<u8>,
    mask: &mut BitMask,
) {
    let (width, height) = (mask.width as usize, mask.height as usize);
    let least = (u16::from(threshold) + 1)
        .saturating_mul(256)
        .saturating_sub(128);
    let least = if threshold == 255 { u16::MAX } else { least };
    columns.clear();
    columns.resize(width + 4, 0);
    above.clear();
    above.resize(mask.words * 64, 0);
    let row = |y: i64| {
        let start = reflect(y, height) * width;
        &gray[start..start + width]
    };
    for y in 0..height {
        let at = y as i64;
        let rows = [row(at - 2), row(at - 1), row(at), row(at + 1), row(at + 2)];
        for (x, sum) in columns[2..width + 2].iter_mut().enumerate() {
            let level = |tap: usize| u16::from(rows[tap][x]);
            *sum = level(0) + level(4) + 4 * (level(1) + level(3)) + 6 * level(2);
        }
        for side in [-2, -1] {
            columns[(side + 2) as usize] = columns[2 + reflect(side, width)];
            let right = width as i64 - 1 - side;
            columns[(right + 2) as usize] = columns[2 + reflect(right, width)];
        }
        let taps: [&[u16]; 5] = std::array::from_fn(|tap| &columns[tap..tap + width]);
        for (x, bit) in above[..width].iter_mut().enumerate() {
            let sum = taps[0][x] + taps[4][x] + 4 * (taps[1][x] + taps[3][x]) + 6 * taps[2][x];
            *bit = u8::from(sum >= least);
        }
        pack(above, mask.row_mut(y));
    }
}

/// Packs bytes of 0 or 1 into bits, the first byte into the lowest bit; 64 bytes a word.
#[inline(always)]
fn pack(bytes: &[u8], words: &mut [u64]) {
    let (blocks, _) = bytes.as_chunks::<64>();
    for (word, block) in words.iter_mut().zip(blocks) {
        let (eights, _) = block.as_chunks();
        let mut packed = [0; 8];
        for (packed, eight) in packed.iter_mut().zip(eights) {
            let bits = u64::from_le_bytes(*eight);
            // Two bits in each 16, four in each 32, eight in all: the lowest ones.
            let bits = bits | bits >> 7;
            let bits = bits | bits >> 14;
            *packed = (bits | bits >> 28) as u8;
        }
        *word = u64::from_le_bytes(packed);
    }
}

/// One bit a pixel, 64 pixels a word, rows padded to whole words; padding bits are 0.
#[derive(Debug, Clone, Default)]
struct BitMask {
    width: u32,
    height: u32,
    words: usize,
    bits: Vec<u64>,
}

impl BitMask {
    fn reset(&mut self, width: u32, height: u32) {
        self.width = width;
        self.height = height;
        self.words = (width as usize).div_ceil(64);
        self.bits.clear();
        self.bits.resize(self.words * height as usize, 0);
    }

    fn row(&self, y: usize) -> &[u64] {
        &self.bits[y * self.words..(y + 1) * self.words]
    }

    fn row_mut(&mut self, y: usize) -> &mut [u64] {
        &mut self.bits[y * self.words..(y + 1) * self.words]
    }

    /// The pixel, `false` outside the picture.
    fn get(&self, x: i64, y: i64) -> bool {
        if x < 0 || y < 0 || x >= i64::from(self.width) || y >= i64::from(self.height) {
            return false;
        }
        self.bits[y as usize * self.words + x as usize / 64] >> (x % 64) & 1 == 1
    }

    /// How many pixels are set in these columns, at least one, of row `y`.
    fn count(&self, y: u32, columns: std::ops::Range<u32>) -> u32 {
        let row = self.row(y as usize);
        let word = |i: u32| {
            let from_here = u64::MAX << columns.start.saturating_sub(64 * i);
            let up_to_here = u64::MAX >> (64 * (i + 1)).saturating_sub(columns.end);
            (row[i as usize] & from_here & up_to_here).count_ones()
        };
        (columns.start / 64..=(columns.end - 1) / 64)
            .map(word)
            .sum()
    }

    fn is_empty(&self) -> bool {
        self.bits.iter().all(|&word| word == 0)
    }

    /// The valid bits of a row's last word.
    fn last_word(&self) -> u64 {
        match self.width % 64 {
            0 => u64::MAX,
            used => (1 << used) - 1,
        }
    }

    /// One round of 3x3 erosion; outside counts as set.
    fn erode_into(&self, out: &mut Self) {
        self.combine_into(out, u64::MAX, |a, b| a & b);
    }

    /// One round of 3x3 dilation; outside counts as clear.
    fn dilate_into(&self, out: &mut Self) {
        self.combine_into(out, 0, |a, b| a | b);
    }

    /// `combine` over each pixel's 3x3 neighbours, with `outside` for those beyond the edge.
    fn combine_into(&self, out: &mut Self, outside: u64, combine: impl Fn(u64, u64) -> u64) {
        out.width = self.width;
        out.height = self.height;
        out.words = self.words;
        out.bits.resize(self.bits.len(), 0);
        let last_word = self.last_word();
        let last = self.height as usize - 1;
        // A row combined with those above and below it, and a word of what is outside at each end.
        let mut columns = vec![outside; self.words + 2];
        vectorized(
            #[inline(always)]
            || {
                for (y, out) in out.bits.chunks_exact_mut(self.words).enumerate() {
                    let up = self.row(y.saturating_sub(1));
                    let down = self.row((y + 1).min(last));
                    let rows = up.iter().zip(self.row(y)).zip(down);
                    for (column, ((up, here), down)) in columns[1..].iter_mut().zip(rows) {
                        *column = combine(combine(*up, *here), *down);
                    }
                    // The padding is the neighbour of the last column, so it stands for the outside.
                    let padded = &mut columns[self.words];
                    *padded = (*padded & last_word) | (outside & !last_word);
                    let neighbours = columns.iter().zip(&columns[1..]).zip(&columns[2..]);
                    for (result, ((left, middle), right)) in out.iter_mut().zip(neighbours) {
                        let from_left = middle << 1 | left >> 63;
                        let from_right = middle >> 1 | right << 63;
                        *result = combine(combine(from_left, *middle), from_right);
                    }
                    out[self.words - 1] &= last_word;
                }
            },
        );
    }
}

/// An 8-connected component: its box and its first pixel in reading order, as `(row, column)`.
#[derive(Debug, Clone, Copy)]
struct Component {
    first: (u32, u32),
    left: u32,
    right: u32,
    bottom: u32,
}

impl Component {
    /// No polygon through its pixels' centres is larger.
    fn area_bound(&self) -> i64 {
        i64::from(self.right - self.left) * i64::from(self.bottom - self.first.0)
    }

    fn bounds(&self) -> Roi {
        let top = self.first.0;
        Roi {
            x: self.left,
            y: top,
            width: self.right - self.left + 1,
            height: self.bottom - top + 1,
        }
    }
}

/// Joins the runs of set bits of neighbouring rows to components.
#[derive(Debug, Clone, Default)]
struct Components {
    found: Vec<Component>,
    parents: Vec<u32>,
    all: Vec<Component>,
    above: Vec<Run>,
    here: Vec<Run>,
}

/// Set pixels `start..=end` of one row and the component they belong to.
#[derive(Debug, Clone, Copy)]
struct Run {
    start: u32,
    end: u32,
    label: u32,
}

impl Components {
    /// Fills `found` with the components of `mask`.
    ///
    /// Components in the hole of another one are among them; `findContours(RETR_EXTERNAL)` leaves those out, but their
    /// polygon lies inside the other's, so they are never the largest.
    fn collect(&mut self, mask: &BitMask) {
        self.found.clear();
        self.parents.clear();
        self.all.clear();
        self.above.clear();
        for y in 0..mask.height {
            self.here.clear();
            let mut candidate = 0;
            let (above, here) = (&self.above, &mut self.here);
            let (parents, all) = (&mut self.parents, &mut self.all);
            for_each_run(mask.row(y as usize), |start, end| {
                let mut label = None;
                while candidate < above.len() && above[candidate].end + 1 < start {
                    candidate += 1;
                }
                let mut touching = candidate;
                while touching < above.len() && above[touching].start <= end + 1 {
                    let other = root(parents, above[touching].label);
                    label = Some(label.map_or(other, |mine| join(parents, all, mine, other)));
                    touching += 1;
                }
                let label = label.unwrap_or_else(|| {
                    let new = all.len() as u32;
                    parents.push(new);
                    all.push(Component {
                        first: (y, start),
                        left: start,
                        right: end,
                        bottom: y,
                    });
                    new
                });
                let component = &mut all[label as usize];
                component.left = component.left.min(start);
                component.right = component.right.max(end);
                component.bottom = y;
                here.push(Run { start, end, label });
            });
            std::mem::swap(&mut self.above, &mut self.here);
        }
        let parents = &self.parents;
        self.found.extend(
            self.all
                .iter()
                .enumerate()
                .filter(|(i, _)| parents[*i] == *i as u32)
                .map(|(_, c)| *c),
        );
    }
}

/// Calls `run` with the first and last column of each run of set bits.
fn for_each_run(words: &[u64], mut run: impl FnMut(u32, u32)) {
    let mut open: Option<u32> = None;
    for (i, &word) in words.iter().enumerate() {
        let base = i as u32 * 64;
        if open.is_none() && word == 0 || open.is_some() && word == u64::MAX {
            continue;
        }
        let mut at = 0;
        while at < 64 {
            // Look for the next set bit outside a run, for the next clear one within.
            let rest = if open.is_some() { !word } else { word } >> at;
            if rest == 0 {
                break;
            }
            at += rest.trailing_zeros();
            match open.take() {
                Some(start) => run(start, base + at - 1),
                None => open = Some(base + at),
            }
        }
    }
    if let Some(start) = open {
        run(start, words.len() as u32 * 64 - 1);
    }
}

fn root(parents: &mut [u32], mut label: u32) -> u32 {
    while parents[label as usize] != label {
        let grandparent = parents[parents[label as usize] as usize];
        parents[label as usize] = grandparent;
        label = grandparent;
    }
    label
}

/// Joins two roots; the one that began first in reading order stays.
fn join(parents: &mut [u32], all: &mut [Component], one: u32, other: u32) -> u32 {
    if one == other {
        return one;
    }
    let (keep, gone) = (one.min(other), one.max(other));
    parents[gone as usize] = keep;
    let absorbed = all[gone as usize];
    let kept = &mut all[keep as usize];
    kept.first = kept.first.min(absorbed.first);
    kept.left = kept.left.min(absorbed.left);
    kept.right = kept.right.max(absorbed.right);
    kept.bottom = kept.bottom.max(absorbed.bottom);
    keep
}

/// Follows the outer border from the component's first pixel in reading order, `(row, column)`; returns twice the
/// polygon's area and leaves its corners in `corners`.
///
/// Border following after Suzuki and Abe (1985), as OpenCV's `findContours` does it: directions are chain codes,
/// 0 east, 2 north, 4 west, 6 south.
fn trace(mask: &BitMask, first: (u32, u32), corners: &mut Vec<Point>) -> i64 {
    const STEPS: [(i64, i64); 8] = [
        (1, 0),
        (1, -1),
        (0, -1),
        (-1, -1),
        (-1, 0),
        (-1, 1),
        (0, 1),
        (1, 1),
    ];
    let start = (i64::from(first.1), i64::from(first.0));
    let step =
        |(x, y): (i64, i64), direction: usize| (x + STEPS[direction].0, y + STEPS[direction].1);
    let is_set = |(x, y): (i64, i64)| mask.get(x, y);
    corners.clear();

    // The pixel to the west is clear; the last neighbour clockwise from there is where the border will return from.
    let Some(mut direction) = (0..8)
        .map(|turn| (3 + 8 - turn) % 8)
        .find(|&d| is_set(step(start, d)))
    else {
        corners.push((first.1, first.0));
        return 0;
    };
    let before_start = step(start, direction);
    let mut previous = direction ^ 4;
    let mut here = start;
    let mut doubled_area = 0;
    loop {
        // Counterclockwise from where we came; that neighbour itself is set, so the search ends.
        loop {
            direction = (direction + 1) % 8;
            if is_set(step(here, direction)) {
                break;
            }
        }
        let next = step(here, direction);
        if direction != previous {
            corners.push((here.0 as u32, here.1 as u32));
            previous = direction;
        }
        doubled_area += here.0 * next.1 - here.1 * next.0;
        if next == start && here == before_start {
            return doubled_area.abs();
        }
        here = next;
        direction = (direction + 4) % 8;
    }
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, Luma};
    use proptest::prelude::*;

    use super::*;

    fn mask_of(width: u32, height: u32, set: &[bool]) -> BitMask {
        let mut mask = BitMask::default();
        mask.reset(width, height);
        for (i, _) in set.iter().enumerate().filter(|(_, set)| **set) {
            let (x, y) = (i % width as usize, i / width as usize);
            mask.row_mut(y)[x / 64] |= 1 << (x % 64);
        }
        mask
    }

    fn pixels(mask: &BitMask) -> Vec<bool> {
        let (width, height) = (i64::from(mask.width), i64::from(mask.height));
        (0..height)
            .flat_map(|y| (0..width).map(move |x| (x, y)))
            .map(|(x, y)| mask.get(x, y))
            .collect()
    }

    /// The 3x3 neighbours of pixel `i` that lie in the picture.
    fn neighbours(width: u32, height: u32, i: usize) -> impl Iterator<Item = usize> {
        let (width, height) = (i64::from(width), i64::from(height));
        let (x, y) = (i as i64 % width, i as i64 / width);
        (-1..=1)
            .flat_map(|dy| (-1..=1).map(move |dx| (dx, dy)))
            .map(move |(dx, dy)| (x + dx, y + dy))
            .filter(move |&(x, y)| (0..width).contains(&x) && (0..height).contains(&y))
            .map(move |(x, y)| (y * width + x) as usize)
    }

    /// A mask of up to 150 x 24 pixels, from sparse to dense.
    fn masks() -> impl Strategy<Value = (u32, u32, Vec<bool>)> {
        (1..150u32, 1..24u32, 0.02..0.98f64).prop_flat_map(|(width, height, density)| {
            let pixel = proptest::bool::weighted(density);
            (
                Just(width),
                Just(height),
                proptest::collection::vec(pixel, (width * height) as usize),
            )
        })
    }

    /// The largest component by flood fill, its holes and everything in them filled, with its polygon's area from counting
    /// 2x2 blocks: 1 for four set pixels, a half for three. Independent of any border following.
    fn largest_by_blocks(width: u32, height: u32, set: &[bool]) -> Option<(f64, (u32, u32))> {
        let (columns, rows) = (width as usize, height as usize);
        let mut seen = vec![false; set.len()];
        let mut best: Option<(f64, (u32, u32))> = None;
        for start in 0..set.len() {
            if !set[start] || seen[start] {
                continue;
            }
            let mut inside = vec![false; set.len()];
            let mut open = vec![start];
            while let Some(i) = open.pop() {
                if std::mem::replace(&mut inside[i], true) {
                    continue;
                }
                seen[i] = true;
                open.extend(neighbours(width, height, i).filter(|&n| set[n] && !inside[n]));
            }
            // What the component keeps from the edge, going up, down, left and right, is within it.
            let mut outside = vec![false; (columns + 2) * (rows + 2)];
            let mut open = vec![0];
            while let Some(i) = open.pop() {
                let (x, y) = (i % (columns + 2), i / (columns + 2));
                let is_set = (1..=columns).contains(&x)
                    && (1..=rows).contains(&y)
                    && inside[(y - 1) * columns + x - 1];
                if is_set || std::mem::replace(&mut outside[i], true) {
                    continue;
                }
                let steps = [(x > 0, i.wrapping_sub(1)), (x <= columns, i + 1)];
                let rises = [
                    (y > 0, i.wrapping_sub(columns + 2)),
                    (y <= rows, i + columns + 2),
                ];
                open.extend(
                    steps
                        .into_iter()
                        .chain(rises)
                        .filter(|(fits, _)| *fits)
                        .map(|(_, n)| n),
                );
            }
            let filled = |x: usize, y: usize| u32::from(!outside[(y + 1) * (columns + 2) + x + 1]);
            let mut area = 0.0;
            for y in 1..rows {
                for x in 1..columns {
                    area += match filled(x - 1, y - 1)
                        + filled(x, y - 1)
                        + filled(x - 1, y)
                        + filled(x, y)
                    {
                        4 => 1.0,
                        3 => 0.5,
                        _ => 0.0,
                    };
                }
            }
            let first = ((start / columns) as u32, (start % columns) as u32);
            if best.is_none_or(|best| (area, first) > best) {
                best = Some((area, first));
            }
        }
        best
    }

    proptest! {
        #[test]
        fn pixels_are_counted_by_the_word((width, height, set) in masks(), (from, columns) in (0..150u32, 1..150u32)) {
            let mask = mask_of(width, height, &set);
            let columns = from % width..(from % width + columns).min(width);
            for y in 0..height {
                let one_by_one = columns.clone().filter(|&x| mask.get(x.into(), y.into())).count();
                prop_assert_eq!(mask.count(y, columns.clone()) as usize, one_by_one);
            }
        }

        #[test]
        fn erosion_and_dilation_are_minimum_and_maximum((width, height, set) in masks()) {
            let mask = mask_of(width, height, &set);
            let mut out = BitMask::default();
            mask.erode_into(&mut out);
            let wanted: Vec<bool> = (0..set.len()).map(|i| neighbours(width, height, i).all(|n| set[n])).collect();
            prop_assert_eq!(pixels(&out), wanted);
            mask.dilate_into(&mut out);
            let wanted: Vec<bool> = (0..set.len()).map(|i| neighbours(width, height, i).any(|n| set[n])).collect();
            prop_assert_eq!(pixels(&out), wanted);
            prop_assert!(out.bits.chunks(out.words).all(|row| row[out.words - 1] & !out.last_word() == 0));
        }

        #[test]
        fn the_largest_contour_is_the_largest((width, height, set) in masks()) {
            let mut finder = RoiFinder::new(CropSpec::default());
            finder.mask = mask_of(width, height, &set);
            let found = finder.largest_contour();
            let wanted = largest_by_blocks(width, height, &set);
            prop_assert_eq!(found.map(|(area, _)| area), wanted.map(|(area, _)| area));
            if let Some((_, (y, x))) = wanted {
                prop_assert_eq!(finder.contour()[0], (x, y));
            }
        }

        #[test]
        fn any_picture_and_any_spec_give_a_rectangle_inside_or_a_reason(
            (width, height, seed) in (1..90u32, 1..90u32, any::<u32>()),
            (threshold, erode, dilate, margin) in (any::<u8>(), any::<u32>(), any::<u32>(), any::<i32>()),
            small in any::<bool>(),
        ) {
            let (erode, dilate, margin) = if small { (erode % 4, dilate % 4, margin % 20) } else { (erode, dilate, margin) };
            let mut state = seed;
            let noise = GrayImage::from_fn(width, height, |_, _| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                Luma([(state >> 24) as u8])
            });
            let mut finder = RoiFinder::new(CropSpec { threshold, erode, dilate, margin });
            if let Ok(BrainContour { roi, .. }) = finder.find(&Picture::Gray(noise)) {
                prop_assert!(roi.width > 0 && roi.height > 0);
                prop_assert!(roi.x + roi.width <= width && roi.y + roi.height <= height);
            }
        }
    }

    #[test]
    fn mirrored_borders_do_not_repeat_the_edge() {
        let at = |length| {
            (-4..length as i64 + 4)
                .map(|i| reflect(i, length))
                .collect::<Vec<_>>()
        };
        assert_eq!(at(4), [2, 3, 2, 1, 0, 1, 2, 3, 2, 1, 0, 1]);
        assert_eq!(at(2), [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]);
        assert_eq!(at(1), [0; 9]);
    }

    #[test]
    fn small_and_black_pictures_are_rejected() {
        let code = |width, height| {
            let picture = Picture::Gray(GrayImage::new(width, height));
            RoiFinder::new(CropSpec::default())
                .find(&picture)
                .unwrap_err()
                .code
        };
        assert_eq!(code(15, 400), RejectCode::TooSmall);
        assert_eq!(code(0, 0), RejectCode::TooSmall);
        assert_eq!(code(16, 16), RejectCode::Blank);
    }

    #[test]
    fn a_reused_finder_forgets_the_picture_before() {
        let disc = |side: u32, center: i64| {
            Picture::Gray(GrayImage::from_fn(side, side, |x, y| {
                let inside = (i64::from(x) - center).pow(2) + (i64::from(y) - center).pow(2) < 400;
                Luma([if inside { 200 } else { 0 }])
            }))
        };
        let mut reused = RoiFinder::new(CropSpec::default());
        for (side, center) in [(130, 100), (64, 30), (201, 60), (64, 30)] {
            let picture = disc(side, center);
            let fresh = RoiFinder::new(CropSpec::default()).find(&picture).unwrap();
            assert_eq!(reused.find(&picture).unwrap(), fresh);
        }
        assert_eq!(
            reused.find(&disc(64, 200)).unwrap_err().code,
            RejectCode::Blank
        );
    }
}
