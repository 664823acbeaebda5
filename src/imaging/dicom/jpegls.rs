//! JPEG-LS (ITU-T T.87, ISO/IEC 14495-1) of one component, lossless and near-lossless.
//!
//! Written here because there is nothing to use: `charls` is C++, and the one pure-Rust port on crates.io
//! (`dicom-toolkit-codec` 0.5.0) fails on files of real scanners. Names and code segments are those of T.87, annex A.

use std::cmp::Ordering;

/// What the segments before the pixels say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Header {
    pub width: usize,
    pub height: usize,
    pub components: u8,
    pub precision: u8,
    near: i32,
    maxval: i32,
    thresholds: [i32; 3],
    reset: i32,
    /// Where the entropy-coded data begins.
    data: usize,
}

/// Why a stream cannot be decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    Damaged,
    /// Colour, restart markers, a point transform or a mapping table.
    Unsupported,
}

impl Header {
    /// Reads the segments up to the first scan.
    pub fn read(bytes: &[u8]) -> Result<Self, Fault> {
        let mut rest = bytes.strip_prefix(b"\xff\xd8").ok_or(Fault::Damaged)?;
        let (mut frame, mut preset) = (None, None);
        loop {
            let (&[fill, marker, high, low], _) =
                rest.split_first_chunk::<4>().ok_or(Fault::Damaged)?;
            if fill != 0xff {
                return Err(Fault::Damaged);
            }
            if marker == 0xff {
                rest = &rest[1..];
                continue;
            }
            let end = 2 + usize::from(u16::from_be_bytes([high, low]));
            let segment = rest.get(4..end).ok_or(Fault::Damaged)?;
            rest = &rest[end..];
            let word = |at: usize| {
                Some(i32::from(u16::from_be_bytes([
                    *segment.get(at)?,
                    *segment.get(at + 1)?,
                ])))
            };
            match (marker, segment) {
                (0xf7, [precision, h1, h0, w1, w0, components, ..]) => {
                    let height = usize::from(u16::from_be_bytes([*h1, *h0]));
                    frame = Some((
                        *precision,
                        height,
                        usize::from(u16::from_be_bytes([*w1, *w0])),
                        *components,
                    ));
                }
                (0xf8, [1, ..]) => {
                    let values = [word(1), word(3), word(5), word(7), word(9)];
                    preset = Some(values.map(|value| value.unwrap_or(0)));
                }
                (0xf8 | 0xdd, _) => return Err(Fault::Unsupported),
                (0xda, [count, scan @ ..]) => {
                    let (precision, height, width, components) = frame.ok_or(Fault::Damaged)?;
                    // A component's id and table, then NEAR, interleave mode, point transform.
                    let &[_, table, near, _, transform] = scan else {
                        return Err(if *count == 1 {
                            Fault::Damaged
                        } else {
                            Fault::Unsupported
                        });
                    };
                    if components != 1 || *count != 1 || table != 0 || transform != 0 {
                        return Err(Fault::Unsupported);
                    }
                    if !(2..=16).contains(&precision) || width == 0 || height == 0 {
                        return Err(Fault::Damaged);
                    }
                    let data = bytes.len() - rest.len();
                    let near = i32::from(near);
                    let header = Self {
                        width,
                        height,
                        components,
                        precision,
                        near,
                        maxval: (1 << precision) - 1,
                        thresholds: [0; 3],
                        reset: 64,
                        data,
                    };
                    return header.with_preset(preset.unwrap_or_default());
                }
                _ => {}
            }
        }
    }

