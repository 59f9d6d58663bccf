"""Large sources: the same examples and the same record as in memory, made once, from files that may be damaged."""

import gzip
import json
import multiprocessing
import pickle
import resource
import warnings
from datetime import date, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from expertune.config import DataConfig
from expertune.data import encode_prompt, make_dataset, prepare_examples, prepare_run, settled, token_cache
from expertune.data.sources import find_source
from expertune.data.special_tokens import plain_places
from expertune.data.token_cache import MappedExamples, cache_key
from expertune.errors import DataError
from tests.processes import run_program

ROWS = [
    {"instruction": f"What is {n} plus </s> one?", "context": "Sums. " * (n % 5), "response": f"It is {n + 1}, é."}
    for n in range(250)
]
TALK = [
    {
        "messages": [
            {"role": "user", "content": f"Is {n} even?"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Are you sure </s>?"},
            {"role": "assistant", "content": "No."},
        ]
    }
    for n in range(120)
]
KINDS = ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet", "rows.txt", "rows.jsonl.gz", "rows.csv.gz"]


@pytest.fixture
def large(monkeypatch, tmp_path):
    """Take every source for a large one, from now on; the folder of what is kept."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def take() -> Path:
        monkeypatch.setattr(token_cache, "LARGE_BYTES", 0)
        return tmp_path / "cache" / "expertune" / "tokens"

    return take


def write(path, rows):
    kind = "".join(path.suffixes)
    if kind == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
        return str(path)
    if ".csv" in kind:
        lines = [",".join(rows[0]), *(",".join(f'"{value}"' for value in row.values()) for row in rows)]
        content = "\n".join(lines)
    elif kind == ".txt":
        content = "\n".join(json.dumps(row) for row in rows)
    elif kind == ".json":
        content = json.dumps(rows)
    else:
        content = "\n".join(json.dumps(row) for row in rows)
    path.write_bytes(gzip.compress(content.encode()) if kind.endswith(".gz") else content.encode())
    return str(path)


def state(folder):
    return sorted((str(path), path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.rglob("*"))


@pytest.mark.parametrize("name", KINDS)
def test_large_source_gives_the_same_examples_and_report_made_and_found_again(name, tmp_path, tiny_tokenizer, large):
    data = DataConfig(train=f"{write(tmp_path / name, ROWS)}[7:240]", max_length=40, on_error="skip")
    expected = prepare_examples(data, "train", tiny_tokenizer)
    folder, told = large(), []
    made = prepare_examples(data, "train", tiny_tokenizer, lambda done, total: told.append((done, total)))
    assert told == [(done, 233) for done in range(0, 233, 64)]
    before = state(folder)
    found = prepare_examples(data, "train", tiny_tokenizer)
    assert state(folder) == before
    for each in (made, found):
        assert isinstance(each.examples, MappedExamples)
        assert list(each.examples) == expected.examples
        assert json.dumps(each.report) == json.dumps(expected.report)
        assert each.digest == expected.digest
        assert (list(each.lengths), list(each.uncut_lengths)) == (expected.lengths, expected.uncut_lengths)


@pytest.mark.parametrize("rows", [ROWS, TALK])
@pytest.mark.parametrize("packing", ["padding-free", "packed"])
def test_prompts_and_sequences_of_a_large_source_are_those_in_memory(rows, packing, tmp_path, tiny_tokenizer, large):
    data = DataConfig(
        train=write(tmp_path / "rows.jsonl", rows), packing=packing, max_length=128, template="chatml", on_error="skip"
    )
    expected = prepare_examples(data, "train", tiny_tokenizer)
    large()
    found = prepare_examples(data, "train", tiny_tokenizer)
    for one, other in zip(found.examples, expected.examples, strict=True):
        assert plain_places(one.prompt) == plain_places(other.prompt)
        assert encode_prompt(one.prompt, tiny_tokenizer) == encode_prompt(other.prompt, tiny_tokenizer)
        assert one.input_ids[: len(encode_prompt(one.prompt, tiny_tokenizer))] == encode_prompt(
            one.prompt, tiny_tokenizer
        )
    assert list(make_dataset(found, data)) == list(make_dataset(expected, data))
    # As a data loader's worker that is started anew gets them.
    assert pickle.loads(pickle.dumps(found.examples))[-3:] == expected.examples[-3:]


def test_resumed_run_finds_tokens_whose_format_and_template_were_chosen(tmp_path, tiny_tokenizer, large):
    data = DataConfig(train=write(tmp_path / "rows.jsonl", ROWS), on_error="skip")
    folder = large()
    made = prepare_examples(data, "train", tiny_tokenizer)
    before = state(folder)
    found = prepare_examples(settled(data, made.report), "train", tiny_tokenizer)
    assert state(folder) == before
    assert (found.digest, found.report) == (made.digest, made.report)


def test_what_decides_tokens_is_in_the_key_and_nothing_else(tmp_path, tiny_tokenizer, mixtral_tokenizer):
    template = tmp_path / "mine.jinja"
    template.write_text("{{ instruction }} {{ response }}", encoding="utf-8")
    data = DataConfig(train=write(tmp_path / "rows.jsonl", ROWS), template=str(template))

    def key(tokenizer=tiny_tokenizer, part="", **changed):
        now = data.model_copy(update=changed)
        return cache_key(find_source(now.train + part), now, tokenizer)

    first = key()
    assert first == key(packing="packed") == key(merge_accumulation=False) == key(eval="other.jsonl")
    others = [
        key(mixtral_tokenizer),
        key(part="[0:9]"),
        key(max_length=64),
        key(train_on="all"),
        key(on_error="skip"),
        key(parse_special_tokens=True),
        key(columns={"prompt": "instruction"}),
        key(format="dolly"),
    ]
    template.write_text("{{ instruction }}: {{ response }}", encoding="utf-8")
    others.append(key())
    write(tmp_path / "rows.jsonl", ROWS[1:])
    others.append(key())
    assert len({first, *others}) == 1 + len(others)


def test_examples_of_a_template_that_writes_the_date_are_kept_for_a_day(tmp_path, tiny_tokenizer, monkeypatch):
    template = tmp_path / "dated.jinja"
    template.write_text("{{ strftime_now('%d') }} {% for m in messages %}{{ m.content }}{% endfor %}", encoding="utf-8")
    path = write(tmp_path / "rows.jsonl", TALK)
    dated, plain = DataConfig(train=path, template=str(template)), DataConfig(train=path, template="chatml")
    before = [cache_key(find_source(path), data, tiny_tokenizer) for data in (dated, plain)]

    class Tomorrow(date):
        @classmethod
        def today(cls):
            return date.today() + timedelta(days=1)

    monkeypatch.setattr(token_cache, "date", Tomorrow)
    after = [cache_key(find_source(path), data, tiny_tokenizer) for data in (dated, plain)]
    assert (before[0] == after[0], before[1] == after[1]) == (False, True)


@pytest.mark.parametrize(
    "damage", ["truncated", "one bit", "no report", "broken report", "other report", "no examples"]
)
def test_damaged_tokens_are_made_again(damage, tmp_path, tiny_tokenizer, large):
    data = DataConfig(train=write(tmp_path / "rows.jsonl", ROWS[:100]))
    expected = prepare_examples(data, "train", tiny_tokenizer)
    folder = large()
    prepare_examples(data, "train", tiny_tokenizer)
    kept = folder / cache_key(find_source(data.train), data, tiny_tokenizer)
    examples, report = kept / "examples.arrow", kept / "report.json"
    content = bytearray(examples.read_bytes())
    if damage == "truncated":
        examples.write_bytes(content[:-100])
    elif damage == "one bit":
        content[len(content) // 2] ^= 1
        examples.write_bytes(content)
    elif damage == "no report":
        report.unlink()
    elif damage == "broken report":
        report.write_text("[]", encoding="utf-8")
    elif damage == "other report":
        report.write_text(json.dumps(json.loads(report.read_text()) | {"sha256": "0" * 64}), encoding="utf-8")
    else:
        examples.unlink()
    (kept / ".examples.arrow.0.tmp").write_bytes(b"left by a process that was killed")
    found = prepare_examples(data, "train", tiny_tokenizer)
    assert list(found.examples) == expected.examples
    assert sorted(path.name for path in kept.iterdir()) == ["examples.arrow", "report.json"]


def test_two_processes_that_make_the_same_tokens_share_them(tmp_path, tiny_tokenizer, large):
    data = DataConfig(train=write(tmp_path / "rows.jsonl", ROWS))
    expected = prepare_examples(data, "train", tiny_tokenizer)
    folder = large()

    def prepare(results):
        results.put(prepare_examples(data, "train", tiny_tokenizer).digest)

    context = multiprocessing.get_context("fork")
    results = context.SimpleQueue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads that a child does not have
        processes = [context.Process(target=prepare, args=(results,)) for _ in range(3)]
        for process in processes:
            process.start()
    for process in processes:
        process.join()
    assert [results.get() for _ in processes] == [expected.digest] * 3
    kept = folder / cache_key(find_source(data.train), data, tiny_tokenizer)
    assert sorted(path.name for path in kept.iterdir()) == ["examples.arrow", "report.json"]


def test_tokens_that_do_not_fit_on_the_disk_are_one_error_and_leave_nothing(tmp_path, tiny_tokenizer, large):
    data = DataConfig(train=write(tmp_path / "rows.jsonl", ROWS))
    folder = large()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(
            DataError, match=r"rows\.jsonl: its tokens cannot be kept: .*set XDG_CACHE_HOME to a folder"
        ):
            prepare_examples(data, "train", tiny_tokenizer)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv", "rows.parquet", "rows.jsonl.gz"])
def test_bad_rows_of_a_large_source_are_named_as_those_of_a_small_one(name, tmp_path, tiny_tokenizer, large):
    rows = [row | ({"response": ""} if number % 70 == 3 else {}) for number, row in enumerate(ROWS)]
    data = DataConfig(train=write(tmp_path / name, rows))

    def said():
        with pytest.raises(DataError) as caught:
            prepare_examples(data, "train", tiny_tokenizer)
        return str(caught.value)

    expected = said()
    assert f"{name}: row 74: empty completion: response holds no text; fill it in" in expected
    assert "4 of 250 examples cannot be used" in expected
    folder = large()
    assert said() == expected
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "spec", "message"),
    [
        (b'{"text": "a"}\n{"text": "b"}', "[0:3]", "the slice ends at row 3, but there are 2 examples"),
        (b"\n", "", "the file is empty"),
        (b"not json\n", "", "not one of 1 examples can be read; rows.jsonl: row 1: not valid JSON"),
        (b'{"text": "a"}\n{"text": \n', "", r"rows\.jsonl: row 2: not valid JSON"),
        (b'{"text": "a"}\n{"text": "caf\xe9"}\n', "", "row 2: not UTF-8: byte 0xe9 at byte offset 27"),
    ],
)
def test_large_source_that_cannot_be_read_is_the_error_of_a_small_one(
    content, spec, message, tmp_path, tiny_tokenizer, large
):
    (tmp_path / "rows.jsonl").write_bytes(content)
    large()
    with pytest.raises(DataError, match=message):
        prepare_examples(DataConfig(train=f"{tmp_path / 'rows.jsonl'}{spec}"), "train", tiny_tokenizer)


def test_examples_longer_than_the_context_are_found_without_reading_them(tmp_path, tiny_tokenizer, large):
    data = DataConfig(train=write(tmp_path / "rows.jsonl", [*ROWS, ROWS[0] | {"context": "long " * 99}]))
    large()
    with pytest.raises(DataError, match=r"1 of 251 examples are longer than .* context of 90 tokens; .*row 251, "):
        prepare_run(data, tiny_tokenizer, context=90)


def test_file_that_grows_while_it_is_read_is_an_error(tmp_path):
    path = Path(write(tmp_path / "rows.jsonl", ROWS))
    source = find_source(str(path))
    with path.open("a") as file:
        file.write("\n" + json.dumps(ROWS[0]))
    with pytest.raises(DataError, match=r"rows\.jsonl: changed while it was read; start again"):
        source.read(stream=True)


def test_small_source_leaves_no_file(tmp_path, tiny_tokenizer, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    data = DataConfig(train=write(tmp_path / "rows.jsonl", ROWS))
    assert isinstance(prepare_examples(data, "train", tiny_tokenizer).examples, list)
    assert not (tmp_path / "cache").exists()


MEMORY = """
import json, resource, sys
from transformers import AutoTokenizer
from expertune.config import DataConfig
from expertune.data import make_dataset, prepare_examples, token_cache

token_cache.LARGE_BYTES = 0
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
peaks = []
for path in sys.argv[2:]:
    for packing in ("padding-free", "packed"):
        data = DataConfig(train=path, packing=packing, max_length=1024)
        dataset = make_dataset(prepare_examples(data, "train", tokenizer), data)
        assert sum(len(sequence["input_ids"]) for sequence in dataset) > 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
print(json.dumps(peaks))
"""


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path, large):
    large()
    row = {
        "instruction": "Which words are these?",
        "context": "some more words of the text " * 60,
        "response": "Words.",
    }
    paths = [write(tmp_path / f"{count}.jsonl", [row | {"id": n} for n in range(count)]) for count in (200, 1600)]
    tokenizer = Path(token_cache.__file__).parents[1] / "assets" / "tiny-mixtral"
    few, many = json.loads(run_program(MEMORY, str(tokenizer), *paths).out)
    assert many - few < 25  # MiB; in lists it is 60 more
