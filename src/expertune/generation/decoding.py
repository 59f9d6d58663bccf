"""Decoding by transformers' `generate`: prompts as token ids in, completions as text out.

The model's own `generation_config` (sampling, penalties, forced tokens) is not used, so that a score depends on the
weights alone, and nothing is drawn unless the caller says so; only its end tokens are kept.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteriaList

from expertune.checkpoint.context import context_length
from expertune.distributed.mesh import Ranks
from expertune.errors import ConfigError, DataError
from expertune.experts.lora import norms_looked_at_once
from expertune.experts.module import in_lockstep
from expertune.generation.norms import norms_in_one_call
from expertune.generation.sampling import Sampling
from expertune.kernels import few_tokens
from expertune.kernels.few_tokens import answering

Progress = Callable[[int, int], None]

# Why an answer ends: at an end token, after `max_new_tokens`, or where the model's context does.
_TURNS: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
_TURNS_LOCK = threading.Lock()

FinishReason = Literal["stop", "length", "context"]

Decoded = tuple[list[int], FinishReason]

# (compute, batch) -> what `compute` returns for each part of the batch, in the order of its sequences.
InParts = Callable[[Callable[[Any], Any], Any], list[Any]]


def whole(compute: Callable[[Any], Any], batch: Any) -> list[Any]:
    """A batch in one part."""
    return [compute(batch)]


@dataclass(frozen=True)
class Batches:
    """What goes with a walk over batches.

    Attributes:
        in_parts: may cut a batch where memory does not suffice, as `expertune.train.oom.OutOfMemory.in_parts` does.
        progress: called with (examples done, examples in all) after each batch.
        ranks: the processes that share the work.
        watched: given a batch's inputs; open while a batch whose loss counts is computed.
        each_token: called with the number of new tokens so far while a batch is answered.
    """

    in_parts: InParts = whole
    progress: Progress | None = None
    ranks: Ranks = field(default_factory=Ranks)
    watched: Callable[[Mapping[str, Any]], AbstractContextManager[None]] = lambda _: nullcontext()
    each_token: Callable[[int], None] | None = None


PLAIN = Batches()


@dataclass(frozen=True)
class Completion:
    """An answer.

    Attributes:
        text: without the prompt and without special tokens.
        num_tokens: tokens of the answer, without the one that ends it.
        finish_reason: why it ends.
        seconds: how long its batch took.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason
    seconds: float


def complete(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    batch_size: int = 32,
    batches: Batches = PLAIN,
) -> list[Completion]:
    """Complete prompts, in batches of similar length.

    Args:
        model: a transformers model or a PeftModel on one, in any mode; its mode is restored.
        tokenizer: the model's tokenizer; it needs no padding token.
        prompts: token ids of each prompt (`expertune.data.encode_prompt`).
        sampling: how tokens are chosen, and the longest answer.
        batch_size: prompts answered at once.
        batches: what is done with each batch besides.

    Returns:
        The completions in the order of `prompts`.

    Raises:
        DataError: a prompt is empty, or leaves no room in the model's context.
        ConfigError: `batch_size` is below 1.
    """
    if batch_size < 1:
        raise ConfigError(f"batch_size is {batch_size}; it must be 1 or more")

    def answer(some: Sequence[list[int]]) -> list[Decoded]:
        watched = {"stopping_criteria": _watched_by(batches.each_token)} if batches.each_token else {}
        return decode(model, tokenizer, some, sampling, batches.ranks, **watched)

    # The longest come first: if memory does not suffice, it shows in the first batch and not in the last.
    order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index]))
    found: dict[int, Completion] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        started = time.monotonic()
        parts = batches.in_parts(answer, [prompts[index] for index in batch])
        seconds = time.monotonic() - started
        for index, (ids, reason) in zip(batch, chain.from_iterable(parts), strict=True):
            found[index] = Completion(to_text(ids, tokenizer), len(ids), reason, seconds)
        if batches.progress:
            batches.progress(start + len(batch), len(prompts))
    return [found[index] for index in range(len(prompts))]


