"""Attention over concatenated sequences that costs per sequence, not per square of the batch.

transformers keeps attention inside each sequence of a concatenated batch by a mask of [T, T]: right, but every token is
multiplied with every other. Here sequences attend by themselves, with no mask at all: on a GPU all of them in one call
of torch's variable-length attention, elsewhere each in a call of scaled-dot-product attention. Where sequences begin is
what the batch says (`cu_seq_lens_q`, `max_length_q`: transformers' names), else where its positions restart. Registered
through transformers' own attention interface; generation and padded batches take transformers' sdpa path.

Shape suffixes: H query heads, K key and value heads, T tokens of all sequences, D head size, V size of a value, N
sequences.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from expertune.errors import UnsupportedModelError
from expertune.kernels import few_tokens
from expertune.kernels.native.attention import attend

NAME = "expertune_varlen"

SEQUENCE_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
"""What a concatenated batch says about its sequences, by the names of transformers' `FlashAttentionKwargs`."""

SHORT_SEQUENCE = 256
"""Tokens up to which a sequence attends in float32 on a CPU, whatever its dtype.

torch's attention in 16 bits makes code for each length that it meets: 3 ms on a CPU with AVX512-BF16, where float32
needs 0.3 ms for all of a short sequence's backward. From some 256 tokens on 16 bits are the faster. Float32 is also the
more exact.
"""

# Terms that some families add inside the attention and that are laid out over the whole batch.
_BATCH_WIDE = ("position_bias", "softcap", "s_aux", "cache")

# Kinds of layers that choose tokens by the mask themselves, before the attention function is asked.
_WITH_A_MASK = ("indexed_attention", "compressed_attention", "sparse_attention")

# What was read from a tensor, with the tensor's version then. Layers of a model are called with the same tensors, also
# when a checkpointed layer is recomputed, and each look at a value waits for the GPU.
_LENGTHS = WeakTensorKeyDictionary()
_BOUNDS = WeakTensorKeyDictionary()

# The window of each mask that says nothing but causal, within a window, inside each sequence.
_WINDOWS = WeakTensorKeyDictionary()

_Derived = TypeVar("_Derived")


class _Sequences(NamedTuple):
    """Sequences of a concatenated batch: token `bounds[n]` to `bounds[n + 1]` is sequence n."""

    bounds: Tensor
    """int32 [N + 1], on the device of the batch."""
    longest: int
    """Tokens of the longest sequence."""


def use_varlen_attention(model: PreTrainedModel) -> bool:
    """Switch a model to variable-length attention; False where its family has no scaled-dot-product attention.

    In either case the model's forward may be called with `SEQUENCE_BOUNDS`; one that has no use for them does not see
    them.
    """
    _accept_bounds(model)
    if not getattr(model, "_supports_sdpa", False) or model.config._attn_implementation != "sdpa":
        return False
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    if any(kind.endswith(_WITH_A_MASK) for kind in kinds):
        return False
    model.set_attn_implementation(NAME)
    return True


def use_sdpa_attention(model: PreTrainedModel) -> None:
    """Back to transformers' own attention: padded batches have no use for another one."""
    if model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")


def require_no_leakage(model: PreTrainedModel) -> None:
    """Try, on two short sequences, concatenated, that the second one knows nothing of the first.

    A layer that carries a state along, or a mask that is made without asking where sequences begin, would train on
    other sequences' tokens, and nothing would show it. Decided by gradients: what the second sequence's logits say of
    the first sequence's embeddings is exactly nothing where sequences are kept apart, whatever the dtype's rounding.

    Args:
        model: a causal language model with its weights, `use_varlen_attention` called; its gradients are left alone.

    Raises:
        UnsupportedModelError: sequences mix, or the family refuses them by itself; names what to set instead.
    """
    lengths = (16, 9)
    embeddings = model.get_input_embeddings()
    device = embeddings.weight.device
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    batch: dict[str, Any] = {
        "input_ids": torch.arange(1, sum(lengths) + 1, device=device)[None] % model.config.get_text_config().vocab_size,
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        **dict(zip(SEQUENCE_BOUNDS, (bounds, bounds, max(lengths), max(lengths)), strict=True)),
        "use_cache": False,
    }
    leaves: list[Tensor] = []

    def cut(_module: nn.Module, _inputs: Any, embedded: Tensor) -> Tensor:
        leaves.append(embedded.detach().requires_grad_())
        return leaves[-1]

    fix = "set data.packing=padded to train this model"
    hook = embeddings.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            second = model(**batch).logits[:, lengths[0] :].float().sum()
    except ValueError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} takes no concatenated sequences ({error}); {fix}"
        ) from None
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(second, leaves[:1])
    if gradient[:, : lengths[0]].any():
        raise UnsupportedModelError(
            f"{type(model).__name__} does not keep concatenated sequences apart: what one says reaches the next "
            f"one; {fix}"
        )


