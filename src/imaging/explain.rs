//! A picture of the steps from the file to the model, for `preprocess --explain`.

use image::{Rgb, RgbImage, imageops};
use imageproc::drawing::{draw_hollow_rect_mut, draw_line_segment_mut};
use imageproc::rect::Rect;

use super::Picture;
use super::resize::{ResizeFilter, ResizeSpec, Resizer};
use super::roi::{BrainContour, RoiFinder};
use crate::prediction::Roi;

/// Side of a panel in pixels.
const PANEL: u32 = 320;
/// Space around panels in pixels.
const GAP: u32 = 10;
/// Height of the line of text above a panel in pixels.
const TITLE: u32 = 24;

const BACKGROUND: Rgb<u8> = Rgb([32, 34, 40]);
const TEXT: Rgb<u8> = Rgb([225, 225, 225]);
const OUTLINE: Rgb<u8> = Rgb([255, 196, 0]);
const RECTANGLE: Rgb<u8> = Rgb([0, 220, 255]);

/// Five panels side by side: the grey picture that the crop works on, its mask, the contour on it, the rectangle on the
/// picture itself, and `input`, what the model sees. `finder` has just looked at `picture`; without a contour (the picture was
/// rejected) the last three panels stay empty.
pub fn explain(
    picture: &Picture,
    finder: &RoiFinder,
    contour: Option<&BrainContour>,
    input: Option<&Picture>,
) -> RgbImage {
    let (width, height) = (picture.width(), picture.height());
    let gray = image::GrayImage::from_raw(width, height, finder.gray(picture).to_vec())
        .map_or_else(|| picture.clone(), Picture::Gray);
    let outlined = contour.map(|_| {
        let mut panel = fitted(&gray);
        draw_contour(&mut panel, finder, (width, height));
        panel
    });
    let framed = contour.map(|contour| {
        let mut panel = fitted(picture);
        draw_roi(&mut panel, contour.roi, (width, height));
        panel
    });
    let panels = [
        ("GREY", Some(fitted(&gray))),
        ("MASK", Some(fitted(&Picture::Gray(finder.mask())))),
        ("CONTOUR", outlined),
        ("RECTANGLE", framed),
        ("MODEL INPUT", input.map(fitted)),
    ];
    let mut sheet = RgbImage::from_pixel(
        panels.len() as u32 * (PANEL + GAP) + GAP,
        PANEL + TITLE + 2 * GAP,
        BACKGROUND,
    );
    for (i, (title, panel)) in panels.iter().enumerate() {
        let x = GAP + i as u32 * (PANEL + GAP);
        write(&mut sheet, title, x, GAP);
        if let Some(panel) = panel {
            imageops::replace(&mut sheet, panel, i64::from(x), i64::from(GAP + TITLE));
        }
    }
    sheet
}

/// The picture scaled into a panel with its aspect kept.
fn fitted(picture: &Picture) -> RgbImage {
    let larger = picture.width().max(picture.height()) > PANEL;
    let filter = if larger {
        ResizeFilter::Area
    } else {
        ResizeFilter::Nearest
    };
    let mut resizer = Resizer::new(ResizeSpec {
        width: PANEL,
        height: PANEL,
        filter,
        keep_aspect: true,
    });
    let whole = Roi {
        x: 0,
        y: 0,
        width: picture.width(),
        height: picture.height(),
    };
    match resizer.resize(picture, whole) {
        Picture::Rgb(image) => image.clone(),
        Picture::Gray(image) => {
            RgbImage::from_fn(PANEL, PANEL, |x, y| Rgb([image.get_pixel(x, y).0[0]; 3]))
        }
    }
}

/// Where a point of the picture lies in its panel.
fn place((x, y): (f32, f32), (width, height): (u32, u32)) -> (f32, f32) {
    let panel = PANEL as f32;
    let scale = panel / width.max(height) as f32;
    let margin = |side: u32| ((panel - side as f32 * scale) / 2.0).floor();
    (margin(width) + x * scale, margin(height) + y * scale)
}

fn draw_contour(panel: &mut RgbImage, finder: &RoiFinder, size: (u32, u32)) {
    let center = |&(x, y): &(u32, u32)| place((x as f32 + 0.5, y as f32 + 0.5), size);
    let points = finder.contour();
    for (from, to) in points.iter().zip(points.iter().cycle().skip(1)) {
        draw_line_segment_mut(panel, center(from), center(to), OUTLINE);
    }
}

