"""NF4, the 4-bit NormalFloat of QLoRA (Dettmers et al. 2023, section 3), byte-compatible with bitsandbytes.

A matrix [N, K] is cut into blocks of 64 along K. Each block keeps its largest magnitude (absmax); each weight keeps the
index of the nearest of 16 codebook values, two to a byte, the first in the high half. With double quantization the
absmax values, less their mean, are themselves held in 8 bits, 256 to a block.

MXFP4 (OCP Microscaling Formats 1.0), in which some checkpoints are published, is a second codebook behind the same
operations: blocks of 32, whose scale is a power of two. Its blocks are kept as they are, never quantized again.

`Nf4Stack` holds M such matrices of one shape, and is what the grouped GEMMs read. Layout:

    packed         uint8   [M, N, K/2]        row-major; no block crosses a row, no row crosses a matrix
    absmax         uint8   [M, N*K/64]        8-bit codes of the absmax (float32 itself without double quantization)
    nested_absmax  float32 [M, ceil(N*K/64/256)]   empty without double quantization
    offset         float32 [M]                     mean of the absmax; empty without double quantization

    MXFP4: packed as above, absmax uint8 [M, N*K/32] holds e for a scale of 2 ** (e - 127), the other two are empty.

A stack may hold a slice of each buffer only, flat as uint8 (`Part`); operators then need the buffers gathered.
"""

from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from expertune.kernels.amounts import BLOCK_SIZE, MXFP4_BLOCK_SIZE, NESTED_BLOCK_SIZE, Scheme
from expertune.kernels.huge_pages import ask_for_huge_pages
from expertune.kernels.nf4 import cpu, reference
from expertune.kernels.nf4.bytes import Fit, Nf4Bytes, Part

__all__ = [
    "BLOCK_SIZE",
    "MXFP4_BLOCK_SIZE",
    "NESTED_BLOCK_SIZE",
    "Fit",
    "Nf4Bytes",
    "Nf4Stack",
    "Part",
    "Scheme",
    "dequantize",
    "dequantize_absmax",
    "quantize_matrix",
]


