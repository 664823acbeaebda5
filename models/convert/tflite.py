"""TFLite files: made from a model, and read for what they take, give and need."""

import dataclasses
import re

import numpy as np
import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils
from tensorflow.python.framework.convert_to_constants import convert_variables_to_constants_v2

from common import Refused, first_line

import flatfile

ELEMENTS = {schema.TensorType.FLOAT32: "float32", schema.TensorType.UINT8: "uint8", schema.TensorType.INT8: "int8"}
# Operators through which a picture stays a picture, or a score a score.
CARRIERS = {"CAST", "DEQUANTIZE", "GATHER", "PAD", "QUANTIZE", "RESHAPE", "RESIZE_BILINEAR", "RESIZE_NEAREST_NEIGHBOR"}
CARRIERS |= {"CONCATENATION", "PACK", "REVERSE_V2", "SPLIT", "SQUEEZE", "STRIDED_SLICE", "TRANSPOSE", "UNPACK"}
ARITHMETIC = {"ADD", "DIV", "MUL", "SUB"}
WEIGHTED = {"AVERAGE_POOL_2D", "BATCH_MATMUL", "CONV_2D", "FULLY_CONNECTED", "MEAN"}
# Most 8-bit numbers whose sum is sure to fit 16 bits.
POOLED = 256


@dataclasses.dataclass
class End:
    """A tensor at an end of the graph."""

    element: str
    shape: list[int]
    scale: float
    zero_point: int


