import math
import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from expertune.adapt.attach import attach
from expertune.checkpoint.load import load_model
from expertune.config import DataConfig, LoraSection, QuantizationConfig, TaskConfig
from expertune.data import IGNORE_INDEX, TokenizedExample, make_collator, make_dataset, prepare_examples
from expertune.distributed.mesh import Ranks
from expertune.errors import ConfigError, DataError
from expertune.evaluation.metrics import slot_f1
from expertune.evaluation.scoring import evaluation_loss, score_task
from expertune.experts.load import RoutingCounts
from expertune.generation.decoding import Batches, Completion
from expertune.objectives.chunked_loss import LanguageModelLoss

TINY = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"
VIGGO = Path(__file__).parents[1] / "files" / "viggo-test-sample.csv"


def viggo_data(**settings):
    columns = {"prompt": "ref", "completion": "mr"}
    return DataConfig(**{"train": str(VIGGO), "columns": columns, "template": "viggo", "max_length": 256, **settings})


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def model():
    loaded = load_model(TINY, QuantizationConfig(), torch.float32, "cpu")
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        return attach(loaded, LoraSection(dropout=0.5), str(TINY)).eval()


@pytest.fixture(scope="module")
def tokenized(tokenizer):
    return prepare_examples(viggo_data(), "train", tokenizer)


@pytest.fixture(scope="module")
def mean_loss(model, tokenized):
    """Mean over all label tokens by the definition: transformers' own loss of each row, weighed by its labels."""
    total, num_tokens = 0.0, 0
    for row in tokenized.examples:
        num_labels = sum(label != IGNORE_INDEX for label in row.labels)
        with torch.no_grad():
            loss = model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels])).loss
        total += loss.item() * num_labels
        num_tokens += num_labels
    return total / num_tokens


@pytest.mark.parametrize("packing", ["padding-free", "packed", "padded"])
@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_the_loss_does_not_depend_on_how_rows_are_batched(model, tokenizer, tokenized, mean_loss, packing, batch_size):
    data = viggo_data(packing=packing)
    dataset, collator = make_dataset(tokenized, data), make_collator(data, tokenizer, keep_example_ids=True)
    assert evaluation_loss(model, dataset, collator, batch_size) == pytest.approx(mean_loss, rel=1e-5)


@pytest.fixture(scope="module")
def routed_tokens(model, tokenized):
    """Tokens of each expert by the definition: each sequence by itself."""
    counts = RoutingCounts(model.get_base_model())
    with counts.watching(), torch.no_grad():
        for row in tokenized.examples:
            with counts.counting({}):
                model(input_ids=torch.tensor([row.input_ids]))
    return counts.to_json(Ranks())


@pytest.mark.parametrize("packing", ["padding-free", "padded"])
def test_counts_of_experts_leave_out_padding_and_what_is_computed_again(
    model, tokenizer, tokenized, routed_tokens, packing
):
    class MemoryRanOutError(Exception):
        pass

    def fail(*_):
        raise MemoryRanOutError

    base, data = model.get_base_model(), viggo_data(packing=packing)
    counts, tries = RoutingCounts(base), []

    def in_parts(compute, batch):
        tries.append(batch)
        if len(tries) == 2:
            failing = base.get_output_embeddings().register_forward_pre_hook(fail)
            with pytest.raises(MemoryRanOutError):
                compute(batch)
            failing.remove()
        return [compute(batch)]

    with counts.watching():
        batches = Batches(in_parts, watched=counts.counting)
        in_chunks = LanguageModelLoss(base).summed  # which looks at a first sample in its first batch
        evaluation_loss(base, make_dataset(tokenized, data), make_collator(data, tokenizer), 4, in_chunks, batches)
    found = counts.to_json(Ranks())
    assert found["tokens"] == routed_tokens["tokens"] == sum(len(row.input_ids) for row in tokenized.examples)
    assert found["entropy"] == pytest.approx(routed_tokens["entropy"], rel=1e-3)
    assert all(0 < entropy < math.log(2) for entropy in found["entropy"].values())
    for name, tokens in found["counts"].items():
        assert sum(tokens) == 2 * found["tokens"]
        assert tokens == pytest.approx(routed_tokens["counts"][name], abs=3)  # a tie may fall to either side


@pytest.mark.parametrize("packing", ["padding-free", "packed"])
def test_where_rows_begin_is_told_and_not_looked_for(model, tokenizer, tokenized, mean_loss, packing, monkeypatch):
    def look(position_ids):
        raise AssertionError("looked for rows in the positions")

    monkeypatch.setattr("expertune.layers.varlen_attention.sequence_lengths", look)
    data = viggo_data(packing=packing)
    loss = evaluation_loss(model, make_dataset(tokenized, data), make_collator(data, tokenizer), 4)
    assert loss == pytest.approx(mean_loss, rel=1e-5)


