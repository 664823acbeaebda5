//! The inference engines: one trait at the C boundary, one implementation a runtime.
//!
//! The trait speaks raw tensor bytes; what they mean (normalisation, quantization, labels) is decided in safe code above it.

#[cfg(feature = "litert")]
mod flatbuffer;
#[cfg(feature = "litert")]
mod litert;
#[cfg(feature = "litert")]
mod stderr;

pub use crate::tensor::{ElementType, QuantParams, TensorSpec};

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
