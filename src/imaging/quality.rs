//! Quality measures of one picture, the flags that they raise, and the rule that calls a picture a misfit.
//!
//! The model answers with a number for anything: a photo, a chest film, a slice above the head. So each result carries flags,
//! and a gross misfit is reported as `indeterminate` with the reason, whatever the model says.
//!
//! **The rule.** Six measures, each 0 to 1, are compared with two sets of limits. Beyond [`QualityRule::flag`] a measure raises
//! its flag: the result stands. Beyond [`QualityRule::indeterminate`] the picture is a misfit. Both sets are configurable; a lower
//! limit of 0 or an upper one of 1 never fires.
//!
//! The measure that tells most is how much of the picture's four corners is bright: a head on a slice leaves them dark, while
//! photos and films fill their frame. A contour that spans everything is not by itself a misfit: many real slices come
//! with a white frame, and their crop is the whole picture, which is harmless.
//!
//! Of the 3251 real slices in `../shared/data/mri` the default rule makes 20 indeterminate (0.6 %): navoneel 6 of 190,
//! br35h 4 of 442, cheng 0 of 1283, btp 0 of 236, lgg 10 of 740 (dark slices of which the crop leaves a scrap), openneuro 0 of
//! 360. Of 24 photos, textures and documents in scikit-image, scikit-learn and matplotlib it catches all as they are and 19
//! when turned grey; a grey one on a black ground (a retina, say) looks like a head to it. It catches the chest film in
//! `../shared/data/dicom` with either polarity.

use serde::{Deserialize, Serialize};

use super::Picture;
use super::roi::{BrainContour, Point, RoiFinder};

/// What was measured on one picture; every value lies between 0 and 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Quality {
    /// Area of the brain's contour in the picture's area.
    pub brain_share: f32,
    /// Area of the contour in that of its convex hull; a head has 0.9 or more.
    pub solidity: f32,
    /// How much of the four corner blocks, each an eighth of the width and height, is in the mask.
    pub corner_share: f32,
    /// Distance between the 5th and 95th percentile of the crop's levels, in 255ths.
    pub contrast: f32,
    /// Share of the crop's pixels at level 255.
    pub clipped: f32,
    /// Share of the picture's pixels whose channels lie more than 24 levels apart; 0 for grey pictures.
    pub color_share: f32,
}

/// What is unusual about a picture. Part of the published contract.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum QualityFlag {
    /// The contour is a small part of the picture.
    SmallContour,
    /// The contour is nearly the whole picture.
    LargeContour,
    /// The contour is far from convex.
    RaggedContour,
    /// The picture's corners are bright.
    BrightCorners,
    /// The crop has few levels.
    LowContrast,
    /// Much of the crop is at the white end.
    Clipped,
    /// The picture has colours.
    Color,
}

impl QualityFlag {
    /// The flag as it is published.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::SmallContour => "small_contour",
            Self::LargeContour => "large_contour",
            Self::RaggedContour => "ragged_contour",
            Self::BrightCorners => "bright_corners",
            Self::LowContrast => "low_contrast",
            Self::Clipped => "clipped",
            Self::Color => "color",
        }
    }
}

/// Limits of the measures in [`Quality`], 0 to 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct QualityLimits {
    /// Least `brain_share`.
    pub min_brain_share: f32,
    /// Greatest `brain_share`.
    pub max_brain_share: f32,
    /// Least `solidity`.
    pub min_solidity: f32,
    /// Greatest `corner_share`.
    pub max_corner_share: f32,
    /// Least `contrast`.
    pub min_contrast: f32,
    /// Greatest `clipped`.
    pub max_clipped: f32,
    /// Greatest `color_share`.
    pub max_color_share: f32,
}

/// When a measure raises its flag and when it makes the picture a misfit.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct QualityRule {
    /// Beyond these the flag is raised.
    #[serde(deserialize_with = "flag_limits")]
    pub flag: QualityLimits,
    /// Beyond these the result is indeterminate.
    #[serde(deserialize_with = "indeterminate_limits")]
    pub indeterminate: QualityLimits,
}

/// Why a result is indeterminate whatever the model says.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Misfit {
    /// The measure that is out of its limits.
    pub flag: QualityFlag,
    /// One line for a person, with value and limit.
    pub message: String,
}

