"""How much the kernels take, by arithmetic alone: a plan reads it, for which torch is not imported.

The kernels read their own constants here, so that what a plan counts is what they take.

Shape suffixes: N out_features, K in_features.
"""

import math
from dataclasses import dataclass
from typing import Literal

Scheme = Literal["nf4", "mxfp4"]

BLOCK_SIZE = 64
MXFP4_BLOCK_SIZE = 32
NESTED_BLOCK_SIZE = 256

# Slices of a buffer begin at a multiple of it where its matrices do: copies of so many bytes are fast.
_SLICE_UNIT = 16

# Working sets where the run file leaves the choice: a GPU dequantizes all experts' weights again for each chunk of
# tokens.
_WORKING_SET_BYTES = {"cpu": 2**29, "cuda": 2**31}

# Most bytes of one dequantized tile. On a CPU a tile has to leave room for x and y in the last-level cache, and to stay
# below the 8 MiB from which on the allocator maps a block afresh (see `trim.map_large_blocks`): a tile is fast because
# its pages come back warm. On a GPU launches cost more than memory, so that a tile is as large as the working set may
# be.
TILE_BYTES = {"cpu": 7 * 2**20, "cuda": 512 * 2**20}

# Of the loss, most bytes of a chunk's float32 logits. On a GPU the weight is read twice for each chunk, so that chunks
# are larger.
LOGITS_BYTES = {"cpu": 64 * 2**20, "cuda": 256 * 2**20}

# Fewer rows than this multiply at a fraction of the speed, so that a large vocabulary may pass the budget above.
_MIN_LOGIT_ROWS = 64

# Most bytes of one tile of the loss: of logits, and of weights that have to be converted. On a CPU it has to fit into
# the last-level cache, and to stay below the 8 MiB from which on the allocator maps a block afresh, page fault by page
# fault; smaller ones would only mean more operators, each with a barrier between threads. On a GPU a tile of logits is
# all of the vocabulary.
LOGIT_TILE_BYTES = {"cpu": 7 * 2**20, "cuda": 256 * 2**20}

# Of a linear of 16 bits on a CPU that multiplies no 16-bit floats: most bytes in float32 of its results, or of their
# gradient, at once. What operators take turns in is kept, and an output head's logits of all tokens would be.
LINEAR_PART_BYTES = 16 * 2**20

# Of panels.h: what each thread multiplies 4-bit weights in, as float32 or as integers.
PANEL_BYTES = (768 + 6 + 64) * 256 * 4

# Of grouped_gemm16.c: tokens of an item, columns that are summed at once, contraction of a pass.
_BFLOAT_ROWS, _BFLOAT_WIDE, _BFLOAT_PASS = 512, 256, 512

_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Dtype:
    """A dtype of torch by its name, and the bytes of a number of it."""

    name: str
    itemsize: int


FLOAT32, BFLOAT16, FLOAT16 = Dtype("float32", 4), Dtype("bfloat16", 2), Dtype("float16", 2)
DTYPES = {dtype.name: dtype for dtype in (FLOAT32, BFLOAT16, FLOAT16)}


