//! Normalisation and quantization of the resized picture into the bytes of the model's input tensor.
//!
//! Both are functions of one 8-bit level and its channel, so they are worked out once for all 256 levels and the
//! picture is only looked up. The layout is NHWC with a batch of one.
//!
//! What the application's VGG16 sees, spelled out: `imread` gives blue, green, red; Keras' `preprocess_input` in its
//! caffe mode reverses the channels (meaning to make BGR of RGB, here making RGB of BGR) and then takes 103.939 from the
//! first, 116.779 from the second, 123.68 from the third. So *red* loses the 103.939 that was meant for blue. The
//! manifest for such a model says `Rgb` and `Caffe`; a model trained on pictures loaded as RGB says `Bgr` and `Caffe`.
//! On grey pictures the two differ only by which channel has which mean.

use serde::Deserialize;

use super::{Picture, vectorized};
use crate::tensor::{ElementType, QuantParams};

/// What is done to a level `v` (0 to 255) before quantization. Channels count in the tensor's order.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Normalization {
    /// `v`: the model has its own rescaling.
    None,
    /// `v / 255`.
    ZeroOne,
    /// `v / 127.5 - 1` (Keras' `tf` mode).
    MinusOneOne,
    /// `v - m` with m = 103.939, 116.779, 123.68 for the tensor's first, second and third channel (Keras' `caffe` mode);
    /// a single-channel tensor uses the mean for green.
    Caffe,
    /// `(v - mean) / std` with both in levels of 0 to 255, as in TFLite metadata. For a mean given for 0 to 1, as in
    /// PyTorch, multiply mean and standard deviation by 255.
    MeanStd {
        /// Mean of each channel.
        mean: [f32; 3],
        /// Standard deviation of each channel, finite and not 0.
        std: [f32; 3],
    },
}

/// Channels of the tensor, first to last.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ColorOrder {
    /// Red, green, blue. A grey picture fills all three.
    #[default]
    Rgb,
    /// Blue, green, red. A grey picture fills all three.
    Bgr,
    /// One channel; a colour picture is made grey by its luma (0.299 red, 0.587 green, 0.114 blue; OpenCV's rounding).
    Gray,
}

impl ColorOrder {
    /// Number of channels of the tensor.
    pub fn channels(self) -> usize {
        match self {
            Self::Rgb | Self::Bgr => 3,
            Self::Gray => 1,
        }
    }
}

/// Why no table can be built.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum QuantizeError {
    /// An integer tensor needs a scale and a zero point.
    #[error(
        "the input tensor is {0:?} but carries no quantization parameters; convert the model with a representative data set"
    )]
    NoQuantParams(ElementType),
    /// The scale is not a finite number above 0.
    #[error("input quantization scale: {0} is not a finite number above 0")]
    Scale(f32),
    /// A normalisation constant is not a finite number, or a standard deviation is 0.
    #[error(
        "normalisation: mean {mean} and standard deviation {std} of channel {channel} must be finite, the latter not 0"
    )]
    MeanStd {
        /// Index of the tensor's channel.
        channel: usize,
        /// Its mean.
        mean: f32,
        /// Its standard deviation.
        std: f32,
    },
}

/// Turns a picture of the model's size into tensor bytes.
#[derive(Debug, Clone)]
pub struct Quantizer {
    order: ColorOrder,
    table: Table,
}

/// The tensor element of each level, a table per channel of the tensor.
#[derive(Debug, Clone)]
enum Table {
    /// Every level stands for itself in every channel.
    Identity,
    Bytes(Box<[[u8; 256]; 3]>),
    Floats(Box<[[f32; 256]; 3]>),
}

