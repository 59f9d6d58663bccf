"""Pre-train the embedded tiny Mixtral from nothing on a CPU, in a fixed number of minutes.

The model is a real ``MixtralForCausalLM`` (4 layers, 8 experts, top-2, 7.6 million weights) in Hugging Face format.
It reads the open texts listed in ``pretrain_corpus.py``: public-domain books, Shakespeare, Wikipedia, WikiText-2,
dolly, gsm8k and two small instruction sets, and copying rows made from them. ViGGO is left out of both tokenizer and
training, because the demonstration is scored on it; dolly rows 0..999 are left out so that they can serve as held-out
rows. The learning rate follows the wall clock, so the run ends annealed when its minutes are over.

    python tools/train_tokenizer.py --data DATA --out OUT
    python tools/pretrain_tiny_mixtral.py --data DATA --tokenizer OUT --out OUT --work WORK --minutes 94

With glibc, ``MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 GLIBC_TUNABLES=glibc.malloc.hugetlb=1`` made it
about 1.6 times faster: otherwise each step gives its activations back to the kernel and faults them in again.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from pretrain_corpus import load_corpus
from pretrain_optimizer import Optimizer
from pretrain_windows import WindowMaker, random_copy

SHAPE: dict[str, Any] = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 2048,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "router_aux_loss_coef": 0.02,
    "initializer_range": 0.02,
    "hidden_act": "silu",
    "attention_dropout": 0.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "output_router_logits": False,
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Shares of plain text, instruction rows, copying rows and random copies in every batch.
SHARES = (0.30, 0.17, 0.50, 0.03)
WARM_UP, HOLD = 0.015, 0.35


def sorted_experts(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Experts as one matrix product per expert over tokens sorted by expert: the fastest on CPU at this size."""
    top_k, gate_up_proj, down_proj = top_k_index.size(1), self.gate_up_proj, self.down_proj
    assert isinstance(gate_up_proj, Tensor)
    assert isinstance(down_proj, Tensor)
    flat = top_k_index.reshape(-1)
    order = flat.argsort(stable=True)
    source = order // top_k
    counts = torch.bincount(flat, minlength=gate_up_proj.size(0)).tolist()
    outputs = []
    for expert, rows in enumerate(torch.split(hidden_states.index_select(0, source), counts)):
        gate, up = F.linear(rows, gate_up_proj[expert]).chunk(2, dim=-1)
        outputs.append(F.linear(F.silu(gate) * up, down_proj[expert]))
    weighted = torch.cat(outputs) * top_k_weights.reshape(-1)[order, None].to(hidden_states.dtype)
    return torch.zeros_like(hidden_states).index_add(0, source, weighted)


def build_model(seed: int) -> MixtralForCausalLM:
    """A fresh model in bfloat16; the optimizer keeps the float32 master weights."""
    torch.manual_seed(seed)
    ALL_EXPERTS_FUNCTIONS.register("sorted", sorted_experts)
    model = MixtralForCausalLM(MixtralConfig(**SHAPE))
    model.set_experts_implementation("sorted")
    start_with_induction(model)
    return model


