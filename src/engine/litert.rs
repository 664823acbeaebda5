//! LiteRT (the present name of TensorFlow Lite) through its C interface, as crate `litert-sys` declares it.
//!
//! Ownership: every object of the runtime is an [`Owned`] handle that destroys it on drop, and the fields of [`LiteRt`]
//! stand in the order in which they must go: buffers, compiled model, options, model, environment, and last the bytes
//! of the file, which the model and the compiled model only borrow.
//!
//! The runtime would write to stderr: see [`super::stderr`]. Its errors become part of ours.
//!
//! Not thread-safe by itself: one [`LiteRt`] belongs to one thread at a time, which `&mut self` and `Send` without `Sync` say.

// Calls into libLiteRt.so.
#![allow(unsafe_code)]

use std::collections::BTreeMap;
use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::mem::MaybeUninit;
use std::ptr::{self, NonNull};
use std::sync::OnceLock;

use litert_sys as sys;

use super::model_file::ModelFile;
use super::packed::Packed;
use super::{ElementType, Engine, EngineError, EngineInfo, ModelBytes, TensorSpec, flip, stderr};

/// The first signature of the file; a file without any gets one from the runtime that stands for its main graph.
const SIGNATURE: sys::LiteRtParamIndex = 0;

/// Loads `bytes`, whose description is `file`, with `threads` threads.
pub(super) fn load(
    bytes: &ModelBytes,
    file: ModelFile,
    threads: usize,
) -> Result<LiteRt, EngineError> {
    let ModelFile {
        input: input_spec,
        outputs: output_specs,
        operators,
        flips,
    } = file;
    let environment = create_environment()?;
    let model = create_model(bytes)?;
    let signature_order = outputs_in_signature_order(&model)?;

    let taken = if flips {
        ElementType::Int8
    } else {
        input_spec.element
    };
    let input = create_buffer(&environment, &input_spec, taken)?;
    write_buffer(&input, input_spec.bytes(), flips, &mut |tensor| {
        tensor.fill(0);
    })?;
    let outputs = output_specs
        .iter()
        .map(|spec| create_buffer(&environment, spec, spec.element))
        .collect::<Result<Vec<_>, _>>()?;

    let Common { packed, delegate } = &bytes.0.litert;
    if delegate.get().is_none() {
        let left = list_undelegated(
            bytes,
            &environment,
            &model,
            &input,
            &outputs,
            &signature_order,
        )?;
        delegate.get_or_init(|| describe_delegate(operators, &left));
        packed.move_to_huge_pages();
    }
    let options = create_options(threads, bytes)?;
    let compiled = compile(&environment, &model, &options)?;
    run(&compiled, &input, &outputs, &signature_order).map_err(does_not_run)?;
    let delegate = delegate.get().expect("just found").clone();
    let version = env!("SCANSENTRY_LITERT_VERSION").to_owned();
    Ok(LiteRt {
        info: EngineInfo {
            runtime: "LiteRT",
            version,
            delegate,
            threads,
        },
        input,
        outputs,
        compiled,
        _options: options,
        _model: model,
        _environment: stderr::DropQuietly::new(environment),
        _bytes: bytes.clone(),
        signature_order,
        input_specs: [input_spec],
        flips,
        output_specs,
    })
}

/// What the first engine of a model leaves for the others.
#[derive(Debug, Default)]
pub(super) struct Common {
    packed: Packed,
    /// Who runs the operators.
    delegate: OnceLock<String>,
}

/// A model compiled by LiteRT for the CPU, with its input and output buffers.
pub(super) struct LiteRt {
    input: Owned<sys::LiteRtTensorBufferT>,
    /// In the model's order, like `output_specs`.
    outputs: Vec<Owned<sys::LiteRtTensorBufferT>>,
    compiled: Owned<sys::LiteRtCompiledModelT>,
    _options: Owned<sys::LiteRtOptionsT>,
    _model: Owned<sys::LiteRtModelT>,
    _environment: stderr::DropQuietly<Owned<sys::LiteRtEnvironmentT>>,
    _bytes: ModelBytes,
    /// `outputs[signature_order[i]]` is the i-th output of the signature, which is the order that running wants.
    signature_order: Vec<usize>,
    input_specs: [TensorSpec; 1],
    /// See [`ModelFile`].
    flips: bool,
    output_specs: Vec<TensorSpec>,
    info: EngineInfo,
}