def test_the_loss_is_of_the_language_model_alone(model, tokenizer, tokenized, mean_loss):
    config = model.get_base_model().config
    config.output_router_logits = True
    try:
        data = viggo_data()
        loss = evaluation_loss(model, make_dataset(tokenized, data), make_collator(data, tokenizer), 4)
    finally:
        config.output_router_logits = False
    assert loss == pytest.approx(mean_loss, rel=1e-5)


def test_a_model_in_training_is_measured_without_dropout_and_goes_on_training(model, tokenizer, tokenized, mean_loss):
    data = viggo_data()
    model.train()
    try:
        loss = evaluation_loss(model, make_dataset(tokenized, data), make_collator(data, tokenizer), 4)
        assert model.training
    finally:
        model.eval()
    assert loss == pytest.approx(mean_loss, rel=1e-5)
    assert all(parameter.grad is None for parameter in model.parameters())


def test_rows_without_labels_have_no_loss(model, tokenizer):
    dataset = [{"input_ids": [1, 5, 6], "labels": [IGNORE_INDEX] * 3, "example_ids": [0]}]
    with pytest.raises(DataError, match="no token that takes a loss"):
        evaluation_loss(model, dataset, make_collator(viggo_data(), tokenizer), 1)


@pytest.fixture
def answered(monkeypatch):
    """Let a list of texts stand for what the model writes; returns the prompts that it was asked."""
    asked = []

    def use(answers):
        def complete(model, tokenizer, prompts, sampling, batch_size, batches):
            asked.extend(prompts)
            return [Completion(text, 1, "stop", 0.0) for text in answers[: len(prompts)]]

        monkeypatch.setattr("expertune.evaluation.scoring.complete", complete)
        return asked

    return use


def test_perfect_answers_score_one(tokenizer, tokenized, answered):
    asked = answered([row.completion for row in tokenized.examples])
    scores = score_task(None, tokenizer, tokenized.examples, TaskConfig(metric="slot-f1"))
    assert (scores["slot_f1"], scores["precision"], scores["recall"], scores["exact_match"]) == (1, 1, 1, 1)
    assert (scores["metric"], scores["rows"]) == ("slot-f1", len(tokenized.examples))
    for row, prompt in zip(tokenized.examples, asked, strict=True):
        assert row.input_ids[: len(prompt)] == prompt


def test_examples_show_the_first_rows_with_their_verdicts(tokenizer, tokenized, answered):
    first, second = tokenized.examples[:2]
    answered([first.completion, "no idea\n"])
    scores = score_task(None, tokenizer, [first, second], TaskConfig(metric="exact-match"))
    assert scores["exact_match"] == 0.5
    assert scores["examples"] == [
        {
            "prompt": first.prompt,
            "expected": first.completion.strip(),
            "answered": first.completion.strip(),
            "right": True,
            "figure": 1.0,
        },
        {
            "prompt": second.prompt,
            "expected": second.completion.strip(),
            "answered": "no idea",
            "right": False,
            "figure": 0.0,
        },
    ]


def test_examples_are_all_that_the_task_has_answered(tokenizer, tokenized, answered):
    answers = [row.completion for row in tokenized.examples]
    asked = answered(answers[1:] + answers[:1])
    scores = score_task(None, tokenizer, tokenized.examples, TaskConfig(metric="slot-f1", rows=10))
    assert (scores["rows"], len(asked), len(scores["examples"])) == (10, 10, 10)
    for example in scores["examples"]:
        assert example["figure"] == slot_f1([example["expected"]], [example["answered"]])["slot_f1"]


def test_examples_of_long_texts_are_the_first_eight(tokenizer, tokenized, answered):
    answered(["long " * 20_000] * 10)
    scores = score_task(None, tokenizer, tokenized.examples, TaskConfig(metric="exact-match", rows=10))
    assert (scores["rows"], len(scores["examples"])) == (10, 8)


def test_an_untuned_model_is_scored_on_what_it_writes(model, tokenizer, tokenized):
    seen = []
    task = TaskConfig(metric="slot-f1", rows=3, max_new_tokens=4, batch_size=2)
    batches = Batches(progress=lambda done, total: seen.append((done, total)))
    scores = score_task(model, tokenizer, tokenized.examples, task, batches)
    assert 0 <= scores["slot_f1"] < 1
    assert scores["seconds"] > 0
    assert not math.isnan(scores["precision"])
    assert seen == [(2, 3), (3, 3)]


def test_a_row_that_is_no_meaning_representation_is_named_before_anything_is_generated(tokenizer, answered):
    asked = answered([])
    row = TokenizedExample([1, 2], [1, 2], "dolly.jsonl: row 7", "Who?", " Camels.", 2)
    with pytest.raises(DataError, match=r"dolly\.jsonl: row 7: the answer 'Camels\.' is no meaning representation"):
        score_task(None, tokenizer, [row], TaskConfig(metric="slot-f1"))
    assert asked == []


def test_a_task_without_a_metric_cannot_be_scored(tokenizer, tokenized):
    with pytest.raises(ConfigError, match=r"task\.metric names no metric"):
        score_task(None, tokenizer, tokenized.examples, TaskConfig())