    /// Applies preset coding parameters; zeros mean the defaults of C.2.4.1.1.
    fn with_preset(mut self, [maxval, t1, t2, t3, reset]: [i32; 5]) -> Result<Self, Fault> {
        if maxval != 0 {
            if maxval > self.maxval {
                return Err(Fault::Damaged);
            }
            self.maxval = maxval;
        }
        if reset != 0 {
            self.reset = reset;
        }
        let (maxval, near) = (self.maxval, self.near);
        if near > (maxval / 2).min(255) || self.reset < 3 {
            return Err(Fault::Damaged);
        }
        let clamp = |value: i32, low: i32| {
            if value > maxval || value < low {
                low
            } else {
                value
            }
        };
        let defaults = if maxval >= 128 {
            let factor = (maxval.min(4095) + 128) / 256;
            [
                factor + 2 + 3 * near,
                factor * 4 + 3 + 5 * near,
                factor * 17 + 4 + 7 * near,
            ]
        } else {
            let factor = 256 / (maxval + 1);
            [
                (3 / factor + 3 * near).max(2),
                (7 / factor + 5 * near).max(3),
                (21 / factor + 7 * near).max(4),
            ]
        };
        let mut low = near + 1;
        for (threshold, (preset, default)) in self
            .thresholds
            .iter_mut()
            .zip([t1, t2, t3].into_iter().zip(defaults))
        {
            *threshold = if preset == 0 {
                clamp(default, low)
            } else {
                preset
            };
            if !(low..=maxval).contains(threshold) {
                return Err(Fault::Damaged);
            }
            low = *threshold;
        }
        Ok(self)
    }

    /// Decodes all samples.
    pub fn decode(&self, bytes: &[u8]) -> Result<Vec<u16>, Fault> {
        let mut scan = Scan::new(self, &bytes[self.data..]);
        let mut samples = Vec::with_capacity(self.width * self.height);
        // One sample on the left (the one above it, A.2.1) and one on the right (a copy of the last).
        let mut above = vec![0_i32; self.width + 2];
        let mut line = vec![0_i32; self.width + 2];
        for _ in 0..self.height {
            line[0] = above[1];
            above[self.width + 1] = above[self.width];
            scan.line(&above, &mut line)?;
            samples.extend(line[1..=self.width].iter().map(|sample| *sample as u16));
            std::mem::swap(&mut above, &mut line);
        }
        Ok(samples)
    }
}

/// Statistics of a context of the regular mode (A.6).
#[derive(Debug, Clone, Copy)]
struct Context {
    a: i32,
    b: i32,
    c: i32,
    n: i32,
}

/// Statistics of a run interruption context (A.7.2).
#[derive(Debug, Clone, Copy)]
struct RunContext {
    a: i32,
    n: i32,
    negative: i32,
}

/// Lengths of run segments as powers of two (A.7.1.1).
const J: [u32; 32] = [
    0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10, 11, 12, 13,
    14, 15,
];

struct Scan<'a> {
    header: Header,
    bits: Bits<'a>,
    range: i32,
    quantized_bits: u32,
    limit: u32,
    contexts: Vec<Context>,
    runs: [RunContext; 2],
    run_index: usize,
}

impl<'a> Scan<'a> {
    fn new(header: &Header, data: &'a [u8]) -> Self {
        let step = 2 * header.near + 1;
        let range = (header.maxval + 2 * header.near) / step + 1;
        let ceil_log2 = |value: i32| 32 - (value as u32 - 1).leading_zeros();
        let bits_per_sample = ceil_log2(header.maxval + 1).max(2);
        let a = ((range + 32) / 64).max(2);
        Self {
            header: *header,
            bits: Bits::new(data),
            range,
            quantized_bits: ceil_log2(range),
            limit: 2 * (bits_per_sample + bits_per_sample.max(8)),
            contexts: vec![
                Context {
                    a,
                    b: 0,
                    c: 0,
                    n: 1
                };
                365
            ],
            runs: [RunContext {
                a,
                n: 1,
                negative: 0,
            }; 2],
            run_index: 0,
        }
    }