def varlen_attention(
    module: nn.Module,
    query_HTD: Tensor,
    key_KTD: Tensor,
    value_KTV: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: [1, H, T, D] queries, [1, K, T, D] keys and values -> [1, T, H, V].

    Sequences are those of `cu_seq_lens_q`, int32 [N + 1], the longest of `max_length_q` tokens (an int); where these
    are not given, sequences begin where `position_ids` [1, T] is 0. With both given nothing is read back from a GPU.
    With a mask that is more than a sliding window, a cache or a batch of several this is transformers' own sdpa, but
    for single tokens of an answer on a CPU (`expertune.kernels.few_tokens`).

    Raises:
        UnsupportedModelError: the family does not say where sequences begin, or adds terms over the whole batch.
    """
    tokens = query_HTD.shape[2]
    window: int | None = None
    if attention_mask is not None:
        window = _WINDOWS.get(attention_mask)
        # A family that does not hand its window to the attention may mean another kind of mask by the same size.
        if window is None or window != kwargs.get("sliding_window"):
            return sdpa_attention_forward(module, query_HTD, key_KTD, value_KTV, attention_mask, **kwargs)
    if attention_mask is None and _is_of_an_answer(query_HTD, key_KTD, value_KTV, kwargs):
        scale = kwargs.get("scaling")
        scale = query_HTD.shape[3] ** -0.5 if scale is None else scale
        return attend(query_HTD, key_KTD, value_KTV, scale), None
    if query_HTD.shape[0] != 1 or key_KTD.shape[2] != tokens or tokens == 1:
        return sdpa_attention_forward(module, query_HTD, key_KTD, value_KTV, attention_mask, **kwargs)
    sequences = _sequences(position_ids, kwargs)
    if sequences is None or any(kwargs.get(term) is not None for term in _BATCH_WIDE):
        if attention_mask is not None:
            return sdpa_attention_forward(module, query_HTD, key_KTD, value_KTV, attention_mask, **kwargs)
        raise UnsupportedModelError(
            f"{type(module).__name__} cannot attend to one sequence at a time; set data.packing=padded to train "
            "this model"
        )
    if window is not None and window >= sequences.longest:
        window = attention_mask = None  # no sequence is long enough for it
    if sequences.longest == tokens and window is None:
        return _attend(module, query_HTD, key_KTD, value_KTV, kwargs), None
    output = _varlen(module, (query_HTD, key_KTD, value_KTV), sequences, window, kwargs)
    if output is not None:
        return output, None
    if attention_mask is not None:
        return sdpa_attention_forward(module, query_HTD, key_KTD, value_KTV, attention_mask, **kwargs)
    lengths = _once(_LENGTHS, sequences.bounds, _lengths)
    separate = zip(*(tensor.split(lengths, dim=2) for tensor in (query_HTD, key_KTD, value_KTV)), strict=True)
    return torch.cat([_attend(module, query, key, value, kwargs) for query, key, value in separate], dim=1), None


def _is_of_an_answer(query_HTD: Tensor, key_KTD: Tensor, value_KTV: Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether one token of each sequence attends to all that is cached, and to nothing else."""
    others = kwargs.get("dropout") or any(kwargs.get(term) is not None for term in _BATCH_WIDE)
    return not others and few_tokens.serves_attention(query_HTD, key_KTD, value_KTV)


def _attend(module: nn.Module, query_HTD: Tensor, key_KTD: Tensor, value_KTV: Tensor, kwargs: dict[str, Any]) -> Tensor:
    """One sequence by scaled-dot-product attention: [1, T, H, V] of the queries' dtype."""
    dtype = query_HTD.dtype
    if query_HTD.device.type != "cpu" or dtype == torch.float32 or query_HTD.shape[2] > SHORT_SEQUENCE:
        return sdpa_attention_forward(module, query_HTD, key_KTD, value_KTV, None, **kwargs)[0]
    exact = sdpa_attention_forward(module, query_HTD.float(), key_KTD.float(), value_KTV.float(), None, **kwargs)[0]
    return exact.to(dtype)


def sequence_lengths(position_ids: Tensor) -> list[int]:
    """Tokens of each sequence of a concatenated batch, from `position_ids` [1, T] that restart at 0."""
    starts = (position_ids.reshape(-1) == 0).nonzero().reshape(-1)
    # A batch whose first token is not at 0 continues a sequence; it is one all the same.
    bounds = [0, *(start for start in starts.tolist() if start), position_ids.numel()]
    return [end - start for start, end in pairwise(bounds)]


def varlen_mask(
    *args: Any, attention_mask: Tensor | None = None, use_vmap: bool = False, **kwargs: Any
) -> Tensor | None:
    """transformers' mask function: none where sequences are attended to one at a time, else sdpa's own."""
    plain = attention_mask is None and not use_vmap
    plain = plain and kwargs["q_length"] == kwargs["kv_length"] and kwargs["batch_size"] == 1
    window = kwargs.get("local_size")
    if plain and (window is None or window >= kwargs["q_length"]):
        return None
    mask = sdpa_mask(*args, attention_mask=attention_mask, use_vmap=use_vmap, **kwargs)
    if plain and mask is not None:
        _WINDOWS[mask] = window
    return mask


def check_varlen(device: torch.device | str) -> float:
    """How far attention in one call is from attention one sequence at a time, on a device.

    Random bfloat16 sequences of odd lengths, in one call, against the same values in float32, each sequence by
    scaled-dot-product attention: outputs and the gradients of queries, keys and values, with grouped queries, values
    that are narrower than keys, and a sliding window.

    Returns:
        The largest difference, as a share of the largest value of the float32 tensor that it is in; some 0.01 is
        bfloat16's own.

    Raises:
        RuntimeError: torch has no variable-length attention on the device.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 3, 129, 64, 257, 31]
    bounds = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)
    sequences = _Sequences(bounds, max(lengths))
    worst = 0.0
    for num_key_heads, value_size, window in ((8, 64, None), (2, 64, None), (8, 32, None), (2, 64, 17)):
        sizes = ((8, 64), (num_key_heads, 64), (num_key_heads, value_size), (8, value_size))
        query, key, value, gradient = (
            torch.randn(1, heads, sum(lengths), size, generator=generator).to(device, torch.bfloat16)
            for heads, size in sizes
        )
        gradient = gradient.transpose(1, 2)
        ours = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        output = _varlen(nn.Module(), ours, sequences, window, {"scaling": 64**-0.5})
        if output is None:
            raise RuntimeError(f"torch {torch.__version__} has no variable-length attention on {device}")
        output.backward(gradient)
        theirs = [tensor.float().requires_grad_() for tensor in (query, key, value)]
        expected = _attend_in_full(theirs[0], theirs[1], theirs[2], lengths, window)
        expected.backward(gradient.float())
        pairs = [(output, expected), *((mine.grad, its.grad) for mine, its in zip(ours, theirs, strict=True))]
        for mine, its in pairs:
            assert mine is not None
            assert its is not None
            difference = (mine.detach().float() - its.detach()).abs().max() / its.detach().abs().max()
            # max() would let a NaN pass.
            worst = worst if difference <= worst else float(difference)
    return worst


def _attend_in_full(
    query_HTD: Tensor, key_KTD: Tensor, value_KTV: Tensor, lengths: list[int], window: int | None
) -> Tensor:
    """[1, T, H, V]: each sequence by scaled-dot-product attention, its window as a mask."""
    outputs = []
    for query, key, value in zip(*(x.split(lengths, dim=2) for x in (query_HTD, key_KTD, value_KTV)), strict=True):
        seen = torch.ones(query.shape[2], query.shape[2], dtype=torch.bool, device=query.device).tril()
        if window is not None:
            seen = seen.triu(1 - window)
        outputs.append(F.scaled_dot_product_attention(query, key, value, attn_mask=seen, enable_gqa=True))
    return torch.cat(outputs, dim=2).transpose(1, 2)


def _varlen(
    module: nn.Module, heads: Sequence[Tensor], sequences: _Sequences, window: int | None, kwargs: dict[str, Any]
) -> Tensor | None:
    """[1, T, H, V] of all sequences in one call, or None where torch's variable-length attention cannot do it.

    `heads` are queries [1, H, T, D], keys [1, K, T, D] and values [1, K, T, V]. A window of W lets a token
    see itself and W - 1 before it.
    """
    is_causal = kwargs.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal) or kwargs.get("dropout"):
        return None
    query_HTD, key_KTD, value_KTV = _autocast(*heads)
    size, value_size = query_HTD.shape[-1], value_KTV.shape[-1]
    if value_size > size:
        return None
    if value_size < size:
        # One size for all is what the kernel wants; columns of zeros add nothing to the others.
        value_KTV = F.pad(value_KTV, (0, size - value_size))
    if not _flash_takes(query_HTD, key_KTD, value_KTV):
        return None
    query_THD, key_TKD, value_TKD = (tensor.squeeze(0).transpose(0, 1) for tensor in (query_HTD, key_KTD, value_KTV))
    groups = query_THD.shape[1] // key_TKD.shape[1]
    # Bounds of the window are inclusive, the token itself comes on top; -1 is no bound.
    terms: dict[str, Any] = {"window_size": (-1 if window is None else window - 1, 0), "scale": kwargs.get("scaling")}
    if groups > 1:
        if _takes_groups(varlen_attn):
            terms["enable_gqa"] = True
        else:
            key_TKD, value_TKD = (tensor.repeat_interleave(groups, dim=1) for tensor in (key_TKD, value_TKD))
    bounds, longest = sequences
    output: Any = varlen_attn(query_THD, key_TKD, value_TKD, bounds, bounds, longest, longest, **terms)
    return output.narrow(-1, 0, value_size).unsqueeze(0)


@functools.cache
def _takes_groups(function: Callable[..., Any]) -> bool:
    """Whether this torch's `varlen_attn` takes fewer heads of keys and values than of queries: from 2.12 on."""
    return "enable_gqa" in inspect.signature(function).parameters


def _flash_takes(query_HTD: Tensor, key_KTD: Tensor, value_KTD: Tensor) -> bool:
    """Whether torch's flash attention, which is behind `varlen_attn`, runs on these tensors, here."""
    if not query_HTD.is_cuda or torch.version.hip is not None:
        return False
    dtypes = {query_HTD.dtype, key_KTD.dtype, value_KTD.dtype}
    # scaled_dot_product_attention pads other sizes to 8, variable-length attention does not.
    if dtypes not in ({torch.float16}, {torch.bfloat16}) or query_HTD.shape[-1] % 8:
        return False
    # torch's own answer for this GPU, head size and need of a gradient; reads no values.
    grouped = query_HTD.shape[1] != key_KTD.shape[1]
    return bool(can_use_flash_attention(SDPAParams(query_HTD, key_KTD, value_KTD, None, 0.0, True, grouped)))


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors as scaled_dot_product_attention would take them; autocast does not know of variable-length attention."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(kind)) for tensor in tensors)


def _sequences(position_ids: Tensor | None, kwargs: dict[str, Any]) -> _Sequences | None:
    """The batch's sequences as it says itself, else from its positions; None where neither is given."""
    bounds, longest = kwargs.get("cu_seq_lens_q"), kwargs.get("max_length_q")
    if not isinstance(bounds, Tensor):
        if position_ids is None:
            return None
        lengths = _once(_LENGTHS, position_ids, sequence_lengths)
        return _Sequences(_once(_BOUNDS, position_ids, functools.partial(_bounds, lengths)), max(lengths))
    if not isinstance(longest, int):
        longest = max(_once(_LENGTHS, bounds, _lengths))
    return _Sequences(bounds, longest)


def _bounds(lengths: list[int], position_ids: Tensor) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=position_ids.device)


