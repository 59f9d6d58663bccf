"""What PEFT's calls for new adapters do on a model with 4-bit experts.

Each public function takes the place of a library's (see `expertune.registration`) and is given that function first. An
adapter of such a model has an `ExpertLoraConfig`, made from the user's `LoraConfig`, so that `Nf4Experts` get
`ExpertsLora` and everything else gets PEFT's own layers, by the names of the live model.
"""

import warnings
from collections.abc import Callable
from typing import Any

from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTuner
from torch import Tensor, nn

from expertune.adapt.factors import read_factors, split_key
from expertune.adapt.first_factors import first_factors
from expertune.adapt.live import live_ranks, names_of, without_adapters
from expertune.adapt.stock.config import StockLoraConfig, exact_names, with_fields
from expertune.adapt.stock.targets import (
    read_targets,
    refuse_other_methods,
    refuse_whole_experts,
    require_possible,
)
from expertune.checkpoint.names import NameMap
from expertune.checkpoint.targets import Rank
from expertune.errors import ConfigError, ExportError
from expertune.experts.lora import NO_MERGE, ExpertLoraConfig, ExpertsLora
from expertune.experts.module import Nf4Experts

Original = Callable[..., Any]


class ExpertLoraModel(LoraModel):
    """PEFT's tuner, in what it does otherwise where `ExpertsLora` is among its layers."""

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refused where one of the adapters is on experts: PEFT would mix the other layers and leave these out.

        And where what one began with is taken away from what it gives: PEFT would mix its factors as they are.

        Raises:
            ExportError: it is.
        """
        self._refuse_on_experts(
            adapters,
            "add_weighted_adapter does not mix adapters of 4-bit experts; set both active with "
            "base_model.set_adapter([...]), which adds them up, or mix them on the 16-bit model",
        )
        for adapter in adapters:
            if any(True for _ in first_factors(self.model, adapter)):
                raise ExportError(
                    f"add_weighted_adapter would mix the factors of {adapter!r} without taking away what they began "
                    "with (lora.init: pissa); save it, and mix what load_adapter makes of its files, an ordinary LoRA"
                )
        super().add_weighted_adapter(adapters, *args, **kwargs)

    def _check_merge_allowed(self) -> None:
        self._refuse_on_experts(self.active_adapters, NO_MERGE)
        super()._check_merge_allowed()

    def _refuse_on_experts(self, adapters: list[str], message: str) -> None:
        for module in self.model.modules():
            if isinstance(module, ExpertsLora) and any(adapter in module.lora_A for adapter in adapters):
                raise ExportError(message)

    def _inject_parameters(self, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> list[str]:
        # PEFT has no dropout on a wrapped parameter; the other layers of the adapter keep theirs.
        dropout, peft_config.lora_dropout = peft_config.lora_dropout, 0.0
        try:
            return super()._inject_parameters(peft_config, *args, **kwargs)
        finally:
            peft_config.lora_dropout = dropout


def inject_adapter(
    original: Original, tuner: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
) -> None:
    """`BaseTuner.inject_adapter`: experts that a LoraConfig names get `ExpertsLora`.

    Raises:
        ConfigError: the experts cannot have what the config asks for, the method is none that can adapt them, or the
            model is a PeftModel itself.
    """
    if isinstance(model, PeftModel):
        raise ConfigError(
            "this model is a PeftModel already, and on 4-bit experts no second one goes around it: add an adapter "
            "with model.add_adapter('second', config), or take the first one off with model.unload()"
        )
    config, names = tuner.peft_config[adapter_name], names_of(model)
    if type(tuner) is LoraModel:
        tuner.__class__ = ExpertLoraModel
    if isinstance(tuner, ExpertLoraModel) and not isinstance(config, ExpertLoraConfig):
        state_dict = kwargs.pop("state_dict", None)
        if state_dict is not None:
            # Only the names of its tensors are used; they identify what is adapted.
            adapted = _adapted_names(config, state_dict, names)
            config = with_fields(config, LoraConfig, {"target_modules": adapted, "target_parameters": None})
        config = tuner._prepare_adapter_config(config, BaseTuner.get_model_config(model))
        tuner.peft_config[adapter_name] = _live_config(model, names, config)
    elif not isinstance(tuner, ExpertLoraModel):
        with without_adapters(model):
            refuse_whole_experts(model, names, config)
            refuse_other_methods(model, names, config, tuner)
    with warnings.catch_warnings():
        # PEFT looks for patterns among modules alone; those of wrapped parameters are used all the same.
        warnings.filterwarnings("ignore", message=r"The following (rank|alpha)_pattern keys did not match any")
        original(tuner, model, adapter_name, *args, **kwargs)
    if getattr(model, "hf_quantizer", None) is not None:
        setattr(model.hf_quantizer, "has_adapters", True)  # noqa: B010 - a module to the type checker


def _live_config(model: nn.Module, names: NameMap, config: LoraConfig) -> LoraConfig:
    with without_adapters(model):
        refuse_whole_experts(model, names, config)
        targets = read_targets(model, names, config)
    if targets.experts:
        require_possible(config)
        if config.use_dora and (other := next(iter(targets.router | targets.others | targets.parameters), None)):
            raise ConfigError(
                f"LoraConfig: use_dora cannot be had on {other} beside 4-bit experts; take it out of the targets"
            )
    if not (targets.experts or targets.router):
        # PEFT's own matter, its own message where nothing fits included.
        return config
    live = with_fields(config, StockLoraConfig, exact_names(targets, Rank(config.r, config.lora_alpha)))
    assert isinstance(live, StockLoraConfig)
    live.expert_ranks = live_ranks(targets)
    live.remember(targets, names, config)
    return live


def _adapted_names(config: LoraConfig, state_dict: dict[str, Tensor], names: NameMap) -> list[str]:
    pairs = {key: tensor for key, tensor in state_dict.items() if split_key(key)[1]}
    # Of a state_dict PEFT takes the names here; its ranks may be of another config.
    factors = read_factors(config.to_dict(), pairs, names, "state_dict", is_own_config=False)
    experts = (
        f"{module}.{names.projection_names[projection]}"
        for module, held in factors.experts.items()
        for projection in held
    )
    return [*factors.linears, *experts]


def convert_config(original: Original, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
    """`convert_peft_config_for_transformers`: nothing, since 4-bit experts are no stacked parameters."""


def num_parameters(original: Original, model: PeftModel) -> tuple[int, int]:
    """`PeftModel.get_nb_trainable_parameters`: with the weights of 4-bit experts, not the bytes that hold them."""
    trainable, everything = original(model)
    for module in model.modules():
        if isinstance(module, Nf4Experts):
            stored = sum(stack.packed.numel() for stack in (module.gate_up, module.down))
            everything += module.spec.num_parameters - stored
    return trainable, everything


def refuse_hotswap(original: Original, *args: Any, **kwargs: Any) -> None:
    """Hotswapping pads ranks and copies layer by layer, which it knows of linears only.

    Raises:
        ConfigError: always.
    """
    raise ConfigError(
        "hotswap: adapters of 4-bit experts cannot be swapped in place; load the other adapter under a name of its own "
        "with load_adapter, and switch with set_adapter"
    )
