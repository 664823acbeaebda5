//! Synthetic head slices, with and without a bright lesion, for the demo, the simulator and the tests.
//!
//! The Rust twin of `models/training/phantom.py`, whose pictures the model has seen in training: the same primitives
//! (filled turned ellipses, Gaussian blur, additive noise), painted in the same order with values from the same ranges.
//! The two draw the same family of pictures, not the same pictures.
//!
//! A seed gives the same picture on every machine: the generator's algorithm is fixed, sine and cosine come from `libm`
//! and not from the system, and everything else is IEEE arithmetic.

use std::ops::Range;

use image::{GrayImage, Luma};
use rand_pcg::Pcg64Mcg;
use rand_pcg::rand_core::{Rng as _, SeedableRng as _};

use crate::prediction::Roi;

/// A drawn slice and the truth about it.
#[derive(Debug, Clone)]
pub struct Phantom {
    /// 180 to 512 pixels wide, 0.92 to 1.22 times that high.
    pub image: GrayImage,
    /// The box around the lesion; `None` without one.
    pub lesion: Option<Roi>,
}

// The ranges of `RANGES` in phantom.py. Lengths are fractions of the smaller side unless said otherwise; grey is 0-255.
const SIZE: Range<f64> = 180.0..512.0; // px, width
const ASPECT: Range<f64> = 0.92..1.22; // height over width
const HEAD_X: Range<f64> = 0.35..0.45; // semi-axis of the scalp, of the width
const HEAD_Y: Range<f64> = 0.38..0.46; // of the height
const HEAD_TILT: Range<f64> = -12.0..12.0; // degrees
const OFFSET: Range<f64> = -0.03..0.03; // of the centre, of width and height
const SCALP: Range<f64> = 90.0..210.0; // grey
const SKULL: Range<f64> = 8.0..40.0; // grey of the dark ring
const SKULL_OUTER: Range<f64> = 0.91..0.95; // of the head's semi-axes
const SKULL_INNER: Range<f64> = 0.82..0.88; // of the head's semi-axes; the brain ends here
const SKULL_STRIPPED: f64 = 0.15; // share of the pictures without scalp and skull
const BRAIN: Range<f64> = 65.0..125.0; // grey matter, grey
const WHITE: Range<f64> = -22.0..32.0; // white matter minus grey matter
const SULCI: Range<f64> = 30.0..60.0; // number of dark folds at the brain's edge
const SULCUS_DEPTH: Range<f64> = 12.0..40.0; // grey, subtracted
const VENTRICLE_IS_DARK: f64 = 0.8; // share with dark ventricles (as in T1, FLAIR); the others are bright (as in T2)
const VENTRICLE_DARK: Range<f64> = 12.0..45.0; // grey
const VENTRICLE_BRIGHT: Range<f64> = 150.0..215.0; // grey
const VENTRICLE_LONG: Range<f64> = 0.07..0.14;
const VENTRICLE_SHORT: Range<f64> = 0.018..0.042;
const VENTRICLE_TILT: Range<f64> = 5.0..25.0; // degrees, mirrored left and right
const TEXTURE: Range<f64> = 2.0..9.0; // grey, standard deviation of the smooth texture
const TEXTURE_SCALE: Range<f64> = 0.012..0.035; // its Gaussian sigma
const SHADING: Range<f64> = -0.15..0.15; // brightness change across the image
const BLUR: Range<f64> = 0.5..1.4; // px at a width of 256, of the whole picture
const NOISE: Range<f64> = 1.5..6.0; // grey, standard deviation
const LESION_SIZE: Range<f64> = 0.055..0.13; // semi-axis
const LESION_ASPECT: Range<f64> = 0.65..1.0;
const LESION_RADIUS: Range<f64> = 0.30..0.62; // distance from the middle, of the brain's semi-axes
const LESION_GAIN: Range<f64> = 60.0..125.0; // grey above the brain's
const LESION_HAS_CORE: f64 = 0.3; // share with a dark core (ring enhancement)
const LESION_LOBES: Range<f64> = 1.0..4.0; // overlapping ellipses
const EDEMA_GAIN: Range<f64> = 0.0..32.0; // grey above the brain's
const EDEMA_SIZE: Range<f64> = 1.4..2.1; // of the lesion

