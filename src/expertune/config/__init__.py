"""The configuration of a run: the schema of its file, and how the file is read."""

from expertune.config.data import DataConfig
from expertune.config.lora import ExpertsSection, LoraSection
from expertune.config.objective import ObjectiveName, RewardConfig, TaskConfig
from expertune.config.reading import (
    apply_overrides,
    check_training_arguments,
    parse_config,
    parse_lora,
    parse_quantization,
    recorded_config,
    with_current_names,
)
from expertune.config.schema import TRUST_KEY, RunConfig
from expertune.config.sections import Section, parse_size
from expertune.config.weights import KernelsConfig, QuantizationConfig

__all__ = [
    "TRUST_KEY",
    "DataConfig",
    "ExpertsSection",
    "KernelsConfig",
    "LoraSection",
    "ObjectiveName",
    "QuantizationConfig",
    "RewardConfig",
    "RunConfig",
    "Section",
    "TaskConfig",
    "apply_overrides",
    "check_training_arguments",
    "parse_config",
    "parse_lora",
    "parse_quantization",
    "parse_size",
    "recorded_config",
    "with_current_names",
]
