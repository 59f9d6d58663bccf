"""The models of the quality study, and text that they were not trained on. Made in minutes on one core."""

import gzip
import json
from pathlib import Path

import torch
import transformers
from torch import Tensor

from benchmarks.peers.processes import ROOT

EMBEDDED = ROOT / "src/expertune/assets/tiny-mixtral"
DATA = ROOT / "benchmarks/data"

# A Qwen3-MoE: many small experts, four to a token, where the embedded model has few large ones.
SHAPE = {
    "vocab_size": 4096,
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "max_position_embeddings": 1024,
    "router_aux_loss_coef": 0.01,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}


def tokenizer() -> transformers.PreTrainedTokenizerBase:
    """The embedded model's, which all models here use."""
    return transformers.AutoTokenizer.from_pretrained(EMBEDDED)


def book_texts() -> list[tuple[str, str]]:
    """Book and text of the passages that models here are trained on."""
    with gzip.open(DATA / "books.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return [(row["book"], row["text"]) for row in rows]


def held_out_windows(count: int, length: int) -> Tensor:
    """Token ids [count, length] of book passages that no model here was trained on, from all of the books."""
    texts = [json.loads(line)["text"] for line in (DATA / "books-held-out.jsonl").read_text().splitlines()]
    encode = tokenizer()
    windows = []
    for text in texts:
        ids = encode(text)["input_ids"]
        windows += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    chosen = torch.tensor(windows)[torch.linspace(0, len(windows) - 1, count).long()]
    assert len(chosen) == count
    return chosen


def many_experts(folder: Path, steps: int = 240, length: int = 128, batch: int = 16) -> Path:
    """A Qwen3-MoE of 2.8 million weights, trained from nothing on four books for two minutes of one core."""
    encode = tokenizer()
    ids = torch.tensor(
        [token for _, text in book_texts() for token in [*encode(text)["input_ids"], encode.eos_token_id]]
    )
    torch.manual_seed(0)
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHAPE))
    model.set_experts_implementation("eager")
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.05)
    generator = torch.Generator().manual_seed(0)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
        starts = torch.randint(len(ids) - length, (batch,), generator=generator)
        windows = torch.stack([ids[start : start + length] for start in starts])
        model(input_ids=windows, labels=windows, output_router_logits=True).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model = model.to(torch.bfloat16)
    model.save_pretrained(folder)
    encode.save_pretrained(folder)
    return folder