    /// Decodes one line; index 0 of both is the sample left of the first.
    fn line(&mut self, above: &[i32], line: &mut [i32]) -> Result<(), Fault> {
        let width = self.header.width;
        let mut x = 1;
        while x <= width {
            let (ra, rb, rc, rd) = (line[x - 1], above[x], above[x - 1], above[x + 1]);
            let gradients = [rd - rb, rb - rc, rc - ra];
            if gradients
                .iter()
                .all(|gradient| gradient.abs() <= self.header.near)
            {
                x = self.run(above, line, x)?;
            } else {
                line[x] = self.regular(ra, rb, rc, gradients)?;
                x += 1;
            }
        }
        Ok(())
    }

    /// A.3.3: a gradient to -4..=4.
    fn quantize(&self, gradient: i32) -> i32 {
        let [t1, t2, t3] = self.header.thresholds;
        let level = match gradient.abs() {
            size if size <= self.header.near => 0,
            size if size < t1 => 1,
            size if size < t2 => 2,
            size if size < t3 => 3,
            _ => 4,
        };
        level * gradient.signum()
    }

    /// A.4 to A.6: one sample by prediction.
    fn regular(&mut self, ra: i32, rb: i32, rc: i32, gradients: [i32; 3]) -> Result<i32, Fault> {
        let near = self.header.near;
        let [q1, q2, q3] = gradients.map(|gradient| self.quantize(gradient));
        let index = 81 * q1 + 9 * q2 + q3;
        let sign = if index < 0 { -1 } else { 1 };
        let context = self
            .contexts
            .get_mut(index.unsigned_abs() as usize)
            .ok_or(Fault::Damaged)?;
        let predicted = if rc >= ra.max(rb) {
            ra.min(rb)
        } else if rc <= ra.min(rb) {
            ra.max(rb)
        } else {
            ra + rb - rc
        };
        let predicted = (predicted + sign * context.c).clamp(0, self.header.maxval);

        let k = golomb(context.n, context.a);
        let mapped = self
            .bits
            .limited_golomb(k, self.limit, self.quantized_bits)?;
        let half = (mapped >> 1) as i32;
        let reversed = near == 0 && k == 0 && 2 * context.b <= -context.n;
        let error = if (mapped & 1 == 1) == reversed {
            half
        } else {
            -half - 1
        };

        context.b += error * (2 * near + 1);
        context.a += error.abs();
        if context.n == self.header.reset {
            context.a >>= 1;
            context.b >>= 1;
            context.n >>= 1;
        }
        context.n += 1;
        if context.b <= -context.n {
            context.b = (context.b + context.n).max(1 - context.n);
            context.c = (context.c - 1).max(-128);
        } else if context.b > 0 {
            context.b = (context.b - context.n).min(0);
            context.c = (context.c + 1).min(127);
        }
        Ok(self.reconstruct(predicted, sign * error))
    }

    /// A.4.5, A.5.2: prediction and error to a sample.
    fn reconstruct(&self, predicted: i32, error: i32) -> i32 {
        let Header { near, maxval, .. } = self.header;
        let step = 2 * near + 1;
        let mut sample = predicted + error * step;
        if sample < -near {
            sample += self.range * step;
        } else if sample > maxval + near {
            sample -= self.range * step;
        }
        sample.clamp(0, maxval)
    }

    /// A.7: a run of the sample on the left, and the sample that ends it. Gives where to go on.
    fn run(&mut self, above: &[i32], line: &mut [i32], start: usize) -> Result<usize, Fault> {
        let end = self.header.width + 1;
        let ra = line[start - 1];
        let mut x = start;
        loop {
            let segment = 1_usize << J[self.run_index];
            if self.bits.bit()? == 1 {
                let length = segment.min(end - x);
                line[x..x + length].fill(ra);
                x += length;
                if length == segment {
                    self.run_index = (self.run_index + 1).min(31);
                }
                if x == end {
                    return Ok(end);
                }
            } else {
                let length = self.bits.take(J[self.run_index])? as usize;
                if length >= end - x {
                    return Err(Fault::Damaged);
                }
                line[x..x + length].fill(ra);
                x += length;
                line[x] = self.interruption(ra, above[x])?;
                self.run_index = self.run_index.saturating_sub(1);
                return Ok(x + 1);
            }
        }
    }

