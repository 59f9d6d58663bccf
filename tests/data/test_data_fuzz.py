"""Data files, templates and tokenizers that no one would make by hand: one error that names the file, in bounds."""

import gzip
import io
import json
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from expertune.checkpoint.tokenizer import load_tokenizer
from expertune.cli import main
from expertune.config import DataConfig
from expertune.data import prepare_examples, trial
from expertune.errors import ExpertuneError
from tests.examples import examples

TINY = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"
EXAMPLE = {"prompt": "One?", "completion": "Two."}
CHAT = {"messages": [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "Two."}]}
KINDS = (".jsonl", ".json", ".csv", ".txt", ".parquet", ".jsonl.gz", ".csv.gz")

quick = examples(30, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(TINY)


def one_error_or_none(work: Callable[[], object], folder: Path, *named: str) -> str:
    """What is said, if anything is; whatever happens is within bounds and leaves nothing behind."""
    before = sorted(folder.iterdir())
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    said = ""
    try:
        work()
    except ExpertuneError as error:
        said = str(error)
        assert any(name in said for name in named)
        assert len(said) < 10_000
        said.encode("utf-8", "backslashreplace")
    assert time.process_time() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500 * 1024
    assert sorted(folder.iterdir()) == before
    return said


def read(content: bytes, kind: str, folder: Path, tokenizer: Any, **data: Any) -> str:
    path = folder / f"examples{kind}"
    path.write_bytes(content)
    try:
        return one_error_or_none(
            lambda: prepare_examples(DataConfig(train=str(path), **data), "train", tokenizer),
            folder,
            f"examples{kind}",
            "data.template",
        )
    finally:
        path.unlink()


def parquet(table: pa.Table) -> bytes:
    file = io.BytesIO()
    pq.write_table(table, file)
    return file.getvalue()


GOOD = {
    ".jsonl": json.dumps(EXAMPLE).encode() + b"\n" + json.dumps(EXAMPLE).encode(),
    ".json": json.dumps([EXAMPLE, EXAMPLE]).encode(),
    ".csv": b'prompt,completion\nOne?,Two.\n"a ""b""","c,\nd"\n',
    ".txt": b"one\ntwo\n",
    ".parquet": parquet(pa.table({"prompt": ["One?", "a"], "completion": ["Two.", "b"]})),
    ".jsonl.gz": gzip.compress(json.dumps(EXAMPLE).encode() * 3),
    ".csv.gz": gzip.compress(b"prompt,completion\na,b\n"),
}

# fmt: off
names = st.sampled_from([
    "prompt", "completion", "messages", "conversations", "role", "content", "from", "value", "text", "instruction",
    "response", "output", "input", "question", "answer", "system", "history", "tools", "weight", "loss", "type",
    "context", "replies", "label", "chosen", "rejected", "reasoning_content", "\ud800", "",
])
# fmt: on
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["\ud800", "</s>", "<pad>", "\0", "\U00100000</s>", "user", "x" * 10_000]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names | st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)


@quick
@given(
    kind=st.sampled_from(KINDS),
    content=st.binary(max_size=80) | st.text(max_size=60).map(lambda t: t.encode("utf-8", "surrogatepass")),
)
@example(kind=".csv", content=b"\xef\xbb\xbf")
@example(kind=".json", content=b"9" * 5000)
@example(kind=".json", content=b"[" * 100_000)
@example(kind=".jsonl", content=b'{"prompt": ' + b"9" * 5000 + b', "completion": "a"}')
@example(kind=".jsonl", content=b'{"messages": ' + b'[{"content": ' * 300 + b"1" + b"}]" * 300 + b"}")
@example(kind=".csv", content=b"a\0,b\n\0,\0\n")
@example(kind=".txt", content=b"\xff\xfea\x00")
@example(kind=".parquet", content=b"PAR1" * 4)
@example(kind=".jsonl.gz", content=gzip.compress(b"{}\n" * 10**7))
def test_file_of_any_bytes_is_read_or_refused(folder, tokenizer, kind, content):
    read(content, kind, folder, tokenizer)