// SAFETY: LiteRT ties none of these objects to the thread that made them; its thread pool is its own. All access goes
// through `&mut self`, so there is never more than one thread in them.
unsafe impl Send for LiteRt {}

impl Engine for LiteRt {
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
        write_buffer(&self.input, self.input_specs[0].bytes(), self.flips, fill)?;
        run(
            &self.compiled,
            &self.input,
            &self.outputs,
            &self.signature_order,
        )
        .map_err(|status| EngineError::Run(status.to_string()))?;
        outputs.resize_with(self.outputs.len(), Vec::new);
        for ((buffer, spec), output) in self.outputs.iter().zip(&self.output_specs).zip(outputs) {
            read_buffer(buffer, spec.bytes(), output)?;
        }
        Ok(())
    }
}

/// LiteRT's context: which accelerators there are.
fn create_environment() -> Result<Owned<sys::LiteRtEnvironmentT>, EngineError> {
    // Only the CPU: else it looks for GPU and NPU libraries beside the program.
    let value = i64::from(sys::kLiteRtHwAcceleratorCpu);
    let options = [sys::LiteRtEnvOption {
        tag: sys::kLiteRtEnvOptionTagAutoRegisterAccelerators,
        value: sys::LiteRtAny {
            type_: sys::kLiteRtAnyTypeInt,
            __bindgen_anon_1: sys::LiteRtAny__bindgen_ty_1 { int_value: value },
        },
    }];
    // SAFETY: `options` holds one option for the duration of the call, which copies it.
    create(sys::LiteRtDestroyEnvironment, |out| unsafe {
        sys::LiteRtCreateEnvironment(1, options.as_ptr(), out)
    })
    .map_err(|status| EngineError::Load(format!("the runtime does not start: {status}")))
}

fn create_model(bytes: &ModelBytes) -> Result<Owned<sys::LiteRtModelT>, EngineError> {
    // SAFETY: the bytes stay where they are until after the model is destroyed: see the order of `LiteRt`'s fields.
    create(sys::LiteRtDestroyModel, |out| unsafe {
        sys::LiteRtCreateModelFromBuffer(bytes.as_ptr().cast(), bytes.len(), out)
    })
    .map_err(|status| EngineError::Load(status.to_string()))
}

fn create_options(
    threads: usize,
    model: &ModelBytes,
) -> Result<Owned<sys::LiteRtOptionsT>, EngineError> {
    let failed =
        |status: Status| EngineError::Load(format!("the runtime refuses its options: {status}"));
    // SAFETY: `out` is where the function writes the new handle.
    let options = create(sys::LiteRtDestroyOptions, |out| unsafe {
        sys::LiteRtCreateOptions(out)
    })
    .map_err(failed)?;
    // SAFETY: the handle is live.
    check(unsafe {
        sys::LiteRtSetOptionsHardwareAccelerators(options.raw(), sys::kLiteRtHwAcceleratorCpu)
    })
    .map_err(failed)?;

    // What `LrtGetOpaqueCpuOptionsData` of litert_cpu_options.h makes; the library does not export that function.
    let packed = model.0.litert.packed.descriptor();
    let packed = packed.map(|descriptor| format!("weight_cache_file_descriptor = {descriptor}\n"));
    let toml = format!("num_threads = {threads}\n{}", packed.unwrap_or_default());
    add_opaque_options(&options, c"xnnpack", &toml).map_err(failed)?;
    Ok(options)
}

