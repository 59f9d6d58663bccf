"""What vLLM's loader makes of an adapter, without a GPU and without weights. Imports nothing of Expertune.

    python vllm_loader.py REQUEST.json

The request: `config`, a folder with the base's `config.json`; and for an adapter `adapter`, a folder, `rank`, vLLM's
`--max-lora-rank`, and `names`, modules by the base's names on disk that it is said to change. `described.json` beside
the request says whether vLLM takes `stacked` experts, and how a layer's `experts` are called: w1, w2 and w3 of the
first, of the second, and so on. Of an adapter `loaded.safetensors` holds what layers would multiply by, scales
included: `NAME.A` and `NAME.B` of a module, and of stacks `NAME.w13.A` [E, r, in], `NAME.w13.B` [E, out, r],
`NAME.w2.A` and `NAME.w2.B`.

vLLM's own classes read, check, rename, scale and stack the adapter. What is left out is the memory of its kernels,
which only GPUs have. Read from vLLM 0.32, private names of `LoRAModelManager` included.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}

import torch
import vllm
from safetensors.torch import save_file
from torch import Tensor, nn
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import (
    destroy_distributed_environment,
    destroy_model_parallel,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.engine.arg_utils import EngineArgs
from vllm.lora.layers import FusedMoE3DWithLoRA, FusedMoEWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.model_manager import LoRAModelManager
from vllm.lora.peft_helper import PEFTHelper
from vllm.lora.utils import (
    get_supported_lora_modules,
    is_moe_model,
    is_supported_lora_module,
    parse_fine_tuned_lora_name,
    process_packed_modules_mapping,
)
from vllm.model_executor.layers.fused_moe import MoERunner
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import supports_lora

PREFIX = "base_model.model."


def main() -> None:
    """Answer the request."""
    path = Path(sys.argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    config = EngineArgs(
        model=request["config"],
        dtype="float32",
        enable_lora=True,
        max_lora_rank=request.get("rank", 16),
        enforce_eager=True,
        skip_tokenizer_init=True,
        load_format="dummy",
    ).create_engine_config()
    with set_current_vllm_config(config), alone(path):
        with torch.device("meta"):
            model = initialize_model(vllm_config=config)
        if not supports_lora(model):
            raise SystemExit(f"{type(model).__name__} takes no adapters in vLLM")
        manager = Manager(model)
        described = {
            "stacked": manager._is_3d_moe_model,
            "experts": manager.packed_modules_mapping.get("experts", []),
        }
        path.with_name("described.json").write_text(json.dumps(described), encoding="utf-8")
        if "adapter" in request:
            found = manager.load(request["adapter"], config, request["names"])
            versions = {"engine": f"vLLM {vllm.__version__}"}
            save_file(found, str(path.with_name("loaded.safetensors")), versions)


@contextmanager
def alone(path: Path) -> Iterator[None]:
    """A group of this process alone; torch writes a warning after the last error where one is left."""
    init_distributed_environment(1, 0, f"file://{path}.group", 0, "gloo")
    initialize_model_parallel(1, 1)
    try:
        yield
    finally:
        destroy_model_parallel()
        destroy_distributed_environment()


class Experts(FusedMoEWithLoRA):
    """A layer of experts with an adapter each, without the kernel that multiplies by them."""

    def __init__(self, layer: MoERunner) -> None:
        nn.Module.__init__(self)
        self.moe_config = layer.moe_config


class StackedExperts(FusedMoE3DWithLoRA):
    """The same of a model whose adapters are stacks; of its buffers only their number of experts is looked at."""

    def __init__(self, layer: MoERunner) -> None:
        nn.Module.__init__(self)
        self.moe_config = layer.moe_config
        self.w13_lora_a_stacked = (torch.empty(1, self.local_num_experts, 0, 0),)


class Manager(LoRAModelManager):
    """vLLM's manager of adapters over a model without memory."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.is_pooling_model = False
        self._is_moe = is_moe_model(model)
        self._is_3d_moe_model = self._is_moe and model.is_3d_moe_weight
        self._is_non_gated_moe = self._is_moe and model.is_non_gated_moe
        self._enable_mixed_moe_lora_format = self._enable_moe_shared_loras = False
        self.supported_lora_modules = get_supported_lora_modules(model)
        self.packed_modules_mapping = process_packed_modules_mapping(model)
        self.packed_modules: dict[str, list[str]] = {}
        self.modules: dict[str, Any] = {}
        kind = StackedExperts if self._is_3d_moe_model else Experts
        for name, module in model.named_modules():
            if is_supported_lora_module(name, module, self.supported_lora_modules):
                self.modules[name] = kind(module) if isinstance(module, MoERunner) else module
                self._register_packed_modules(name)

    def load(self, folder: str, config: VllmConfig, names: list[str]) -> dict[str, Tensor]:
        """What an adapter makes each layer multiply by, under the base's names on disk.

        Raises:
            SystemExit: vLLM has no layer for a tensor of the adapter, and would leave it out without a word.
        """
        mapper = getattr(self.model, "hf_to_vllm_mapper", None)
        mapper = mapper.get_rename_mapper() if mapper is not None else None
        helper = PEFTHelper.from_local_dir(folder, None)
        helper.validate_legal(config.lora_config)
        lora = LoRAModel.from_local_checkpoint(
            folder,
            self._expected(),
            helper,
            device="cpu",
            dtype=torch.float32,
            weights_mapper=mapper,
            skip_prefixes=getattr(self.model, "lora_skip_prefixes", None),
        )
        self._validate_moe_lora_format(lora)
        for layer, parts in self.packed_modules.items():
            missing = [part for part in parts if part not in lora.loras]
            if isinstance(self.modules[layer], FusedMoEWithLoRA) and 0 < len(missing) < len(parts):
                raise SystemExit(f"{missing[0]} has no adapter, which others of its layer have")
        self._create_merged_loras_inplace(lora)
        left_out = sorted(set(lora.loras) - set(self.modules) - {f"{name}.base_layer" for name in self.modules})
        if left_out:
            raise SystemExit(f"vLLM has no layer for {left_out[0]}, and would leave its adapter out")
        parents = {
            part: (parent, index) for parent, parts in self.packed_modules.items() for index, part in enumerate(parts)
        }
        found: dict[str, Tensor] = {}
        for name in names:
            theirs, _ = parse_fine_tuned_lora_name(f"{PREFIX}{name}.lora_A.weight", mapper)
            parent, index = parents.get(theirs, (theirs, None))
            layer = lora.loras.get(parent)
            if layer is None:
                continue
            if index is not None and isinstance(self.modules[parent], Experts):
                expert, which = divmod(index, len(self.packed_modules[parent]) // len(layer.lora_a[0]))
                pair = layer.lora_a[which][expert], layer.lora_b[which][expert]
            elif index is not None:
                pair = layer.lora_a[index], layer.lora_b[index]
            else:
                pair = layer.lora_a, layer.lora_b
            if index is None and isinstance(self.modules[parent], StackedExperts):
                for part, a, b in zip(("w13", "w2"), *pair, strict=True):
                    found |= {f"{name}.{part}.A": a, f"{name}.{part}.B": b}
            elif isinstance(pair[0], Tensor):
                found |= {f"{name}.A": pair[0], f"{name}.B": pair[1]}
        return {name: tensor.contiguous().clone() for name, tensor in found.items()}

    def _expected(self) -> set[str]:
        """As `WorkerLoRAManager._load_adapter` has it."""
        found = [part for name in self.supported_lora_modules for part in self.packed_modules_mapping.get(name, [name])]
        return {*found, "experts"} if "experts" in self.supported_lora_modules else set(found)


if __name__ == "__main__":
    main()