def stack_bytes(
    num_matrices: int, shape_NK: tuple[int, int], double_quantization: bool, scheme: Scheme = "nf4", slices: int = 1
) -> int:
    """Bytes of an `Nf4Stack`, or of the first of so many slices of each of its buffers.

    Args:
        num_matrices: how many matrices it holds.
        shape_NK: shape of each; where K is no multiple of a block, as many whole blocks as it takes.
        double_quantization: whether scales are held in 8 bits.
        scheme: what the codes stand for.
        slices: see `Part`.
    """
    per_matrix = _buffer_bytes(-(-math.prod(shape_NK) // BLOCK_SIZE) * BLOCK_SIZE, double_quantization, scheme)
    if slices == 1:
        return num_matrices * sum(per_matrix)
    return sum(slice_bytes(num_bytes, num_matrices, slices) for num_bytes in per_matrix)


def _buffer_bytes(weights: int, double_quantization: bool, scheme: Scheme) -> tuple[int, int, int, int]:
    """Of a matrix of so many weights: codes, their scales, the scales of these, and their mean."""
    if scheme == "mxfp4":
        return weights // 2, weights // MXFP4_BLOCK_SIZE, 0, 0
    blocks = weights // BLOCK_SIZE
    if not double_quantization:
        return weights // 2, _FLOAT32_BYTES * blocks, 0, 0
    return weights // 2, blocks, _FLOAT32_BYTES * -(-blocks // NESTED_BLOCK_SIZE), _FLOAT32_BYTES


def slice_bytes(bytes_per_matrix: int, num_matrices: int, slices: int) -> int:
    """Bytes of the first of so many slices of a buffer; see `Part`."""
    unit = math.gcd(_SLICE_UNIT, bytes_per_matrix) or 1
    return -(-num_matrices * bytes_per_matrix // (slices * unit)) * unit


def default_working_set_bytes(device_type: str) -> int:
    """The working set of an expert layer where nothing is set."""
    return _WORKING_SET_BYTES.get(device_type, _WORKING_SET_BYTES["cuda"])


def bytes_per_routed_token(
    hidden_size: int, intermediate_size: int, num_parts: int, swiglu: bool, dropped: bool, device_type: str = "cpu"
) -> int:
    """Bytes that a routed token takes between the GEMMs, in backward.

    On a CPU float32 throughout: gate and up, which their gradients replace, and the intermediate values; the input's
    gradient. Where dropped inputs are made (the fused route drops as it reads): one and the gradient of one, of either
    width. Elsewhere all is 16-bit but for the input's gradient, the intermediate values have their gradient beside
    them, and nothing is kept for dropout; where an activation is differentiated by autograd, also its result, its
    gradients, and two tensors of the intermediate size that it keeps. On a CPU these are of a few tokens at a time.
    """
    if device_type == "cpu":
        inner = num_parts + 1 + (2 if dropped else 0)
        return 4 * (inner * intermediate_size + (3 if dropped else 1) * hidden_size)
    inner = num_parts + 2 + (0 if swiglu else num_parts + 3)
    return 2 * inner * intermediate_size + 4 * hidden_size


def bytes_per_gained_token(hidden_size: int, intermediate_size: int, num_parts: int) -> int:
    """What gains add to that, in float32: gate and up before them, the output before them, and its gradient."""
    return 4 * (num_parts * intermediate_size + 2 * hidden_size)


def kept_bytes_per_routed_token(intermediate_size: int, num_parts: int, dtype: Dtype) -> int:
    """Bytes that a layer which keeps what its first GEMM gave holds until backward, for each routed token.

    `dtype` is that of the tokens.
    """
    return num_parts * intermediate_size * dtype.itemsize


def scratch_bytes(tokens: int, depth: int) -> int:
    """Scratch memory of a thread for GEMMs in bfloat16 of so many tokens; see `Scratch` of grouped_gemm16.c."""
    rows = min(-(-tokens // 16) * 16, _BFLOAT_ROWS)
    tiles = rows * (-(-depth // 32) * 32) * 2
    return _BFLOAT_WIDE * (_BFLOAT_ROWS * 4 + _BFLOAT_PASS * 2) + tiles


def loss_working_set_bytes(
    num_rows: int, vocabulary: int, hidden_size: int, dtype: Dtype, device: str, rank: int = 0
) -> int:
    """The most bytes that `linear_cross_entropy` holds at once beside its inputs and the gradients it returns.

    Counted: the float32 logits of a chunk, tiles beside them, and the chunk's rows with their gradient. With an update
    its B and that one's gradient in float32, its input, and what they have in common with the chunk's rows.

    Args:
        num_rows: T, an upper bound of the rows with a label.
        vocabulary: V.
        hidden_size: D.
        dtype: of hidden.
        device: `cpu` or `cuda`.
        rank: of the head's updates, all together; 0 without one.
    """
    rows = min(num_rows, most_logit_rows(vocabulary, device))
    logits = rows * vocabulary * _FLOAT32_BYTES
    # On a CPU a tile of logits on their way to the next step, its gradient, and weights that were converted; elsewhere
    # a tile is all of the chunk's logits: in float32, and in the dtype of the GEMM.
    cpu_tiles = 3 * min(LOGIT_TILE_BYTES["cpu"], logits)
    beside = cpu_tiles if device == "cpu" else logits + rows * vocabulary * dtype.itemsize
    # The native library takes rows in float32, and gives a tile's part of their gradient apart.
    of_rows = 4 if device == "cpu" and dtype == BFLOAT16 else 2
    updates = 2 * rank * vocabulary + rows * (hidden_size + 3 * rank) if rank else 0
    return logits + beside + (of_rows * rows * hidden_size + updates) * _FLOAT32_BYTES


def most_logit_rows(vocabulary: int, device: str) -> int:
    """Rows whose logits `linear_cross_entropy` computes at once, at most."""
    budget = LOGITS_BYTES.get(device, LOGITS_BYTES["cuda"])
    return max(budget // (vocabulary * _FLOAT32_BYTES), _MIN_LOGIT_ROWS)
