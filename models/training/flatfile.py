"""Reading and writing TFLite files as Python objects: operators with their versions, and packing with the right alignment."""

import flatbuffers
from tensorflow.lite.python import schema_py_generated as schema

NAMES = {value: key for key, value in vars(schema.BuiltinOperator).items() if not key.startswith("_")}

# Highest version -> the operators that TensorFlow Lite 1.15 registers with it (its lite/kernels/register.cc).
_REGISTERED = {
    6: "FULLY_CONNECTED",
    4: "DEQUANTIZE",
    3: (
        "BIDIRECTIONAL_SEQUENCE_LSTM CONV_2D DEPTHWISE_CONV_2D EMBEDDING_LOOKUP GATHER LSTM MUL SLICE SPARSE_TO_DENSE "
        "SPLIT TRANSPOSE"
    ),
    2: (
        "ADD ARG_MAX ARG_MIN AVERAGE_POOL_2D BATCH_TO_SPACE_ND BIDIRECTIONAL_SEQUENCE_RNN CONCATENATION EQUAL "
        "FAKE_QUANT FLOOR_DIV GREATER GREATER_EQUAL L2_NORMALIZATION LESS LESS_EQUAL LOGISTIC LOG_SOFTMAX MAXIMUM "
        "MAX_POOL_2D MEAN MINIMUM NOT_EQUAL PACK PAD PADV2 QUANTIZE REDUCE_MAX REDUCE_MIN RELU6 RESIZE_BILINEAR "
        "RESIZE_NEAREST_NEIGHBOR RNN SELECT SOFTMAX SPACE_TO_BATCH_ND SPACE_TO_DEPTH STRIDED_SLICE SUB SUM SVDF TANH "
        "TOPK_V2 UNIDIRECTIONAL_SEQUENCE_LSTM UNIDIRECTIONAL_SEQUENCE_RNN UNPACK"
    ),
    1: (
        "ABS ADD_N CAST CEIL COS DEPTH_TO_SPACE DIV ELU EMBEDDING_LOOKUP_SPARSE EXP EXPAND_DIMS FILL FLOOR FLOOR_MOD "
        "GATHER_ND HARD_SWISH HASHTABLE_LOOKUP IF L2_POOL_2D LEAKY_RELU LOCAL_RESPONSE_NORMALIZATION LOG LOGICAL_AND "
        "LOGICAL_NOT LOGICAL_OR LSH_PROJECTION MATRIX_DIAG MATRIX_SET_DIAG MIRROR_PAD NEG ONE_HOT POW PRELU RANGE RANK "
        "REDUCE_ANY REDUCE_PROD RELU RELU_N1_TO_1 RESHAPE REVERSE_SEQUENCE REVERSE_V2 ROUND RSQRT SHAPE SIN SKIP_GRAM "
        "SPLIT_V SQRT SQUARE SQUARED_DIFFERENCE SQUEEZE TILE TRANSPOSE_CONV UNIQUE WHERE WHILE ZEROS_LIKE"
    ),
}
TFLITE_1_15 = {name: version for version, names in _REGISTERED.items() for name in names.split()}


class AlignedBuilder(flatbuffers.Builder):
    """Keeps weights on 16-byte boundaries, as the TFLite schema demands (`force_align`) and the Python packer forgets."""

    def StartVector(self, elemSize, numElems, alignment):  # noqa: N802, N803 (the library's names)
        return super().StartVector(elemSize, numElems, max(16, alignment))


def pack(model: schema.ModelT) -> bytes:
    """The file."""
    builder = AlignedBuilder(1 << 22)
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    return bytes(builder.Output())


def operator_name(code: schema.OperatorCodeT) -> str:
    """`CONV_2D` and the like; a custom operator's own name, a TensorFlow one's begins with Flex."""
    name = NAMES.get(max(code.builtinCode, code.deprecatedBuiltinCode), "unknown")
    return text(code.customCode) if name == "CUSTOM" else name


def text(name: bytes | str | None) -> str:
    """A name in the file."""
    return name.decode(errors="replace") if isinstance(name, bytes) else name or ""


def operators(model: schema.ModelT) -> list[tuple[str, int, int]]:
    """(name, version, count in the main graph) of each kind of operator."""
    used = [operator.opcodeIndex for operator in model.subgraphs[0].operators]
    return [(operator_name(code), code.version, used.count(i)) for i, code in enumerate(model.operatorCodes)]