def decode(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    sampling: Sampling,
    ranks: Ranks = PLAIN.ranks,
    **generate_arguments: Any,
) -> list[Decoded]:
    """Complete one batch of prompts, padded on the left, with the cache on.

    Args:
        model, tokenizer, prompts, sampling: see `complete`.
        ranks: the processes, each of which completes a batch of its own at the same time.
        **generate_arguments: a `streamer` or `stopping_criteria` for transformers' `generate`.

    Returns:
        Ids of each completion up to its end token, which is left out, and why it ends.

    Raises:
        DataError, ConfigError: see `complete`.
        AbandonedError: see `expertune.distributed.mesh.Ranks.proceed`.
    """
    base = _base(model)
    room = _room(base, prompts)
    ends = end_ids(model, tokenizer)
    config = GenerationConfig(
        num_beams=1,
        max_new_tokens=min(sampling.max_new_tokens, room),
        eos_token_id=ends,
        # Padding is masked, so that any id will do; transformers would only ask for one.
        pad_token_id=ends[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **_choice(sampling),
    )
    with in_turn(model), _seeded(sampling, base.device):
        found = generate_ids(model, prompts, config, ranks, **generate_arguments)
    cut: FinishReason = "context" if room < sampling.max_new_tokens else "length"
    return [_until_end(ids, ends, cut) for ids in found]


def generate_ids(
    model: nn.Module,
    prompts: Sequence[list[int]],
    config: GenerationConfig,
    ranks: Ranks = PLAIN.ranks,
    **generate_arguments: Any,
) -> list[list[int]]:
    """New tokens for one batch of prompts, padded on the left, with the cache on.

    Args:
        model, prompts, ranks, **generate_arguments: see `decode`.
        config: how tokens are chosen, with `pad_token_id`; nothing of the model's own is used besides.

    Returns:
        Of each prompt the ids up to and with its end token, and padding behind it.

    Raises:
        DataError: see `complete`.
    """
    base = _base(model)
    room, pad = _room(base, prompts), config.pad_token_id
    config.update(use_cache=True, max_new_tokens=min(config.max_new_tokens, room))
    width = max(len(prompt) for prompt in prompts)
    input_ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=base.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=base.device)
    with (
        in_turn(model),
        evaluation_mode(model),
        norms_looked_at_once(base),
        answering(),
        _own_generation_config_aside(base),
        _head_in_one_product(base),
        norms_in_one_call(base),
        _passes_begun_together(base, ranks, idle=pad),
    ):
        output = base.generate(input_ids=input_ids, attention_mask=mask, generation_config=config, **generate_arguments)
    new: list[list[int]] = output[:, width:].tolist()
    return new


def in_turn(model: nn.Module) -> AbstractContextManager[Any]:
    """Held while a model answers, by one thread at a time, which may take it again.

    Which adapter is active, and what is set aside while tokens are written, is the model's and not a thread's.
    """
    with _TURNS_LOCK:
        return _TURNS.setdefault(_base(model), threading.RLock())