impl Phantom {
    /// Draws the slice of `seed`. With and without `lesion` it is the same head.
    pub fn draw(seed: u64, lesion: bool) -> Self {
        let mut dice = Dice::new(seed, 0);
        let width = dice.pick(SIZE).floor();
        let height = (width * dice.pick(ASPECT)).floor();
        let side = width.min(height);
        let mut canvas = Canvas::new(width as usize, height as usize);

        let (cx, cy) = (
            width * (0.5 + dice.pick(OFFSET)),
            height * (0.5 + dice.pick(OFFSET)),
        );
        let (hx, hy, tilt) = (
            width * dice.pick(HEAD_X),
            height * dice.pick(HEAD_Y),
            dice.pick(HEAD_TILT),
        );
        let head = Ellipse {
            x: cx,
            y: cy,
            a: hx,
            b: hy,
            degrees: tilt,
        };
        // The pixel of a point that is given in the tilted head's own axes.
        let at = |across: f64, down: f64| {
            let (sin, cos) = sin_cos(tilt);
            (
                cx + across * cos - down * sin,
                cy + across * sin + down * cos,
            )
        };

        // The head, from outside in.
        let (scalp, skull, skull_outer) =
            (dice.pick(SCALP), dice.pick(SKULL), dice.pick(SKULL_OUTER));
        let (inner, brain_grey) = (dice.pick(SKULL_INNER), dice.pick(BRAIN));
        if !dice.chance(SKULL_STRIPPED) {
            canvas.paint(&head, |level| *level = scalp as f32);
            canvas.paint(&head.scaled(skull_outer), |level| *level = skull as f32);
        }
        let (bx, by) = (hx * inner, hy * inner);
        let brain = canvas.mask(&head.scaled(inner));
        canvas.paint_mask(&brain, |level, _| *level = brain_grey as f32);

        // White matter: one ellipse a hemisphere. Sulci: short dark folds pointing inwards. The midline fissure.
        let white = dice.pick(WHITE);
        for hemisphere in [-1.0, 1.0] {
            let (x, y) = at(hemisphere * 0.40 * bx, 0.0);
            canvas.paint(
                &Ellipse {
                    x,
                    y,
                    a: 0.36 * bx,
                    b: 0.70 * by,
                    degrees: tilt,
                },
                |level| *level += white as f32,
            );
        }
        let depth = dice.pick(SULCUS_DEPTH);
        for _ in 0..dice.pick(SULCI) as usize {
            let (angle, reach) = (dice.pick(0.0..360.0), dice.pick(0.84..0.97));
            let (sin, cos) = sin_cos(angle);
            let (x, y) = at(cos * reach * bx, sin * reach * by);
            let (a, b) = (
                side * dice.pick(0.015..0.045),
                side * dice.pick(0.003..0.008),
            );
            let inwards = libm::atan2(sin * by, cos * bx).to_degrees();
            let degrees = inwards + tilt + dice.pick(-35.0..35.0);
            let fold = canvas
                .mask(&Ellipse {
                    x,
                    y,
                    a,
                    b,
                    degrees,
                })
                .and(&brain);
            canvas.paint_mask(&fold, |level, _| *level -= depth as f32);
        }
        let fissure = Ellipse {
            x: cx,
            y: cy,
            a: (0.004 * side).max(0.7),
            b: 0.95 * by,
            degrees: tilt,
        };
        canvas.paint(&fissure, |level| *level -= depth as f32);

        // Ventricles: a leaning pair beside the midline.
        let (long, short) = (
            side * dice.pick(VENTRICLE_LONG),
            side * dice.pick(VENTRICLE_SHORT),
        );
        let lean = dice.pick(VENTRICLE_TILT);
        let (dark, bright) = (dice.pick(VENTRICLE_DARK), dice.pick(VENTRICLE_BRIGHT));
        let ventricle_grey = if dice.chance(VENTRICLE_IS_DARK) {
            dark
        } else {
            bright
        };
        for hemisphere in [-1.0, 1.0] {
            let (x, y) = at(hemisphere * 1.6 * short, 0.0);
            let degrees = tilt + hemisphere * lean;
            canvas.paint(
                &Ellipse {
                    x,
                    y,
                    a: short,
                    b: long,
                    degrees,
                },
                |level| *level = ventricle_grey as f32,
            );
        }

        let (texture, texture_sigma) = (dice.pick(TEXTURE) as f32, side * dice.pick(TEXTURE_SCALE));
        let field = canvas.smooth_noise(&mut dice, texture_sigma);
        canvas.paint_mask(&brain, |level, i| *level += texture * field[i]);

        // Its own dice, so that the head does not depend on it.
        let lesion = lesion.then(|| {
            let mut dice = Dice::new(seed, 1);
            let field = canvas.smooth_noise(&mut dice, texture_sigma);
            let (extent, ratio) = (side * dice.pick(LESION_SIZE), dice.pick(LESION_ASPECT));
            let (gain, radius) = (dice.pick(LESION_GAIN), dice.pick(LESION_RADIUS));
            // Off the midline: the part from front to back is kept below 0.85 of the radius.
            let (sin, cos) = sin_cos(dice.pick(0.0..360.0));
            let across = cos.abs().max(0.5).copysign(cos);
            let (x, y) = at(across * radius * bx, sin.clamp(-0.85, 0.85) * radius * by);
            let ellipse = |x, y, a: f64, degrees| Ellipse {
                x,
                y,
                a,
                b: a * ratio,
                degrees,
            };

            let (core, lobes) = (
                dice.chance(LESION_HAS_CORE),
                dice.pick(LESION_LOBES) as usize,
            );
            let (edema_gain, edema) =
                (dice.pick(EDEMA_GAIN) as f32, extent * dice.pick(EDEMA_SIZE));
            let halo = canvas
                .mask(&ellipse(x, y, edema, dice.pick(0.0..180.0)))
                .and(&brain);
            let mut glow: Vec<f32> = halo
                .0
                .iter()
                .map(|&inside| if inside { edema_gain } else { 0.0 })
                .collect();
            canvas.blur(&mut glow, (0.02 * side).max(0.5));
            canvas
                .levels
                .iter_mut()
                .zip(&glow)
                .for_each(|(level, glow)| *level += glow);

            let mut body = Mask(vec![false; canvas.levels.len()]);
            let spread = if lobes > 1 { 0.45 * extent } else { 0.0 };
            for _ in 0..lobes {
                let (dx, dy) = (dice.pick(-1.0..1.0) * spread, dice.pick(-1.0..1.0) * spread);
                let lobe = canvas.mask(&ellipse(x + dx, y + dy, extent, dice.pick(0.0..180.0)));
                body.0
                    .iter_mut()
                    .zip(&lobe.0)
                    .for_each(|(body, &lobe)| *body |= lobe);
            }
            let body = body.and(&brain);
            canvas.paint_mask(&body, |level, i| {
                *level = (brain_grey + gain) as f32 + texture * field[i]
            });
            if core {
                let middle = canvas.mask(&ellipse(x, y, 0.5 * extent, 0.0)).and(&brain);
                canvas.paint_mask(&middle, |level, _| *level = (0.55 * brain_grey) as f32);
            }
            body.bounds(canvas.width)
        });

        // The scanner: shading, point spread, noise (on the background too, but less).
        let (across, down) = (dice.pick(SHADING), dice.pick(SHADING));
        for (i, level) in canvas.levels.iter_mut().enumerate() {
            let (x, y) = ((i % canvas.width) as f64, (i / canvas.width) as f64);
            let shade = 1.0 + across * (x / width - 0.5) * 2.0 + down * (y / height - 0.5) * 2.0;
            *level *= shade as f32;
        }
        let mut levels = std::mem::take(&mut canvas.levels);
        canvas.blur(&mut levels, dice.pick(BLUR) * width / 256.0);
        let noise = dice.pick(NOISE) as f32;
        let inside = canvas.mask(&head);
        let image = GrayImage::from_fn(canvas.width as u32, canvas.height as u32, |x, y| {
            let i = y as usize * canvas.width + x as usize;
            let strength = if inside.0[i] { noise } else { 0.3 * noise };
            let level = levels[i] + strength * dice.normal();
            Luma([level.round_ties_even().clamp(0.0, 255.0) as u8])
        });
        Self {
            image,
            lesion: lesion.flatten(),
        }
    }
}

