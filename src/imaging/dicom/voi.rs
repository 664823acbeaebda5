//! From stored values to grey levels: rescale, window, inversion (PS3.3, C.11.1, C.11.2; PS3.14 is not applied).

/// `VOILUTFunction` (0028,1056).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Function {
    Linear,
    LinearExact,
    Sigmoid,
}

/// A window, in output units of the rescale step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Window {
    pub center: f64,
    pub width: f64,
    pub function: Function,
}

impl Window {
    /// `None` for a window that the standard does not allow.
    pub fn new(center: f64, width: f64, function: Function) -> Option<Self> {
        let least = if function == Function::Linear {
            1.0
        } else {
            f64::MIN_POSITIVE
        };
        (center.is_finite() && width.is_finite() && width >= least).then_some(Self {
            center,
            width,
            function,
        })
    }

    /// The level of `value`, 0 to 1: PS3.3, C.11.2.1.2.
    fn level(self, value: f64) -> f64 {
        let Self {
            center,
            width,
            function,
        } = self;
        match function {
            Function::Linear if width <= 1.0 => f64::from(u8::from(value > center - 0.5)),
            Function::Linear => (value - (center - 0.5)) / (width - 1.0) + 0.5,
            Function::LinearExact => (value - center) / width + 0.5,
            Function::Sigmoid => 1.0 / (1.0 + (-4.0 * (value - center) / width).exp()),
        }
    }
}

/// How samples are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stored {
    /// Significant bits, 1 to 16.
    pub bits: u16,
    /// Two's complement.
    pub signed: bool,
    /// Bits below the significant ones.
    pub shift: u16,
}

impl Stored {
    /// Number of different stored values.
    pub fn values(self) -> usize {
        1 << self.bits
    }

    /// A raw sample to the index of its value.
    pub fn index(self, raw: u16) -> usize {
        usize::from(raw >> self.shift) & (self.values() - 1)
    }

    /// The value at an index.
    pub fn value(self, index: usize) -> i32 {
        let index = index as i32;
        if self.signed && index >= 1 << (self.bits - 1) {
            index - (1 << self.bits)
        } else {
            index
        }
    }
}

/// What makes grey levels out of stored values.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Transform {
    pub slope: f64,
    pub intercept: f64,
    /// `None`: a percentile window, or the levels as they are where those are 8 bits already.
    pub window: Option<Window>,
    /// `MONOCHROME1`: low values are bright.
    pub inverted: bool,
    /// Stored values, from and to, that stand for no measurement; shown black.
    pub padding: Option<(i32, i32)>,
}

impl Transform {
    fn is_padding(&self, value: i32) -> bool {
        self.padding
            .is_some_and(|(from, to)| (from..=to).contains(&value))
    }

    /// One level for each stored value.
    pub fn table(&self, stored: Stored, window: Option<Window>) -> Vec<u8> {
        (0..stored.values())
            .map(|index| {
                let value = stored.value(index);
                if self.is_padding(value) {
                    return 0;
                }
                let output = f64::from(value) * self.slope + self.intercept;
                let level = match window {
                    Some(window) => window.level(output),
                    None => output / 255.0,
                };
                // Half up; `as u8` saturates and takes NaN for 0.
                let level = (level.clamp(0.0, 1.0) * 255.0 + 0.5).floor() as u8;
                if self.inverted { 255 - level } else { level }
            })
            .collect()
    }