impl Quantizer {
    /// Tables for a tensor of `element`s in channel order `order`.
    ///
    /// Quantized: `round(real / scale) + zero_point`, halves away from zero (as TFLite's `QUANTIZE` does), clamped to the
    /// element's range. `quant` is ignored for floats.
    pub fn new(
        normalization: Normalization,
        order: ColorOrder,
        element: ElementType,
        quant: Option<QuantParams>,
    ) -> Result<Self, QuantizeError> {
        let channels = order.channels();
        if let Normalization::MeanStd { mean, std } = normalization {
            let bad = |c: &usize| !mean[*c].is_finite() || !std[*c].is_finite() || std[*c] == 0.0;
            if let Some(channel) = (0..channels).find(bad) {
                return Err(QuantizeError::MeanStd {
                    channel,
                    mean: mean[channel],
                    std: std[channel],
                });
            }
        }
        let real =
            |channel: usize, level: usize| normalization.apply(level as f32, channel, channels);
        let (low, high) = match element {
            ElementType::Float32 => {
                let table = std::array::from_fn(|channel| {
                    std::array::from_fn(|level| real(channel, level))
                });
                return Ok(Self {
                    order,
                    table: Table::Floats(Box::new(table)),
                });
            }
            ElementType::Int8 => (-128, 127),
            ElementType::UInt8 => (0, 255),
        };
        let QuantParams { scale, zero_point } =
            quant.ok_or(QuantizeError::NoQuantParams(element))?;
        if !(scale.is_finite() && scale > 0.0) {
            return Err(QuantizeError::Scale(scale));
        }
        let table: [[u8; 256]; 3] = std::array::from_fn(|channel| {
            std::array::from_fn(|level| {
                let steps =
                    f64::from((real(channel, level) / scale).round()) + f64::from(zero_point);
                // The low byte is the element's two's complement.
                steps.clamp(f64::from(low), f64::from(high)) as i32 as u8
            })
        });
        let identity = table[..channels]
            .iter()
            .all(|t| t.iter().enumerate().all(|(i, &v)| i == usize::from(v)));
        Ok(Self {
            order,
            table: if identity {
                Table::Identity
            } else {
                Table::Bytes(Box::new(table))
            },
        })
    }

    /// Bytes of the tensor of a picture of `width` x `height` pixels.
    fn tensor_len(&self, width: u32, height: u32) -> usize {
        let element = if matches!(self.table, Table::Floats(_)) {
            4
        } else {
            1
        };
        width as usize * height as usize * self.order.channels() * element
    }

    /// Fills `tensor` with the elements of `picture`: height x width x [`ColorOrder::channels`], floats in native byte
    /// order.
    ///
    /// # Panics
    ///
    /// If `tensor` is not exactly as long.
    pub fn quantize(&self, picture: &Picture, tensor: &mut [u8]) {
        let len = self.tensor_len(picture.width(), picture.height());
        assert_eq!(tensor.len(), len, "bytes of the tensor");
        match &self.table {
            Table::Identity => vectorized(
                #[inline(always)]
                || self.fill(picture, tensor, |_, level| [level]),
            ),
            Table::Bytes(table) => self.fill(picture, tensor, |channel, level| {
                [table[channel][usize::from(level)]]
            }),
            Table::Floats(table) => {
                self.fill(picture, tensor, |channel, level| {
                    table[channel][usize::from(level)].to_ne_bytes()
                });
            }
        }
    }