/// Adds one block of options: an identifier and a text in TOML.
fn add_opaque_options(
    options: &Owned<sys::LiteRtOptionsT>,
    identifier: &CStr,
    toml: &str,
) -> Result<(), Status> {
    unsafe extern "C" fn free_payload(payload: *mut c_void) {
        // SAFETY: the runtime hands back, once, the pointer that `CString::into_raw` gave it.
        drop(unsafe { CString::from_raw(payload.cast::<c_char>()) });
    }
    let payload = CString::new(toml).expect("no NUL in options").into_raw();
    let mut opaque = ptr::null_mut();
    // SAFETY: identifier and payload are C strings; the payload now belongs to the options, which free it by `free_payload`.
    let status = unsafe {
        sys::LiteRtCreateOpaqueOptions(
            identifier.as_ptr(),
            payload.cast(),
            Some(free_payload),
            &raw mut opaque,
        )
    };
    if let Err(status) = check(status) {
        // SAFETY: nothing took the payload over.
        drop(unsafe { CString::from_raw(payload) });
        return Err(status);
    }
    // SAFETY: both handles are live; `options` takes over `opaque`.
    check(unsafe { sys::LiteRtAddOpaqueOptions(options.raw(), opaque) })
}

fn compile(
    environment: &Owned<sys::LiteRtEnvironmentT>,
    model: &Owned<sys::LiteRtModelT>,
    options: &Owned<sys::LiteRtOptionsT>,
) -> Result<Owned<sys::LiteRtCompiledModelT>, EngineError> {
    // SAFETY: the three handles are live, and outlive the compiled model: see the order of `LiteRt`'s fields.
    create(sys::LiteRtDestroyCompiledModel, |out| unsafe {
        sys::LiteRtCreateCompiledModel(environment.raw(), model.raw(), options.raw(), out)
    })
    .map_err(|status| EngineError::Load(status.to_string()))
}

fn run(
    compiled: &Owned<sys::LiteRtCompiledModelT>,
    input: &Owned<sys::LiteRtTensorBufferT>,
    outputs: &[Owned<sys::LiteRtTensorBufferT>],
    signature_order: &[usize],
) -> Result<(), Status> {
    let mut inputs = [input.raw()];
    let mut results: Vec<_> = signature_order.iter().map(|&i| outputs[i].raw()).collect();
    // SAFETY: all handles are live, and both arrays hold as many buffers as their counts say, in the signature's order.
    check(unsafe {
        sys::LiteRtRunCompiledModel(
            compiled.raw(),
            SIGNATURE,
            inputs.len(),
            inputs.as_mut_ptr(),
            results.len(),
            results.as_mut_ptr(),
        )
    })
}

/// Compiling accepts operators that the runtime does not have, among others: only running shows them.
fn does_not_run(status: Status) -> EngineError {
    EngineError::Load(format!("it does not run: {status}"))
}

/// Who runs the operators of the main graph, given the kinds of those that XNNPACK leaves to the built-in kernels.
fn describe_delegate(operators: usize, left: &[String]) -> String {
    let share = format!(
        "XNNPACK ({} of {operators} operators",
        operators.saturating_sub(left.len())
    );
    if left.is_empty() {
        return share + ")";
    }
    let mut counts = BTreeMap::<&str, usize>::new();
    for kind in left {
        *counts.entry(kind).or_default() += 1;
    }
    let kinds: Vec<_> = counts
        .into_iter()
        .map(|(kind, count)| format!("{count} {kind}"))
        .collect();
    format!("{share}; on built-in kernels: {})", kinds.join(", "))
}