    /// A window from the 0.5th to the 99.5th percentile of the picture's values without its padding.
    ///
    /// The ends are values that occur. Half a percent at either end keeps a few hot pixels, or a burned-in letter, from
    /// flattening the rest. A picture of one value only gives black.
    pub fn percentile_window(
        &self,
        stored: Stored,
        indices: impl Iterator<Item = usize>,
    ) -> Window {
        let mut counts = vec![0_u64; stored.values()];
        for index in indices {
            counts[index] += 1;
        }
        // In the order of values: of signed ones the upper half of the indices comes first.
        let half = if stored.signed {
            stored.values() / 2
        } else {
            0
        };
        let ascending = (half..stored.values()).chain(0..half);
        let seen: Vec<(i32, u64)> = ascending
            .map(|index| (stored.value(index), counts[index]))
            .filter(|(value, count)| *count > 0 && !self.is_padding(*value))
            .collect();
        let total: u64 = seen.iter().map(|(_, count)| count).sum();
        let at = |rank: u64| {
            let mut below = 0;
            seen.iter()
                .find(|(_, count)| {
                    below += count;
                    below > rank
                })
                .map_or(0.0, |(value, _)| {
                    f64::from(*value) * self.slope + self.intercept
                })
        };
        // The nearest ranks, as integers: the same on every machine.
        let last = total.saturating_sub(1);
        let (first, second) = (at((last * 5 + 500) / 1000), at((last * 995 + 500) / 1000));
        let (low, high) = (first.min(second), first.max(second));
        let width = if high > low { high - low } else { 1.0 };
        let center = if high > low {
            f64::midpoint(low, high)
        } else {
            low + 0.5
        };
        Window {
            center,
            width,
            function: Function::LinearExact,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TWELVE: Stored = Stored {
        bits: 12,
        signed: false,
        shift: 0,
    };
    const SIGNED: Stored = Stored {
        bits: 16,
        signed: true,
        shift: 0,
    };
    const PLAIN: Transform = Transform {
        slope: 1.0,
        intercept: 0.0,
        window: None,
        inverted: false,
        padding: None,
    };

    /// The example of PS3.3, C.11.2.1.2.1: centre 2048, width 4096 maps 0 to the minimum and 4095 to the maximum.
    #[test]
    fn linear_spans_the_standards_example() {
        let window = Window::new(2048.0, 4096.0, Function::Linear);
        let table = PLAIN.table(TWELVE, window);
        assert_eq!((table[0], table[4095]), (0, 255));
        assert!(table.is_sorted());
    }

    #[test]
    fn width_one_is_a_threshold() {
        let table = PLAIN.table(TWELVE, Window::new(100.0, 1.0, Function::Linear));
        assert_eq!((table[99], table[100]), (0, 255));
    }

    #[test]
    fn exact_and_sigmoid_meet_in_the_centre() {
        for function in [Function::LinearExact, Function::Sigmoid] {
            let table = PLAIN.table(SIGNED, Window::new(0.0, 100.0, function));
            assert_eq!(table[0], 128, "{function:?}");
            assert!(table[SIGNED.values() - 50] < table[50], "{function:?}");
        }
    }

    #[test]
    fn impossible_windows_are_none() {
        assert_eq!(Window::new(0.0, 0.5, Function::Linear), None);
        assert_eq!(Window::new(0.0, 0.0, Function::Sigmoid), None);
        assert_eq!(Window::new(f64::NAN, 10.0, Function::Linear), None);
    }

    #[test]
    fn padding_is_black_even_inverted() {
        let transform = Transform {
            inverted: true,
            padding: Some((-2000, -2000)),
            ..PLAIN
        };
        let table = transform.table(SIGNED, Window::new(0.0, 100.0, Function::Linear));
        assert_eq!(table[SIGNED.index(-2000_i16 as u16)], 0);
        assert_eq!(table[SIGNED.index(-1999_i16 as u16)], 255);
    }

    #[test]
    fn percentiles_leave_out_padding_and_outliers() {
        let transform = Transform {
            padding: Some((-500, -500)),
            ..PLAIN
        };
        let values = (0..=1000)
            .chain(std::iter::repeat_n(-500, 5000))
            .chain([30_000]);
        let window =
            transform.percentile_window(SIGNED, values.map(|v: i32| SIGNED.index(v as i16 as u16)));
        // 1002 values count: rank 5 of 0 to 1001 is 5, rank 996 is 996.
        assert_eq!(
            window,
            Window {
                center: 500.5,
                width: 991.0,
                function: Function::LinearExact
            }
        );
    }

    #[test]
    fn one_value_is_black() {
        let window = PLAIN.percentile_window(TWELVE, std::iter::repeat_n(7, 10));
        assert_eq!(PLAIN.table(TWELVE, Some(window))[7], 0);
    }
}
