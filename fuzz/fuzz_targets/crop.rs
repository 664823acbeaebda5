//! Any small picture through crop and resize, with any parameters: the rectangle lies inside the picture.
//!
//! Input: eight bytes of parameters, then levels row by row; the height follows from what there is.
#![no_main]

use libfuzzer_sys::fuzz_target;
use scansentry::imaging::Picture;
use scansentry::imaging::resize::{ResizeFilter, ResizeSpec, Resizer};
use scansentry::imaging::roi::{CropSpec, RoiFinder};

fuzz_target!(|bytes: &[u8]| {
    let [
        width,
        colour,
        threshold,
        erode,
        dilate,
        margin,
        filter,
        side,
        levels @ ..,
    ] = bytes
    else {
        return;
    };
    let width = u32::from(*width).max(1);
    let channels = if colour % 2 == 1 { 3 } else { 1 };
    let height = (levels.len() as u32 / (width * channels)).min(512);
    if height == 0 {
        return;
    }
    let levels = levels[..(width * height * channels) as usize].to_vec();
    let picture = if channels == 3 {
        Picture::Rgb(
            image::RgbImage::from_raw(width, height, levels).expect("three levels a pixel"),
        )
    } else {
        Picture::Gray(image::GrayImage::from_raw(width, height, levels).expect("a level a pixel"))
    };
    let spec = CropSpec {
        threshold: *threshold,
        erode: u32::from(erode % 5),
        dilate: u32::from(dilate % 5),
        margin: i32::from(*margin as i8),
    };
    let mut finder = RoiFinder::new(spec).with_min_side(1);
    let Ok(found) = finder.find(&picture) else {
        return;
    };
    for area in [found.roi, found.bounds] {
        assert!(area.width > 0 && area.height > 0, "{found:?}");
        assert!(
            area.x + area.width <= width && area.y + area.height <= height,
            "{found:?}"
        );
    }
    assert_eq!(
        finder.find(&picture),
        Ok(found),
        "the finder's buffers carry something over"
    );
    let spec = ResizeSpec {
        width: u32::from(*side).max(1),
        height: u32::from(side / 2).max(1),
        filter: [
            ResizeFilter::Linear,
            ResizeFilter::Cubic,
            ResizeFilter::Area,
        ][usize::from(filter % 3)],
        keep_aspect: filter & 0x80 != 0,
    };
    let resized = Resizer::new(spec).resize(&picture, found.roi).clone();
    assert_eq!(
        (resized.width(), resized.height()),
        (spec.width, spec.height)
    );
});