fn sin_cos(degrees: f64) -> (f64, f64) {
    let radians = degrees.to_radians();
    (libm::sin(radians), libm::cos(radians))
}

/// The source of all chance in a picture.
struct Dice(Pcg64Mcg);

impl Dice {
    /// Streams of one seed are independent of each other.
    fn new(seed: u64, stream: u64) -> Self {
        // Seeding mixes its argument well, so neighbouring seeds are no worse than others.
        Self(Pcg64Mcg::seed_from_u64(seed ^ (stream << 56)))
    }

    /// Uniform in [0, 1).
    fn unit(&mut self) -> f64 {
        (self.0.next_u64() >> 11) as f64 / (1_u64 << 53) as f64
    }

    fn pick(&mut self, range: Range<f64>) -> f64 {
        range.start + (range.end - range.start) * self.unit()
    }

    fn chance(&mut self, share: f64) -> bool {
        self.unit() < share
    }

    /// Mean 0, standard deviation 1: four uniform values added up, which is near enough to normal and never beyond 3.5.
    fn normal(&mut self) -> f32 {
        let bits = self.0.next_u64();
        let sum: u64 = (0..4).map(|i| (bits >> (16 * i)) & 0xffff).sum();
        // Each has mean (2^16 - 1) / 2 and variance (2^32 - 1) / 12.
        (sum as f32 - 2.0 * 65_535.0) / 37_837.2
    }
}

