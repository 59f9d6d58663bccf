"""What every stack is given: one folder of weights, one adapter, one micro-batch. Made once, read by all.

The weights are random and the text is real. The adapter is written in stock PEFT's per-expert layout with B away from
zero, so that a stack that ignored part of it would show another loss.
"""

import gzip
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from expertune.adapt.factors import PREFIX
from expertune.config import DataConfig
from expertune.data import make_collator, make_dataset, prepare_examples

HERE = Path(__file__).parent
DOLLY_SAMPLE = HERE / "data" / "dolly-first64.jsonl"
TOKENIZER = HERE.parent / "tests" / "data" / "files" / "mixtral-tokenizer"

HEAD_SIZE = 128
QUERIES_PER_KEY = 4
VOCAB_SIZE = 32_000
ROW_TOKENS = 320  # the recipe's max_length
_SEED = 0
_WEIGHT_STD = 0.02
_LORA_B_STD = 0.01

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3", "lm_head")


@dataclass(frozen=True)
class Shape:
    """A Mixtral by its sizes; heads follow from hidden as Mixtral-8x7B has them (128 wide, 4 queries to a key)."""

    hidden: int
    intermediate: int
    layers: int
    experts: int
    top_k: int

    def __post_init__(self) -> None:
        step = HEAD_SIZE * QUERIES_PER_KEY
        if self.hidden % step or self.intermediate % 64:
            raise ValueError(f"hidden must be a multiple of {step} and intermediate of 64, got {self}")

    @property
    def name(self) -> str:
        """Folder name that no other shape has."""
        return f"h{self.hidden}-i{self.intermediate}-l{self.layers}-e{self.experts}-k{self.top_k}-s{_SEED}"

    @property
    def key_width(self) -> int:
        """Output width of k_proj and v_proj."""
        return self.hidden // QUERIES_PER_KEY

    def attention(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each attention projection."""
        wide, narrow = (self.hidden, self.hidden), (self.key_width, self.hidden)
        return {"q_proj": wide, "k_proj": narrow, "v_proj": narrow, "o_proj": wide}

    def expert(self) -> dict[str, tuple[int, int]]:
        """[out, in] of each projection of an expert."""
        wide = (self.intermediate, self.hidden)
        return {"w1": wide, "w2": (self.hidden, self.intermediate), "w3": wide}

    def config(self) -> dict[str, object]:
        """The `config.json` that transformers 4 and 5 both read."""
        return {
            "architectures": ["MixtralForCausalLM"],
            "model_type": "mixtral",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.hidden // HEAD_SIZE,
            "num_key_value_heads": self.key_width // HEAD_SIZE,
            "num_local_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "max_position_embeddings": 32768,
            "rope_theta": 1e6,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "sliding_window": None,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "torch_dtype": "bfloat16",
        }


@dataclass(frozen=True)
class Lora:
    """The recipe's adapter (rank, alpha and dropout)."""

    r: int = 8
    alpha: int = 16
    dropout: float = 0.05


@dataclass(frozen=True)
class Workload:
    """Paths of what the drivers read, and the size of the micro-batch."""

    model: Path
    adapter: Path
    batch: Path
    tokens: int
    rows: int

    def to_json(self) -> dict[str, object]:
        """Without the paths, which mean nothing elsewhere."""
        return {"tokens": self.tokens, "rows": self.rows}


def prepare(
    shape: Shape, lora: Lora, tokens: int, text: Path, cache: Path, sequence_tokens: int | None = None
) -> Workload:
    """Make weights, adapter and micro-batch under `cache`, unless they are there.

    Args:
        shape: the model.
        lora: the adapter.
        tokens: tokens of the micro-batch.
        text: a JSONL file in dolly's layout.
        cache: folder for everything that is made.
        sequence_tokens: see `text_batch`.

    Raises:
        ValueError: the text has fewer tokens.
    """
    model = model_folder(shape, cache)
    adapter = once(cache / f"{shape.name}-r{lora.r}-a{lora.alpha}", lambda folder: _write_lora(folder, shape, lora))
    batch, rows = _batch(tokens, text, sequence_tokens)
    path = cache / f"batch-{tokens}{f'-{sequence_tokens}' if sequence_tokens else ''}.safetensors"
    # Some tensors of a batch are one and the same, which the file format does not have.
    save_file({name: tensor.clone() for name, tensor in batch.items()}, path)
    return Workload(model, adapter, path, tokens, rows)


def model_folder(shape: Shape, cache: Path) -> Path:
    """A folder of random weights, made under `cache` unless it is there; without a tokenizer."""
    return once(cache / shape.name, lambda folder: _write_model(folder, shape))


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """The folder, made beside and renamed, so that a run that was cut short leaves nothing to be taken for whole."""
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder.with_name(f".{folder.name}.{os.getpid()}")
        try:
            beside.mkdir()
            make(beside)
            beside.rename(folder)
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _write_model(folder: Path, shape: Shape) -> None:
    generator = torch.Generator().manual_seed(_SEED)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator).mul_(_WEIGHT_STD).to(torch.bfloat16)

    weight_map: dict[str, str] = {}
    total = 0
    for number, tensors in enumerate(_shards(shape, normal)):
        shard = f"model-{number:05d}.safetensors"
        save_file(tensors, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, shard)
        total += sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(shape.config(), indent=2), encoding="utf-8")


