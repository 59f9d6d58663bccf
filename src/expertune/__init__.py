"""Expertune: QLoRA for mixture-of-experts language models.

    import expertune
    run = expertune.finetune("run.yaml")

Importing this package is cheap: torch and transformers are imported when a step needs them.
"""

from importlib.metadata import version as _version
from typing import TYPE_CHECKING, Any

from expertune.config import RunConfig
from expertune.kernels.threads import prepare_threads
from expertune.registration import register as _register
from expertune.run.record import RunRecord
from expertune.run.source import load_run as load_config

if TYPE_CHECKING:
    from expertune.api import Run, evaluate, finetune, generate, make_plan
    from expertune.checkpoint.quantize import quantize

__version__ = _version("expertune")
__all__ = ["Run", "RunConfig", "RunRecord", "evaluate", "finetune", "generate", "load_config", "make_plan", "quantize"]

# From here on `AutoModelForCausalLM.from_pretrained` reads NF4 folders, and PEFT's calls adapt experts.
_register()


def __getattr__(name: str) -> Any:
    if name in __all__:
        prepare_threads()  # what follows imports torch; importing this package sets nothing
    if name == "quantize":
        from expertune.checkpoint.quantize import quantize

        return quantize
    if name in __all__:
        from expertune import api

        return getattr(api, name)
    raise AttributeError(f"module 'expertune' has no attribute {name!r}")
