import copy
import hashlib
import json

import pytest

from expertune.config import DataConfig
from expertune.data import IGNORE_INDEX, make_collator, make_dataset, prepare_examples, prepare_run
from expertune.errors import ConfigError, DataError
from expertune.run.identity import require_same_files
from expertune.run.record import RunRecord

GOOD = {"prompt": "One plus one?", "completion": " Two."}


def test_examples_come_in_order_with_their_places(files, tiny_tokenizer):
    data = DataConfig(train=f"{files}/viggo-train-first5.csv[1:4]", columns={"prompt": "ref", "completion": "mr"})
    examples = prepare_examples(data, "train", tiny_tokenizer).examples
    assert [example.place for example in examples] == [f"viggo-train-first5.csv: row {number}" for number in (2, 3, 4)]


def test_evaluation_examples_are_read_from_their_own_source(jsonl, tiny_tokenizer):
    train, evaluation = jsonl(GOOD), jsonl({**GOOD, "completion": " 2."}, name="eval.jsonl")
    (example,) = prepare_examples(DataConfig(train=train, eval=evaluation), "eval", tiny_tokenizer).examples
    assert (example.place, example.completion) == ("eval.jsonl: row 1", " 2.")
    with pytest.raises(ConfigError, match=r"data\.eval names no examples"):
        prepare_examples(DataConfig(train=train), "eval", tiny_tokenizer)


def test_report_counts_what_the_record_needs(files, tiny_tokenizer):
    path = files / "dolly-first5.jsonl"
    data = DataConfig(train=str(path), max_length=200)
    found = prepare_examples(data.model_copy(update={"on_error": "skip"}), "train", tiny_tokenizer)
    report = found.report
    json.dumps(report, allow_nan=False)
    assert report["source"] == str(path)
    assert report["sha256"] == {"dolly-first5.jsonl": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert (report["format"], report["template"]) == ("dolly", "dolly")
    assert report["num_rows"] + report["num_skipped"] == 5
    assert report["num_skipped"] == len(report["skipped"]) > 0
    assert report["num_tokens"] == sum(len(example.input_ids) for example in found.examples)
    assert report["num_label_tokens"] == sum(
        label != IGNORE_INDEX for example in found.examples for label in example.labels
    )
    lengths = [example.uncut_length for example in found.examples]
    assert (report["length"]["min"], report["length"]["max"]) == (min(lengths), max(lengths))
    assert report["num_truncated"] == sum(length > 200 for length in lengths)


def test_same_file_gives_the_same_examples(files, tiny_tokenizer):
    data = DataConfig(train=str(files / "dolly-first5.jsonl"))
    assert prepare_examples(data, "train", tiny_tokenizer) == prepare_examples(data, "train", tiny_tokenizer)


def test_cut_is_on_the_right_and_keeps_bos(jsonl, tiny_tokenizer):
    path = jsonl({"prompt": "Count.", "completion": " one two three four five six seven eight nine ten"})
    (whole,) = prepare_examples(DataConfig(train=path), "train", tiny_tokenizer).examples
    found = prepare_examples(DataConfig(train=path, max_length=10), "train", tiny_tokenizer)
    (cut,) = found.examples
    assert cut.input_ids == whole.input_ids[:10]
    assert cut.labels == whole.labels[:10]
    assert cut.input_ids[0] == tiny_tokenizer.bos_token_id
    assert cut.uncut_length == len(whole.input_ids)
    assert found.report["num_truncated"] == 1


def test_example_without_a_label_behind_the_cut_is_an_error(jsonl, tiny_tokenizer):
    path = jsonl(GOOD, {"prompt": "word " * 50, "completion": "late"})
    with pytest.raises(
        DataError, match=r"row 2: no label is left: the example has \d+ tokens and the cut at 32 falls bef"
    ):
        prepare_examples(DataConfig(train=path, max_length=32), "train", tiny_tokenizer)
    # With the loss on the prompt too, the same cut leaves labels.
    assert (
        len(prepare_examples(DataConfig(train=path, max_length=32, train_on="all"), "train", tiny_tokenizer).examples)
        == 2
    )


def test_true_eos_is_trained_where_padding_is_eos(jsonl, mixtral_tokenizer):
    tokenizer = copy.deepcopy(mixtral_tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    data = DataConfig(train=jsonl(GOOD), packing="padded", max_length=32)
    tokenized = prepare_examples(data, "train", tokenizer)
    batch = make_collator(data, tokenizer)(make_dataset(tokenized, data))
    num_padding = 32 - len(tokenized.examples[0].input_ids)
    assert batch["input_ids"][0, :num_padding].tolist() == [tokenizer.eos_token_id] * num_padding
    assert batch["labels"][0, :num_padding].tolist() == [IGNORE_INDEX] * num_padding
    assert batch["labels"][0, -1] == tokenizer.eos_token_id


def test_text_that_holds_the_padding_token_is_an_error(jsonl, tiny_tokenizer):
    path = jsonl({"prompt": "<pad><pad>", "completion": " x"})
    with pytest.raises(DataError, match="the text holds the padding token <pad> 2 times; remove it"):
        prepare_examples(DataConfig(train=path, parse_special_tokens=True), "train", tiny_tokenizer)
    # Where only the template writes special tokens, it is a text like any other.
    (example,) = prepare_examples(DataConfig(train=path), "train", tiny_tokenizer).examples
    assert tiny_tokenizer.pad_token_id not in example.input_ids


def test_half_a_surrogate_pair_is_an_error_of_its_example(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD) + '\n{"prompt": "smile", "completion": "\\ud83d"}\n', encoding="utf-8")
    with pytest.raises(DataError, match=r"row 2: half a surrogate pair, '\\ud83d', is not a character"):
        prepare_examples(DataConfig(train=str(path)), "train", tiny_tokenizer)


def test_answer_that_the_template_empties_is_an_error(tmp_path, jsonl, tiny_tokenizer):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ prompt }} {{ completion | replace('Two.', '') }}", encoding="utf-8")
    with pytest.raises(DataError, match="empty completion: what the template makes of the answer holds no text"):
        prepare_examples(DataConfig(train=jsonl(GOOD), template=str(template)), "train", tiny_tokenizer)


