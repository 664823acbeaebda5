//! The inference engine on tiny models of every kind. `tests/fixtures/models/generate.py` makes them and prints what
//! they answer; the expected values here are its.

use std::fs;
use std::path::Path;

use scansentry::engine::{self, ElementType, Engine, QuantParams, TensorSpec};

fn fixture(name: &str) -> Vec<u8> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/fixtures/models")
        .join(format!("{name}.tflite"));
    fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn load(name: &str) -> Box<dyn Engine> {
    engine::load(&fixture(name), 1).unwrap_or_else(|error| panic!("{name}: {error}"))
}

fn refused(bytes: &[u8]) -> String {
    match engine::load(bytes, 1) {
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

/// Quantized answers may differ by a step between architectures.
fn assert_within_a_step(actual: &[u8], expected: &[u8]) {
    assert_eq!(actual.len(), expected.len());
    for (a, e) in actual.iter().zip(expected) {
        assert!(a.abs_diff(*e) <= 1, "{actual:?} is not {expected:?}");
    }
}

#[test]
fn float32_in_and_out() {
    let mut engine = load("float32");
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

#[test]
fn uint8_in_and_out() {
    let mut engine = load("uint8");
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
    assert_within_a_step(&outputs[0], &[97]);
}

#[test]
fn int8_in_and_out() {
    let mut engine = load("int8");
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
    assert_within_a_step(&[outputs[0][0] ^ 0x80], &[97]);
}

#[test]
fn two_outputs_come_in_the_models_order() {
    let mut engine = load("uint8-two-outputs");
    let shapes: Vec<_> = engine
        .outputs()
        .iter()
        .map(|spec| spec.shape.clone())
        .collect();
    assert_eq!(shapes, [vec![1, 2, 2, 1], vec![1, 1]]);
    let outputs = run(&mut *engine, &ramp().collect::<Vec<_>>());
    assert_within_a_step(&outputs[0], &[42, 72, 162, 192]);
    assert_within_a_step(&outputs[1], &[97]);
}

#[test]
fn runs_again_and_again_into_the_same_vectors() {
    let mut engine = load("uint8-two-outputs");
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

#[test]
fn an_engine_moves_to_another_thread_and_several_run_at_once() {
    let answers: Vec<_> = (0..4)
        .map(|_| load("uint8"))
        .map(|mut engine| {
            std::thread::spawn(move || run(&mut *engine, &ramp().collect::<Vec<_>>()))
        })
        .map(|thread| thread.join().unwrap())
        .collect();
    assert!(answers.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn an_input_of_the_wrong_size_is_an_error() {
    let mut engine = load("uint8");
    let error = engine
        .run(&[0; 47], &mut Vec::new())
        .unwrap_err()
        .to_string();
    assert_eq!(
        error,
        "inference failed: input has 47 bytes; the model takes 48"
    );
}

#[test]
fn info_names_the_runtime_and_the_delegates_share() {
    let check = |name: &str, delegate: &str| {
        let engine = load(name);
        let info = engine.info();
        assert_eq!(
            (info.runtime, &info.version[..], &info.delegate[..]),
            ("LiteRT", "2.1.4", delegate),
            "{name}"
        );
    };
    check("float32", "XNNPACK (4 of 4 operators)");
    check(
        "uint8",
        "XNNPACK (4 of 6 operators; on built-in kernels: 2 QUANTIZE)",
    );
    check(
        "float32-partly-delegated",
        "XNNPACK (3 of 4 operators; on built-in kernels: 1 TOPK_V2)",
    );
}

/// The runtime starts one thread fewer than it is told to use: the caller's is one of them. Other tests run beside this
/// one in the same process, so it counts in a process of its own.
#[test]
fn the_thread_count_is_a_setting() {
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
        let engine = engine::load(&fixture("float32"), wanted).unwrap();
        assert_eq!(engine.info().threads, wanted);
        assert_eq!(threads_now() - before, wanted - 1, "{wanted} threads");
    }
    assert_eq!(threads_now(), before);
}

#[test]
fn models_that_do_not_fit_are_refused_in_plain_words() {
    let check =
        |name: &str, expected: &str| assert_eq!(refused(&fixture(name)), expected, "{name}");
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
    check(
        "float32-custom-operator",
        "model does not load: it does not run: LiteRT: runtime failure (status 3): Encountered unresolved custom op: MatrixDeterminant",
    );
}

#[test]
fn garbage_is_refused() {
    assert_eq!(
        refused(b""),
        "model does not load: 0 bytes; expected a TFLite model of 32 bytes to 2 GiB"
    );
    assert_eq!(
        refused(&[0x5a; 4096]),
        "model does not load: not a TFLite model: its identifier is not TFL3"
    );
}

#[test]
fn a_truncated_file_is_refused() {
    for name in ["float32", "uint8-two-outputs"] {
        let whole = fixture(name);
        for len in (8..whole.len() - 64).step_by(7) {
            let error = refused(&whole[..len]);
            assert!(
                error.starts_with("model does not load: "),
                "{name} cut to {len}: {error}"
            );
        }
    }
}