/// The outcome of the rule for one picture.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Assessment {
    /// The measures.
    pub quality: Quality,
    /// Flags raised, in a fixed order.
    pub flags: Vec<QualityFlag>,
    /// Set for a gross misfit.
    pub misfit: Option<Misfit>,
}

const FLAG: QualityLimits = QualityLimits {
    min_brain_share: 0.12,
    max_brain_share: 0.9,
    min_solidity: 0.6,
    max_corner_share: 0.2,
    min_contrast: 0.2,
    max_clipped: 0.1,
    max_color_share: 0.01,
};

const INDETERMINATE: QualityLimits = QualityLimits {
    min_brain_share: 0.005,
    max_brain_share: 1.0,
    min_solidity: 0.0,
    max_corner_share: 0.35,
    min_contrast: 0.05,
    max_clipped: 0.5,
    max_color_share: 0.1,
};

impl Default for QualityRule {
    fn default() -> Self {
        Self {
            flag: FLAG,
            indeterminate: INDETERMINATE,
        }
    }
}

impl QualityRule {
    /// Flags and verdict for what was measured.
    pub fn assess(&self, quality: Quality) -> Assessment {
        let flags = Self::beyond(&quality, &self.flag)
            .into_iter()
            .map(|(flag, ..)| flag)
            .collect();
        let misfit = Self::beyond(&quality, &self.indeterminate)
            .into_iter()
            .next()
            .map(|(flag, value, limit)| Misfit {
                flag,
                message: format!("{}: {value:.3}, limit {limit}", describe(flag)),
            });
        Assessment {
            quality,
            flags,
            misfit,
        }
    }

    /// The measures out of `limits`, the most telling first, with value and limit.
    fn beyond(quality: &Quality, limits: &QualityLimits) -> Vec<(QualityFlag, f32, f32)> {
        use QualityFlag::{
            BrightCorners, Clipped, Color, LargeContour, LowContrast, RaggedContour, SmallContour,
        };
        let above = |flag, value: f32, limit: f32| (value > limit).then_some((flag, value, limit));
        let below = |flag, value: f32, limit: f32| (value < limit).then_some((flag, value, limit));
        [
            above(Color, quality.color_share, limits.max_color_share),
            above(BrightCorners, quality.corner_share, limits.max_corner_share),
            below(SmallContour, quality.brain_share, limits.min_brain_share),
            above(LargeContour, quality.brain_share, limits.max_brain_share),
            below(RaggedContour, quality.solidity, limits.min_solidity),
            below(LowContrast, quality.contrast, limits.min_contrast),
            above(Clipped, quality.clipped, limits.max_clipped),
        ]
        .into_iter()
        .flatten()
        .collect()
    }
}

/// What a flag says about the picture.
fn describe(flag: QualityFlag) -> &'static str {
    match flag {
        QualityFlag::SmallContour => "the bright region is only a scrap of the picture",
        QualityFlag::LargeContour => "the bright region spans the whole picture",
        QualityFlag::RaggedContour => "the outline is too ragged for a head",
        QualityFlag::BrightCorners => "the corners of the picture are bright, unlike around a head",
        QualityFlag::LowContrast => "the crop has almost no contrast",
        QualityFlag::Clipped => "most of the crop is pure white",
        QualityFlag::Color => "the picture is in colour",
    }
}

/// How far apart the channels of a coloured pixel are at least; chroma noise of JPEG stays below.
const COLORED: u8 = 24;

/// Rows looked at for levels and colours: enough for shares to two digits, few enough to cost next to nothing.
const ROWS: u32 = 128;