/// A filled ellipse: centre and semi-axes in pixels, turned by `degrees`.
struct Ellipse {
    x: f64,
    y: f64,
    a: f64,
    b: f64,
    degrees: f64,
}

impl Ellipse {
    fn scaled(&self, factor: f64) -> Self {
        Self {
            a: self.a * factor,
            b: self.b * factor,
            ..*self
        }
    }
}

struct Mask(Vec<bool>);

impl Mask {
    fn and(mut self, other: &Self) -> Self {
        self.0.iter_mut().zip(&other.0).for_each(|(a, &b)| *a &= b);
        self
    }

    /// The smallest box around it; `None` when it is empty.
    fn bounds(&self, width: usize) -> Option<Roi> {
        let points = || {
            self.0
                .iter()
                .enumerate()
                .filter(|(_, inside)| **inside)
                .map(|(i, _)| (i % width, i / width))
        };
        let (left, right) = (
            points().map(|(x, _)| x).min()?,
            points().map(|(x, _)| x).max()?,
        );
        let (top, bottom) = (
            points().map(|(_, y)| y).min()?,
            points().map(|(_, y)| y).max()?,
        );
        Some(Roi {
            x: left as u32,
            y: top as u32,
            width: (right - left + 1) as u32,
            height: (bottom - top + 1) as u32,
        })
    }
}

/// The picture while it is drawn: levels row by row, not yet limited to 0-255.
struct Canvas {
    width: usize,
    height: usize,
    levels: Vec<f32>,
}

impl Canvas {
    fn new(width: usize, height: usize) -> Self {
        Self {
            width,
            height,
            levels: vec![0.0; width * height],
        }
    }

