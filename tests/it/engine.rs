//! The inference engines of this build on tiny models of every kind. `tests/fixtures/models/generate.py` makes them and
//! prints what they answer; the expected values here are its.

use std::fs;
use std::path::Path;

use rustix::thread::{Pid, sched_getaffinity};
use scansentry::engine::{
    self, ElementType, Engine, ModelBytes, QuantParams, RUNTIMES, Runtime, Shared, TensorSpec,
};
use scansentry::imaging::Picture;
use scansentry::imaging::decode::{Limits, Source};
use scansentry::imaging::resize::{ResizeFilter, ResizeSpec, Resizer};
use scansentry::imaging::roi::{CropSpec, RoiFinder};

use crate::support::{Steps, real_images, shipped_bundles, slices};

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/models")
        .join(format!("{name}.tflite"));
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn load(runtime: Runtime, name: &str) -> Box<dyn Engine> {
    engine::load(runtime, &ModelBytes::copy_of(&fixture(name)), 1)
        .unwrap_or_else(|error| panic!("{name} on {runtime:?}: {error}"))
}

fn refused(runtime: Runtime, bytes: &[u8]) -> String {
    match engine::load(runtime, &ModelBytes::copy_of(bytes), 1) {
        Ok(engine) => panic!("loaded: {:?}", engine.info()),
        Err(error) => error.to_string(),
    }
}

/// 0, 5, 10, ... 235: the picture that the generator shows to its models.
fn ramp() -> impl Iterator<Item = u8> {
    (0..48).map(|i| i * 5)
}

fn image_spec(element: ElementType, quant: Option<QuantParams>) -> TensorSpec {
    TensorSpec {
        name: "serving_default_image:0".to_owned(),
        shape: vec![1, 4, 4, 3],
        element,
        quant,
    }
}

fn run(engine: &mut dyn Engine, input: &[u8]) -> Vec<Vec<u8>> {
    let mut outputs = Vec::new();
    engine.run(input, &mut outputs).unwrap();
    outputs
}

/// Quantized answers may differ by a step or two between engines and architectures.
fn assert_within_two_steps(actual: &[u8], expected: &[u8]) {
    assert_eq!(actual.len(), expected.len());
    for (a, e) in actual.iter().zip(expected) {
        assert!(a.abs_diff(*e) <= 2, "{actual:?} is not {expected:?}");
    }
}

#[test]
fn float32_in_and_out() {
    for &runtime in RUNTIMES {
        let mut engine = load(runtime, "float32");
        assert_eq!(engine.inputs(), [image_spec(ElementType::Float32, None)]);
        assert_eq!(engine.outputs()[0].shape, [1, 1]);
        assert_eq!(engine.outputs()[0].quant, None);

        let input: Vec<u8> = ramp()
            .flat_map(|level| f32::from(level).to_ne_bytes())
            .collect();
        let outputs = run(&mut *engine, &input);
        let score = f32::from_ne_bytes(outputs[0][..].try_into().unwrap());
        assert!((score - 0.381_219_54).abs() < 1e-5, "{score}");
    }
}

#[test]
fn uint8_in_and_out() {
    for &runtime in RUNTIMES {
        let mut engine = load(runtime, "uint8");
        let pixels = QuantParams {
            scale: 1.0,
            zero_point: 0,
        };
        assert_eq!(
            engine.inputs(),
            [image_spec(ElementType::UInt8, Some(pixels))]
        );
        assert_eq!(
            engine.outputs()[0].quant,
            Some(QuantParams {
                scale: 1.0 / 256.0,
                zero_point: 0
            })
        );
        let outputs = run(&mut *engine, &ramp().collect::<Vec<_>>());
        assert_within_two_steps(&outputs[0], &[97]);
    }
}

#[test]
fn int8_in_and_out() {
    for &runtime in RUNTIMES {
        let mut engine = load(runtime, "int8");
        let pixels = QuantParams {
            scale: 1.0,
            zero_point: -128,
        };
        assert_eq!(
            engine.inputs(),
            [image_spec(ElementType::Int8, Some(pixels))]
        );
        assert_eq!(
            engine.outputs()[0].quant,
            Some(QuantParams {
                scale: 1.0 / 256.0,
                zero_point: -128
            })
        );
        // A level minus 128 as a two's complement byte is the level with its top bit flipped.
        let outputs = run(
            &mut *engine,
            &ramp().map(|level| level ^ 0x80).collect::<Vec<_>>(),
        );
        assert_within_two_steps(&[outputs[0][0] ^ 0x80], &[97]);
    }
}

#[test]
fn two_outputs_come_in_the_models_order() {
    for &runtime in RUNTIMES {
        let mut engine = load(runtime, "uint8-two-outputs");
        let shapes: Vec<_> = engine
            .outputs()
            .iter()
            .map(|spec| spec.shape.clone())
            .collect();
        assert_eq!(shapes, [vec![1, 2, 2, 1], vec![1, 1]]);
        let outputs = run(&mut *engine, &ramp().collect::<Vec<_>>());
        assert_within_two_steps(&outputs[0], &[42, 72, 162, 192]);
        assert_within_two_steps(&outputs[1], &[97]);
    }
}