def _shards(shape: Shape, normal: Callable[..., Tensor]) -> Iterator[dict[str, Tensor]]:
    """One shard per layer and one for the rest: no more than a layer is ever held."""
    ones = torch.ones(shape.hidden, dtype=torch.bfloat16)
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        tensors = {f"{prefix}.self_attn.{name}.weight": normal(*size) for name, size in shape.attention().items()}
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}.{norm}.weight"] = ones.clone()
        moe = f"{prefix}.block_sparse_moe"
        tensors[f"{moe}.gate.weight"] = normal(shape.experts, shape.hidden)
        for expert in range(shape.experts):
            for name, size in shape.expert().items():
                tensors[f"{moe}.experts.{expert}.{name}.weight"] = normal(*size)
        yield tensors
    yield {
        "model.embed_tokens.weight": normal(VOCAB_SIZE, shape.hidden),
        "model.norm.weight": ones.clone(),
        "lm_head.weight": normal(VOCAB_SIZE, shape.hidden),
    }


def _write_lora(folder: Path, shape: Shape, lora: Lora) -> None:
    generator = torch.Generator().manual_seed(_SEED + 1)
    linears = {"lm_head": (VOCAB_SIZE, shape.hidden)}
    for layer in range(shape.layers):
        prefix = f"model.layers.{layer}"
        linears |= {f"{prefix}.self_attn.{name}": size for name, size in shape.attention().items()}
        for expert in range(shape.experts):
            moe = f"{prefix}.block_sparse_moe.experts.{expert}"
            linears |= {f"{moe}.{name}": size for name, size in shape.expert().items()}
    tensors = {}
    for name, (rows, columns) in linears.items():
        factor_a = torch.empty(lora.r, columns)
        factor_a.uniform_(-1 / math.sqrt(columns), 1 / math.sqrt(columns), generator=generator)
        tensors[f"{PREFIX}{name}.lora_A.weight"] = factor_a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = torch.randn(rows, lora.r, generator=generator) * _LORA_B_STD
    config = {
        **{"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "benchmark"},
        **{"r": lora.r, "lora_alpha": lora.alpha, "lora_dropout": 0.0, "bias": "none"},
        **{"target_modules": list(TARGETS), "inference_mode": True},
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def token_ids(text: Path, tokens: int) -> Tensor:
    """The first tokens of a text, int64 [tokens]."""
    return _batch(tokens, text)[0]["input_ids"][0]


def _batch(tokens: int, text: Path, sequence_tokens: int | None = None) -> tuple[dict[str, Tensor], int]:
    batch, rows = text_batch(tokens, text, sequence_tokens)
    return {key: value for key, value in batch.items() if isinstance(value, Tensor)}, rows


def text_batch(tokens: int, text: Path, sequence_tokens: int | None = None) -> tuple[dict[str, Any], int]:
    """The first rows of a file in dolly's layout as the trainer's padding-free batch, and how many they are.

    The last row is cut so that the sum is exact.

    Args:
        tokens: of the batch.
        text: the file.
        sequence_tokens: join all rows and cut them anew, so that each sequence has so many tokens.

    Raises:
        ValueError: the text has fewer tokens.
    """
    rows, collate = token_rows(text, "dolly-tutorial", min(ROW_TOKENS, tokens))
    if sequence_tokens:
        rows = _cut(rows, sequence_tokens)
    chosen, left = [], tokens
    for row in rows:
        if left < 2:
            break
        chosen.append(
            {"input_ids": row["input_ids"][:left], "labels": row["labels"][:left], "example_ids": row["example_ids"]}
        )
        left -= len(chosen[-1]["input_ids"])
    if left:
        raise ValueError(f"{text}: {tokens - left} tokens, {tokens} wanted; give a longer file with --text")
    return collate(chosen), len(chosen)


def _cut(rows: Sequence[dict[str, Any]], length: int) -> list[dict[str, Any]]:
    joined = {key: [token for row in rows for token in row[key]] for key in ("input_ids", "labels")}
    starts = range(0, len(joined["input_ids"]), length)
    return [
        {key: tokens[start : start + length] for key, tokens in joined.items()} | {"example_ids": [number]}
        for number, start in enumerate(starts)
    ]


def token_rows(
    text: Path, template: str, max_length: int
) -> tuple[Sequence[dict[str, Any]], Callable[[Sequence[dict[str, Any]]], dict[str, Any]]]:
    """Rows of a file as a run's trainer gets them, by Mixtral's tokenizer, and what makes a padding-free batch of some.

    The loss is taken on the whole row.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = _tokenizer(Path(folder))
    data = DataConfig(train=str(text), template=template, max_length=max_length, train_on="all")
    return make_dataset(prepare_examples(data, "train", tokenizer), data), make_collator(data, tokenizer)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)


def write_tokenizer(folder: Path) -> None:
    """Mixtral's own tokenizer, which lies gzipped among the test files."""
    for source in TOKENIZER.iterdir():
        content = source.read_bytes()
        plain = gzip.decompress(content) if source.suffix == ".gz" else content
        (folder / source.name.removesuffix(".gz")).write_bytes(plain)


def describe(shape: Shape, lora: Lora) -> dict[str, object]:
    """Sizes for the JSON."""
    return asdict(shape) | {"vocab": VOCAB_SIZE, "lora": asdict(lora) | {"targets": list(TARGETS)}}