/// The kinds of the operators that XNNPACK leaves to the built-in kernels, one entry an operator.
///
/// Only a profiler says which. So a copy of the model is compiled with one, run on zeros, and thrown away; it also packs the weights for the engines that
/// come after it.
fn list_undelegated(
    bytes: &ModelBytes,
    environment: &Owned<sys::LiteRtEnvironmentT>,
    model: &Owned<sys::LiteRtModelT>,
    input: &Owned<sys::LiteRtTensorBufferT>,
    outputs: &[Owned<sys::LiteRtTensorBufferT>],
    signature_order: &[usize],
) -> Result<Vec<String>, EngineError> {
    let failed = |status: Status| EngineError::Load(format!("the profiler fails: {status}"));
    let options = create_options(1, bytes)?;
    add_opaque_options(
        &options,
        c"runtime_options_string",
        "enable_profiling = true\n",
    )
    .map_err(failed)?;
    let copy = compile(environment, model, &options)?;
    // SAFETY (here and below): the copy is live and owns the profiler; the last argument is written to.
    let profiler = get(|out| unsafe { sys::LiteRtCompiledModelGetProfiler(copy.raw(), out) })?;
    check(unsafe { profiling::LiteRtStartProfiler(profiler) }).map_err(failed)?;
    run(&copy, input, outputs, signature_order).map_err(does_not_run)?;
    check(unsafe { profiling::LiteRtStopProfiler(profiler) }).map_err(failed)?;

    let count = get(|out| unsafe { profiling::LiteRtGetNumProfilerEvents(profiler, out) })?;
    let mut events = vec![profiling::Event::EMPTY; usize::try_from(count).unwrap_or(0)];
    // SAFETY: `events` has room for `count` events.
    check(unsafe { profiling::LiteRtGetProfilerEvents(profiler, count, events.as_mut_ptr()) })
        .map_err(failed)?;
    Ok(events
        .iter()
        // What a delegate runs has event types of its own.
        .filter(|event| event.kind == sys::OPERATOR_INVOKE_EVENT)
        // SAFETY: tags are C strings that belong to the profiler, which lives as long as the copy.
        .map(|event| unsafe { text(event.tag) })
        .collect())
}

/// The part of `litert_profiler.h` that is needed; litert-sys leaves that header out.
mod profiling {
    use super::{c_char, c_int, sys};

    #[derive(Clone, Copy)]
    #[repr(C)]
    pub(super) struct Event {
        pub(super) tag: *const c_char,
        pub(super) kind: sys::LiteRtProfilerEventType,
        pub(super) start_and_elapsed_us: [u64; 2],
        pub(super) memory_before_and_after: [usize; 6],
        pub(super) metadata: [u64; 2],
        /// 0 LiteRT, 1 the interpreter, 2 a delegate.
        pub(super) source: u32,
    }

    impl Event {
        pub(super) const EMPTY: Self = Self {
            tag: std::ptr::null(),
            kind: 0,
            start_and_elapsed_us: [0; 2],
            memory_before_and_after: [0; 6],
            metadata: [0; 2],
            source: 0,
        };
    }

    unsafe extern "C" {
        pub(super) fn LiteRtStartProfiler(profiler: sys::LiteRtProfiler) -> sys::LiteRtStatus;
        pub(super) fn LiteRtStopProfiler(profiler: sys::LiteRtProfiler) -> sys::LiteRtStatus;
        pub(super) fn LiteRtGetNumProfilerEvents(
            profiler: sys::LiteRtProfiler,
            count: *mut c_int,
        ) -> sys::LiteRtStatus;
        pub(super) fn LiteRtGetProfilerEvents(
            profiler: sys::LiteRtProfiler,
            count: c_int,
            events: *mut Event,
        ) -> sys::LiteRtStatus;
    }
}