#[test]
fn runs_again_and_again_into_the_same_vectors() {
    for &runtime in RUNTIMES {
        let mut engine = load(runtime, "uint8-two-outputs");
        let (dark, ramp) = (vec![0; 48], ramp().collect::<Vec<_>>());
        let mut outputs = Vec::new();
        engine.run(&ramp, &mut outputs).unwrap();
        let (first, place) = (outputs.clone(), outputs[0].as_ptr());
        engine.run(&dark, &mut outputs).unwrap();
        assert_ne!(outputs, first);
        engine.run(&ramp, &mut outputs).unwrap();
        assert_eq!(outputs, first);
        assert_eq!(outputs[0].as_ptr(), place);
    }
}

#[test]
fn an_engine_moves_to_another_thread_and_several_run_at_once() {
    for &runtime in RUNTIMES {
        let answers: Vec<_> = (0..4)
            .map(|_| load(runtime, "uint8"))
            .map(|mut engine| {
                std::thread::spawn(move || run(&mut *engine, &ramp().collect::<Vec<_>>()))
            })
            .map(|thread| thread.join().unwrap())
            .collect();
        assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
    }
}

#[test]
fn an_input_of_the_wrong_size_is_an_error() {
    for &runtime in RUNTIMES {
        let mut engine = load(runtime, "uint8");
        let error = engine
            .run(&[0; 47], &mut Vec::new())
            .unwrap_err()
            .to_string();
        assert_eq!(
            error,
            "inference failed: input has 47 bytes; the model takes 48"
        );
    }
}

#[test]
fn info_names_the_runtime_and_who_runs_the_operators() {
    let check = |name: &str, on_litert: &str, on_tflite: &str| {
        for &runtime in RUNTIMES {
            let engine = load(runtime, name);
            let info = engine.info();
            let expected = match runtime {
                Runtime::LiteRt => ("LiteRT", "2.1.4", on_litert),
                Runtime::TfLite => ("TensorFlow Lite", "1.15.5", on_tflite),
            };
            let found = (info.runtime, &info.version[..], &info.delegate[..]);
            assert_eq!(found, expected, "{name}");
        }
    };
    check(
        "float32",
        "XNNPACK (4 of 4 operators)",
        "built-in kernels (4 operators)",
    );
    check(
        "uint8",
        "XNNPACK (4 of 5 operators; on built-in kernels: 1 QUANTIZE)",
        "built-in kernels (5 operators)",
    );
    check(
        "float32-partly-delegated",
        "XNNPACK (3 of 4 operators; on built-in kernels: 1 TOPK_V2)",
        "built-in kernels (4 operators)",
    );
}

/// LiteRT starts one thread fewer than it is told to use: the caller's is one of them. After a run the others are kept off the processor that it was
/// on. Other tests run beside this one in the same process, so it counts in a process of its own.
#[test]
fn the_thread_count_is_a_setting() {
    if !RUNTIMES.contains(&Runtime::LiteRt) {
        eprintln!("not tested: this build has no LiteRT");
        return;
    }
    let name = "the_thread_count_is_a_setting";
    if std::env::var_os("SCANSENTRY_TEST_ALONE").is_none() {
        let alone = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", &format!("engine::{name}"), "--test-threads=1"])
            .env("SCANSENTRY_TEST_ALONE", "1")
            .output()
            .unwrap();
        let output = String::from_utf8_lossy(&alone.stdout);
        assert!(
            alone.status.success() && output.contains("1 passed"),
            "{output}"
        );
        return;
    }
    let threads_now = || fs::read_dir("/proc/self/task").unwrap().count();
    let before = threads_now();
    for wanted in [1, 2, 3] {
        let mut engine = engine::load(
            Runtime::LiteRt,
            &ModelBytes::copy_of(&fixture("float32")),
            wanted,
        )
        .unwrap();
        assert_eq!(engine.info().threads, wanted);
        assert_eq!(threads_now() - before, wanted - 1, "{wanted} threads");
        let input = vec![0; engine.inputs()[0].bytes()];
        engine.run(&input, &mut Vec::new()).unwrap();
        let others: Vec<_> = fs::read_dir("/proc/self/task")
            .unwrap()
            .map(|task| task.unwrap())
            .filter(|task| {
                let name = fs::read_to_string(task.path().join("comm")).unwrap();
                name.starts_with("infer-")
            })
            .map(|task| task.file_name().to_str().unwrap().parse().unwrap())
            .collect();
        assert_eq!(others.len(), wanted - 1);
        let processors = |thread| sched_getaffinity(thread).unwrap().count();
        let ours = processors(None);
        for other in others {
            assert_eq!(processors(Pid::from_raw(other)), (ours - 1).max(1));
        }
    }
    assert_eq!(threads_now(), before);
}

