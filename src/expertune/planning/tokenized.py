"""How long a run's examples are, by its tokenizer: of all of a small source, and of a sample of a larger one."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from expertune.checkpoint.context import context_length, read_config
from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.config import DataConfig, RunConfig
from expertune.data import TokenizedExamples, make_dataset, prepare_examples
from expertune.data.lint import check_context
from expertune.data.prepare import sampled
from expertune.planning.duration import Lengths

# Of a source of at least twice as many examples so many are tokenized: their lengths are those of all to a percent or
# two, and tokenizing all of the demo's takes as long as importing torch.
_SAMPLED = 1024


def tokenized_lengths(config: RunConfig, trust_remote_code: bool = False) -> Lengths:
    """Number and lengths of a run's examples, which lie in small files, as its model does in a folder.

    Args:
        config: the run.
        trust_remote_code: run Python that ships with the model's tokenizer.

    Raises:
        ExpertuneError: the examples cannot be trained on.
    """
    data, folder = config.data, Path(config.model).expanduser()
    tokenizer = load_tokenizer(folder, trust_remote_code)
    context = context_length(read_config(folder, trust_remote_code))
    train = _Sample.of(config, data, "train", tokenizer)
    check_context(train.examples, context, "data.train")
    found = Lengths.of(data, len(make_dataset(train.examples, data)), train.examples.report, None)
    found = replace(found, num_rows=train.of_all(found.num_rows), is_sampled=train.share < 1)
    if data.eval is None:
        return found
    template = {"template": train.examples.report["template"]}
    evaluation = _Sample.of(config, data.model_copy(update=template), "eval", tokenizer)
    check_context(evaluation.examples, context, "data.eval")
    of_eval = Lengths.of(data, 1, train.examples.report, evaluation.examples.report)
    num_eval_rows = evaluation.of_all(of_eval.num_eval_rows)
    return replace(found, num_eval_rows=num_eval_rows, eval_tokens=of_eval.eval_tokens)


@dataclass(frozen=True)
class _Sample:
    """Examples of a source that stand for all: some, drawn evenly over it, or all of a small one.

    Attributes:
        examples: tokenized.
        share: of the source's examples, how many of them were looked at.
    """

    examples: TokenizedExamples
    share: float

    @classmethod
    def of(cls, config: RunConfig, data: DataConfig, which: Literal["train", "eval"], tokenizer: Any) -> "_Sample":
        """Those of a part of the data; what cannot be trained on is skipped, and a run says what is wrong with it."""
        kept = data.model_copy(update={"on_error": "skip"})
        examples = prepare_examples(kept, which, tokenizer, objective=config.objective, sample_size=_SAMPLED)
        total = sum(examples.report["files"].values())
        return cls(examples, len(sampled(total, _SAMPLED)) / total)

    def of_all(self, count: int | None) -> int:
        """A number of the sample's examples, or of packs of them, for the whole source."""
        return round((count or 0) / self.share)