@quick
@given(kind=st.sampled_from(KINDS), data=st.data())
def test_damaged_file_is_read_or_refused(folder, tokenizer, kind, data):
    content = bytearray(GOOD[kind])
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.none() | st.integers(0, len(content)))
    read(bytes(content[:cut]), kind, folder, tokenizer, on_error=data.draw(st.sampled_from(["stop", "skip"])))


@quick
@given(
    examples=st.lists(st.dictionaries(names, values, max_size=4), min_size=1, max_size=3),
    template=st.sampled_from([None, "chatml", "plain"]),
)
@example(examples=[{"prompt": "\ud800", "completion": "a"}], template=None)
@example(examples=[{"\ud800": "a"}], template=None)
@example(examples=[{"x" * 100_000: "a"}], template=None)
@example(examples=[{"prompt": "a", "completion": "b", "x" * 100_000: "a"}], template="chatml")
@example(examples=[{"messages": [{"role": "x" * 100_000, "content": "a"}]}], template="chatml")
@example(examples=[{"messages": [{"role": ["user"], "content": {}}]}], template="chatml")
@example(examples=[{"conversations": [{"from": {}, "value": 1}]}], template="chatml")
def test_examples_of_any_values_are_read_or_refused(folder, tokenizer, examples, template):
    read("\n".join(map(json.dumps, examples)).encode(), ".jsonl", folder, tokenizer, template=template)


@quick
@given(
    st.lists(
        st.dictionaries(
            names.filter(str.isascii),
            st.binary(max_size=4)
            | st.dates()
            | st.integers(-5, 5)
            | st.text(max_size=5)
            | st.none()
            | st.lists(st.text(max_size=3), max_size=2),
            min_size=1,
            max_size=3,
        ),
        min_size=1,
        max_size=3,
    )
)
def test_parquet_of_any_types_is_read_or_refused(folder, tokenizer, examples):
    try:
        content = parquet(pa.Table.from_pylist(examples))
    except (pa.ArrowException, OSError):
        return
    read(content, ".parquet", folder, tokenizer)


# fmt: off
BOMBS = [
    "{% for i in range(10**9) %}x{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 10**(10**10) }}", "{{ 'a' * 10**11 }}", "{{ [1] * 10**10 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ " + "(" * 5000 + ")" * 5000 + " }}",
    "{% if 1 %}" * 300 + "{% endif %}" * 300,
    "{% for a in 'b' %}" * 40 + "{% endfor %}" * 40,
    "{{ 1/0 }}", "{{ 'a' | nope }}", "{{ 'a' is nope }}", "{% include 'x' %}", "{% extends 'x' %}",
    "{{ x.y.z }}", "{% if %}", "{{ caller() }}", "{#", "{% raw %}", "{% break %}",
]
pieces = st.sampled_from([
    "{{ ", " }}", "{% ", " %}", "for m in messages", "endfor", "if m", "endif", "m.content", "prompt", "completion",
    "+", "~", "|", "upper", "join('x')", "[", "]", "(", ")", "set x = ", "loop.index", "generation", "endgeneration",
    "eos_token", "0", "'", "\n", "{#", "#}", "-", "messages", "macro f()", "endmacro", "raise_exception('x')",
    "namespace()", "\x00", "</s>",
])
# fmt: on


@pytest.mark.parametrize("example", [EXAMPLE, CHAT], ids=["columns", "messages"])
@pytest.mark.parametrize("bomb", range(len(BOMBS)))
def test_template_that_never_ends_or_fails_is_one_error(folder, tokenizer, monkeypatch, example, bomb):
    monkeypatch.setattr(trial, "SECONDS", 1)
    body = (
        "{% for m in messages %}{{ m.content ~ eos_token }}{% endfor %}"
        if "messages" in example
        else "{{ prompt }} {{ completion }}"
    )
    assert "mine.jinja" in render(BOMBS[bomb] + body, example, folder, tokenizer)


