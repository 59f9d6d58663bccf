"""ExpertPeftModel: a PeftModel whose files stock PEFT reads, whatever the live model holds."""

import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModelForCausalLM
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from expertune.adapt.files import Origin, read_adapter, stock_config, write_adapter
from expertune.adapt.layout_trial import StockLayout
from expertune.adapt.live import LiveAdapter
from expertune.adapt.stock.config import StockLoraConfig, settings_of
from expertune.checkpoint.fingerprint import Fingerprint
from expertune.checkpoint.names import NameMap
from expertune.errors import ConfigError
from expertune.experts.lora import ExpertLoraConfig
from expertune.experts.replay import with_replay
from expertune.kernels.dropout import CounterDropout


class ExpertPeftModel(PeftModelForCausalLM):
    """A causal language model with LoRA on experts and linears.

    It is a PeftModel in every respect (`disable_adapter`, `set_adapter`, Trainer checkpoints). What it overrides is
    the adapter's files, how activations are checkpointed, and what trainers take its own weights for.

    Args:
        model: the base model with `Nf4Experts`.
        config: its live configuration.
        origin: where it comes from, as its files record it.
        names: the base model's name map.
        adapter_name: name of the first adapter.
        dtype: dtype of the adapter's own weights.

    Attributes:
        base: what identifies the base model, as far as it is known; adapters carry it.
        is_loaded_in_4bit: False, of what is attached: its dtype is `lora.dtype`, and TRL's trainers would round it to
            bfloat16 where this is True. Of the frozen weights the transformers model inside says True, which PEFT asks.
    """

    is_loaded_in_4bit = False

    def __init__(
        self,
        model: nn.Module,
        config: ExpertLoraConfig,
        origin: Origin,
        names: NameMap,
        adapter_name: str = "default",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        with warnings.catch_warnings():
            # PEFT 0.21 itself asks by a name that transformers 5.23 has renamed; users can do nothing about it.
            warnings.filterwarnings(
                "ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning
            )
            super().__init__(model, config, adapter_name, autocast_adapter_dtype=False)
        self.names = names
        self.base: Fingerprint | None = None
        self.origins = {adapter_name: origin}
        self._finish(adapter_name, dtype)

    def attach(
        self,
        adapter_name: str,
        config: ExpertLoraConfig,
        origin: Origin,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Add a further adapter; it is not active until `set_adapter` is called."""
        super().add_adapter(adapter_name, config)
        self.origins[adapter_name] = origin
        self._finish(adapter_name, dtype)

    def add_adapter(self, adapter_name: str, peft_config: PeftConfig, *args: Any, **kwargs: Any) -> None:
        """PEFT's method: a stock `LoraConfig` adapts the experts that it names; not active until `set_adapter`.

        Raises:
            ConfigError: experts cannot have what the config asks for (see `expertune.adapt.stock.targets`).
        """
        super().add_adapter(adapter_name, peft_config, *args, **kwargs)
        self.origins[adapter_name] = self._origin_of(self.peft_config[adapter_name])
        self._finish(adapter_name, torch.float32)

    def _origin_of(self, config: Any) -> Origin:
        """The origin of an adapter that was added by its config: this base, its own settings."""
        for adapter, origin in self.origins.items():
            if self.peft_config.get(adapter) is config:
                return origin
        first = next(iter(self.origins.values()))
        settings = config.settings() if isinstance(config, StockLoraConfig) else None
        return Origin(first.base_model, first.revision, settings or settings_of(config))

    def save_pretrained(self, save_directory: str, selected_adapters: list[str] | None = None, **kwargs: Any) -> None:
        """Write adapters as stock PEFT reads them: adapter tensors only, scales in B, dropout 0.

        Args:
            save_directory: the adapter `default` goes here, others into folders of their own name.
            selected_adapters: which ones; None means all.
            **kwargs: other arguments of PEFT's method, which do not apply.
        """
        for adapter in selected_adapters or list(self.peft_config):
            folder = Path(save_directory) / (adapter if adapter != "default" else "")
            origin, stock = self.origins[adapter], self.stock_layout(adapter)
            tensors = self._live(adapter).in_file(stock)
            write_adapter(folder, tensors, stock_config(origin, stock), self.base, origin.settings)

    def stock_layout(self, adapter: str = "default") -> StockLayout:
        """How an adapter's file is laid out, and whether stock PEFT reads it."""
        return self._live(adapter).layout(self.origins[adapter].settings)

    def save_live_factors(self, folder: str | Path, adapter: str = "default") -> None:
        """Beside saved files, what of the adapter does not come back from them to the bit."""
        self._live(adapter).write_factors(folder, self.stock_layout(adapter))

    def _live(self, adapter: str) -> LiveAdapter:
        return LiveAdapter(self.get_base_model(), self.names, adapter)

    def load_adapter(self, model_id: str, adapter_name: str, is_trainable: bool = False, **kwargs: Any) -> Any:
        """Read an adapter folder: into an adapter that is attached, else, as PEFT does, into a new one of this name.

        Raises:
            CheckpointError: the folder is no adapter, is damaged, or holds other tensors than the adapter has.
        """
        if adapter_name not in self.peft_config:
            return super().load_adapter(model_id, adapter_name, is_trainable, **kwargs)
        file = read_adapter(model_id)
        return self._live(adapter_name).load(file.per_expert(self.names), file.live)

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """transformers' method, sparing the experts the second forward (see `expertune.experts.replay`)."""
        base = self.get_base_model()
        arguments = with_replay(activation_checkpointing_kwargs)
        if hasattr(base, "activation_checkpointing_enable"):
            base.activation_checkpointing_enable(arguments, **kwargs)
        else:  # transformers before 5.21 has the older name only
            base.gradient_checkpointing_enable(arguments, **kwargs)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable`."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def _replicate_for_data_parallel(self) -> "ExpertPeftModel":
        """torch's hook: `nn.DataParallel` calls it for a copy on another GPU, as transformers has it do by default.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            "this process sees several GPUs, and transformers would copy the model to each: 4-bit experts cannot be. "
            "Start a process for each GPU with torchrun, or show it one with CUDA_VISIBLE_DEVICES=0"
        )

    def _finish(self, adapter_name: str, dtype: torch.dtype) -> None:
        """Give the adapter's layers Expertune's own dropout, and bring all factors to one dtype."""
        base = self.get_base_model()
        for module in base.modules():
            if isinstance(module, BaseTunerLayer) and adapter_name in module.lora_A:
                if type(module.lora_dropout[adapter_name]) is nn.Dropout:
                    module.lora_dropout[adapter_name] = CounterDropout(module.lora_dropout[adapter_name].p)
                module.lora_A[adapter_name].to(dtype)
                module.lora_B[adapter_name].to(dtype)
                if adapter_name in module.lora_magnitude_vector:  # what a step changes is lost in 16 bits
                    module.lora_magnitude_vector[adapter_name].to(torch.float32)