class File:
    """A TFLite file. `data` is what the daemon takes: the batch is fixed at 1 where it was open."""

    def __init__(self, data: bytes):
        try:
            self.model = flatbuffer_utils.read_model_from_bytearray(bytearray(data))
            self.graph = self.model.subgraphs[0]
            self.ends = [self.end(index) for index in [*self.graph.inputs, *self.graph.outputs]]
            self.operators = flatfile.operators(self.model)
        except Refused:
            raise
        except Exception as error:  # noqa: BLE001 (whatever a damaged file makes the reader raise)
            raise Refused(f"model: is not an intact TFLite file ({first_line(error)}); copy it again") from error
        if len(self.graph.inputs) != 1:
            raise Refused(f"model: has {len(self.graph.inputs)} inputs; only models with one image input can be used")
        self.input, self.outputs = self.ends[0], self.ends[1:]
        shape = self.input.shape
        if len(shape) != 4 or shape[0] not in (1, -1) or shape[3] not in (1, 3) or min(shape[1:]) < 1:
            raise Refused(f"model: takes {shape}; expected one image of fixed size [1, height, width, 1 or 3 channels]")
        foreign = [name for name, _, _ in self.operators if name not in flatfile.NAMES.values()]
        if foreign:
            raise Refused(f"model: needs the operators {', '.join(foreign)}, which no engine has; save it with plain layers")
        self.data = self.fixed_batch() if self.open_batch() else data

    def end(self, index: int) -> End:
        tensor = self.graph.tensors[index]
        if tensor.type not in ELEMENTS:
            names = {value: key for key, value in vars(schema.TensorType).items()}
            raise Refused(
                f"model: {flatfile.text(tensor.name)} is {names.get(tensor.type, tensor.type).lower()}; "
                "expected float32, uint8 or int8 inputs and outputs"
            )
        shape = tensor.shape if tensor.shapeSignature is None or not len(tensor.shapeSignature) else tensor.shapeSignature
        quantization = tensor.quantization
        scaled = quantization is not None and quantization.scale is not None and len(quantization.scale) == 1
        if not scaled and tensor.type != schema.TensorType.FLOAT32:
            raise Refused(f"model: {flatfile.text(tensor.name)} has no scale; convert it with full-integer quantization")
        scale, zero = (float(quantization.scale[0]), int(quantization.zeroPoint[0])) if scaled else (0.0, 0)
        return End(ELEMENTS[tensor.type], [int(n) for n in shape], scale, zero)

    def open_batch(self) -> bool:
        return any(-1 in end.shape for end in self.ends)

    def fixed_batch(self) -> bytes:
        """The file with a batch of 1, the size for which it holds its shapes; the daemon refuses open ones."""
        for end in self.ends:
            if -1 in end.shape[1:]:
                raise Refused(f"model: has the open shape {end.shape}; convert it with fixed sizes")
            end.shape[0] = abs(end.shape[0])
        for tensor in self.graph.tensors:
            tensor.shapeSignature = None
        self.write_down_shapes()
        self.operators = flatfile.operators(self.model)
        return flatfile.pack(self.model)

    def write_down_shapes(self) -> None:
        """Shapes that the graph works out from its open batch become constants; TensorFlow Lite 1.15 wants all sizes beforehand."""
        graph = self.graph
        for operator in graph.operators:
            if self.name(operator) == "RESHAPE" and len(operator.inputs) > 1 and not self.constant(operator.inputs[1]):
                shape = np.array(graph.tensors[operator.outputs[0]].shape, np.int32)
                buffer, tensor = schema.BufferT(), schema.TensorT()
                buffer.data = np.frombuffer(shape.tobytes(), np.uint8)
                self.model.buffers.append(buffer)
                tensor.name, tensor.type, tensor.shape = "shape", schema.TensorType.INT32, [len(shape)]
                tensor.buffer = len(self.model.buffers) - 1
                graph.tensors.append(tensor)
                operator.inputs = [operator.inputs[0], len(graph.tensors) - 1]
        count = -1
        while count != len(graph.operators):  # until nobody's work is for nothing
            count = len(graph.operators)
            used = {int(i) for operator in graph.operators for i in operator.inputs} | {int(i) for i in graph.outputs}
            graph.operators = [operator for operator in graph.operators if used.intersection(map(int, operator.outputs))]

    def producer(self, tensor: int) -> tuple[str, object] | None:
        """Name and operator that gives a tensor."""
        for operator in self.graph.operators:
            if tensor in operator.outputs:
                return self.name(operator), operator
        return None

    def name(self, operator: object) -> str:
        return flatfile.operator_name(self.model.operatorCodes[operator.opcodeIndex])

    def constant(self, tensor: int) -> bool:
        buffer = self.model.buffers[self.graph.tensors[tensor].buffer]
        return buffer.data is not None and len(buffer.data) > 0

    def activation(self, position: int) -> str | None:
        """`sigmoid`, `softmax` or `logit` by the last operator before output `position`; None where that does not say."""
        found = self.producer(self.graph.outputs[position])
        while found and found[0] in CARRIERS:
            found = self.producer(found[1].inputs[0])
        if found is None:
            return None
        name, operator = found
        if name in ("LOGISTIC", "SOFTMAX"):
            return "sigmoid" if name == "LOGISTIC" else "softmax"
        fused = getattr(operator.builtinOptions, "fusedActivationFunction", 0)
        return "logit" if name in WEIGHTED | ARITHMETIC and not fused else None

    def arithmetic_first(self) -> str | None:
        """The arithmetic with constants that the picture meets before anything else: the model normalises by itself."""
        tensors = {self.graph.inputs[0]}
        for operator in self.graph.operators:  # in the order of their running
            inputs = [i for i in operator.inputs if i >= 0]
            if not tensors.intersection(inputs):
                continue
            name = self.name(operator)
            if name in ARITHMETIC and any(self.constant(i) for i in inputs):
                return name
            if name in CARRIERS:
                tensors.update(operator.outputs)
        return None

    def newer_than_1_15(self) -> list[str]:
        """Operators that TensorFlow Lite 1.15 does not have, or only in older versions; SHAPE leaves the output open there."""
        newer = [f"{name} version {version}" for name, version, _ in self.operators if version > flatfile.TFLITE_1_15.get(name, 0)]
        return newer + [f"{name} (open sizes)" for name, _, count in self.operators if name == "SHAPE" and count]

    def wide_pools(self) -> list[str]:
        """Integer average pools over so many cells that the 16 bits in which TensorFlow Lite 1.15 adds them up can overflow."""
        found = set()
        for operator in self.graph.operators:
            if self.name(operator) != "AVERAGE_POOL_2D":
                continue
            options, element = operator.builtinOptions, self.graph.tensors[operator.outputs[0]].type
            if options.filterHeight * options.filterWidth > POOLED and element != schema.TensorType.FLOAT32:
                found.add(f"AVERAGE_POOL_2D of {options.filterWidth}x{options.filterHeight}")
        return sorted(found)

    def float_operators(self) -> list[str]:
        """Operators that work with floating-point numbers, but for those at the borders to the integer ones."""
        kinds = set()
        for operator in self.graph.operators:
            element = self.graph.tensors[operator.outputs[0]].type
            if element == schema.TensorType.FLOAT32 and self.name(operator) not in ("DEQUANTIZE", "QUANTIZE"):
                kinds.add(self.name(operator))
        return sorted(kinds)