/// Measures `picture`; `contour` is what `finder` has just found in it.
pub fn measure(picture: &Picture, finder: &RoiFinder, contour: &BrainContour) -> Quality {
    let (width, height) = (picture.width(), picture.height());
    let hull = hull_area(finder.contour());
    let roi = contour.roi;
    let gray = finder.gray(picture);
    // Four, taken in turn: neighbours are often alike, and an addition to one counter waits for the one before.
    let mut counters = [[0u32; 256]; 4];
    for y in (roi.y..roi.y + roi.height).step_by((roi.height / ROWS).max(1) as usize) {
        let start = y as usize * width as usize + roi.x as usize;
        let (fours, rest) = gray[start..start + roi.width as usize].as_chunks::<4>();
        for four in fours {
            for (counter, &level) in counters.iter_mut().zip(four) {
                counter[usize::from(level)] += 1;
            }
        }
        for &level in rest {
            counters[0][usize::from(level)] += 1;
        }
    }
    let histogram: [u32; 256] =
        std::array::from_fn(|level| counters.iter().map(|counter| counter[level]).sum());
    let counted: u32 = histogram.iter().sum();
    Quality {
        brain_share: (contour.area / (f64::from(width) * f64::from(height))) as f32,
        solidity: if hull > 0.0 {
            (contour.area / hull) as f32
        } else {
            1.0
        },
        corner_share: finder.corner_share(),
        contrast: (percentile(&histogram, counted, 95) - percentile(&histogram, counted, 5)) as f32
            / 255.0,
        clipped: histogram[255] as f32 / counted.max(1) as f32,
        color_share: color_share(picture),
    }
}

/// The level below or at which `percent` of the counted pixels lie.
fn percentile(histogram: &[u32; 256], counted: u32, percent: u64) -> usize {
    let wanted = u64::from(counted) * percent;
    let mut below = 0;
    for (level, &count) in histogram.iter().enumerate() {
        below += u64::from(count) * 100;
        if below >= wanted {
            return level;
        }
    }
    255
}

fn color_share(picture: &Picture) -> f32 {
    let Picture::Rgb(image) = picture else {
        return 0.0;
    };
    let (mut colored, mut counted) = (0u32, 0u32);
    let row_bytes = image.width() as usize * 3;
    let step = (image.height() / ROWS).max(1) as usize;
    for row in image.as_raw().chunks_exact(row_bytes.max(1)).step_by(step) {
        for &[r, g, b] in row.as_chunks::<3>().0 {
            colored += u32::from(r.max(g).max(b) - r.min(g).min(b) > COLORED);
        }
        counted += image.width();
    }
    colored as f32 / counted.max(1) as f32
}

/// Area of the convex hull of the points (Andrew's monotone chain).
fn hull_area(points: &[Point]) -> f64 {
    let mut sorted: Vec<(i64, i64)> = points
        .iter()
        .map(|&(x, y)| (i64::from(x), i64::from(y)))
        .collect();
    sorted.sort_unstable();
    sorted.dedup();
    let cross = |o: (i64, i64), a: (i64, i64), b: (i64, i64)| {
        (a.0 - o.0) * (b.1 - o.1) - (a.1 - o.1) * (b.0 - o.0)
    };
    let half = |points: &mut dyn Iterator<Item = (i64, i64)>| {
        let mut chain: Vec<(i64, i64)> = Vec::new();
        for point in points {
            while chain.len() >= 2
                && cross(chain[chain.len() - 2], chain[chain.len() - 1], point) <= 0
            {
                chain.pop();
            }
            chain.push(point);
        }
        chain.pop();
        chain
    };
    let mut hull = half(&mut sorted.iter().copied());
    hull.extend(half(&mut sorted.iter().rev().copied()));
    let next = hull.iter().cycle().skip(1);
    let doubled: i64 = hull
        .iter()
        .zip(next)
        .map(|(a, b)| a.0 * b.1 - a.1 * b.0)
        .sum();
    doubled.abs() as f64 / 2.0
}

/// A partly given set of limits: what is not given keeps its default.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct PartialLimits {
    min_brain_share: Option<f32>,
    max_brain_share: Option<f32>,
    min_solidity: Option<f32>,
    max_corner_share: Option<f32>,
    min_contrast: Option<f32>,
    max_clipped: Option<f32>,
    max_color_share: Option<f32>,
}

impl PartialLimits {
    fn over(self, base: QualityLimits) -> QualityLimits {
        QualityLimits {
            min_brain_share: self.min_brain_share.unwrap_or(base.min_brain_share),
            max_brain_share: self.max_brain_share.unwrap_or(base.max_brain_share),
            min_solidity: self.min_solidity.unwrap_or(base.min_solidity),
            max_corner_share: self.max_corner_share.unwrap_or(base.max_corner_share),
            min_contrast: self.min_contrast.unwrap_or(base.min_contrast),
            max_clipped: self.max_clipped.unwrap_or(base.max_clipped),
            max_color_share: self.max_color_share.unwrap_or(base.max_color_share),
        }
    }
}

