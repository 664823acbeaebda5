"""An int8 `model.tflite` -> the same network on a grid on which every engine rounds alike, and the proof from the file.

    exact.py --model int8.tflite --pictures plain-u8.npy|index.csv [--run RUN-SEED.npz] --out model.tflite

LiteRT's XNNPACK and TensorFlow Lite 1.15 both sum a convolution in int32, exactly. They differ in the step back to int8, where
sums x become round(x * M) with M = s_in * s_w / s_out of the output channel: XNNPACK multiplies in float32 and rounds once, half
to even; TensorFlow Lite multiplies by M's 31-bit mantissa, rounds, shifts, and rounds again, half away from zero (Jacob et al.
2018, gemmlowp). One value of some hundred comes out a step apart, and 50 layers spread it. Here neither has a choice:

1. M is 2^-n less a relative 2^-24 to 2^-22, never 2^-n itself. The 31-bit mantissa is then 2^31 - d with |x| d < 2^30, so the first
   rounding gives x itself, and only the shift rounds. In float32 the product is x * 2^-n to within 2^-22 of itself.
2. Weights are even and biases odd, so x is odd. Halves are at the odd multiples of 2^(n-1), which is even for n >= 2: an odd x is
   never on one, and at least 1 from it, more than the 2^-22 of x moves it.

So both round to the nearest, and it is one number. What saturates is past the last half in either, as both are monotonous.
Additions have one scale and one zero point on all three sides: their multipliers are powers of two, and nothing is rounded. The
pool divides by 49, an odd number, which has no halves.

The price is a bit and a half of the weights. They are rounded one input after the other, each rounding's error being made up for
by the weights that still follow (GPTQ, Frantar et al. 2022), after a least-squares fit to what the old network's layer gives on
its own inputs: so each layer also makes up for the errors of those before. Biases then keep every channel's mean (Nagel et al. 2019).
"""

import argparse
import copy
import csv
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # its threads wait for each other far longer than these small products take
import numpy as np
from ai_edge_litert.interpreter import Interpreter
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

import flatfile
from convert import check
from preprocess import brain_roi, model_input, read_bgr

LINEAR = ("CONV_2D", "DEPTHWISE_CONV_2D", "FULLY_CONNECTED")
SHIFTS = range(2, 14)  # n: halves are even from 2 on, and |x| <= 2^8 * 2^n stays under what d allows up to 13
LARGEST = 63  # weights are -126 to 126, even
PICTURES = 200
POSITIONS = 200, 40  # of a layer's output in each picture; of a depthwise one's, which has few weights to fit
RIDGE = 0.03  # of the mean variance of a layer's inputs: how strongly the fit is held to the old weights
DAMP = 0.01  # the same, while rounding


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--pictures", type=Path, required=True, help="uint8 [n, 224, 224, 3] (.npy), or index.csv as of train.sh")
    parser.add_argument("--run", type=Path, help="RUN-SEED.npz: what it held back of the .npy is not fitted on")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pictures = of_index(args.pictures) if args.pictures.suffix == ".csv" else of_training(args.pictures, args.run)
    made = args.out.with_suffix(".unproven")
    made.write_bytes(regrid(args.model.read_bytes(), pictures))
    for line in [*check(made), *prove(made)]:
        print(line)
    made.rename(args.out)


def of_training(path: Path, run: Path | None) -> np.ndarray:
    """Up to PICTURES of an array of pictures, none that `run` held back."""
    plain = np.load(path, mmap_mode="r")
    held = np.load(run)["ids"] if run else []
    usable = np.setdiff1d(np.arange(len(plain)), held)
    return plain[np.sort(np.random.default_rng(7).choice(usable, min(PICTURES, len(usable)), replace=False))]