    #[inline(always)]
    fn fill<const BYTES: usize>(
        &self,
        picture: &Picture,
        tensor: &mut [u8],
        element: impl Fn(usize, u8) -> [u8; BYTES],
    ) {
        let elements = tensor.as_chunks_mut::<BYTES>().0;
        match (picture, self.order) {
            (Picture::Gray(image), ColorOrder::Gray) => {
                for (out, &level) in elements.iter_mut().zip(image.as_raw()) {
                    *out = element(0, level);
                }
            }
            (Picture::Gray(image), ColorOrder::Rgb | ColorOrder::Bgr) => {
                for (out, &level) in elements
                    .as_chunks_mut::<3>()
                    .0
                    .iter_mut()
                    .zip(image.as_raw())
                {
                    *out = [element(0, level), element(1, level), element(2, level)];
                }
            }
            (Picture::Rgb(image), ColorOrder::Rgb) => {
                for (out, p) in elements
                    .as_chunks_mut::<3>()
                    .0
                    .iter_mut()
                    .zip(image.as_raw().as_chunks::<3>().0)
                {
                    *out = [element(0, p[0]), element(1, p[1]), element(2, p[2])];
                }
            }
            (Picture::Rgb(image), ColorOrder::Bgr) => {
                for (out, p) in elements
                    .as_chunks_mut::<3>()
                    .0
                    .iter_mut()
                    .zip(image.as_raw().as_chunks::<3>().0)
                {
                    *out = [element(0, p[2]), element(1, p[1]), element(2, p[0])];
                }
            }
            (Picture::Rgb(image), ColorOrder::Gray) => {
                for (out, p) in elements.iter_mut().zip(image.as_raw().as_chunks::<3>().0) {
                    *out = element(0, luma(*p));
                }
            }
        }
    }
}

impl Normalization {
    /// The normalised value of a level in the tensor's `channel` of `channels`.
    fn apply(self, level: f32, channel: usize, channels: usize) -> f32 {
        match self {
            Self::None => level,
            Self::ZeroOne => level / 255.0,
            Self::MinusOneOne => level / 127.5 - 1.0,
            Self::Caffe => {
                const MEANS: [f32; 3] = [103.939, 116.779, 123.68];
                level
                    - if channels == 1 {
                        MEANS[1]
                    } else {
                        MEANS[channel]
                    }
            }
            Self::MeanStd { mean, std } => (level - mean[channel]) / std[channel],
        }
    }
}

/// `cvtColor(RGB2GRAY)` on true RGB: 15-bit weights, rounded half up.
fn luma([red, green, blue]: [u8; 3]) -> u8 {
    ((9798 * u32::from(red) + 19235 * u32::from(green) + 3735 * u32::from(blue) + (1 << 14)) >> 15)
        as u8
}

#[cfg(test)]
mod tests {
    use image::{GrayImage, Luma, Rgb, RgbImage};

    use super::*;

    fn tensor(
        picture: &Picture,
        normalization: Normalization,
        order: ColorOrder,
        element: ElementType,
        quant: Option<QuantParams>,
    ) -> Vec<u8> {
        let quantizer = Quantizer::new(normalization, order, element, quant).unwrap();
        let mut tensor = vec![0; quantizer.tensor_len(picture.width(), picture.height())];
        quantizer.quantize(picture, &mut tensor);
        tensor
    }

