//! TensorFlow Lite 1.15 through the crate `tflite`, which compiles it from source: for boards without a LiteRT library.
//!
//! The crate knows neither 8-bit signed tensors nor quantization, so tensors are read and written as bytes, and what they are
//! comes from [`ModelFile`]. It runs on the runtime's own kernels, which have SIMD code on ARM and are slow on x86.

use tflite::ops::builtin::BuiltinOpResolver;
use tflite::{FlatBufferModel, Interpreter, InterpreterBuilder};

use super::model_file::ModelFile;
use super::{Engine, EngineError, EngineInfo, TensorSpec, flip};

/// Of the sources that crate tflite 0.9.8 has.
const VERSION: &str = "1.15.5";

/// Loads `bytes`, whose description is `file`, with `threads` threads.
pub(super) fn load(bytes: &[u8], file: ModelFile, threads: usize) -> Result<TfLite, EngineError> {
    let refused = |error: tflite::Error| EngineError::Load(words(&error));
    let model = FlatBufferModel::build_from_buffer(bytes.to_vec()).map_err(refused)?;
    let builder = InterpreterBuilder::new(model, BuiltinOpResolver::default()).map_err(refused)?;
    let threads_wanted = i32::try_from(threads).expect("clamped");
    let interpreter = builder
        .build_with_threads(threads_wanted)
        .map_err(refused)?;
    let mut engine = TfLite {
        info: EngineInfo {
            runtime: "TensorFlow Lite",
            version: VERSION.to_owned(),
            delegate: format!("built-in kernels ({} operators)", file.operators),
            threads,
        },
        interpreter,
        input_specs: [file.input],
        flips: file.flips,
        output_specs: file.outputs,
    };
    engine.check_sizes()?;
    // Some operators refuse only when they run.
    let blank = vec![0; engine.input_specs[0].bytes()];
    engine
        .run(&blank, &mut Vec::new())
        .map_err(|error| EngineError::Load(format!("it does not run: {error}")))?;
    Ok(engine)
}

/// The crate's errors carry their text in backquotes.
fn words(error: &tflite::Error) -> String {
    format!("TensorFlow Lite: {}", error.to_string().trim_matches('`'))
}

/// A model with its memory.
pub(super) struct TfLite {
    interpreter: Interpreter<'static, BuiltinOpResolver>,
    input_specs: [TensorSpec; 1],
    /// See [`ModelFile`].
    flips: bool,
    output_specs: Vec<TensorSpec>,
    info: EngineInfo,
}

impl TfLite {
    /// The runtime has given each end of the graph the memory that the file promises.
    fn check_sizes(&self) -> Result<(), EngineError> {
        let specs = self.input_specs.iter().chain(&self.output_specs);
        let tensors = self.interpreter.inputs().iter();
        let mut tensors = tensors.chain(self.interpreter.outputs());
        for spec in specs {
            let buffer = tensors
                .next()
                .and_then(|&index| self.interpreter.tensor_buffer(index));
            let bytes = buffer.map_or(0, <[u8]>::len);
            if bytes != spec.bytes() {
                return Err(EngineError::Tensor {
                    name: spec.name.clone(),
                    problem: format!(
                        "has {bytes} bytes in the runtime; expected {}",
                        spec.bytes()
                    ),
                });
            }
        }
        Ok(())
    }
}

impl Engine for TfLite {
    fn info(&self) -> &EngineInfo {
        &self.info
    }

    fn inputs(&self) -> &[TensorSpec] {
        &self.input_specs
    }

    fn outputs(&self) -> &[TensorSpec] {
        &self.output_specs
    }

    fn run_filled(
        &mut self,
        fill: &mut dyn FnMut(&mut [u8]),
        outputs: &mut Vec<Vec<u8>>,
    ) -> Result<(), EngineError> {
        let gone = || EngineError::Run("a tensor has no memory".to_owned());
        let index = self.interpreter.inputs()[0];
        let tensor = self.interpreter.tensor_buffer_mut(index).ok_or_else(gone)?;
        fill(tensor);
        if self.flips {
            flip(tensor);
        }
        self.interpreter
            .invoke()
            .map_err(|error| EngineError::Run(words(&error)))?;
        outputs.resize_with(self.output_specs.len(), Vec::new);
        for (&index, output) in self.interpreter.outputs().iter().zip(outputs) {
            output.clear();
            output.extend_from_slice(self.interpreter.tensor_buffer(index).ok_or_else(gone)?);
        }
        Ok(())
    }
}