class Graph:
    """A model as one TensorFlow function of a fixed batch of 1: float32 [1, height, width, channels] -> a list of tensors."""

    # What leaves a picture a picture or a score a score, arithmetic, and what gives scores, in TensorFlow's names.
    CARRIERS = {
        "Cast",
        "ConcatV2",
        "ExpandDims",
        "GatherV2",
        "Identity",
        "Pack",
        "PlaceholderWithDefault",
        "Reshape",
        "ResizeBicubic",
    }
    CARRIERS |= {"ResizeBilinear", "ResizeNearestNeighbor", "ReverseV2", "Squeeze", "StridedSlice", "Transpose", "Unpack"}
    ARITHMETIC = {"Add", "AddV2", "BiasAdd", "Mul", "RealDiv", "Sub"}
    WEIGHTED = {"AvgPool", "BatchMatMulV2", "Conv2D", "MatMul", "Mean"}

    def __init__(self, call, height: int, width: int, channels: int):
        try:
            spec = tf.TensorSpec((1, height, width, channels), tf.float32, name="image")
            self.call = tf.function(call).get_concrete_function(spec)
            self.frozen = convert_variables_to_constants_v2(self.call)
        except Exception as error:  # noqa: BLE001 (whatever layers raise that do not fit the size)
            raise Refused(
                f"model: does not take {width}x{height} pixels with {channels} channels ({first_line(error)}); give another --size"
            ) from error
        self.input, *self.outputs = (
            End(tensor.dtype.name, [-1 if extent is None else extent for extent in tensor.shape], 0.0, 0)
            for tensor in [*self.frozen.inputs, *self.frozen.outputs]
        )

    def activation(self, position: int) -> str | None:
        """`sigmoid`, `softmax` or `logit` by the last operation before output `position`; None where that does not say."""
        operation = self.frozen.outputs[position].op
        while operation.type in self.CARRIERS:
            operation = operation.inputs[0].op
        if operation.type in ("Sigmoid", "Softmax"):
            return operation.type.lower()
        return "logit" if operation.type in self.ARITHMETIC | self.WEIGHTED else None

    def arithmetic_first(self) -> str | None:
        """The arithmetic that the picture meets before anything else: the model normalises by itself."""
        tensors = {tensor.name for tensor in self.frozen.inputs}
        for operation in self.frozen.graph.get_operations():  # in an order in which inputs come first
            if not tensors.intersection(tensor.name for tensor in operation.inputs):
                continue
            if operation.type in self.ARITHMETIC:
                return operation.type
            if operation.type in self.CARRIERS:
                tensors.update(tensor.name for tensor in operation.outputs)
        return None

    def convert(self, samples: list[np.ndarray] | None) -> bytes:
        """A float32 TFLite file, or with `samples` (float32 [height, width, channels]) an int8 one with uint8 ends.

        Dense layers get one scale a layer, not one a unit: the latter is FULLY_CONNECTED version 12, which TensorFlow Lite
        1.15 does not have. Operators without an integer form stay float.
        """
        # With the model's variables beside it the converter leaves them variables.
        converter = tf.lite.TFLiteConverter.from_concrete_functions([self.frozen])
        if samples is not None:
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.representative_dataset = lambda: ([sample[None]] for sample in samples)
            converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
            converter.inference_input_type = converter.inference_output_type = tf.uint8
            converter._experimental_disable_per_channel_quantization_for_dense_layers = True  # noqa: SLF001 (the only switch)
        try:
            return converter.convert()
        except Exception as error:  # noqa: BLE001 (the converter raises bare exceptions)
            missing = sorted(set(re.findall(r"'(tf\.\w+)' op", str(error))))
            why = f"TFLite has nothing for {', '.join(missing)}" if missing else first_line(error)
            raise Refused(f"model: cannot be made a TFLite file ({why}); save it with plain layers") from error
