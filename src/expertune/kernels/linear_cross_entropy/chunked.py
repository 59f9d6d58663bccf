"""Loss and gradients a chunk of rows at a time, and within a chunk a tile of the vocabulary at a time; on any device.

The logits of a chunk are held for all of the vocabulary, tile by tile, so that the weight is multiplied once for them
and once more for the gradient of hidden. An online softmax would hold a single tile, and multiply a third time.

Shape suffixes: T rows, N rows with a label, n of these in a chunk, D hidden size, V vocabulary, v of it in a tile,
r rank.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from expertune.kernels import native
from expertune.kernels.amounts import LOGIT_TILE_BYTES, most_logit_rows
from expertune.kernels.cpu import gemm_dtype
from expertune.kernels.linear_cross_entropy import tiles
from expertune.kernels.linear_cross_entropy.tiles import Head, LowRank, TileLoss

IGNORE_INDEX = -100

_TILE_MULTIPLE = 64


def forward(
    hidden_TD: Tensor,
    head: Head,
    labels_T: Tensor,
    own_inputs: list[Tensor],
    hidden_gradient: bool,
    update_gradients: bool,
    weights_T: Tensor | None = None,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The loss of each row, and the gradients of their sum: of hidden, each A and B, and each update's own input.

    Args:
        hidden_TD: [T, D].
        head: weight, bias and updates.
        labels_T: int64 [T], -100 for none.
        own_inputs: inputs [T, D] of those updates that have their own, in order.
        hidden_gradient: whether to make hidden's gradient; if not, it is empty.
        update_gradients: whether to make those of updates and their inputs; if not, the lists are empty.
        weights_T: float32 [T], the gradients are those of the losses times these; None means ones.

    Returns:
        float32 [N] first, of the rows that have a label.

    Raises:
        ValueError: a label is outside the vocabulary.
    """
    rows_N = (labels_T != IGNORE_INDEX).nonzero().squeeze(1)
    labels_N = labels_T[rows_N]
    _check_labels(labels_N, head.weight_VD.shape[0])
    inputs = iter(own_inputs)
    x_updates = [next(inputs) if own else hidden_TD for own in head.has_own_input]
    ranks = [factor.shape[0] for factor in head.a]

    losses_N = hidden_TD.new_empty(rows_N.shape[0], dtype=torch.float32)
    d_hidden_TD = hidden_TD.new_zeros(hidden_TD.shape if hidden_gradient else 0)
    # Sums over chunks are float32, whatever the factors are.
    b_VR = torch.cat([losses_N.new_empty(len(head.weight_VD), 0), *(factor.float() for factor in head.b)], dim=1)
    d_a = [factor.new_zeros(factor.shape, dtype=torch.float32) for factor in head.a if update_gradients]
    d_b_VR = b_VR.new_zeros(b_VR.shape if hidden_gradient or update_gradients else 0)
    d_own = [x.new_zeros(x.shape) for x in own_inputs if update_gradients]

    step = rows_per_chunk(rows_N.shape[0], head.weight_VD.shape[0], hidden_TD.device)
    for start in range(0, rows_N.shape[0], step):
        chunk = slice(start, start + step)
        rows_n, labels_n = rows_N[chunk], labels_N[chunk]
        x_nD = hidden_TD[rows_n].to(gemm_dtype(hidden_TD.dtype, hidden_TD.device))
        x_of_updates = [x_TD[rows_n].float() for x_TD in x_updates]
        of_updates = zip(x_of_updates, head.a, head.scalings, strict=True)
        h_nR = torch.cat([b_VR.new_empty(len(x_nD), 0), *(x @ a.float().t() * by for x, a, by in of_updates)], dim=1)
        low_rank = LowRank(h_nR, b_VR, torch.zeros_like(h_nR), d_b_VR)
        weight = _Weight(head.weight_VD, x_nD, hidden_TD.dtype)
        logits, losses_N[chunk], lse_n = _logits(x_nD, head, low_rank, weight, labels_n)
        if not (hidden_gradient or update_gradients):
            logits.clear()  # before the next chunk's are made
            continue
        dx_nD = torch.zeros_like(x_nD, dtype=torch.float32) if hidden_gradient else None
        weights_n = None if weights_T is None else weights_T[rows_n]
        for tile in weight.tiles():
            loss = TileLoss(labels_n, lse_n, weights_n)
            d_logits_nv = tiles.gradient(logits.pop(0), tile, head, low_rank, loss, weight.gradient_dtype)
            if dx_nD is not None:
                weight.add_transposed(d_logits_nv, tile, dx_nD)
        gradients_of_inputs = iter(d_own)
        for u, dh_nr in enumerate(low_rank.dh_nR.split(ranks, dim=1)):
            dh_nr = dh_nr * head.scalings[u]
            if update_gradients:
                d_a[u].addmm_(dh_nr.t(), x_of_updates[u])
            if head.has_own_input[u]:
                if update_gradients:
                    d_input = next(gradients_of_inputs)
                    d_input[rows_n] = (dh_nr @ head.a[u].float()).to(d_input.dtype)
            elif dx_nD is not None:
                dx_nD.addmm_(dh_nr, head.a[u].float())
        if dx_nD is not None:
            d_hidden_TD[rows_n] = dx_nD.to(d_hidden_TD.dtype)

    d_a = [gradient.to(factor.dtype) for gradient, factor in zip(d_a, head.a, strict=False)]
    d_b = []
    if update_gradients:
        d_b = [
            gradient.to(factor.dtype, memory_format=torch.contiguous_format, copy=True)
            for gradient, factor in zip(d_b_VR.split(ranks, dim=1), head.b, strict=True)
        ]
    return losses_N, d_hidden_TD, d_a, d_b, d_own


