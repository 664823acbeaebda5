//! The inference engines: one trait at the C boundary, one implementation a runtime.
//!
//! The trait speaks raw tensor bytes; what they mean (normalisation, quantization, labels) is decided in safe code above it.
//! Which runtimes a build has is decided by its features and its target: see `build.rs`, which sets `cfg(litert)` and
//! `cfg(tflite)`.

mod heap;
mod helpers;
#[cfg(litert)]
mod litert;
mod model_file;
#[cfg(litert)]
mod packed;
mod shared;
mod stderr;
#[cfg(tflite)]
mod tflite;

use std::ops::Deref;
use std::sync::Arc;

use serde::Serialize;

use heap::{GivenBack, give_back};
use helpers::{Helped, Helpers};
use model_file::ModelFile;
use shared::Either;

pub use crate::tensor::{ElementType, QuantParams, TensorSpec};
pub use shared::{AtWork, Shared};

/// Between unsigned bytes and signed ones whose zero point is 128 less.
fn flip(bytes: &mut [u8]) {
    for byte in bytes {
        *byte ^= 0x80;
    }
}

/// A runtime for TFLite models.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// LiteRT, TensorFlow Lite's present name.
    LiteRt,
    /// TensorFlow Lite 1.15, compiled from source.
    TfLite,
}

impl Runtime {
    /// As the configuration names it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::LiteRt => "litert",
            Self::TfLite => "tflite",
        }
    }
}

/// The runtimes that this build has, at least one, the fastest first.
pub const RUNTIMES: &[Runtime] = &[
    #[cfg(litert)]
    Runtime::LiteRt,
    #[cfg(tflite)]
    Runtime::TfLite,
];

/// Which runtime runs the model, for the start-up log line and `bench`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct EngineInfo {
    /// `"LiteRT"` or `"TensorFlow Lite"`.
    pub runtime: &'static str,
    /// Version of the runtime.
    pub version: String,
    /// Who executes the operators, with its share when known, e.g. `"XNNPACK (65 of 65 operators)"`.
    pub delegate: String,
    /// Threads of an inference while no other file is in work.
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
    /// Runs the model on what `fill` makes of the single input: it is called once, with exactly `inputs()[0].bytes()` bytes of any content. Afterwards
    /// `outputs[i]` has exactly `outputs()[i].bytes()` bytes (the vectors are reused, not reallocated).
    fn run_filled(
        &mut self,
        fill: &mut dyn FnMut(&mut [u8]),
        outputs: &mut Vec<Vec<u8>>,
    ) -> Result<(), EngineError>;
    /// The same on a copy of `input`.
    fn run(&mut self, input: &[u8], outputs: &mut Vec<Vec<u8>>) -> Result<(), EngineError> {
        let expected = self.inputs()[0].bytes();
        if input.len() != expected {
            return Err(EngineError::Run(format!(
                "input has {} bytes; the model takes {expected}",
                input.len()
            )));
        }
        self.run_filled(&mut |tensor| tensor.copy_from_slice(input), outputs)
    }
    /// There has been nothing to run for a while: lets go of what only many pictures at a time need. Whether it could; else it is worth another try.
    fn settle(&mut self) -> bool {
        true
    }
}

/// Why a model did not load or run.
#[derive(Debug, Clone, thiserror::Error)]
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
}

/// More threads than that per interpreter help on no board that this runs on.
const MAX_THREADS: usize = 64;

/// The bytes of a `.tflite` file, and what all engines of that model share. Cheap to clone.
#[derive(Debug, Clone)]
pub struct ModelBytes(Arc<Model>);

#[derive(Debug)]
struct Model {
    /// With some bytes in front, so that the file begins at an address that is a multiple of 16, for which its tensors are laid out.
    bytes: Vec<u8>,
    start: usize,
    /// What it says of itself.
    file: Result<ModelFile, EngineError>,
    #[cfg(litert)]
    litert: litert::Common,
}

impl ModelBytes {
    const ALIGNMENT: usize = 16;

    /// A copy of `bytes`, for the engines: without an operator that they do not need ([`ModelFile::take`]).
    pub fn copy_of(bytes: &[u8]) -> Self {
        Self::copied(bytes, ModelFile::take)
    }

    fn copied(
        bytes: &[u8],
        read: impl FnOnce(&mut [u8]) -> Result<ModelFile, EngineError>,
    ) -> Self {
        let mut aligned: Vec<u8> = Vec::with_capacity(bytes.len() + Self::ALIGNMENT);
        let start = aligned.as_ptr().align_offset(Self::ALIGNMENT);
        aligned.resize(start, 0);
        // It has the room, so it stays where it is.
        aligned.extend_from_slice(bytes);
        let file = read(&mut aligned[start..]);
        Self(Arc::new(Model {
            bytes: aligned,
            start,
            file,
            #[cfg(litert)]
            litert: litert::Common::default(),
        }))
    }
}

impl Deref for ModelBytes {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0.bytes[self.0.start..]
    }
}

/// Loads `model` (the bytes of a `.tflite` file) on `runtime`, one of [`RUNTIMES`], with `threads` threads (1 to 64; values outside
/// are moved to the nearest end).
///
/// A loaded model has exactly one input, and only tensors of fixed shape and of an [`ElementType`].
pub fn load(
    runtime: Runtime,
    model: &ModelBytes,
    threads: usize,
) -> Result<Box<dyn Engine>, EngineError> {
    let file = model.0.file.clone()?;
    let threads = threads.clamp(1, MAX_THREADS);
    let load = || -> Result<Box<dyn Engine>, EngineError> {
        match runtime {
            #[cfg(litert)]
            Runtime::LiteRt => Ok(Box::new(litert::load(model, file, threads)?)),
            #[cfg(tflite)]
            Runtime::TfLite => Ok(Box::new(tflite::load(model, file, threads)?)),
            #[cfg(not(all(litert, tflite)))]
            missing => Err(EngineError::Load(format!(
                "{} is not in this build",
                missing.as_str()
            ))),
        }
    };
    let (engine, helpers) = Helpers::of(|| stderr::explained(load));
    Ok(Box::new(Helped {
        engine: engine?,
        helpers,
        _memory: GivenBack,
    }))
}

/// The `shared` engine of that model for when no other worker is at work, and one with one thread for when others are, loaded when it is needed.
pub fn load_beside(runtime: Runtime, model: &ModelBytes, shared: Arc<Shared>) -> Box<dyn Engine> {
    let model = model.clone();
    let load_own = move || {
        let engine = load(runtime, &model, 1)?;
        // Loading needs more than what stays, and another worker's is loaded beside this. Not after the shared one, for it tears huge pages apart.
        give_back();
        Ok(engine)
    };
    Box::new(Either::new(shared, Box::new(load_own)))
}