def quantize_matrix(
    matrix_NK: Tensor, double_quantization: bool = True, fit: Fit | None = None, packed: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantize one matrix to the bytes that bitsandbytes gives for it, or to others of the same layout.

    Args:
        matrix_NK: [N, K], float32, float16 or bfloat16, K a multiple of 64.
        double_quantization: hold the absmax values in 8 bits.
        fit: choose scales by error; None means by the largest magnitude, as bitsandbytes does.
        packed: contiguous uint8 [N, K/2] on the same device that is to hold the codes; None makes it.

    Returns:
        packed uint8 [N, K/2], absmax [N*K/64], nested_absmax float32, offset float32 [1] (see the module's layout).

    Raises:
        ValueError: the shape cannot be cut into blocks, the dtype is another one, or a value is NaN or infinite.
    """
    if matrix_NK.ndim != 2 or matrix_NK.shape[1] % BLOCK_SIZE:
        raise ValueError(
            f"expected a matrix whose columns are a multiple of {BLOCK_SIZE}, got {tuple(matrix_NK.shape)}"
        )
    if matrix_NK.numel() == 0:
        raise ValueError(f"expected a matrix with weights in it, got {tuple(matrix_NK.shape)}")
    if matrix_NK.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"expected float32, float16 or bfloat16, got {str(matrix_NK.dtype).removeprefix('torch.')}")
    if packed is None:
        packed = torch.empty(matrix_NK.shape[0], matrix_NK.shape[1] // 2, dtype=torch.uint8, device=matrix_NK.device)
    return packed, *cpu.quantize_matrix(matrix_NK, packed, double_quantization, fit)


def dequantize_absmax(weight: Nf4Bytes, index: int) -> Tensor:
    """Scales of matrix `index`, float32 [N, K/64]; of MXFP4 [N, K/32]."""
    return _codec(weight).dequantize_absmax(weight, index)


def dequantize(
    weight: Nf4Bytes, index: int, out: Tensor, rows: slice | None = None, columns: slice | None = None
) -> Tensor:
    """Dequantize one matrix, or a part of it, into `out`.

    Args:
        weight: M matrices [N, K].
        index: which of them.
        out: float32, float16 or bfloat16, of the part's shape; its rows may lie apart.
        rows: None means all.
        columns: whole blocks of 64; None means all.

    Returns:
        `out`: each value is rounded once from float32.

    Raises:
        ValueError: the columns cut a block, or `out` has another shape.
    """
    rows = slice(0, weight.out_features) if rows is None else rows
    columns = slice(0, weight.in_features) if columns is None else columns
    if columns.start % BLOCK_SIZE or columns.stop % BLOCK_SIZE:
        raise ValueError(f"columns must be whole blocks of {BLOCK_SIZE}, got {columns.start}:{columns.stop}")
    shape = (rows.stop - rows.start, columns.stop - columns.start)
    if tuple(out.shape) != shape or out.stride(1) != 1:
        raise ValueError(f"out must be {shape} with adjoining columns, got {tuple(out.shape)}, strides {out.stride()}")
    return _codec(weight).dequantize(weight, index, out, rows, columns)


def _codec(weight: Nf4Bytes) -> ModuleType:
    return cpu if weight.packed.device.type == "cpu" else reference


class Nf4Stack(nn.Module):
    """M frozen matrices [N, K] as NF4 bytes, or as MXFP4's.

    Args:
        num_matrices: M.
        out_features: N.
        in_features: K, a multiple of 64.
        double_quantization: hold the absmax values in 8 bits.
        device: where the bytes live; `meta` holds none yet.
        scheme: `nf4`, or `mxfp4`, whose bytes are copied in (`packed`, `absmax`) and for which `double_quantization`
            means nothing.

    Attributes:
        part: which slice of each buffer is held; None means all.
        whole: the four buffers of all matrices, without memory.

    Raises:
        ValueError: K is no multiple of 64.
    """

    packed: nn.Parameter
    absmax: Tensor
    nested_absmax: Tensor
    offset: Tensor

    def __init__(
        self,
        num_matrices: int,
        out_features: int,
        in_features: int,
        double_quantization: bool = True,
        device: torch.device | str | None = None,
        scheme: Scheme = "nf4",
    ) -> None:
        super().__init__()
        if in_features % BLOCK_SIZE:
            raise ValueError(f"in_features must be a multiple of {BLOCK_SIZE}, got {in_features}")
        self.num_matrices, self.out_features, self.in_features = num_matrices, out_features, in_features
        self.scheme: Scheme = scheme
        double_quantization = double_quantization and scheme == "nf4"
        self.double_quantization = double_quantization
        # Whether `model.to(device)` leaves the bytes where they are: a placement has put them there.
        self.stays = False
        blocks = out_features * in_features // (MXFP4_BLOCK_SIZE if scheme == "mxfp4" else BLOCK_SIZE)
        nested = -(-blocks // NESTED_BLOCK_SIZE) if double_quantization else 0
        absmax_dtype = torch.float32 if scheme == "nf4" and not double_quantization else torch.uint8
        packed = torch.empty(num_matrices, out_features, in_features // 2, dtype=torch.uint8, device=device)
        self.packed = nn.Parameter(ask_for_huge_pages(packed), requires_grad=False)
        self.register_buffer("absmax", torch.empty(num_matrices, blocks, dtype=absmax_dtype, device=device))
        self.register_buffer("nested_absmax", torch.empty(num_matrices, nested, dtype=torch.float32, device=device))
        self.register_buffer(
            "offset", torch.empty(num_matrices if double_quantization else 0, dtype=torch.float32, device=device)
        )
        self.part: Part | None = None
        self.whole = Nf4Bytes(*(torch.empty_like(tensor, device="meta") for tensor in self.bytes))

    def hold(self, part: Part, device: torch.device | str | None = None) -> None:
        """Hold a slice of each buffer, flat, without bytes so far."""
        held = (torch.empty(len(part.of(whole)), dtype=torch.uint8, device=device) for whole in self.whole)
        self.part = part
        packed, self.absmax, self.nested_absmax, self.offset = held
        self.packed = nn.Parameter(packed, requires_grad=False)

    @torch.no_grad()
    def write(self, index: int, matrix_NK: Tensor, fit: Fit | None = None) -> None:
        """Quantize a matrix [N, K] into place `index`; see `quantize_matrix`.

        Raises:
            ValueError: the shape is another one, or the matrix cannot be quantized.
        """
        if self.scheme != "nf4":
            raise ValueError(f"a stack of {self.scheme} holds what a checkpoint gives it; it quantizes nothing")
        if tuple(matrix_NK.shape) != (self.out_features, self.in_features):
            raise ValueError(f"expected shape {(self.out_features, self.in_features)}, got {tuple(matrix_NK.shape)}")
        # Codes go where they stay, unless that is elsewhere or a slice of them.
        own = self.packed[index] if self.part is None and self.packed.device == matrix_NK.device else None
        packed, absmax, nested_absmax, offset = quantize_matrix(matrix_NK, self.double_quantization, fit, own)
        self.put(index, absmax=absmax)
        if own is None:
            self.put(index, packed=packed)
        if self.double_quantization:
            self.put(index, nested_absmax=nested_absmax, offset=offset)

    @torch.no_grad()
    def put(self, index: int, **buffers: Tensor) -> None:
        """Copy buffers of one matrix into place `index`, by name: of a slice, the bytes that belong to it.

        Args:
            index: which matrix.
            **buffers: as many values as the stack has for a matrix.
        """
        for name, values in buffers.items():
            whole, held = getattr(self.whole, name), getattr(self, name)
            if self.part is None:
                held[index].copy_(values.reshape(held[index].shape))
                continue
            here, size = self.part.of(whole), whole[:1].nbytes
            first, end = max(index * size, here.start), min((index + 1) * size, here.stop)
            if first < end:
                flat = values.to(whole.dtype).contiguous().view(-1).view(torch.uint8)
                held[first - here.start : end - here.start].copy_(flat[first - index * size : end - index * size])

    @property
    def bytes(self) -> Nf4Bytes:
        """The four buffers, as operators take them."""
        return Nf4Bytes(self.packed, self.absmax, self.nested_absmax, self.offset)

    def place(self, held: Nf4Bytes, stays: bool) -> None:
        """Hold the same bytes in other tensors, which are taken as they are.

        Args:
            held: tensors of the same shapes and dtypes, anywhere.
            stays: whether `model.to(device)` is to leave them there.

        Raises:
            ValueError: a shape or dtype is another one.
        """
        for name, new, old in zip(Nf4Bytes._fields, held, self.bytes, strict=True):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(f"{name} must be {old.dtype} {tuple(old.shape)}, got {new.dtype} {tuple(new.shape)}")
        self.packed = nn.Parameter(held.packed, requires_grad=False)
        self.absmax, self.nested_absmax, self.offset = held.absmax, held.nested_absmax, held.offset
        self.stays = stays

    def dequantize(self, index: int, dtype: torch.dtype) -> Tensor:
        """Matrix `index` as [N, K] of `dtype`.

        Raises:
            ValueError: the stack holds a slice.
        """
        if self.part is not None:
            raise ValueError(f"a slice of the bytes is here, 1 of {self.part.size}; no matrix can be dequantized")
        return dequantize(
            self.bytes, index, torch.empty(self.out_features, self.in_features, dtype=dtype, device=self.packed.device)
        )

    @property
    def nbytes(self) -> int:
        """Bytes that the stack holds."""
        return self.packed.nbytes + sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Nf4Stack":
        # model.to(bfloat16) and model.half() would round the float32 scales and change every weight: only the device
        # of such a call is followed, never its dtype.
        def move_only(tensor: Tensor) -> Tensor:
            if self.stays:
                return tensor
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)

    def extra_repr(self) -> str:
        """Shape and scheme for `print(model)`."""
        double = ", double quantization" if self.double_quantization else ""
        return f"{self.num_matrices} x [{self.out_features}, {self.in_features}], {self.scheme}{double}"