def test_bad_examples_stop_the_run_with_one_message(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    lines = [json.dumps(GOOD)] * 20
    for index in range(2, 16, 2):
        lines[index] = json.dumps({**GOOD, "completion": ""})
    lines[4] = '{"prompt": '
    path.write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(DataError) as caught:
        prepare_examples(DataConfig(train=str(path)), "train", tiny_tokenizer)
    first, *rest = str(caught.value).split("\n")
    assert first == f"data.train: {path}: 7 of 20 examples cannot be used; first:"
    assert (
        rest[0] == "  rows.jsonl: row 3: empty completion: completion holds no text; fill it in or delete the example"
    )
    assert rest[1].startswith("  rows.jsonl: row 5: not valid JSON")
    assert rest[5:] == ["  ... and 2 more", "Fix these examples, or set data.on_error: skip to drop and count them."]


def test_bad_examples_are_dropped_and_counted_where_asked(jsonl, tiny_tokenizer):
    examples = [GOOD, *[{**GOOD, "completion": ""}] * 30, GOOD]
    found = prepare_examples(DataConfig(train=jsonl(*examples), on_error="skip"), "train", tiny_tokenizer)
    assert [example.place for example in found.examples] == ["rows.jsonl: row 1", "rows.jsonl: row 32"]
    assert found.report["num_skipped"] == 30
    assert len(found.report["skipped"]) == 20
    assert found.report["skipped"][0].startswith("rows.jsonl: row 2: empty completion")


def test_nothing_left_is_an_error_even_where_bad_examples_may_be_dropped(jsonl, tiny_tokenizer):
    path = jsonl({**GOOD, "completion": ""}, {"prompt": "One?"})
    with pytest.raises(DataError, match=r"2 of 2 examples cannot be used(.*\n)+No example is left to train on\."):
        prepare_examples(DataConfig(train=path, on_error="skip"), "train", tiny_tokenizer)


def test_first_line_that_is_not_json_does_not_hide_the_layout(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("# examples of mine\n" + json.dumps(GOOD) + "\n", encoding="utf-8")
    (example,) = prepare_examples(DataConfig(train=str(path), on_error="skip"), "train", tiny_tokenizer).examples
    assert example.place == "rows.jsonl: row 2"


def test_file_of_nothing_but_broken_lines_reports_the_lines(tmp_path, tiny_tokenizer):
    path = tmp_path / "rows.jsonl"
    path.write_text("not json\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"rows\.jsonl: row 1: not valid JSON"):
        prepare_examples(DataConfig(train=str(path)), "train", tiny_tokenizer)


def test_resume_names_the_file_of_a_glob_that_is_new_gone_or_other(tmp_path, jsonl, tiny_tokenizer):
    jsonl(GOOD, name="a.jsonl")
    jsonl(GOOD, name="b.jsonl")
    data = DataConfig(train=str(tmp_path / "*.jsonl"))

    def report():
        return prepare_examples(data, "train", tiny_tokenizer).report

    record = RunRecord(tmp_path / "record.json", {"data": {"train": report()}})
    require_same_files(record, {"train": report()})
    jsonl(GOOD, GOOD, name="a.jsonl")
    with pytest.raises(DataError, match=r"data\.train: a\.jsonl has changed since the run started; restore it"):
        require_same_files(record, {"train": report()})
    jsonl(GOOD, name="a.jsonl")
    (tmp_path / "b.jsonl").rename(tmp_path / "c.jsonl")
    with pytest.raises(DataError, match=r"c\.jsonl, b\.jsonl has changed .* \(new: c\.jsonl; gone: b\.jsonl\)"):
        require_same_files(record, {"train": report()})


def test_examples_longer_than_the_models_context_are_an_error_with_their_number(jsonl, tiny_tokenizer):
    long = {"prompt": "word " * 40, "completion": "end"}
    data = DataConfig(train=jsonl(GOOD, long), eval=jsonl(long, {**long, "prompt": "word " * 50}, name="eval.jsonl"))
    train, evaluation = prepare_run(data, tiny_tokenizer, context=2048)
    longest = max(example.uncut_length for example in evaluation.examples)
    assert prepare_run(data, tiny_tokenizer, context=longest)[1].examples == evaluation.examples
    with pytest.raises(DataError, match=rf"data\.eval: 1 of 2 .* context of {longest - 1} tokens; .*row 2, {longest} "):
        prepare_run(data, tiny_tokenizer, context=longest - 1)
    with pytest.raises(DataError, match=r"data\.train: 1 of 2 examples .* Set data\.max_length: 32 to cut them"):
        prepare_run(data, tiny_tokenizer, context=32)
    assert train.examples