def _lengths(bounds: Tensor) -> list[int]:
    lengths: list[int] = bounds.diff().tolist()
    return lengths


def _once(known: WeakTensorKeyDictionary, tensor: Tensor, derive: Callable[[Tensor], _Derived]) -> _Derived:
    """`derive(tensor)`, worked out once for all layers of a model."""
    if tensor.is_inference():  # has no version, so that a change would go unseen
        return derive(tensor)
    version, derived = known.get(tensor, (None, None))
    if version != tensor._version:
        with torch.inference_mode(False):  # kept for the tensor's other uses, which may need gradients
            derived = derive(tensor)
        known[tensor] = (tensor._version, derived)
    return derived


def _accept_bounds(model: PreTrainedModel) -> None:
    """Keep `SEQUENCE_BOUNDS` from a forward that would refuse them."""
    forward = model.forward
    parameters = inspect.signature(forward).parameters
    if any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return
    unknown = {name for name in SEQUENCE_BOUNDS if name not in parameters}

    @functools.wraps(forward)
    def without_bounds(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **{name: value for name, value in kwargs.items() if name not in unknown})

    # On the instance and not as a hook: PEFT calls the base model's forward by itself.
    model.forward = without_bounds


AttentionInterface.register(NAME, varlen_attention)
AttentionMaskInterface.register(NAME, varlen_mask)
