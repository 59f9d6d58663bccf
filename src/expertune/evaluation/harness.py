"""Tasks of lm-evaluation-harness on a live model, with its adapter and without.

The harness's `simple_evaluate` sets the seeds of the whole process, starts programs that describe the machine, and asks
the hub about the model; `evaluate` below it does none of that. Read from lm-eval 0.4.13.
"""

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from jinja2.exceptions import SecurityError
from transformers import PreTrainedTokenizerBase

from expertune.adapt.peft_model import ExpertPeftModel
from expertune.errors import ConfigError, DoesNotFitError, first_line
from expertune.evaluation.harness_tasks import TaskFiles
from expertune.generation.decoding import evaluation_mode, to_text
from expertune.placement.out_of_memory import in_one_line, is_out_of_memory
from expertune.text import counted

# Of few-shot examples and of answers that are sampled: the harness's own.
_SEED = 1234


class Harness:
    """lm-evaluation-harness on one model.

    Args:
        model: the adapted model.
        tokenizer: the base model's tokenizer; it stays as it is.
        tasks: what is run.
        batch_size: examples of a batch; fewer where memory does not suffice.
        notify: called with a line where that happens.
    """

    def __init__(
        self,
        model: ExpertPeftModel,
        tokenizer: PreTrainedTokenizerBase,
        tasks: TaskFiles,
        batch_size: int,
        notify: Callable[[str], None],
    ) -> None:
        self._model, self._tokenizer, self._tasks = model, tokenizer, tasks
        self._batch_size, self._notify = batch_size, notify

    def scores(self, limit: int | None = None) -> dict[str, dict[str, Any]]:
        """The score of each task and group.

        Args:
            limit: how many examples of each task are taken; None means all.

        Returns:
            By name: `figures` by metric (with the filter's name where a task has several), each with `value` and
            `stderr` (None where the harness has none); `examples`, `shots`, `version`, `harness`.

        Raises:
            ConfigError: a task cannot be prepared, or its templates reach for what they may not.
            DoesNotFitError: memory ran out on a single example.
        """
        devices = [self._model.device] if self._model.device.type != "cpu" else []
        with torch.random.fork_rng(devices), evaluation_mode(self._model), self._tasks.loaded() as tasks:
            torch.manual_seed(_SEED)
            for task in tasks["tasks"].values():
                if task.get_config("num_fewshot") is None:
                    task.set_config(key="num_fewshot", value=0)
                task.set_fewshot_seed(seed=_SEED)
            try:
                results = self._evaluate(tasks, limit)
            except SecurityError as error:
                raise ConfigError(f"tasks: a template reaches for what it may not ({first_line(error)})") from None
            return _scores(results)

    def _evaluate(self, tasks: dict[str, Any], limit: int | None) -> Mapping[str, Any]:
        from lm_eval import evaluate

        while True:
            try:
                model = _live(self._model, self._tokenizer, self._batch_size)
                return evaluate(lm=model, task_dict=tasks, limit=limit, log_samples=False)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = in_one_line(error)
            if self._batch_size == 1:
                raise DoesNotFitError(f"tasks: memory does not suffice for one example at a time ({reason})")
            self._batch_size //= 2
            self._notify(f"tasks: memory ran out ({reason}); again with {counted(self._batch_size, 'example')} a batch")


def _live(model: ExpertPeftModel, tokenizer: PreTrainedTokenizerBase, batch_size: int) -> Any:
    """The harness's model over the transformers model, inside whose layers the adapter lies."""
    from lm_eval.models.huggingface import HFLM

    class Live(HFLM):
        def tok_decode(self, tokens: Any, skip_special_tokens: bool = True) -> str:
            # As answers are read elsewhere: spaces before punctuation stay as they were written.
            if not skip_special_tokens:
                return str(self.tokenizer.decode(tokens))
            return to_text(tokens, self.tokenizer)

    # It sets a padding token.
    own = copy.deepcopy(tokenizer)
    return Live(pretrained=model.get_base_model(), tokenizer=own, backend="causal", batch_size=batch_size)


def _scores(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    import lm_eval

    found = {}
    for name, values in {**results["results"], **results.get("groups", {})}.items():
        figures = {
            _shown(key): {"value": _number(value), "stderr": _number(values.get(_stderr_key(key)))}
            for key, value in values.items()
            if "," in key and "_stderr," not in key and _number(value) is not None
        }
        if not figures:
            continue  # a group that has no figure of its own
        counted = results["n-samples"].get(name, {}).get("effective", values.get("sample_len"))
        found[name] = {
            "figures": figures,
            "examples": counted,
            "shots": results["n-shot"].get(name),
            "version": results["versions"].get(name),
            "harness": lm_eval.__version__,
        }
    return found


def _stderr_key(key: str) -> str:
    metric, _, name = key.partition(",")
    return f"{metric}_stderr,{name}"


def _shown(key: str) -> str:
    """The metric's name; `none` is the harness's name for no filter."""
    return key.removesuffix(",none")


def _number(value: Any) -> float | None:
    """A figure; the harness writes `N/A` where it has none."""
    return float(value) if isinstance(value, int | float) else None