def of_index(path: Path) -> np.ndarray:
    """About PICTURES of the index (file,label,source,...), as many of each source, as the daemon would show them."""
    with path.open() as lines:
        rows = list(csv.DictReader(lines))
    rng, sources, files = np.random.default_rng(7), sorted({row["source"] for row in rows}), []
    for source in sources:
        own = [row["file"] for row in rows if row["source"] == source]
        files += rng.choice(own, min(PICTURES // len(sources), len(own)), replace=False).tolist()
    pictures = [read_bgr(path.parent / file) for file in files]
    return np.stack([model_input(picture, brain_roi(picture)) for picture in pictures])


def regrid(model: bytes, pictures: np.ndarray) -> bytes:
    """`model` on the grid, fitted on uint8 `pictures` [n, height, width, 3] of the kind it is to see."""
    old = flatbuffer_utils.read_model_from_bytearray(bytearray(model))
    new = copy.deepcopy(old)
    operators = new.subgraphs[0].operators
    # Tensor -> its values for every picture [n, ...], in the old network and in the new one.
    before = {int(new.subgraphs[0].inputs[0]): pictures}
    after = dict(before)
    for number, operator in enumerate(operators):
        if name_of(new, operator) in LINEAR:
            layer = Layer(new, operator)
            places = layer.places(before, np.random.default_rng(number))
            layer.fit(layer.patches(before, places), layer.patches(after, places))
            layer.write()
        for graph, values in ((old, before), (new, after)):
            run_alone(graph, number, values)
            needed = {int(i) for later in operators[number + 1 :] for i in later.inputs}
            for tensor in set(values) - needed:
                del values[tensor]
    return flatfile.pack(new)


class Layer:
    """A convolution or the fully connected layer, as matrices: [groups, outputs of a group, inputs of an output].

    A depthwise convolution is a group for each channel, anything else one group. Inputs are counted in their own steps.
    """

    def __init__(self, model: schema.ModelT, operator: schema.OperatorT):
        self.model, self.operator, self.kind = model, operator, name_of(model, operator)
        tensors = model.subgraphs[0].tensors
        self.input, self.kernel, self.bias, self.output = (tensors[i] for i in (*operator.inputs, *operator.outputs))
        self.shape = [int(n) for n in self.kernel.shape]
        self.step_in, self.step_out = (np.float32(t.quantization.scale[0]) for t in (self.input, self.output))
        integers = data_of(model, self.kernel, np.int8).reshape(self.shape).astype(np.float64)
        if self.kind == "DEPTHWISE_CONV_2D":
            matrix = integers.reshape(-1, self.shape[3]).T[:, None, :]  # [channels, 1, taps]
        else:
            matrix = integers.reshape(1, self.shape[0], -1)  # [1, outputs, taps and channels]
        rows = np.asarray(self.kernel.quantization.scale, np.float64).reshape(matrix.shape[0], -1, 1)
        # What a step of the input adds to the output, in steps of the output; and the bias in those.
        self.weights = matrix * rows * float(self.step_in) / float(self.step_out)
        bias = data_of(model, self.bias, np.int32) * np.asarray(self.bias.quantization.scale, np.float64)
        self.offset = bias.reshape(matrix.shape[:2]) / float(self.step_out)

    def places(self, values: dict, rng: np.random.Generator) -> np.ndarray | None:
        """Where in each picture's output to look: int [pictures, at most POSITIONS, 2] (row, column); none of a vector."""
        if self.kind == "FULLY_CONNECTED":
            return None
        height, width = (int(n) for n in self.output.shape[1:3])
        some = min(POSITIONS[self.kind == "DEPTHWISE_CONV_2D"], height * width)
        pictures = range(len(values[int(self.operator.inputs[0])]))
        flat = np.stack([rng.choice(height * width, some, replace=False) for _ in pictures])
        return np.stack(np.divmod(flat, width), -1)

    def patches(self, values: dict, places: np.ndarray | None) -> np.ndarray:
        """The inputs of the outputs at `places`, less their zero point: float32 [groups, samples, inputs]."""
        given = values[int(self.operator.inputs[0])]
        zero = int(self.input.quantization.zeroPoint[0])
        if places is None:
            return given.reshape(1, len(given), -1).astype(np.float32) - zero
        options, (taps_y, taps_x) = self.operator.builtinOptions, self.shape[1:3]
        stride = options.strideH
        before = [
            max((out - 1) * stride + taps - size, 0) // 2 if options.padding == schema.Padding.SAME else 0
            for out, taps, size in zip(self.output.shape[1:3], (taps_y, taps_x), given.shape[1:3], strict=True)
        ]
        found = []
        for picture, where in zip(given, places, strict=True):
            around = ((before[0], taps_y), (before[1], taps_x), (0, 0))
            padded = np.pad(picture, around, constant_values=zero)
            rows = where[:, :1] * stride + np.arange(taps_y)
            columns = where[:, 1:] * stride + np.arange(taps_x)
            cut = padded[rows[:, :, None], columns[:, None, :]].astype(np.float32) - zero  # [places, taps_y, taps_x, channels]
            if self.kind == "DEPTHWISE_CONV_2D":
                found.append(np.moveaxis(cut, 3, 0).reshape(cut.shape[3], len(where), -1))
            else:
                found.append(cut.reshape(1, len(where), -1))
        return np.concatenate(found, 1)

    def fit(self, old: np.ndarray, new: np.ndarray) -> None:
        """Set `shifts`, `integers` and `biases` so that `new` inputs give what the old weights make of the `old` ones."""
        mean_old, mean_new = (inputs.mean(1, keepdims=True) for inputs in (old, new))
        within, across = moment(new - mean_new, new - mean_new), moment(old - mean_old, new - mean_new)
        level = np.maximum(np.trace(within, axis1=1, axis2=2) / within.shape[1], 1e-6)[:, None, None] * np.eye(within.shape[1])
        # Least squares, held to the old weights: target (within + r) = weights (across + r); all but `weights` may be transposed.
        target = np.linalg.solve(within + RIDGE * level, (self.weights @ (across + RIDGE * level)).swapaxes(1, 2)).swapaxes(1, 2)
        self.shifts, self.integers = on_grid(target, within + DAMP * level)
        steps = 2.0 ** self.shifts[..., None]
        mean = self.offset[..., None] + self.weights @ mean_old.swapaxes(1, 2) - self.integers / steps @ mean_new.swapaxes(1, 2)
        self.biases = (2 * np.rint((mean * steps - 1) / 2) + 1)[..., 0]

    def write(self) -> None:
        """Put what was fitted into the model."""
        scales = step_of_weights(self.shifts.ravel(), self.step_in, self.step_out)
        if self.kind == "DEPTHWISE_CONV_2D":
            integers = self.integers[:, 0, :].T
        else:
            integers = self.integers
        buffers = self.model.buffers
        buffers[self.kernel.buffer].data = np.frombuffer(integers.astype(np.int8).tobytes(), np.uint8)
        buffers[self.bias.buffer].data = np.frombuffer(self.biases.ravel().astype("<i4").tobytes(), np.uint8)
        self.kernel.quantization.scale = scales
        self.bias.quantization.scale = self.step_in * scales


def moment(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The mean of a b^T over samples: float64 [groups, inputs, inputs] from float32 [groups, samples, inputs]."""
    return (a.swapaxes(1, 2) @ b).astype(np.float64) / a.shape[1]


def on_grid(target: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n [groups, rows], even integers w [groups, rows, inputs]) with w * 2^-n near `target`, as `weight` [groups, inputs, inputs] measures it."""
    fitting = np.floor(np.log2(2 * LARGEST / np.maximum(np.abs(target).max(2), 1e-12))).astype(int)
    choices = []
    # Or twice as fine, with the largest weights cut off, where that gives less error.
    for shifts in (fitting, fitting + 1):
        shifts = np.clip(shifts, SHIFTS[0], SHIFTS[-1])
        integers = 2 * rounded(target * 2.0 ** (shifts[..., None] - 1), weight)
        left = integers * 2.0 ** -shifts[..., None] - target
        choices.append((shifts, integers, (left @ weight * left).sum(2)))
    (coarse, coarse_integers, error), (fine, fine_integers, fine_error) = choices
    finer = fine_error < error
    return np.where(finer, fine, coarse), np.where(finer[..., None], fine_integers, coarse_integers)


def rounded(exact: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Integers of at most LARGEST for `exact` [groups, rows, inputs], the error of each passed on to the inputs after it (GPTQ)."""
    order = np.argsort(-np.diagonal(weight, axis1=1, axis2=2), axis=1)
    groups = np.arange(len(order))[:, None]
    sorted_weight = weight[groups[:, :, None], order[:, :, None], order[:, None, :]]
    upper = np.linalg.cholesky(np.linalg.inv(sorted_weight)).swapaxes(1, 2)
    left = np.take_along_axis(exact, order[:, None, :], 2)
    whole = np.zeros_like(left)
    for i in range(left.shape[2]):
        whole[:, :, i] = np.clip(np.rint(left[:, :, i]), -LARGEST, LARGEST)
        error = (left[:, :, i] - whole[:, :, i]) / upper[:, i, i, None]
        left[:, :, i:] -= error[:, :, None] * upper[:, None, i, i:]
    return np.take_along_axis(whole, np.argsort(order, 1)[:, None, :], 2)


def step_of_weights(shifts: np.ndarray, step_in: np.float32, step_out: np.float32) -> np.ndarray:
    """The largest float32 s with step_in * s / step_out below 2^-shift in every arithmetic of `mantissas`: float32 [rows]."""
    scales = (2.0 ** -shifts.astype(np.float64) * float(step_out) / float(step_in)).astype(np.float32)
    while (over := np.any([exponent != -shifts for _, exponent in mantissas(step_in, scales, step_out)], 0)).any():
        scales = np.where(over, np.nextafter(scales, np.float32(0)), scales)
    return scales


def mantissas(step_in: np.float32, scales: np.ndarray, step_out: np.float32) -> list[tuple[np.ndarray, np.ndarray]]:
    """(31-bit mantissa, exponent) of the multipliers by TensorFlow Lite's QuantizeMultiplier, their product in float64 and in float32.

    TensorFlow Lite 1.15 has the latter in the fully connected layer (GetQuantizedConvolutionMultipler).
    """
    products = np.float64(step_in) * scales.astype(np.float64), (step_in * scales).astype(np.float64)
    return [normalized(product / np.float64(step_out)) for product in products]


def normalized(multiplier: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(mantissa, exponent): multiplier = mantissa * 2^(exponent - 31), the mantissa a whole number from 2^30 to 2^31 - 1."""
    fraction, exponent = np.frexp(multiplier)
    whole = np.rint(fraction * 2.0**31).astype(np.int64)
    full = whole == 2**31
    return np.where(full, 2**30, whole), np.where(full, exponent + 1, exponent)


def run_alone(model: schema.ModelT, number: int, values: dict[int, np.ndarray]) -> None:
    """Add the outputs of operator `number` to `values`, from its inputs in there."""
    graph, operator = model.subgraphs[0], copy.copy(model.subgraphs[0].operators[number])
    shown = [int(i) for i in operator.inputs if int(i) in values]
    part, tensors = schema.ModelT(), [int(i) for i in (*operator.inputs, *operator.outputs)]
    part.version, part.operatorCodes, part.description = model.version, [model.operatorCodes[operator.opcodeIndex]], model.description
    part.subgraphs, part.buffers = [schema.SubGraphT()], [schema.BufferT()]
    part.subgraphs[0].tensors = []
    for tensor in tensors:
        part.subgraphs[0].tensors.append(copy.copy(graph.tensors[tensor]))
        part.subgraphs[0].tensors[-1].buffer = len(part.buffers)
        part.buffers.append(model.buffers[graph.tensors[tensor].buffer])
    operator.opcodeIndex = 0
    operator.inputs = list(range(len(operator.inputs)))
    operator.outputs = [len(tensors) - 1]
    part.subgraphs[0].operators = [operator]
    part.subgraphs[0].inputs = [tensors.index(i) for i in shown]
    part.subgraphs[0].outputs = operator.outputs
    interpreter = Interpreter(model_content=flatfile.pack(part), num_threads=1)
    interpreter.allocate_tensors()
    given, out = [d["index"] for d in interpreter.get_input_details()], interpreter.get_output_details()[0]["index"]
    found = []
    for k in range(len(values[shown[0]])):
        for target, tensor in zip(given, shown, strict=True):
            interpreter.set_tensor(target, values[tensor][k][None])
        interpreter.invoke()
        found.append(interpreter.get_tensor(out)[0].copy())
    values[tensors[-1]] = np.stack(found)


def name_of(model: schema.ModelT, operator: schema.OperatorT) -> str:
    return flatfile.operator_name(model.operatorCodes[operator.opcodeIndex])


def data_of(model: schema.ModelT, tensor: schema.TensorT, kind: type) -> np.ndarray:
    """A constant's values, flat."""
    return np.frombuffer(bytes(model.buffers[tensor.buffer].data), np.dtype(kind).newbyteorder("<"))


def prove(path: Path) -> list[str]:
    """Raise where the file is not what the module's text says; else a line on each kind of operator."""
    model = flatbuffer_utils.read_model(str(path))
    tensors, lines = model.subgraphs[0].tensors, []

    def refuse(operator: schema.OperatorT, what: str) -> None:
        name = flatfile.text(tensors[int(operator.outputs[0])].name)
        raise SystemExit(f"{path}: {name_of(model, operator)} {name}: {what}; engines would round it differently (exact.py)")

    shifts = []
    for operator in model.subgraphs[0].operators:
        kind = name_of(model, operator)
        sides = [tensors[int(i)] for i in (*operator.inputs, *operator.outputs)]
        scales = [np.asarray(side.quantization.scale if side.quantization and side.quantization.scale is not None else [], np.float32) for side in sides]
        zeros = [list(side.quantization.zeroPoint) if side.quantization and side.quantization.zeroPoint is not None else [] for side in sides]
        if kind in LINEAR:
            (_, kernel, bias, _), (given, steps, _, made) = sides, scales
            weights, biases = data_of(model, kernel, np.int8), data_of(model, bias, np.int32)
            if (weights % 2 != 0).any():
                refuse(operator, "an odd weight")
            if (biases % 2 != 1).any():
                refuse(operator, "an even bias")
            n = -mantissas(given[0], steps, made[0])[0][1]
            for whole, exponent in mantissas(given[0], steps, made[0]):
                if (exponent != -n).any() or (n < SHIFTS[0]).any() or ((2**31 - whole) * 2.0 ** (8 + n) >= 2**30).any():
                    refuse(operator, "a multiplier that is not just below a power of two")
            if (np.abs(given[0] * steps / made[0] * 2.0**n - 1) > 2.0**-22).any():  # float32 throughout, as in XNNPACK
                refuse(operator, "a float32 multiplier that is not next to a power of two")
            shifts += n.tolist()
        elif kind == "ADD":
            if len({float(s[0]) for s in scales}) != 1 or len({int(z[0]) for z in zeros}) != 1:
                refuse(operator, "scales or zero points that differ")
        elif kind == "AVERAGE_POOL_2D":
            options = operator.builtinOptions
            if scales[0][0] != scales[1][0] or zeros[0] != zeros[1] or options.filterHeight * options.filterWidth % 2 == 0:
                refuse(operator, "scales that differ or an even number of cells")
        elif kind == "QUANTIZE":
            if scales[0][0] != scales[1][0]:
                refuse(operator, "scales that differ")
        elif kind not in ("LOGISTIC", "RESHAPE"):
            refuse(operator, "nothing is known of this operator")
    lines.append(f"{len(shifts)} channels with multipliers just below 2^-{min(shifts)} to 2^-{max(shifts)}, even weights, odd biases")
    return lines


if __name__ == "__main__":
    main()