    /// Calls `each` with the index of every pixel whose centre lies in the ellipse.
    fn inside(&self, ellipse: &Ellipse, mut each: impl FnMut(usize)) {
        let (sin, cos) = sin_cos(ellipse.degrees);
        let reach = ellipse.a.max(ellipse.b) + 1.0;
        let limit = |middle: f64, size: usize| {
            let low = (middle - reach).floor().clamp(0.0, size as f64) as usize;
            let high = (middle + reach).ceil().clamp(0.0, size as f64) as usize;
            low..high
        };
        for y in limit(ellipse.y, self.height) {
            for x in limit(ellipse.x, self.width) {
                let (dx, dy) = (x as f64 - ellipse.x, y as f64 - ellipse.y);
                let (u, v) = (
                    (dx * cos + dy * sin) / ellipse.a,
                    (dy * cos - dx * sin) / ellipse.b,
                );
                if u * u + v * v <= 1.0 {
                    each(y * self.width + x);
                }
            }
        }
    }

    fn mask(&self, ellipse: &Ellipse) -> Mask {
        let mut mask = Mask(vec![false; self.width * self.height]);
        self.inside(ellipse, |i| mask.0[i] = true);
        mask
    }

    fn paint(&mut self, ellipse: &Ellipse, paint: impl Fn(&mut f32)) {
        let mut levels = std::mem::take(&mut self.levels);
        self.inside(ellipse, |i| paint(&mut levels[i]));
        self.levels = levels;
    }

    fn paint_mask(&mut self, mask: &Mask, paint: impl Fn(&mut f32, usize)) {
        for (i, level) in self
            .levels
            .iter_mut()
            .enumerate()
            .filter(|(i, _)| mask.0[*i])
        {
            paint(level, i);
        }
    }

    /// Noise of mean 0 and standard deviation 1, blurred to the scale `sigma` (px).
    fn smooth_noise(&self, dice: &mut Dice, sigma: f64) -> Vec<f32> {
        let mut field: Vec<f32> = (0..self.width * self.height)
            .map(|_| dice.normal())
            .collect();
        self.blur(&mut field, sigma.max(0.5));
        let count = field.len() as f64;
        let mean = field.iter().map(|&v| f64::from(v)).sum::<f64>() / count;
        let variance = field
            .iter()
            .map(|&v| (f64::from(v) - mean) * (f64::from(v) - mean))
            .sum::<f64>()
            / count;
        let deviation = variance.sqrt() + 1e-6;
        for value in &mut field {
            *value = ((f64::from(*value) - mean) / deviation) as f32;
        }
        field
    }

    /// Gaussian blur: exact for small `sigma` (px), three box blurs for large.
    fn blur(&self, plane: &mut [f32], sigma: f64) {
        let kernels = if sigma < 3.0 {
            vec![gaussian(sigma)]
        } else {
            boxes(sigma)
        };
        let mut line = vec![0.0; self.width.max(self.height)];
        for kernel in kernels {
            for y in 0..self.height {
                convolve(
                    &mut plane[y * self.width..],
                    1,
                    self.width,
                    &kernel,
                    &mut line,
                );
            }
            for x in 0..self.width {
                convolve(&mut plane[x..], self.width, self.height, &kernel, &mut line);
            }
        }
    }
}

/// A symmetric kernel of odd length.
enum Kernel {
    Weights(Vec<f32>),
    /// Equal weights, `2 * radius + 1` of them.
    Box {
        radius: usize,
    },
}

fn gaussian(sigma: f64) -> Kernel {
    let radius = (3.0 * sigma).ceil() as i32;
    let weights: Vec<f64> = (-radius..=radius)
        .map(|i| libm::exp(-0.5 * f64::from(i * i) / (sigma * sigma)))
        .collect();
    let sum: f64 = weights.iter().sum();
    Kernel::Weights(weights.iter().map(|weight| (weight / sum) as f32).collect())
}

/// Three boxes whose variances, (width^2 - 1) / 12 each, add up to that of the Gaussian or nearly so.
fn boxes(sigma: f64) -> Vec<Kernel> {
    let radius = (((4.0 * sigma * sigma + 1.0).sqrt() - 1.0) / 2.0).round() as usize;
    (0..3).map(|_| Kernel::Box { radius }).collect()
}