def end_ids(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end an answer: the tokenizer's EOS, which training examples end in, then the model's own.

    Raises:
        ConfigError: there is none.
    """
    own = _base(model).generation_config.eos_token_id
    own_ids = [] if own is None else [own] if isinstance(own, int) else list(own)
    ends = list(dict.fromkeys([tokenizer.eos_token_id, *own_ids]))
    if ends == [None]:
        raise ConfigError("the tokenizer has no EOS token, so no answer could end; set eos_token in its config")
    return [end for end in ends if end is not None]


def to_text(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Text of a completion. Some tokenizers would tidy up the spaces before punctuation; answers stay as written."""
    return str(tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def _choice(sampling: Sampling) -> dict[str, Any]:
    """Settings of transformers' logits processors; each is given, because it has defaults of its own (`top_k` 50)."""
    if sampling.is_greedy:
        return {"do_sample": False}
    top_p = 1.0 if sampling.top_p is None else float(sampling.top_p)
    return {
        "do_sample": True,
        "temperature": float(sampling.temperature or 1),
        "top_p": top_p,
        "top_k": sampling.top_k or 0,
    }


def _watched_by(each_token: Callable[[int], None]) -> StoppingCriteriaList:
    """A criterion that stops nothing, and counts: transformers asks it after each token."""
    num_tokens = 0

    def watch(input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        nonlocal num_tokens
        num_tokens += 1
        each_token(num_tokens)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)

    return StoppingCriteriaList([watch])


@contextmanager
def _seeded(sampling: Sampling, device: torch.device) -> Iterator[None]:
    """Draw from the seed, and leave torch's generators as they were."""
    if sampling.is_greedy or sampling.seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(sampling.seed)
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradient checkpointing off (the latter would switch off the cache), then restore each module.

    Modules are restored one by one, because a model may hold some in training mode and some not.
    """
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _own_generation_config_aside(base: PreTrainedModel) -> Iterator[None]:
    # transformers fills whatever a given GenerationConfig leaves open from the model's own one.
    own = base.generation_config
    base.generation_config = GenerationConfig()
    try:
        yield
    finally:
        base.generation_config = own


@contextmanager
def _head_in_one_product(base: PreTrainedModel) -> Iterator[None]:
    """Hand the output head hidden states that lie side by side.

    After reading prompts transformers cuts out the last position of each. Of such a view [B, 1, D] torch makes B
    products, for which it copies a 16-bit weight B times on a CPU: gigabytes, and seconds. Of one sequence the view
    counts as contiguous, whatever its strides; torch looks at these. Where it multiplies slowly, `few_tokens` does.
    """
    head = base.get_output_embeddings()
    linear = getattr(head, "base_layer", head)  # beneath an adapter
    own = linear.__dict__.get("forward")

    def side_by_side(_head: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            each.clone(memory_format=torch.contiguous_format) if isinstance(each, torch.Tensor) else each
            for each in inputs
        )

    def multiply(x: Tensor) -> Tensor:
        served = few_tokens.serves_dense(x, linear.weight)
        return few_tokens.dense(x, linear.weight) if served else nn.functional.linear(x, linear.weight)

    hook = head.register_forward_pre_hook(side_by_side)
    plain = type(linear) is nn.Linear and linear.bias is None and own is None
    if plain:
        linear.forward = multiply
    try:
        yield
    finally:
        hook.remove()
        if plain:
            del linear.forward


@contextmanager
def _passes_begun_together(base: PreTrainedModel, ranks: Ranks, idle: int) -> Iterator[None]:
    """Where ranks need each other in a forward, take part in those of the others until all have answered.

    transformers' `synced_gpus` would do so too, by a collective that a rank without memory never comes to.

    Args:
        base: the model that answers while the block runs.
        ranks: the processes.
        idle: a token to compute on where this rank has answered.
    """
    if not in_lockstep(base):
        yield
        return

    def begin(*_: Any) -> None:
        ranks.begin_pass(True)

    hook = base.register_forward_pre_hook(begin)
    try:
        yield
    finally:
        hook.remove()
    input_ids = torch.full((1, 1), idle, device=base.device)
    with torch.no_grad():
        while ranks.begin_pass(False):
            base(input_ids=input_ids, use_cache=False)


def _base(model: nn.Module) -> PreTrainedModel:
    """The transformers model: LoRA lives inside its layers, so that it generates with the adapter just as well."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _room(base: PreTrainedModel, prompts: Sequence[list[int]]) -> int:
    """New tokens that fit behind the longest prompt."""
    if not all(prompts):
        raise DataError("the prompt holds no tokens; write one")
    longest = max(len(prompt) for prompt in prompts)
    context = context_length(base.config)
    if context is None:
        return 2**31 - longest
    if longest >= context:
        raise DataError(f"the prompt has {longest} tokens, but the model's context holds {context}; shorten it")
    return context - longest


def _until_end(ids: list[int], ends: Sequence[int], cut: FinishReason) -> Decoded:
    end = next((index for index, token_id in enumerate(ids) if token_id in ends), None)
    return (ids, cut) if end is None else (ids[:end], "stop")
