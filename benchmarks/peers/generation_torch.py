"""Ours, with and without an adapter, and bitsandbytes' own layers over the same bytes, in transformers' `generate`."""

import argparse
import copy
import importlib.metadata
import time
from typing import Any

import bitsandbytes as bnb
import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from benchmarks.peers.bitsandbytes_weight import bitsandbytes_weight
from benchmarks.peers.generation_serving import own_stdout, prompts, serve
from expertune.adapt.attach import attach
from expertune.checkpoint.load import load_model
from expertune.checkpoint.meta import build_twin
from expertune.config import LoraSection, QuantizationConfig
from expertune.experts.module import Nf4Experts
from expertune.generation.decoding import generate_ids
from expertune.kernels.few_tokens import answering
from expertune.layers.nf4_linear import Nf4Linear

_READ_BYTES = 2**30
_CHECKED = 2, 48  # sequences, tokens of each
_PACKAGES = ("torch", "transformers", "peft", "bitsandbytes")


class BitsandbytesExperts(nn.Module):
    """Experts as one `Linear4bit` a matrix, of the same bytes, computed one after the other."""

    def __init__(self, experts: Nf4Experts, dtype: torch.dtype) -> None:
        super().__init__()
        self.matrices = nn.ModuleList(
            nn.ModuleList(_linear4bit(*experts.locate(expert, name), dtype) for name in ("gate", "up", "down"))
            for expert in range(experts.num_experts)
        )

    def forward(self, hidden_TD: Tensor, index_TK: Tensor, weights_TK: Tensor) -> Tensor:
        out = torch.zeros_like(hidden_TD)
        for expert in index_TK.unique().tolist():
            tokens, choices = (index_TK == expert).nonzero(as_tuple=True)
            gate, up, down = self.matrices[expert]
            x = hidden_TD[tokens]
            y = down(nn.functional.silu(gate(x)) * up(x)) * weights_TK[tokens, choices, None]
            out.index_add_(0, tokens, y.to(out.dtype))
        return out


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--stack", choices=("ours", "adapted", "bitsandbytes"), required=True)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), required=True)
    args = parser.parse_args()
    answers = own_stdout()
    dtype = getattr(torch, args.dtype)
    loaded = load_model(args.model, QuantizationConfig(), dtype, "cpu")
    model: Any = loaded.model.eval()
    notes = [f"NF4 with double quantization, computed in {args.dtype}; lm_head, keys and values in {args.dtype}"]
    if args.stack == "adapted":
        section = LoraSection(r=8, alpha=16, targets=["attention", "experts", "lm_head"])
        model = attach(loaded, section, "benchmark").eval()
        notes.append("an adapter of rank 8 on attention, experts and lm_head")
    if args.stack == "bitsandbytes":
        _use_bitsandbytes(model, dtype)
        notes.append("in bitsandbytes' layout for CPUs, if it has one here")

    def generate(asked: list[list[int]], new: int) -> list[list[int]]:
        # Nothing ends an answer, and no padding is needed.
        config = GenerationConfig(max_new_tokens=new, do_sample=False, num_beams=1, pad_token_id=0)
        if args.stack != "bitsandbytes":
            return generate_ids(model, asked, config)
        ids = torch.tensor(asked)
        with torch.inference_mode():
            found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=config)
        return found[:, ids.shape[1] :].tolist()

    others = {"read rate": _read_rate, "check": lambda: _check(model)}
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    serve(generate, others, answers, threads=torch.get_num_threads(), versions=versions, notes=notes)


def _linear4bit(stack: Any, index: int, dtype: torch.dtype) -> bnb.nn.Linear4bit:
    linear = bnb.nn.Linear4bit(stack.in_features, stack.out_features, bias=False, quant_type="nf4", device="meta")
    packed, state = bitsandbytes_weight(stack, index, dtype)
    linear.weight = bnb.nn.Params4bit(
        packed.t(), requires_grad=False, quant_state=state, bnb_quantized=True, module=linear
    )
    linear.quant_state = state
    return linear.eval()


def _use_bitsandbytes(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Replace our layers by bitsandbytes' own."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Nf4Experts):
            model.set_submodule(name, BitsandbytesExperts(module, dtype))
        elif isinstance(module, Nf4Linear):
            module.__class__ = bnb.nn.Linear4bit  # which ours is, but for its forward


def _check(model: PreTrainedModel) -> dict[str, Any]:
    """How far logits are from those of plain float32 on the dequantized weights, given the same tokens.

    Ours token by token with a cache, as answers are made; and those of plain transformers in bfloat16.
    """
    ids = torch.tensor(prompts(*_CHECKED))
    with torch.inference_mode():
        with answering():
            ours = _token_by_token(model, ids)
        plain = _dequantized(model)
        exact = plain(input_ids=ids).logits
        for parameter in plain.parameters():  # and no buffers, such as the frequencies of rotary embeddings
            parameter.data = parameter.data.bfloat16()
        theirs = plain(input_ids=ids).logits.float()
    return {"tokens": ids.numel(), "ours": _distance(ours, exact), "plain": _distance(theirs, exact)}


def _token_by_token(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [B, T, V] of steps of one token a sequence."""
    logits, cache = [], None
    for token in ids.split(1, dim=1):
        step = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        logits.append(step.logits[:, -1].float())
    return torch.stack(logits, dim=1)


def _distance(logits: Tensor, exact: Tensor) -> dict[str, float]:
    """Root mean square of the difference in standard deviations of the exact logits; share of tokens with its best."""
    rms = ((logits - exact) / exact.std()).square().mean().sqrt()
    return {"rms_error": float(rms), "top1_agreement": float((logits.argmax(-1) == exact.argmax(-1)).float().mean())}


def _dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """transformers' own model with the values of ours in float32."""
    twin = build_twin(model)
    inside: tuple[str, ...] = ()
    for name, module in model.named_modules():
        if name.startswith(inside) and inside:
            continue
        target = twin.get_submodule(name)
        if isinstance(module, Nf4Experts):
            matrices = {
                part: [module.dequantize(expert, part, torch.float32) for expert in range(module.num_experts)]
                for part in ("gate", "up", "down")
            }
            pairs = zip(matrices["gate"], matrices["up"], strict=True)
            target.gate_up_proj = nn.Parameter(torch.stack([torch.cat(pair) for pair in pairs]), requires_grad=False)
            target.down_proj = nn.Parameter(torch.stack(matrices["down"]), requires_grad=False)
            inside = (*inside, f"{name}.")
        elif isinstance(module, Nf4Linear):
            state = copy.copy(module.weight.quant_state)
            state.dtype = torch.float32
            weight = bnb.functional.dequantize_4bit(module.weight.data, state)
            target.weight = nn.Parameter(weight, requires_grad=False)
        else:
            for key, parameter in module._parameters.items():
                # Of its own: what becomes of the twin's dtype is not to change ours.
                own = parameter if parameter is None else nn.Parameter(parameter.float(), requires_grad=False)
                setattr(target, key, own)
    return twin.eval()


def _read_rate() -> dict[str, float]:
    """Bytes a second that all threads read from memory: the sum of more numbers than caches hold."""
    numbers = torch.ones(_READ_BYTES // 4)
    seconds = []
    for _ in range(5):
        started = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - started)
    return {"rate": _READ_BYTES / min(seconds)}


if __name__ == "__main__":
    main()