fn draw_roi(panel: &mut RgbImage, roi: Roi, size: (u32, u32)) {
    let from = place((roi.x as f32, roi.y as f32), size);
    let to = place(
        ((roi.x + roi.width) as f32, (roi.y + roi.height) as f32),
        size,
    );
    let (x, y) = (from.0 as i32, from.1 as i32);
    let (width, height) = ((to.0 as i32 - x).max(1), (to.1 as i32 - y).max(1));
    for inset in 0..2 {
        let (width, height) = (width - 2 * inset, height - 2 * inset);
        if width > 0 && height > 0 {
            let rect = Rect::at(x + inset, y + inset).of_size(width as u32, height as u32);
            draw_hollow_rect_mut(panel, rect, RECTANGLE);
        }
    }
}

/// Writes a title in capitals, two pixels a dot: no font file is worth carrying for five words.
fn write(sheet: &mut RgbImage, text: &str, x: u32, y: u32) {
    for (i, letter) in text.chars().enumerate() {
        for (row, bits) in glyph(letter).iter().enumerate() {
            for column in (0..5).filter(|column| bits >> (4 - column) & 1 == 1) {
                let (x, y) = (x + 12 * i as u32 + 2 * column, y + 2 * row as u32);
                for (dx, dy) in [(0, 0), (1, 0), (0, 1), (1, 1)] {
                    if x + dx < sheet.width() && y + dy < sheet.height() {
                        sheet.put_pixel(x + dx, y + dy, TEXT);
                    }
                }
            }
        }
    }
}

/// Seven rows of five dots, the leftmost in bit 4.
fn glyph(letter: char) -> [u8; 7] {
    match letter {
        'A' => [0x0e, 0x11, 0x11, 0x1f, 0x11, 0x11, 0x11],
        'C' => [0x0e, 0x11, 0x10, 0x10, 0x10, 0x11, 0x0e],
        'D' => [0x1e, 0x11, 0x11, 0x11, 0x11, 0x11, 0x1e],
        'E' => [0x1f, 0x10, 0x10, 0x1e, 0x10, 0x10, 0x1f],
        'G' => [0x0e, 0x11, 0x10, 0x17, 0x11, 0x11, 0x0f],
        'I' => [0x0e, 0x04, 0x04, 0x04, 0x04, 0x04, 0x0e],
        'K' => [0x11, 0x12, 0x14, 0x18, 0x14, 0x12, 0x11],
        'L' => [0x10, 0x10, 0x10, 0x10, 0x10, 0x10, 0x1f],
        'M' => [0x11, 0x1b, 0x15, 0x15, 0x11, 0x11, 0x11],
        'N' => [0x11, 0x19, 0x15, 0x13, 0x11, 0x11, 0x11],
        'O' => [0x0e, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0e],
        'P' => [0x1e, 0x11, 0x11, 0x1e, 0x10, 0x10, 0x10],
        'R' => [0x1e, 0x11, 0x11, 0x1e, 0x14, 0x12, 0x11],
        'S' => [0x0f, 0x10, 0x10, 0x0e, 0x01, 0x01, 0x1e],
        'T' => [0x1f, 0x04, 0x04, 0x04, 0x04, 0x04, 0x04],
        'U' => [0x11, 0x11, 0x11, 0x11, 0x11, 0x11, 0x0e],
        'Y' => [0x11, 0x11, 0x0a, 0x04, 0x04, 0x04, 0x04],
        _ => [0; 7],
    }
}

#[cfg(test)]
mod tests {
    use image::GrayImage;

    use super::*;
    use crate::imaging::roi::CropSpec;

    #[test]
    fn shows_the_outline_the_rectangle_and_the_input() {
        let picture = Picture::Gray(GrayImage::from_fn(90, 60, |x, y| {
            image::Luma([if (20..70).contains(&x) && (10..50).contains(&y) {
                180
            } else {
                3
            }])
        }));
        let mut finder = RoiFinder::new(CropSpec::default());
        let contour = finder.find(&picture).unwrap();
        let sheet = explain(&picture, &finder, Some(&contour), Some(&picture));
        assert_eq!(sheet.dimensions(), (1660, 364));
        let has = |color: Rgb<u8>, panel: u32| {
            let left = GAP + panel * (PANEL + GAP);
            sheet
                .enumerate_pixels()
                .any(|(x, _, p)| *p == color && (left..left + PANEL).contains(&x))
        };
        assert!(has(OUTLINE, 2) && !has(OUTLINE, 0));
        assert!(has(RECTANGLE, 3) && !has(RECTANGLE, 2));
        assert!(has(Rgb([180; 3]), 4));
    }

    #[test]
    fn a_rejected_picture_still_shows_its_mask() {
        let picture = Picture::Gray(GrayImage::new(40, 90));
        let mut finder = RoiFinder::new(CropSpec::default());
        assert!(finder.find(&picture).is_err());
        let sheet = explain(&picture, &finder, None, None);
        assert_eq!(
            *sheet.get_pixel(GAP + 4 * (PANEL + GAP), GAP + TITLE),
            BACKGROUND
        );
    }
}