#[test]
fn models_that_do_not_fit_are_refused_in_plain_words() {
    let check = |name: &str, expected: &str| {
        for &runtime in RUNTIMES {
            assert_eq!(refused(runtime, &fixture(name)), expected, "{name}");
        }
    };
    check(
        "float32-dynamic-batch",
        "model tensor serving_default_image:0: has the shape [-1, 4, 4, 3]; expected fixed sizes (convert with a fixed batch of 1)",
    );
    check(
        "float32-two-inputs",
        "model does not load: 2 inputs; expected exactly one, the picture",
    );
    check(
        "int32",
        "model tensor serving_default_image:0: has element type int32; expected int8, uint8 or float32",
    );
    for &runtime in RUNTIMES {
        let refusal = match runtime {
            Runtime::LiteRt => "it does not run: LiteRT: runtime failure (status 3)",
            Runtime::TfLite => "TensorFlow Lite: failed to allocate tensors",
        };
        assert_eq!(
            refused(runtime, &fixture("float32-custom-operator")),
            format!(
                "model does not load: {refusal}: Encountered unresolved custom op: MatrixDeterminant"
            )
        );
    }
}

/// The shipped model, on every engine of this build: made pictures, and real ones where they are.
#[test]
fn all_engines_give_the_same_answers() {
    let [first, others @ ..] = RUNTIMES else {
        panic!("no engine")
    };
    if others.is_empty() {
        eprintln!("not compared: this build has one engine; `make test-tflite` has two");
        return;
    }
    for bundle in shipped_bundles() {
        let model = ModelBytes::copy_of(&fs::read(bundle.join("model.tflite")).unwrap());
        let mut reference = engine::load(*first, &model, 1).unwrap();
        let inputs = model_inputs(reference.inputs()[0].bytes());
        for &other in others {
            let mut engine = engine::load(other, &model, 1).unwrap();
            assert_eq!(engine.inputs(), reference.inputs());
            assert_eq!(engine.outputs(), reference.outputs());
            let mut steps = Steps::default();
            for input in &inputs {
                let (expected, actual) = (run(&mut *reference, input), run(&mut *engine, input));
                steps.add(expected[0][0].abs_diff(actual[0][0]));
            }
            println!("{}: {other:?} against {first:?}: {steps}", bundle.display());
            steps.assert_close();
        }
    }
}

/// One worker alone has the shared engine and its two threads, one of several its own.
#[test]
fn alone_or_beside_others_the_answer_is_the_same() {
    for bundle in shipped_bundles() {
        let model = ModelBytes::copy_of(&fs::read(bundle.join("model.tflite")).unwrap());
        for &runtime in RUNTIMES {
            let its_model = model.clone();
            let load = move || engine::load(runtime, &its_model, 2);
            let shared = Shared::new(load().unwrap(), load);
            let mut engine = engine::load_beside(runtime, &model, shared.clone());
            for input in model_inputs(engine.inputs()[0].bytes()) {
                assert!(engine.settle());
                let _one = shared.begin();
                let alone = run(&mut *engine, &input);
                let _another = shared.begin();
                assert!(run(&mut *engine, &input) == alone, "{}", bundle.display());
            }
        }
    }
}

/// Cropped and resized pictures as the model takes them: slices with and without a lesion, and up to 40 real ones.
fn model_inputs(bytes: usize) -> Vec<Vec<u8>> {
    let mut files = slices(12);
    match real_images(40) {
        Some(real) => files.extend(real),
        None => eprintln!("not compared on real images: no ../shared/data"),
    }
    let limits = Limits::default();
    let mut finder = RoiFinder::new(CropSpec::default());
    let mut resizer = Resizer::new(ResizeSpec {
        width: 224,
        height: 224,
        filter: ResizeFilter::Cubic,
        keep_aspect: false,
    });
    let mut inputs = Vec::new();
    for file in files {
        let picture = Source::open(&file, &limits).and_then(|mut source| source.frame(0));
        // Some are too dark to crop.
        let Some((picture, contour)) = picture
            .ok()
            .and_then(|picture| finder.find(&picture).ok().map(|contour| (picture, contour)))
        else {
            continue;
        };
        inputs.push(match resizer.resize(&picture, contour.roi) {
            Picture::Gray(image) => image.as_raw().iter().flat_map(|&l| [l; 3]).collect(),
            Picture::Rgb(image) => image.as_raw().clone(),
        });
    }
    assert!(inputs.iter().all(|input: &Vec<u8>| input.len() == bytes));
    assert!(inputs.len() >= 12);
    inputs
}

#[test]
fn garbage_is_refused() {
    for &runtime in RUNTIMES {
        assert_eq!(
            refused(runtime, b""),
            "model does not load: 0 bytes; expected a TFLite model of 32 bytes to 2 GiB"
        );
        assert_eq!(
            refused(runtime, &[0x5a; 4096]),
            "model does not load: not a TFLite model: its identifier is not TFL3"
        );
    }
}

#[test]
fn a_truncated_file_is_refused() {
    for &runtime in RUNTIMES {
        for name in ["float32", "uint8-two-outputs"] {
            let whole = fixture(name);
            for len in (8..whole.len() - 64).step_by(7) {
                let error = refused(runtime, &whole[..len]);
                assert!(
                    error.starts_with("model does not load: "),
                    "{name} cut to {len}: {error}"
                );
            }
        }
    }
}