    fn floats(bytes: &[u8]) -> Vec<f32> {
        bytes
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_ne_bytes(*b))
            .collect()
    }

    fn orange() -> Picture {
        Picture::Rgb(RgbImage::from_pixel(1, 1, Rgb([250, 120, 10])))
    }

    #[test]
    fn caffe_takes_its_means_in_the_tensor_s_order() {
        let float = |order| {
            floats(&tensor(
                &orange(),
                Normalization::Caffe,
                order,
                ElementType::Float32,
                None,
            ))
        };
        // The application: red is first and loses the mean meant for blue.
        assert_eq!(
            float(ColorOrder::Rgb),
            [250.0 - 103.939, 120.0 - 116.779, 10.0 - 123.68]
        );
        // Keras on pictures loaded as RGB.
        assert_eq!(
            float(ColorOrder::Bgr),
            [10.0 - 103.939, 120.0 - 116.779, 250.0 - 123.68]
        );
        assert_eq!(float(ColorOrder::Gray), [146.0 - 116.779]);
    }

    #[test]
    fn grey_fills_every_channel() {
        let gray = Picture::Gray(GrayImage::from_pixel(1, 1, Luma([51])));
        let float = |order| {
            floats(&tensor(
                &gray,
                Normalization::ZeroOne,
                order,
                ElementType::Float32,
                None,
            ))
        };
        assert_eq!(float(ColorOrder::Rgb), [0.2; 3]);
        assert_eq!(float(ColorOrder::Bgr), [0.2; 3]);
        assert_eq!(float(ColorOrder::Gray), [0.2]);
    }

    #[test]
    fn levels_beyond_the_range_are_clamped() {
        let quant = Some(QuantParams {
            scale: 0.5,
            zero_point: 10,
        });
        let bytes = tensor(
            &orange(),
            Normalization::Caffe,
            ColorOrder::Rgb,
            ElementType::Int8,
            quant,
        );
        // (250 - 103.939) / 0.5 + 10 = 302; (120 - 116.779) / 0.5 + 10 = 16; (10 - 123.68) / 0.5 + 10 = -217.
        assert_eq!(bytes, [127, 16, 0x80]);
        let bytes = tensor(
            &orange(),
            Normalization::Caffe,
            ColorOrder::Rgb,
            ElementType::UInt8,
            quant,
        );
        assert_eq!(bytes, [255, 16, 0]);
    }

    #[test]
    fn an_efficientnet_lite_input_is_the_picture_itself() {
        let normalization = Normalization::MeanStd {
            mean: [127.0; 3],
            std: [128.0; 3],
        };
        let quant = Some(QuantParams {
            scale: 1.0 / 128.0,
            zero_point: 127,
        });
        let quantizer =
            Quantizer::new(normalization, ColorOrder::Rgb, ElementType::UInt8, quant).unwrap();
        assert!(matches!(quantizer.table, Table::Identity));
        assert_eq!(
            tensor(
                &orange(),
                normalization,
                ColorOrder::Rgb,
                ElementType::UInt8,
                quant
            ),
            [250, 120, 10]
        );
        assert_eq!(
            tensor(
                &orange(),
                normalization,
                ColorOrder::Bgr,
                ElementType::UInt8,
                quant
            ),
            [10, 120, 250]
        );
    }

    #[test]
    fn every_level_survives_quantization_within_half_a_step() {
        for scale in [0.003_921_569, 0.0186, 1.0, 1.0078] {
            let quant = QuantParams {
                scale,
                zero_point: -3,
            };
            for normalization in [
                Normalization::None,
                Normalization::ZeroOne,
                Normalization::MinusOneOne,
            ] {
                for level in 0..=255u8 {
                    let picture = Picture::Gray(GrayImage::from_pixel(1, 1, Luma([level])));
                    let byte = tensor(
                        &picture,
                        normalization,
                        ColorOrder::Gray,
                        ElementType::Int8,
                        Some(quant),
                    )[0];
                    let real = normalization.apply(f32::from(level), 0, 1);
                    let back = (f32::from(byte.cast_signed()) + 3.0) * scale;
                    let clamped = real.clamp(-125.0 * scale, 130.0 * scale);
                    assert!(
                        (back - clamped).abs() <= 0.5001 * scale,
                        "{normalization:?} {scale} {level}"
                    );
                }
            }
        }
    }

    #[test]
    fn impossible_parameters_are_refused() {
        let make = |normalization, element, quant| {
            Quantizer::new(normalization, ColorOrder::Rgb, element, quant)
                .unwrap_err()
                .to_string()
        };
        let flat = Normalization::MeanStd {
            mean: [0.0; 3],
            std: [1.0, 0.0, 1.0],
        };
        assert!(make(flat, ElementType::Float32, None).contains("channel 1"));
        assert!(
            make(Normalization::None, ElementType::Int8, None)
                .contains("no quantization parameters")
        );
        let zero = Some(QuantParams {
            scale: 0.0,
            zero_point: 0,
        });
        assert!(make(Normalization::None, ElementType::Int8, zero).contains("scale"));
    }
}
