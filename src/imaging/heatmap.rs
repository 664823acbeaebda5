//! A picture of where a score came from, for `classify --heatmap`: the class activation map over the crop.
//!
//! The colours have a fixed scale around 0, the same for every picture. Scaled to each picture's own values, something would glow in
//! every negative. What it shows is where the score came from; it is no outline of anything.

use image::{Rgb, RgbImage};
use serde::Serialize;

use super::Picture;
use super::resize::{ResizeFilter, ResizeSpec, Resizer};
use crate::prediction::{Heatmap, Roi};

/// Log-odds, for or against, at which a colour is full. The cells of the shipped model reach about 12.
pub const SCALE: f32 = 16.0;

/// The longest side of the picture drawn, in pixels; a larger crop is scaled down to it.
const MAX_SIDE: u32 = 1024;

/// How much of a pixel a full colour covers.
const COVER: f32 = 0.6;

/// What speaks for a positive label: vermilion of the palette of Okabe and Ito (2008), which colour-blind people can tell apart.
const FOR: Rgb<u8> = Rgb([213, 94, 0]);

/// What speaks against it: blue of the same palette.
const AGAINST: Rgb<u8> = Rgb([0, 114, 178]);

/// The strongest cell of a map.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Peak {
    /// Its centre in the source picture, pixels from the left, inside the crop.
    pub x: u32,
    /// Its centre in the source picture, pixels from the top, inside the crop.
    pub y: u32,
    /// Its value, log-odds, to the thousandth.
    pub value: f64,
}

/// Where a crop lies under a map of the model's whole input.
struct Geometry {
    crop: Roi,
    /// The crop's place in the input.
    place: Roi,
    /// Cells of the map in one pixel of the input, across and down.
    cells: (f32, f32),
}

impl Geometry {
    fn new(crop: Roi, map: &Heatmap, input: ResizeSpec) -> Self {
        Self {
            crop,
            place: input.place(crop.width, crop.height),
            cells: (
                map.width as f32 / input.width as f32,
                map.height as f32 / input.height as f32,
            ),
        }
    }

    /// In the map, in cells, of a point of the crop given in shares of its sides.
    fn on_map(&self, (x, y): (f32, f32)) -> (f32, f32) {
        let place = self.place;
        (
            (place.x as f32 + x * place.width as f32) * self.cells.0,
            (place.y as f32 + y * place.height as f32) * self.cells.1,
        )
    }

    /// In the crop, in shares of its sides, of a point of the map given in cells; outside 0 to 1 for one beside the crop.
    fn on_crop(&self, (x, y): (f32, f32)) -> (f32, f32) {
        let place = self.place;
        (
            (x / self.cells.0 - place.x as f32) / place.width as f32,
            (y / self.cells.1 - place.y as f32) / place.height as f32,
        )
    }

    /// The pixel of the source picture at shares of the crop's sides; one beside the crop is moved to its edge.
    fn pixel(&self, (x, y): (f32, f32)) -> (u32, u32) {
        let along = |start: u32, length: u32, share: f32| {
            // `as` saturates at 0.
            start + ((share * length as f32) as u32).min(length - 1)
        };
        (
            along(self.crop.x, self.crop.width, x),
            along(self.crop.y, self.crop.height, y),
        )
    }
}

/// The part `roi` of `picture` with `map` over it: vermilion where the map speaks for a positive label, blue where it speaks against it,
/// the more the stronger, full at [`SCALE`]. The map lies over the model's whole input, which was made from that part as `input` says.
/// At the crop's own resolution, at most 1024 pixels a side; between the centres of its cells the map is interpolated.
pub fn overlay(picture: &Picture, roi: Roi, map: &Heatmap, input: ResizeSpec) -> RgbImage {
    let geometry = Geometry::new(roi, map, input);
    let longest = roi.width.max(roi.height);
    let drawn = |side: u32| match longest {
        0..=MAX_SIDE => side,
        _ => (u64::from(side) * u64::from(MAX_SIDE) / u64::from(longest)).max(1) as u32,
    };
    let mut resizer = Resizer::new(ResizeSpec {
        width: drawn(roi.width),
        height: drawn(roi.height),
        filter: ResizeFilter::Area,
        keep_aspect: false,
    });
    let mut image = match resizer.resize(picture, roi) {
        Picture::Rgb(image) => image.clone(),
        Picture::Gray(image) => RgbImage::from_fn(image.width(), image.height(), |x, y| {
            Rgb([image.get_pixel(x, y).0[0]; 3])
        }),
    };
    let (width, height) = (image.width() as f32, image.height() as f32);
    for (x, y, pixel) in image.enumerate_pixels_mut() {
        let share = ((x as f32 + 0.5) / width, (y as f32 + 0.5) / height);
        let value = interpolated(map, geometry.on_map(share));
        let color = if value > 0.0 { FOR } else { AGAINST };
        let cover = COVER * (value.abs() / SCALE).min(1.0);
        for (level, color) in pixel.0.iter_mut().zip(color.0) {
            let mixed = f32::from(*level) * (1.0 - cover) + f32::from(color) * cover;
            *level = mixed.round() as u8;
        }
    }
    image
}

/// The cell of the highest value among those whose centre lies over the crop, or, where the crop is too narrow for that, among all.
/// `None` for a map without a finite value.
pub fn peak(roi: Roi, map: &Heatmap, input: ResizeSpec) -> Option<Peak> {
    let geometry = Geometry::new(roi, map, input);
    let cells = || {
        let cells = map.cells.iter().enumerate();
        cells
            .filter(|(_, value)| value.is_finite())
            .map(|(i, value)| {
                let center = ((i % map.width) as f32 + 0.5, (i / map.width) as f32 + 0.5);
                (geometry.on_crop(center), *value)
            })
    };
    let inside = |share: f32| (0.0..=1.0).contains(&share);
    let over = cells().filter(|((x, y), _)| inside(*x) && inside(*y));
    let highest = |a: &((f32, f32), f32), b: &((f32, f32), f32)| a.1.total_cmp(&b.1);
    let (share, value) = over.max_by(highest).or_else(|| cells().max_by(highest))?;
    let (x, y) = geometry.pixel(share);
    let value = (f64::from(value) * 1000.0).round() / 1000.0;
    Some(Peak { x, y, value })
}