/// Convolves `count` values that lie `stride` apart; the ends are repeated outwards.
fn convolve(values: &mut [f32], stride: usize, count: usize, kernel: &Kernel, line: &mut [f32]) {
    let line = &mut line[..count];
    line.iter_mut()
        .enumerate()
        .for_each(|(i, value)| *value = values[i * stride]);
    let last = count as isize - 1;
    let at = |i: isize| line[i.clamp(0, last) as usize];
    match kernel {
        Kernel::Weights(weights) => {
            let radius = (weights.len() / 2) as isize;
            for i in 0..count as isize {
                let first = i - radius;
                values[i as usize * stride] = weights
                    .iter()
                    .enumerate()
                    .map(|(k, weight)| weight * at(first + k as isize))
                    .sum();
            }
        }
        Kernel::Box { radius } => {
            let radius = *radius as isize;
            let share = 1.0 / (2 * radius + 1) as f64;
            let mut sum: f64 = (-radius..=radius).map(|i| f64::from(at(i))).sum();
            for i in 0..count as isize {
                values[i as usize * stride] = (sum * share) as f32;
                sum += f64::from(at(i + radius + 1)) - f64::from(at(i - radius));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_seed_is_a_picture() {
        let (a, b) = (Phantom::draw(7, true), Phantom::draw(7, true));
        assert_eq!(a.image, b.image);
        assert_eq!(a.lesion, b.lesion);
        assert_ne!(a.image, Phantom::draw(8, true).image);
    }

    /// The same bytes on every architecture and in every release: golden pictures and tests rest on it.
    #[test]
    fn the_pictures_of_a_seed_never_change() {
        let sum = |seed, lesion| {
            let Phantom { image, .. } = Phantom::draw(seed, lesion);
            // FNV-1a.
            let hash = image
                .as_raw()
                .iter()
                .fold(0xcbf2_9ce4_8422_2325_u64, |hash, &level| {
                    (hash ^ u64::from(level)).wrapping_mul(0x0100_0000_01b3)
                });
            (image.width(), image.height(), hash)
        };
        let expected = [
            (464, 446, 2_129_947_923_935_170_611),
            (464, 446, 3_528_799_311_243_869_387),
            (406, 398, 14_974_063_924_065_705_251),
        ];
        assert_eq!([sum(1, false), sum(1, true), sum(2, true)], expected);
    }

    #[test]
    fn sizes_are_those_of_scanners_and_the_head_is_inside() {
        for seed in 0..40 {
            let Phantom { image, lesion } = Phantom::draw(seed, false);
            assert!((180..512).contains(&image.width()), "{seed}");
            assert!((165..=625).contains(&image.height()), "{seed}");
            assert_eq!(lesion, None);
            let bright = image.pixels().filter(|level| level[0] > 45).count();
            let share = bright as f64 / image.len() as f64;
            assert!((0.2..0.8).contains(&share), "{seed}: {share}");
        }
    }

    #[test]
    fn a_lesion_is_brighter_than_the_same_place_without_it_and_changes_nothing_else() {
        for seed in 0..40 {
            let (with, without) = (Phantom::draw(seed, true), Phantom::draw(seed, false));
            let Roi {
                x,
                y,
                width,
                height,
            } = with.lesion.unwrap();
            assert_eq!(with.image.dimensions(), without.image.dimensions());
            let sum = |image: &GrayImage| -> u64 {
                (y..y + height)
                    .flat_map(|y| (x..x + width).map(move |x| (x, y)))
                    .map(|(x, y)| u64::from(image.get_pixel(x, y)[0]))
                    .sum()
            };
            let gain =
                (sum(&with.image) as f64 - sum(&without.image) as f64) / f64::from(width * height);
            assert!(gain > 12.0, "{seed}: brighter by {gain:.1} only");
            assert_eq!(with.image.get_pixel(0, 0), without.image.get_pixel(0, 0));
        }
    }
}