fn create_buffer(
    environment: &Owned<sys::LiteRtEnvironmentT>,
    spec: &TensorSpec,
    element: ElementType,
) -> Result<Owned<sys::LiteRtTensorBufferT>, EngineError> {
    let mut layout = sys::LiteRtLayout::default();
    layout.set_rank(spec.shape.len() as u32);
    for (slot, &extent) in layout.dimensions.iter_mut().zip(&spec.shape) {
        *slot = i32::try_from(extent).expect("read from an i32");
    }
    let element_type = match element {
        ElementType::Int8 => sys::kLiteRtElementTypeInt8,
        ElementType::UInt8 => sys::kLiteRtElementTypeUInt8,
        ElementType::Float32 => sys::kLiteRtElementTypeFloat32,
    };
    let tensor_type = sys::LiteRtRankedTensorType {
        element_type,
        layout,
    };
    // SAFETY: the environment is live and outlives the buffer; `tensor_type` is copied.
    create(sys::LiteRtDestroyTensorBuffer, |out| unsafe {
        sys::LiteRtCreateManagedTensorBuffer(
            environment.raw(),
            sys::kLiteRtTensorBufferTypeHostMemory,
            &raw const tensor_type,
            spec.bytes(),
            out,
        )
    })
    .map_err(|status| EngineError::Tensor {
        name: spec.name.clone(),
        problem: format!("no buffer for it: {status}"),
    })
}

/// Has `fill` write the buffer's `len` bytes, exactly as many as it was made for, and flips them where the model `flips` them.
fn write_buffer(
    buffer: &Owned<sys::LiteRtTensorBufferT>,
    len: usize,
    flips: bool,
    fill: &mut dyn FnMut(&mut [u8]),
) -> Result<(), EngineError> {
    let memory = lock(buffer, sys::kLiteRtTensorBufferLockModeWrite)?;
    // SAFETY: the buffer was created with `len` bytes, is host memory of the runtime, whose bytes have some value, and is locked until the call below; the slice
    // ends before it.
    let tensor = unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), len) };
    fill(tensor);
    if flips {
        flip(tensor);
    }
    unlock(buffer)
}

/// Copies the buffer's `len` bytes, exactly as many as it was made for, to `bytes`.
fn read_buffer(
    buffer: &Owned<sys::LiteRtTensorBufferT>,
    len: usize,
    bytes: &mut Vec<u8>,
) -> Result<(), EngineError> {
    let memory = lock(buffer, sys::kLiteRtTensorBufferLockModeRead)?;
    bytes.clear();
    // SAFETY: the buffer was created with `len` bytes, is host memory that the run has written, and is locked until the
    // call below; the slice ends before it.
    bytes.extend_from_slice(unsafe { std::slice::from_raw_parts(memory.as_ptr(), len) });
    unlock(buffer)
}

fn lock(
    buffer: &Owned<sys::LiteRtTensorBufferT>,
    mode: sys::LiteRtTensorBufferLockMode,
) -> Result<NonNull<u8>, EngineError> {
    let mut memory = ptr::null_mut();
    // SAFETY: the handle is live; `memory` receives the address.
    check(unsafe { sys::LiteRtLockTensorBuffer(buffer.raw(), &raw mut memory, mode) })
        .map_err(|status| EngineError::Run(format!("a tensor does not lock: {status}")))?;
    NonNull::new(memory.cast()).ok_or_else(|| EngineError::Run("a tensor has no memory".to_owned()))
}

fn unlock(buffer: &Owned<sys::LiteRtTensorBufferT>) -> Result<(), EngineError> {
    // SAFETY: the handle is live and locked.
    check(unsafe { sys::LiteRtUnlockTensorBuffer(buffer.raw()) })
        .map_err(|status| EngineError::Run(format!("a tensor does not unlock: {status}")))
}

