//! The inference engines: one trait at the C boundary, one implementation a runtime.
//!
//! The trait speaks raw tensor bytes; what they mean (normalisation, quantization, labels) is decided in safe code above it.

#[cfg(feature = "litert")]
mod flatbuffer;
#[cfg(feature = "litert")]
mod litert;
#[cfg(feature = "litert")]
mod stderr;

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

/// Which runtime runs the model, for the start-up log line and `bench`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineInfo {
    /// `"LiteRT"` or `"TensorFlow Lite"`.
    pub runtime: &'static str,
    /// Version of the runtime.
    pub version: String,
    /// Who executes the operators, with its share when known, e.g. `"XNNPACK (65 of 65 operators)"`.
    pub delegate: String,
    /// Threads of one interpreter.
    pub threads: usize,
}

impl std::fmt::Display for EngineInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} {}, {}, {} thread(s)",
            self.runtime, self.version, self.delegate, self.threads
        )
    }
}

/// A loaded model, ready to run. One instance belongs to one thread.
pub trait Engine: Send {
    /// The runtime behind it.
    fn info(&self) -> &EngineInfo;
    /// Input tensors in the model's order.
    fn inputs(&self) -> &[TensorSpec];
    /// Output tensors in the model's order.
    fn outputs(&self) -> &[TensorSpec];
    /// Runs the model on the single input; `input` has exactly `inputs()[0].bytes()` bytes, and afterwards
    /// `outputs[i]` has exactly `outputs()[i].bytes()` bytes (the vectors are reused, not reallocated).
    fn run(&mut self, input: &[u8], outputs: &mut Vec<Vec<u8>>) -> Result<(), EngineError>;
}

/// Why a model did not load or run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The runtime refused the model file.
    #[error("model does not load: {0}")]
    Load(String),
    /// A tensor is of a kind that ScanSentry cannot use.
    #[error("model tensor {name}: {problem}")]
    Tensor {
        /// Name of the tensor in the model.
        name: String,
        /// What is wrong with it.
        problem: String,
    },
    /// Running the model failed.
    #[error("inference failed: {0}")]
    Run(String),
    /// This build has no engine.
    #[error("this build has no inference engine; build with --features litert")]
    NoEngine,
}

/// Loads `model` (the bytes of a `.tflite` file) on the engine that this build has, with `threads` threads (at least 1).
///
/// A loaded model has exactly one input, and only tensors of fixed shape and of an [`ElementType`].
#[cfg(feature = "litert")]
pub fn load(model: &[u8], threads: usize) -> Result<Box<dyn Engine>, EngineError> {
    Ok(Box::new(litert::load(model, threads)?))
}

/// Loads a model on the engine that this build has: there is none.
#[cfg(not(feature = "litert"))]
pub fn load(_model: &[u8], _threads: usize) -> Result<Box<dyn Engine>, EngineError> {
    Err(EngineError::NoEngine)
}
