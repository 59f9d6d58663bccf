"""Log-probabilities by stock transformers, and by stock PEFT of cases with an adapter. Imports nothing of Expertune.

    python stock.py REQUEST.json

The request: `prompts`, lists of token ids; `scored`, examples as [ids, labels]; `auto`, a class of transformers;
`trust`; and `cases`, by name: `model`, a folder, with `adapter`, a folder, or with `updates`, a safetensors file of
`PARAMETER.left` and `PARAMETER.right` whose product is added to the parameter, in float32, and rounded to the dtype
that `rounded` has for it, if any. Of each case `CASE.safetensors` beside the request holds `logprobs` [positions, V],
float32, and `loss` [sum, tokens] over the examples' labels; of those with `updates` also `routed.MODULE` [positions,
k], the experts that each position is sent to, of the request's `experts`, modules by name.
"""

import json
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file

IGNORED = -100


def main() -> None:
    """Answer the cases of a request, in order; what has been answered stays where a later one fails."""
    path = Path(sys.argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    loaded: tuple[str, Any] = "", None
    for name, case in request["cases"].items():
        if case["model"] != loaded[0]:
            loaded = "", None  # before the next one takes its memory
            loaded = case["model"], load(case["model"], request)
        model, versions = loaded[1], f"transformers {transformers.__version__}"
        if "adapter" in case:
            import peft

            versions += f", PEFT {peft.__version__}"
            adapted = peft.PeftModel.from_pretrained(model, case["adapter"])
            answer(adapted.eval(), request, path.parent / f"{name}.safetensors", versions)
            adapted.unload()
        elif "updates" in case:
            before = update(model, case)
            answer(model, request, path.parent / f"{name}.safetensors", versions, request["experts"])
            for parameter, values in before.items():
                model.get_parameter(parameter).data.copy_(values)
        else:
            answer(model, request, path.parent / f"{name}.safetensors", versions)


def load(folder: str, request: dict[str, Any]) -> Any:
    """The model in float32, its experts one at a time: the plainest arithmetic that transformers has."""
    options: dict[str, Any] = {"trust_remote_code": request["trust"], "attn_implementation": "eager"}
    if int(transformers.__version__.split(".")[0]) >= 5:
        options |= {"dtype": torch.float32, "experts_implementation": "eager"}
    else:
        options |= {"torch_dtype": torch.float32}
    model = getattr(transformers, request["auto"]).from_pretrained(folder, **options)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def update(model: Any, case: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Add left @ right to each parameter; returns what the parameters were."""
    before: dict[str, torch.Tensor] = {}
    rounded = case.get("rounded") or {}
    with safe_open(case["updates"], framework="pt") as file:
        for key in file.keys():  # noqa: SIM118 - not a mapping
            if not key.endswith(".left"):
                continue
            name = key.removesuffix(".left")
            parameter = model.get_parameter(name)
            before[name] = parameter.detach().clone()
            parameter += file.get_tensor(key) @ file.get_tensor(f"{name}.right")
            if f"{name}.magnitude" in file.keys():  # noqa: SIM118 - not a mapping
                scale(parameter, file.get_tensor(f"{name}.magnitude"))
            if name in rounded:
                parameter.copy_(parameter.to(getattr(torch, rounded[name])))
    return before


def scale(parameter: torch.Tensor, magnitudes: torch.Tensor) -> None:
    """Scale each output feature to its magnitude, which is NaN where it has none; in place."""
    inputs = -1 if magnitudes.shape[-1] == 1 else -2
    norms = torch.linalg.vector_norm(parameter, dim=inputs, keepdim=True).clamp_min(1e-30)
    parameter.mul_(torch.where(magnitudes.isnan(), 1.0, magnitudes / norms))


@torch.no_grad()
def answer(model: Any, request: dict[str, Any], path: Path, versions: str, experts: Sequence[str] = ()) -> None:
    """Write one case's log-probabilities and loss, and where it sends each position."""
    with routes(model, experts) as routed:
        prompts = [logprobs(model, ids) for ids in request["prompts"]]
    tensors = {f"routed.{name}": torch.cat(chosen) for name, chosen in routed.items()}
    total, count = 0.0, 0
    for ids, labels in request["scored"]:
        wanted = torch.tensor(labels[1:])
        kept = wanted != IGNORED
        if kept.any():
            found = logprobs(model, ids)[:-1][kept]
            total -= float(found.gather(1, wanted[kept].unsqueeze(1)).sum())
            count += int(kept.sum())
    loss = torch.tensor([total, count], dtype=torch.float64)
    save_file({"logprobs": torch.cat(prompts), "loss": loss, **tensors}, str(path), {"engine": versions})


@contextmanager
def routes(model: Any, modules: Sequence[str]) -> Iterator[dict[str, list[torch.Tensor]]]:
    """What experts modules are called with: of each the experts of every token [tokens, k], call by call."""
    found: dict[str, list[torch.Tensor]] = {}

    def noting(name: str) -> Any:
        def note(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            _, top_k_index, _ = arguments
            found.setdefault(name, []).append(top_k_index.long().reshape(-1, top_k_index.shape[-1]))

        return note

    hooks = [model.get_submodule(name).register_forward_pre_hook(noting(name)) for name in modules]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def logprobs(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens, V], float32."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float().log_softmax(dim=-1)


if __name__ == "__main__":
    main()