/// For each output of the signature, its place among the main graph's outputs: a signature sorts them by name.
fn outputs_in_signature_order(model: &Owned<sys::LiteRtModelT>) -> Result<Vec<usize>, EngineError> {
    // SAFETY (all): the model is live, graph, signature and tensors belong to it, and the last argument is written to.
    let index = get(|out| unsafe { sys::LiteRtGetMainModelSubgraphIndex(model.raw(), out) })?;
    let graph = get(|out| unsafe { sys::LiteRtGetModelSubgraph(model.raw(), index, out) })?;
    let count = get(|out| unsafe { sys::LiteRtGetNumSubgraphOutputs(graph, out) })?;
    let outputs: Vec<sys::LiteRtTensor> = (0..count)
        .map(|i| get(|out| unsafe { sys::LiteRtGetSubgraphOutput(graph, i, out) }))
        .collect::<Result<_, _>>()?;

    let signature =
        get(|out| unsafe { sys::LiteRtGetModelSignature(model.raw(), SIGNATURE, out) })?;
    let count = get(|out| unsafe { sys::LiteRtGetNumSignatureOutputs(signature, out) })?;
    let order = (0..count)
        .map(|i| {
            let tensor = get(|out| unsafe {
                sys::LiteRtGetSignatureOutputTensorByIndex(signature, i, out)
            })?;
            outputs
                .iter()
                .position(|&output| output == tensor)
                .ok_or_else(|| {
                    EngineError::Load(format!(
                        "output {i} of its signature is not an output of its graph"
                    ))
                })
        })
        .collect::<Result<Vec<_>, _>>()?;
    if order.len() == outputs.len() {
        Ok(order)
    } else {
        Err(EngineError::Load(format!(
            "its signature has {} outputs and its graph {}; expected the same",
            order.len(),
            outputs.len()
        )))
    }
}

/// A handle of the runtime and the function that destroys it.
struct Owned<T> {
    raw: NonNull<T>,
    destroy: unsafe extern "C" fn(*mut T),
}

impl<T> Owned<T> {
    fn raw(&self) -> *mut T {
        self.raw.as_ptr()
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: the handle came from the create function that belongs to `destroy`, and this is its only owner.
        unsafe { (self.destroy)(self.raw.as_ptr()) }
    }
}

/// Calls `make` with the place for a new handle, which `destroy` will destroy.
fn create<T>(
    destroy: unsafe extern "C" fn(*mut T),
    make: impl FnOnce(*mut *mut T) -> sys::LiteRtStatus,
) -> Result<Owned<T>, Status> {
    let mut raw = ptr::null_mut();
    check(make(&raw mut raw))?;
    NonNull::new(raw)
        .map(|raw| Owned { raw, destroy })
        .ok_or(Status(sys::kLiteRtStatusErrorUnknown))
}

/// Calls `read` with the place for its answer.
///
/// `T` is a plain C type of which all-zero bytes are a value: a number, a handle, a struct of numbers.
fn get<T: Copy>(read: impl FnOnce(*mut T) -> sys::LiteRtStatus) -> Result<T, EngineError> {
    let mut answer = MaybeUninit::<T>::zeroed();
    check(read(answer.as_mut_ptr())).map_err(|status| EngineError::Load(status.to_string()))?;
    // SAFETY: zeroed is a value of `T`, and a successful call has put its answer there.
    Ok(unsafe { answer.assume_init() })
}

/// A status other than success.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Status(sys::LiteRtStatus);

fn check(status: sys::LiteRtStatus) -> Result<(), Status> {
    if status == sys::kLiteRtStatusOk {
        Ok(())
    } else {
        Err(Status(status))
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The library does not export its own names for them.
        let words = match self.0 {
            sys::kLiteRtStatusErrorInvalidArgument => "invalid argument",
            sys::kLiteRtStatusErrorMemoryAllocationFailure => "out of memory",
            sys::kLiteRtStatusErrorRuntimeFailure => "runtime failure",
            sys::kLiteRtStatusErrorUnsupported => "not supported",
            sys::kLiteRtStatusErrorNotFound => "not found",
            sys::kLiteRtStatusErrorWrongVersion
            | sys::kLiteRtStatusErrorUnsupportedRuntimeVersion => "wrong version",
            sys::kLiteRtStatusErrorFileIO => "file error",
            sys::kLiteRtStatusErrorInvalidFlatbuffer => "not an intact model file",
            sys::kLiteRtStatusErrorCompilation => "compilation failed",
            sys::kLiteRtStatusErrorIndexOOB => "index out of range",
            sys::kLiteRtStatusErrorInvalidGraphInvariant => "inconsistent graph",
            _ => "failed",
        };
        write!(f, "LiteRT: {words} (status {})", self.0)
    }
}