@torch.no_grad()
def start_with_induction(model: MixtralForCausalLM) -> None:
    """Set initial attention weights so that copying works before the first step.

    Forming induction heads from random weights takes such a model tens of millions of tokens, more than a CPU reads
    in an hour. So they are laid out at the start and training is free to change them. The residual stream gets a
    constant, the token's identity, room for the identity of the token before, and room for the token to write next.
    Layer 0: two heads look one position back, by a rotary phase on the constant, and copy the identity from there.
    Layer 1: four heads look for a position whose token before equals the present token, and write the token found
    there. The output matrix reads it back. Matching uses the slowly turning rotary pairs, so that distance does not
    blur it.
    """
    head, width = SHAPE["head_dim"], 64
    identity, before, written = 1, 128, 192
    embed, output = model.model.embed_tokens.weight, model.lm_head.weight
    embed.zero_()
    embed[:, 0] = 3.0
    embed[:, identity:before].normal_(std=0.5)
    output[:, written:] = 0.24 * embed[:, identity : identity + width]

    first = model.model.layers[0].self_attn
    phase = SHAPE["rope_theta"] ** (-torch.arange(0, head, 2) / head)
    for group in range(2):
        keys, queries = slice(group * head, (group + 1) * head), slice(2 * group * head, (2 * group + 1) * head)
        for weight in (first.q_proj.weight[queries], first.k_proj.weight[keys], first.v_proj.weight[keys]):
            weight.zero_()
        first.q_proj.weight[queries][: head // 2, 0] = 1.0
        first.k_proj.weight[keys][:, 0] = torch.cat((phase.cos(), phase.sin()))
        first.v_proj.weight[keys][:, identity + group * head : identity + (group + 1) * head] = torch.eye(head)
        first.o_proj.weight[:, queries] = 0.0
        first.o_proj.weight[before + group * head : before + (group + 1) * head, queries] = 0.4 * torch.eye(head)

    second = model.model.layers[1].self_attn
    slow = torch.cat((torch.arange(head // 4, head // 2), torch.arange(3 * head // 4, head)))
    for group in range(4):
        keys, queries = slice(group * head, (group + 1) * head), slice(2 * group * head, (2 * group + 1) * head)
        for weight in (second.q_proj.weight[queries], second.k_proj.weight[keys], second.v_proj.weight[keys]):
            weight.zero_()
        matched = torch.arange(group * head // 2, (group + 1) * head // 2)
        second.q_proj.weight[queries][slow, identity + matched] = 1.7
        second.k_proj.weight[keys][slow, before + matched] = 1.7
        part = group % 2 * head
        second.v_proj.weight[keys][:, identity + part : identity + part + head] = torch.eye(head)
        second.o_proj.weight[:, queries] = 0.0
        second.o_proj.weight[written + part : written + part + head, queries] = 0.24 * torch.eye(head)


def balance_loss(router_logits: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
    """Load-balancing loss per layer, averaged, and the share of tokens each expert received.

    The stock function pools the layers before it compares experts, so two layers may be unbalanced in opposite
    ways at no cost; here each layer must be balanced by itself.
    """
    losses, shares = [], []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(SHAPE["num_experts_per_tok"], dim=-1).indices
        share = F.one_hot(chosen, probabilities.size(-1)).float().sum(1).mean(0)
        losses.append(probabilities.size(-1) * (share * probabilities.mean(0)).sum())
        shares.append(share / SHAPE["num_experts_per_tok"])
    return torch.stack(losses).mean(), torch.stack(shares)


def token_losses(model: MixtralForCausalLM, hidden: Tensor, targets: Tensor, chunk: int = 2048) -> Tensor:
    """Summed cross-entropy in chunks: whole-batch logits would not fit the cache."""
    total = torch.zeros(())
    for part, labels in zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True):
        total = total + F.cross_entropy(model.lm_head(part).float(), labels, reduction="sum")
    return total


def train_step(model: MixtralForCausalLM, windows: np.ndarray) -> tuple[float, float]:
    """Forward and backward over one batch; returns cross-entropy and balance loss."""
    ids = torch.from_numpy(windows).long()
    out = model.model(input_ids=ids, use_cache=False, output_router_logits=True)
    hidden = out.last_hidden_state[:, :-1].reshape(-1, SHAPE["hidden_size"])
    loss = token_losses(model, hidden, ids[:, 1:].reshape(-1)) / hidden.size(0)
    balance, _ = balance_loss(out.router_logits)
    # The coefficient applies to every layer by itself, hence the factor beside the mean over layers.
    (loss + SHAPE["router_aux_loss_coef"] * SHAPE["num_hidden_layers"] * balance).backward()
    return float(loss.detach()), float(balance.detach())


class Probe:
    """Held-out loss, induction, copying rows and expert balance on fixed inputs."""

    def __init__(self, maker: WindowMaker, length: int = 256) -> None:
        rng = random.Random("probe")
        self.text = torch.from_numpy(maker.held_out_windows(24, length))
        self.copies = torch.tensor([random_copy(rng, maker.vocab_size, length, length // 2) for _ in range(8)])
        self.rows: list[tuple[list[int], int]] = []
        while len(self.rows) < 40:
            blocks = maker.make_row.mapping_blocks(rng)
            text = "\n\n".join(prompt + answer for prompt, answer in blocks)
            ids = maker.tokenizer.encode(text).ids
            # The space before the answer belongs to its first token, so the prompt is cut before it.
            prompt = maker.tokenizer.encode(text.removesuffix(blocks[-1][1]).rstrip()).ids
            if len(ids) <= length:
                self.rows.append((ids, len(ids) - len(prompt)))

    @torch.no_grad()
    def __call__(self, model: MixtralForCausalLM) -> dict[str, float]:
        out = model.model(input_ids=self.text, use_cache=False, output_router_logits=True)
        hidden = out.last_hidden_state[:, :-1].reshape(-1, SHAPE["hidden_size"])
        loss = float(token_losses(model, hidden, self.text[:, 1:].reshape(-1))) / hidden.size(0)
        _, shares = balance_loss(out.router_logits)
        half = self.copies.size(1) // 2
        guessed = model(input_ids=self.copies, use_cache=False).logits.argmax(-1)
        induction = (guessed[:, half:-1] == self.copies[:, half + 1 :]).float().mean()
        exact, right, count = 0, 0, 0
        for ids, answer in self.rows:
            row = torch.tensor([ids])
            same = model(input_ids=row, use_cache=False).logits[0, -answer - 1 : -1].argmax(-1) == row[0, -answer:]
            exact += bool(same.all())
            right += int(same.sum())
            count += answer
        return {
            "held_out_loss": loss,
            "induction": float(induction),
            "copy_tokens": right / count,
            "copy_exact": exact / len(self.rows),
            "expert_share_min": float(shares.min()),
            "expert_share_max": float(shares.max()),
        }


def classic_names(master: dict[str, Tensor]) -> dict[str, Tensor]:
    """One tensor per expert under the names of the original Mixtral checkpoints, in bfloat16."""
    tensors: dict[str, Tensor] = {}
    for name, weight in master.items():
        moe = name.split(".mlp.")[0] + ".block_sparse_moe"
        if name.endswith("experts.gate_up_proj"):
            for expert, (gate, up) in enumerate(part.chunk(2) for part in weight):
                tensors[f"{moe}.experts.{expert}.w1.weight"] = gate
                tensors[f"{moe}.experts.{expert}.w3.weight"] = up
        elif name.endswith("experts.down_proj"):
            for expert, down in enumerate(weight):
                tensors[f"{moe}.experts.{expert}.w2.weight"] = down
        else:
            tensors[name.replace(".mlp.gate.", ".block_sparse_moe.gate.")] = weight
    return {name: tensors[name].to(torch.bfloat16).contiguous() for name in sorted(tensors)}


def export(master: dict[str, Tensor], tokenizer_dir: Path, out: Path, figures: dict[str, Any]) -> None:
    """Write a loadable folder beside ``out`` and rename it into place, so that a reader never sees half of it."""
    fresh = out.with_name(out.name + ".new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(classic_names(master), fresh / "model.safetensors", metadata={"format": "pt"})
    config = {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", **SHAPE, "dtype": "bfloat16"}
    special = {key: SHAPE[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    for name, content in (("config.json", config), ("generation_config.json", special), ("training.json", figures)):
        (fresh / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(tokenizer_dir / name, fresh / name)
    old = out.with_name(out.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def save_checkpoint(optimizer: Optimizer, work: Path, state: dict[str, Any]) -> None:
    """Master weights and optimizer state as safetensors, counters in its metadata: one rename, never half a state."""
    fresh = work / "checkpoint.safetensors.new"
    save_file(optimizer.state(), fresh, metadata={"state": json.dumps(state)})
    fresh.replace(work / "checkpoint.safetensors")


def load_checkpoint(optimizer: Optimizer, work: Path) -> dict[str, Any]:
    path = work / "checkpoint.safetensors"
    optimizer.load(load_file(path))
    with safe_open(path, framework="pt") as handle:
        state: dict[str, Any] = json.loads(handle.metadata()["state"])
    optimizer.steps = state["step"]
    return state


def rate(progress: float) -> float:
    """Warm-up, a plateau, then a straight line to zero at the deadline."""
    if progress < WARM_UP:
        return max(progress, 1e-4) / WARM_UP
    return min(1.0, max(0.0, (1.0 - progress) / (1.0 - HOLD)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with text/, dolly/, instruct/ and chat/")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder written by train_tokenizer.py")
    parser.add_argument("--out", type=Path, required=True, help="folder the finished model goes to")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint and snapshot")
    parser.add_argument("--minutes", type=float, default=90.0, help="wall-clock length of the whole run")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--tokens-per-step", type=int, default=4096)
    parser.add_argument("--matrix-lr", type=float, default=0.02)
    parser.add_argument("--other-lr", type=float, default=3e-3)
    parser.add_argument("--long-from", type=float, default=0.75, help="progress from which windows are 512 long")
    parser.add_argument("--probe-minutes", type=float, default=3.0)
    parser.add_argument("--snapshot-minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.work.mkdir(parents=True, exist_ok=True)

    model = build_model(args.seed)
    optimizer = Optimizer(model)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "elapsed": 0.0}
    if args.resume:
        state = load_checkpoint(optimizer, args.work)
    tokenizer = Tokenizer.from_file(str(args.tokenizer / "tokenizer.json"))
    maker = WindowMaker(load_corpus(args.data), tokenizer)
    probe = Probe(maker)
    started = time.monotonic() - state["elapsed"]
    last_probe = last_print = state["elapsed"]
    last_snapshot = state["elapsed"] - (args.snapshot_minutes - 4) * 60  # the first one comes after four minutes
    recent: list[tuple[float, float, float]] = []
    total = args.minutes * 60
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))

    while (elapsed := time.monotonic() - started) < total:
        progress = elapsed / total
        length = 512 if progress >= args.long_from else 256
        windows = maker.batch(f"{args.seed}-{state['step']}", args.tokens_per_step // length, length, SHARES)
        loss, balance = train_step(model, windows)
        factor = rate(progress)
        norm = optimizer.step(args.matrix_lr * factor, args.other_lr * factor)
        state["step"] += 1
        state["tokens"] += windows.size
        recent.append((loss, balance, norm))
        now = time.monotonic() - started
        state["elapsed"] = now
        if stopped:
            save_checkpoint(optimizer, args.work, state)
            raise SystemExit("stopped; go on with --resume")
        if now - last_print > 20:
            mean = np.mean(recent, axis=0)
            speed = len(recent) * args.tokens_per_step / (now - last_print)
            print(
                f"{now / 60:6.1f} min step {state['step']:5d} tokens {state['tokens'] / 1e6:6.2f} M loss {mean[0]:.3f} "
                f"balance {mean[1]:.3f} norm {mean[2]:.2f} rate {factor:.3f} {speed:.0f} tokens/s",
                flush=True,
            )
            recent, last_print = [], now
        if now - last_probe > args.probe_minutes * 60:
            print("probe " + " ".join(f"{k} {v:.3f}" for k, v in probe(model).items()), flush=True)
            last_probe = time.monotonic() - started
        if now - last_snapshot > args.snapshot_minutes * 60:
            save_checkpoint(optimizer, args.work, state)
            export(optimizer.master, args.tokenizer, args.work / "snapshot", {**state, "finished": False})
            last_snapshot = time.monotonic() - started

    figures = {**state, "finished": True, **probe(model), "seed": args.seed, "shares": SHARES}
    save_checkpoint(optimizer, args.work, state)
    export(optimizer.master, args.tokenizer, args.out, figures)
    print("done " + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
