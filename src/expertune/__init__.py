"""Expertune: QLoRA for mixture-of-experts language models.

    import expertune
    run = expertune.finetune("run.yaml")

Everything public is here and is documented in `docs/reference/python.md`. Importing this package is cheap: what a name
needs, such as torch and transformers, is imported when the name is used.
"""

from importlib import import_module as _import_module
from typing import TYPE_CHECKING, Any

from expertune.errors import ExpertuneError
from expertune.kernels.threads import prepare_threads
from expertune.registration import register as _register

if TYPE_CHECKING:
    from expertune.api import finetune
    from expertune.config import RunConfig
    from expertune.exporting.export import export, verify
    from expertune.models import attach, load_adapter, load_model, quantize
    from expertune.run.answering import answers, chat, generate
    from expertune.run.evaluation import evaluate
    from expertune.run.examples import examples
    from expertune.run.inference import Run, open_run
    from expertune.run.planning import plan
    from expertune.run.record import RunRecord
    from expertune.run.source import load_config

    __version__: str

__all__ = [
    "ExpertuneError",
    "Run",
    "RunConfig",
    "RunRecord",
    "answers",
    "attach",
    "chat",
    "evaluate",
    "examples",
    "export",
    "finetune",
    "generate",
    "load_adapter",
    "load_config",
    "load_model",
    "open_run",
    "plan",
    "prepare_threads",
    "quantize",
    "verify",
]

# Where the names lie that need more than Python's own library.
_MODULES = {
    "api": ("finetune",),
    "config": ("RunConfig",),
    "exporting.export": ("export", "verify"),
    "models": ("attach", "load_adapter", "load_model", "quantize"),
    "planning": ("make_plan",),  # the earlier name of `plan`, of a RunConfig alone
    "run.answering": ("answers", "chat", "generate"),
    "run.evaluation": ("evaluate",),
    "run.examples": ("examples",),
    "run.inference": ("Run", "open_run"),
    "run.planning": ("plan",),
    "run.record": ("RunRecord",),
    "run.source": ("load_config",),
}

# From here on `AutoModelForCausalLM.from_pretrained` reads NF4 folders, and PEFT's calls adapt experts.
_register()


if not TYPE_CHECKING:  # which would take every name for one of the package's

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            return _import_module("importlib.metadata").version("expertune")
        for module, names in _MODULES.items():
            if name in names:
                return getattr(_import_module(f"expertune.{module}"), name)
        raise AttributeError(f"module 'expertune' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