@quick
@given(parts=st.lists(pieces, max_size=12), example=st.sampled_from([EXAMPLE, CHAT]))
def test_template_of_any_pieces_renders_or_is_refused(folder, tokenizer, parts, example):
    render("".join(parts), example, folder, tokenizer)


def render(source: str, example: dict[str, Any], folder: Path, tokenizer: Any) -> str:
    template, path = folder / "mine.jinja", folder / "rows.jsonl"
    template.write_text(source, encoding="utf-8")
    path.write_text(json.dumps(example), encoding="utf-8")
    data = DataConfig(train=str(path), template=str(template))
    try:
        return one_error_or_none(lambda: prepare_examples(data, "train", tokenizer), folder, "mine.jinja", "rows.jsonl")
    finally:
        template.unlink()
        path.unlink()


FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    for name in ("config.json", *FILES):
        shutil.copyfile(TINY / name, folder / name)
    small = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    vocabulary = dict(list(small["model"]["vocab"].items())[:300])
    small["model"] |= {"vocab": vocabulary, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(small), encoding="utf-8")
    return folder


def load(model: Path) -> str:
    return one_error_or_none(lambda: load_tokenizer(model).encode("One two."), model, str(model))


@quick
@given(name=st.sampled_from(FILES), data=st.data())
def test_tokenizer_with_any_value_anywhere_loads_or_is_refused(model, name, data):
    path = model / name
    before = path.read_bytes()
    content = json.loads(before)
    inside, key = content, data.draw(st.sampled_from(sorted(content)))
    while isinstance(inside[key], dict | list) and inside[key] and data.draw(st.integers(0, 3)):
        inside = inside[key]
        key = data.draw(
            st.sampled_from(sorted(inside)[:20] if isinstance(inside, dict) else range(min(len(inside), 20)))
        )
    inside[key] = data.draw(
        st.sampled_from([None, 0, -1, 2**31, 2**63, 1.5, "", "x", [], [1], {}, {"a": 1}, True, "\ud800"])
    )
    path.write_text(json.dumps(content), encoding="utf-8")
    try:
        load(model)
    finally:
        path.write_bytes(before)


@quick
@given(
    name=st.sampled_from([*FILES, "tokenizer.model"]),
    content=st.binary(max_size=60) | st.sampled_from([b"[]", b"{}", b"1", b"[" * 100_000, b"null"]),
)
def test_tokenizer_file_of_any_bytes_is_refused_or_read(model, name, content):
    path = model / name
    before = path.read_bytes() if path.exists() else None
    hidden = (model / "tokenizer.json").read_bytes()
    if name == "tokenizer.model":
        (model / "tokenizer.json").unlink()
    path.write_bytes(content)
    try:
        load(model)
    finally:
        path.unlink() if before is None else path.write_bytes(before)
        (model / "tokenizer.json").write_bytes(hidden)


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("rows.jsonl", b'{"prompt": "a", "prompt": "b"}\n\xff\n', "rows.jsonl: row 1: not valid JSON"),
        ("mine.jinja", b"{{ 10**(10**10) }}{{ prompt }}{{ completion }}", "mine.jinja: one example takes more than"),
        ("model/tokenizer.json", b'{"model": 1}', "its tokenizer cannot be loaded"),
    ],
)
def test_train_on_a_bad_file_ends_with_exit_code_2_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, name, content, named
):
    monkeypatch.setattr(trial, "SECONDS", 1)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(tmp_path)
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(json.dumps(EXAMPLE), encoding="utf-8")
    (tmp_path / "mine.jinja").write_text("{{ prompt }} {{ completion }}", encoding="utf-8")
    (tmp_path / name).write_bytes(content)
    (tmp_path / "run.yaml").write_text(
        "model: model\ndata: {train: rows.jsonl, template: mine.jinja}\noutput_dir: out\n"
    )
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["expertune", "train", "run.yaml"])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert named in said
    assert said.count("expertune: error: ") == 1
    assert "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before