/// The map at a point given in cells, bilinear between the cells' centres; what is no number counts as 0.
fn interpolated(map: &Heatmap, (x, y): (f32, f32)) -> f32 {
    let cell = |column: f32, row: f32| {
        let at = |place: f32, count: usize| (place.max(0.0) as usize).min(count - 1);
        let value = map.cells[at(row, map.height) * map.width + at(column, map.width)];
        if value.is_finite() { value } else { 0.0 }
    };
    let (x, y) = (x - 0.5, y - 0.5);
    let (left, top) = (x.floor(), y.floor());
    let (right, down) = (x - left, y - top);
    let row = |row: f32| cell(left, row) * (1.0 - right) + cell(left + 1.0, row) * right;
    row(top) * (1.0 - down) + row(top + 1.0) * down
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, Luma};

    use super::*;

    fn input(width: u32, height: u32, keep_aspect: bool) -> ResizeSpec {
        ResizeSpec {
            width,
            height,
            filter: ResizeFilter::Linear,
            keep_aspect,
        }
    }

    fn map(width: usize, cells: &[f32]) -> Heatmap {
        Heatmap {
            width,
            height: cells.len() / width,
            cells: cells.to_vec(),
        }
    }

    const CROP: Roi = Roi {
        x: 10,
        y: 20,
        width: 80,
        height: 40,
    };

    fn grey() -> Picture {
        Picture::Gray(GrayImage::from_pixel(120, 90, Luma([100])))
    }

    #[test]
    fn a_value_has_the_same_colour_in_every_picture() {
        let pixel = |cells: &[f32]| {
            let image = overlay(&grey(), CROP, &map(2, cells), input(8, 8, false));
            assert_eq!(image.dimensions(), (80, 40));
            image.get_pixel(0, 0).0
        };
        assert_eq!(pixel(&[0.0; 4]), [100; 3], "nothing over nothing");
        let full = |color: Rgb<u8>| color.0.map(|c| (40.0 + 0.6 * f32::from(c)).round() as u8);
        assert_eq!(pixel(&[SCALE; 4]), full(FOR));
        assert_eq!(pixel(&[-SCALE; 4]), full(AGAINST));
        assert_eq!(pixel(&[1e9, 0.0, 0.0, 0.0]), full(FOR), "no more than full");
        // A weak map stays weak, whatever its own highest value is.
        let weak = pixel(&[0.2, 0.1, 0.0, 0.0]);
        assert!(
            weak.iter().all(|level| level.abs_diff(100) <= 2),
            "{weak:?}"
        );
        assert_eq!(pixel(&[f32::NAN; 4]), [100; 3]);
    }

    #[test]
    fn between_centres_the_map_is_interpolated() {
        let two = map(2, &[0.0, 4.0]);
        for (x, expected) in [
            (0.0, 0.0),
            (0.5, 0.0),
            (1.0, 2.0),
            (1.25, 3.0),
            (1.5, 4.0),
            (2.0, 4.0),
        ] {
            let found = interpolated(&two, (x, 0.5));
            assert!((found - expected).abs() < 1e-6, "{x}: {found}");
        }
    }

    #[test]
    fn the_peak_is_where_its_cell_lies_in_the_source() {
        let cells = [0.0, 1.0, 2.0, 9.0, 4.0, 5.0, 6.0, 7.0];
        let found = peak(CROP, &map(4, &cells), input(16, 16, false)).unwrap();
        // The fourth of four columns, the upper of two rows.
        assert_eq!((found.x, found.y), (10 + 70, 20 + 10));
        assert!((found.value - 9.0).abs() < f64::EPSILON);
        let negative = peak(CROP, &map(2, &[-3.0, -1.0]), input(8, 8, false)).unwrap();
        assert_eq!((negative.x, negative.y), (10 + 60, 20 + 20));
        assert_eq!(
            peak(CROP, &map(2, &[f32::NAN; 4]), input(8, 8, false)),
            None
        );
    }

    #[test]
    fn the_black_beside_a_crop_of_another_aspect_is_left_out() {
        // 80x40 in 16x16: rows 4 to 11 of the input, cells 1 and 2 of four down.
        let mut cells = [0.0; 16];
        cells[0] = 9.0;
        cells[6] = 5.0;
        let square = input(16, 16, true);
        let found = peak(CROP, &map(4, &cells), square).unwrap();
        assert_eq!((found.x, found.y), (10 + 50, 20 + 10));
        let image = overlay(&grey(), CROP, &map(4, &cells), square);
        assert_ne!(image.get_pixel(50, 10).0, [100; 3]);
        assert_eq!(image.get_pixel(75, 35).0, [100; 3]);
        // So flat that no cell's centre lies over it.
        let flat = Roi { height: 1, ..CROP };
        assert!(peak(flat, &map(2, &[1.0; 4]), square).is_some());
    }

    #[test]
    fn a_large_crop_is_scaled_down() {
        let picture = Picture::Gray(GrayImage::new(3000, 30));
        let whole = Roi {
            x: 0,
            y: 0,
            width: 3000,
            height: 30,
        };
        let image = overlay(&picture, whole, &map(1, &[0.0]), input(8, 8, false));
        assert_eq!(image.dimensions(), (1024, 10));
    }
}
