//! What a model file says about its tensors: the language that the engines, the quantizer and the classifier share.

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// Signed 8-bit, quantized.
    Int8,
    /// Unsigned 8-bit, quantized.
    UInt8,
    /// 32-bit IEEE float, native byte order.
    Float32,
}

impl ElementType {
    /// Size of one element in bytes.
    pub fn size(self) -> usize {
        match self {
            Self::Int8 | Self::UInt8 => 1,
            Self::Float32 => 4,
        }
    }
}

/// Affine quantization of a tensor: `real = (q - zero_point) * scale`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct QuantParams {
    /// Real-valued step, finite and above 0.
    pub scale: f32,
    /// The quantized value that stands for 0.0.
    pub zero_point: i32,
}

/// What the model file says about one of its tensors.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorSpec {
    /// The tensor's name in the model file.
    pub name: String,
    /// Dimensions, all fixed and at least 1.
    pub shape: Vec<usize>,
    /// Element type.
    pub element: ElementType,
    /// Per-tensor quantization; `None` for float tensors.
    pub quant: Option<QuantParams>,
}

impl TensorSpec {
    /// Number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Number of bytes.
    pub fn bytes(&self) -> usize {
        self.elements() * self.element.size()
    }
}