def rows_per_chunk(num_rows: int, vocabulary: int, device: torch.device) -> int:
    """Rows of a chunk: as many as the budget of its logits allows, in chunks of even size."""
    num_chunks = -(-num_rows // most_logit_rows(vocabulary, device.type))
    return -(-num_rows // num_chunks) if num_chunks else 1


def _check_labels(labels_N: Tensor, vocabulary: int) -> None:
    if labels_N.shape[0] == 0:
        return
    for label in torch.stack(labels_N.aminmax()).tolist():
        if not 0 <= label < vocabulary:
            raise ValueError(f"labels must be {IGNORE_INDEX} or within [0, {vocabulary}), got {label}")


def _logits(
    x_nD: Tensor, head: Head, low_rank: LowRank, weight: "_Weight", labels_n: Tensor
) -> tuple[list[Tensor], Tensor, Tensor]:
    """The float32 logits of a chunk, one tensor [n, v] for each tile; its losses [n]; and its log-sum-exp [n]."""
    logits, log_sums = [], []
    label_logits_n = x_nD.new_zeros(x_nD.shape[0], dtype=torch.float32)
    for tile in weight.tiles():
        z_nv, log_sum_n = tiles.complete(weight.multiply(tile), tile, head, low_rank)
        column_n, inside_n = tiles.columns_of_labels(labels_n, tile)
        own_n = z_nv.gather(1, column_n.unsqueeze(1)).squeeze(1)
        label_logits_n = torch.where(inside_n, own_n, label_logits_n)
        log_sums.append(log_sum_n)
        logits.append(z_nv)
    lse_n = torch.logsumexp(torch.stack(log_sums), dim=0)
    return logits, lse_n - label_logits_n, lse_n


class _Weight:
    """The head's weight in slices of the vocabulary ("tiles"), each in the dtype of the GEMM when it is used.

    On a CPU with AMX the native library multiplies a weight that is bfloat16 as it lies, with float32 results; torch
    would lay it out anew for each GEMM. On one without 16-bit floats it does so in integers, and torch in float32.
    """

    def __init__(self, weight_VD: Tensor, x_nD: Tensor, dtype: torch.dtype) -> None:
        self._weight_VD = weight_VD
        vocabulary, width = weight_VD.shape
        on_cpu = weight_VD.device.type == "cpu"
        in_bfloat16 = on_cpu and dtype == weight_VD.dtype == torch.bfloat16 and weight_VD.stride(1) == 1
        self._native = in_bfloat16 and native.available() and native.arithmetic(dtype) in (native.AMX, native.INTEGERS)
        converts = weight_VD.dtype != x_nD.dtype and not self._native
        budget = LOGIT_TILE_BYTES.get(weight_VD.device.type, LOGIT_TILE_BYTES["cuda"])
        per_column = x_nD.shape[0] * torch.float32.itemsize
        self._columns = _even(vocabulary, budget // per_column) if on_cpu else vocabulary
        # What has to be converted may be wider than a tile of logits is.
        most = budget // (width * x_nD.element_size()) if converts else self._columns
        self._converted = min(_even(self._columns, most), self._columns)
        self._scratch_vD = x_nD.new_empty(self._converted, width) if converts else None
        self._x_nD = x_nD.float() if self._native else x_nD
        self.gradient_dtype = self._x_nD.dtype

    def tiles(self) -> Iterator[slice]:
        """The vocabulary, tile by tile."""
        vocabulary = self._weight_VD.shape[0]
        for start in range(0, vocabulary, self._columns):
            yield slice(start, min(start + self._columns, vocabulary))

    def multiply(self, tile: slice) -> Tensor:
        """x @ W.T over a tile, [n, v] of x's dtype or float32."""
        z_nv = self._x_nD.new_empty(self._x_nD.shape[0], tile.stop - tile.start)
        if self._native:
            self._multiply_native(self._x_nD, tile, z_nv, transposed=True)
            return z_nv
        for part, weight_vD in self._parts(tile):
            torch.mm(self._x_nD, weight_vD.t(), out=z_nv[:, part])
        return z_nv

    def add_transposed(self, d_logits_nv: Tensor, tile: slice, total_nD: Tensor) -> None:
        """total += d_logits @ W over a tile, d_logits of `gradient_dtype`; the sum over tiles is float32."""
        if self._native:
            part_nD = torch.empty_like(total_nD)
            self._multiply_native(d_logits_nv, tile, part_nD, transposed=False)
            total_nD.add_(part_nD)
            return
        for part, weight_vD in self._parts(tile):
            if weight_vD.dtype == torch.float32:
                total_nD.addmm_(d_logits_nv[:, part], weight_vD)
            else:
                total_nD.add_(torch.mm(d_logits_nv[:, part].to(weight_vD.dtype), weight_vD))

    def _multiply_native(self, x: Tensor, tile: slice, out: Tensor, transposed: bool) -> None:
        weight, offsets = self._weight_VD[tile].unsqueeze(0), torch.tensor([x.shape[0]])
        native.grouped_gemm(x, weight, offsets, out, transposed=transposed, dtype=torch.bfloat16)

    def _parts(self, tile: slice) -> Iterator[tuple[slice, Tensor]]:
        """Columns of a tile and their weights; those that had to be converted are valid until the next ones are."""
        for start in range(tile.start, tile.stop, self._converted):
            stop = min(start + self._converted, tile.stop)
            weight_vD = self._weight_VD[start:stop]
            if self._scratch_vD is not None:
                weight_vD = self._scratch_vD[: stop - start].copy_(weight_vD)
            yield slice(start - tile.start, stop - tile.start), weight_vD


def _even(count: int, most: int) -> int:
    """Columns of a tile: at most `most`, in even tiles. A small or odd rest would multiply at half the speed."""
    most = max(most // _TILE_MULTIPLE, 1) * _TILE_MULTIPLE
    num_tiles = -(-count // most)
    return min(-(-count // (num_tiles * _TILE_MULTIPLE)) * _TILE_MULTIPLE, count)