/// Copies a C string.
///
/// # Safety
///
/// `chars` points to a C string, or is null.
unsafe fn text(chars: *const c_char) -> String {
    if chars.is_null() {
        return String::new();
    }
    // SAFETY: the caller's promise.
    unsafe { CStr::from_ptr(chars) }
        .to_string_lossy()
        .into_owned()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;
    use std::path::Path;

    use rustix::fs::fstat;

    use super::super::packed::HUGE_PAGE;
    use super::super::{Runtime, load};
    use super::*;

    fn inode(model: &ModelBytes) -> u64 {
        fstat(model.0.litert.packed.file()).unwrap().st_ino
    }

    /// Descriptors of the packed weights of `model` in this process.
    fn open(model: &ModelBytes) -> usize {
        let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
        descriptors
            .filter_map(|entry| std::fs::metadata(entry.ok()?.path()).ok())
            .filter(|file| file.ino() == inode(model))
            .count()
    }

    /// How often this process has mapped them.
    fn mapped(model: &ModelBytes) -> usize {
        let inode = format!(" {} ", inode(model));
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        maps.lines()
            .filter(|line| line.contains("packed weights") && line.contains(&inode))
            .count()
    }

    #[test]
    fn without_the_operator_that_flips_the_picture_the_answers_are_the_same() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        for bundle in ["braintumor", "braintumor-small"] {
            let bytes = std::fs::read(root.join(format!("models/{bundle}/model.tflite"))).unwrap();
            let whole = ModelBytes::copied(&bytes, |bytes| ModelFile::read(bytes));
            let mut engines = [ModelBytes::copy_of(&bytes), whole]
                .map(|model| load(Runtime::LiteRt, &model, 2).unwrap());
            let inputs = engines[0].inputs().to_vec();
            assert_eq!(inputs, engines[1].inputs(), "{bundle}");
            let mut state = 1_u32;
            for _ in 0..5 {
                // A linear congruential generator (Numerical Recipes).
                let noise = std::iter::repeat_with(|| {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    state.to_be_bytes()[0]
                });
                let input: Vec<u8> = noise.take(inputs[0].bytes()).collect();
                let [left, whole] = &mut engines;
                let (mut ours, mut theirs) = (Vec::new(), Vec::new());
                left.run(&input, &mut ours).unwrap();
                whole.run(&input, &mut theirs).unwrap();
                assert_eq!(ours, theirs, "{bundle}");
            }
            assert_ne!(engines[0].info().delegate, engines[1].info().delegate);
        }
    }

    #[test]
    fn engines_of_a_model_share_its_packed_weights() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let bytes = std::fs::read(root.join("models/braintumor/model.tflite")).unwrap();
        let model = ModelBytes::copy_of(&bytes);
        let load = |threads| load(Runtime::LiteRt, &model, threads).unwrap();
        let mut engines = vec![load(2)];
        // The one that writes the file may map it in pieces.
        let first = mapped(&model);
        // All engines can map them as huge pages, and none packs its own.
        let size = fstat(model.0.litert.packed.file()).unwrap().st_size;
        assert_eq!(size % HUGE_PAGE as i64, 0);
        engines.extend([load(1), load(1)]);
        assert_eq!(mapped(&model), first + 2);
        let mut answers = Vec::new();
        for engine in &mut engines {
            let input: Vec<u8> = (0..engine.inputs()[0].bytes()).map(|i| i as u8).collect();
            let mut outputs = Vec::new();
            engine.run(&input, &mut outputs).unwrap();
            assert_eq!(
                engine.info().delegate,
                "XNNPACK (61 of 64 operators; on built-in kernels: 1 AVERAGE_POOL_2D, 2 QUANTIZE)"
            );
            answers.push(outputs);
        }
        assert!(answers[0] == answers[1] && answers[1] == answers[2]);
        drop(engines);
        assert_eq!((mapped(&model), open(&model)), (0, 1));
    }
}