    /// A.7.2: the sample that ends a run.
    fn interruption(&mut self, ra: i32, rb: i32) -> Result<i32, Fault> {
        let alike = (ra - rb).abs() <= self.header.near;
        let kind = i32::from(alike);
        let context = &mut self.runs[usize::from(alike)];
        let k = golomb(
            context.n,
            if alike {
                context.a + (context.n >> 1)
            } else {
                context.a
            },
        );
        let limit = self.limit - J[self.run_index] - 1;
        let mapped = self.bits.limited_golomb(k, limit, self.quantized_bits)? as i32;
        let temp = mapped + kind;
        let odd = temp & 1 == 1;
        let size = (temp + i32::from(odd)) >> 1;
        let error = if (k != 0 || 2 * context.negative >= context.n) == odd {
            -size
        } else {
            size
        };
        if error < 0 {
            context.negative += 1;
        }
        context.a += (mapped + 1 - kind) >> 1;
        if context.n == self.header.reset {
            context.a >>= 1;
            context.n >>= 1;
            context.negative >>= 1;
        }
        context.n += 1;
        Ok(match (alike, rb.cmp(&ra)) {
            (true, _) => self.reconstruct(ra, error),
            (false, Ordering::Less) => self.reconstruct(rb, -error),
            (false, _) => self.reconstruct(rb, error),
        })
    }
}

/// A.5.1: the Golomb parameter.
fn golomb(n: i32, a: i32) -> u32 {
    (0..16).find(|k| n << k >= a).unwrap_or(16)
}

/// Bits, most significant first; after a byte 0xFF comes one with only 7 (A.1, "bit stuffing").
struct Bits<'a> {
    data: &'a [u8],
    buffer: u64,
    count: u32,
    after_ff: bool,
    /// Zero bits handed out behind the end of the data.
    beyond: u32,
}

impl<'a> Bits<'a> {
    fn new(data: &'a [u8]) -> Self {
        Self {
            data,
            buffer: 0,
            count: 0,
            after_ff: false,
            beyond: 0,
        }
    }

    /// Makes sure of 32 bits.
    fn fill(&mut self) -> Result<(), Fault> {
        while self.count <= 32 {
            let (byte, bits) = match self.data.split_first() {
                // 0xFF and a byte with its top bit set: a marker.
                Some((&byte, rest))
                    if !(byte == 0xff && rest.first().is_none_or(|next| *next >= 0x80)) =>
                {
                    self.data = rest;
                    (byte, if self.after_ff { 7 } else { 8 })
                }
                _ => {
                    self.beyond += 8;
                    if self.beyond > 64 + 8 {
                        return Err(Fault::Damaged);
                    }
                    (0, 8)
                }
            };
            self.after_ff = byte == 0xff;
            self.buffer = self.buffer << bits | u64::from(byte & (0xff >> (8 - bits)));
            self.count += bits;
        }
        Ok(())
    }

    /// The next `count` bits, at most 32.
    fn take(&mut self, count: u32) -> Result<u32, Fault> {
        if count == 0 {
            return Ok(0);
        }
        if self.count < count {
            self.fill()?;
        }
        self.count -= count;
        Ok((self.buffer >> self.count) as u32 & (u32::MAX >> (32 - count)))
    }

    fn bit(&mut self) -> Result<u32, Fault> {
        self.take(1)
    }

    /// A.5.3: a limited-length Golomb code.
    fn limited_golomb(&mut self, k: u32, limit: u32, quantized_bits: u32) -> Result<u32, Fault> {
        let most = limit
            .checked_sub(quantized_bits + 1)
            .ok_or(Fault::Damaged)?;
        let mut zeros = 0;
        while self.bit()? == 0 {
            zeros += 1;
            if zeros > most {
                return Err(Fault::Damaged);
            }
        }
        if zeros < most {
            Ok(zeros << k | self.take(k)?)
        } else {
            Ok(self.take(quantized_bits)? + 1)
        }
    }
}