fn flag_limits<'de, D: serde::Deserializer<'de>>(from: D) -> Result<QualityLimits, D::Error> {
    PartialLimits::deserialize(from).map(|limits| limits.over(FLAG))
}

fn indeterminate_limits<'de, D: serde::Deserializer<'de>>(
    from: D,
) -> Result<QualityLimits, D::Error> {
    PartialLimits::deserialize(from).map(|limits| limits.over(INDETERMINATE))
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, Luma, Rgb, RgbImage};

    use super::*;
    use crate::imaging::roi::CropSpec;

    fn assess(picture: &Picture) -> Assessment {
        let mut finder = RoiFinder::new(CropSpec::default());
        let contour = finder.find(picture).unwrap();
        QualityRule::default().assess(measure(picture, &finder, &contour))
    }

    fn disc(side: u32, radius: f64, inside: impl Fn(u32, u32) -> u8) -> GrayImage {
        GrayImage::from_fn(side, side, |x, y| {
            let at = |v: u32| f64::from(v) - f64::from(side) / 2.0;
            Luma([if at(x).hypot(at(y)) < radius {
                inside(x, y)
            } else {
                4
            }])
        })
    }

    #[test]
    fn a_head_on_a_dark_ground_is_fine() {
        let found = assess(&Picture::Gray(disc(200, 70.0, |x, y| {
            60 + ((x * 7 + y * 3) % 120) as u8
        })));
        assert_eq!((found.flags, found.misfit), (vec![], None));
        assert!(
            (found.quality.brain_share - 0.385).abs() < 0.01,
            "{:?}",
            found.quality
        );
        assert!(found.quality.solidity > 0.97);
    }

    #[test]
    fn misfits_are_named() {
        let texture = |x: u32, y: u32| 80 + ((x * 5 + y * 11) % 150) as u8;
        let photo = GrayImage::from_fn(160, 120, |x, y| Luma([texture(x, y)]));
        let check = |picture: Picture, wanted: QualityFlag| {
            let misfit = assess(&picture).misfit.unwrap();
            assert_eq!(misfit.flag, wanted);
        };
        check(Picture::Gray(photo), QualityFlag::BrightCorners);
        check(
            Picture::Gray(disc(300, 8.0, texture)),
            QualityFlag::SmallContour,
        );
        check(
            Picture::Gray(disc(200, 170.0, |_, _| 90)),
            QualityFlag::BrightCorners,
        );
        check(
            Picture::Gray(disc(200, 99.0, |_, _| 255)),
            QualityFlag::Clipped,
        );
        let colored = RgbImage::from_fn(120, 120, |x, y| {
            let at = |v: u32| f64::from(v) - 60.0;
            if at(x).hypot(at(y)) < 40.0 {
                Rgb([200, 90, 120])
            } else {
                Rgb([0, 0, 0])
            }
        });
        check(Picture::Rgb(colored), QualityFlag::Color);
    }

    #[test]
    fn limits_can_be_given_in_part() {
        let rule: QualityRule =
            toml::from_str("[indeterminate]\nmax_corner_share = 1.0\n").unwrap();
        assert_eq!(rule.flag, FLAG);
        assert_eq!(
            rule.indeterminate,
            QualityLimits {
                max_corner_share: 1.0,
                ..INDETERMINATE
            }
        );
        assert!(toml::from_str::<QualityRule>("[flag]\nmax_corners = 1.0\n").is_err());
    }

    #[test]
    fn the_hull_of_a_cross_is_an_octagon() {
        let cross = [
            (1, 0),
            (2, 0),
            (2, 1),
            (3, 1),
            (3, 2),
            (2, 2),
            (2, 3),
            (1, 3),
            (1, 2),
            (0, 2),
            (0, 1),
            (1, 1),
        ];
        assert!((hull_area(&cross) - 7.0).abs() < 1e-9);
        assert!(hull_area(&[(4, 4)]).abs() < 1e-9);
        assert!(hull_area(&[]).abs() < 1e-9);
    }
}
