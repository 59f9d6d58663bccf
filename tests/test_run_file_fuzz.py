"""Run files that no one would write by hand: exit code 2, one message that names the file, and nothing left behind."""

import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from expertune.cli import main
from tests.examples import examples

GOOD = """\
model: some/model
data: {train: "rows.jsonl[0:8]", max_length: 64}
lora: {r: 4, alpha: 8, targets: [attention, experts]}
training: {learning_rate: 1e-4, max_steps: 3, save_strategy: no}
output_dir: runs/first
"""
ALIASES = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
MERGES = "a0: &a0 {k: 1}\n" + "".join(
    f"a{n}: &a{n} {{k{n}: 1, <<: [{', '.join([f'*a{n - 1}'] * 16)}]}}\n" for n in range(1, 12)
)

Run = Callable[[bytes, list[str]], tuple[int, str]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """`expertune train` on a file of this content in a folder of its own; gives exit code and stderr."""
    folder = tmp_path_factory.mktemp("fuzz")

    def call(content: bytes, overrides: list[str]) -> tuple[int, str]:
        (folder / "run.yaml").write_bytes(content)
        with pytest.MonkeyPatch.context() as patch, (folder / "stderr").open("w+", errors="backslashreplace") as said:
            patch.chdir(folder)
            patch.setattr(os, "environ", os.environ.copy())
            patch.setattr(sys, "argv", ["expertune", "train", "run.yaml", *overrides])
            patch.setattr(sys, "stderr", said)
            with pytest.raises(SystemExit) as ended:
                main()
            said.seek(0)
            text = said.read()
        (folder / "stderr").unlink()
        assert [path.name for path in folder.iterdir()] == ["run.yaml"]
        return int(ended.value.code or 0), text

    call(GOOD.encode(), [])  # what this imports is not counted
    return call


def refused(run: Run, content: bytes, overrides: list[str] | None = None) -> str:
    """What is said of a bad file, within bounds of time, memory and length."""
    started, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    code, said = run(content, overrides or [])
    assert code == 2, said
    assert said.startswith("expertune: error: ")
    assert "Traceback" not in said
    assert len(said) < 10_000
    assert time.process_time() - started < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 300 * 1024
    return said


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.dates() | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
# fmt: off
keys = st.sampled_from([
    "model", "revision", "data", "lora", "training", "task", "quantization", "kernels", "memory_budget", "output_dir",
    "data.train", "data.eval", "data.columns", "data.max_length", "lora.r", "lora.alpha", "lora.targets", "placement",
    "lora.rank_pattern", "training.learning_rate", "training.max_steps", "training.optim", "training.report_to", "loss",
    "training.eval_strategy", "training.lr_scheduler_kwargs", "task.metric",
])
pieces = st.sampled_from([
    "model: m\n", "data: ", "{train: t}", "{", "}", "[", "]", "- ", "? ", ": ", "\n", "\t", "  ", "&a ", "*a", "<<: ",
    "|", ">", "---\n", "...\n", "%YAML 1.2\n", "!!int ", "!!set ", "!!binary ", "!!python/name:os.system ", "!x ", "'",
    '"', "#", "\\", "\ufeff", "\x85", "é", "0x", "1e999", "9" * 400, ".nan", "=", "@", "`", "~", "training",
    "output_dir: o\n",
])
# fmt: on


@given(st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b"\xff\xfem\x00o\x00")
@example(b"- a\n- b\n")
@example(b"[" * 5000)
@example(b"a: " + b"x" * 300_000)
@example(ALIASES.encode())
@example(MERGES.encode())
@example(b"&a {model: *a, data: [*a], output_dir: o}")
@example((GOOD + "revision: 2024-99-99\nlora: {r: !!int many}\n").encode())
@example((GOOD + "revision: !!timestamp x\n").encode())
@example((GOOD + 'revision: "\\ud800"\n').encode())
@example((GOOD + 'revision: "\\0"\n').encode())
@example((GOOD + "".join(f"key{n}: 1\n" for n in range(8000))).encode())
@example((GOOD + f"task: {{rows: {'9' * 5000}}}\n").encode())
@example(GOOD.replace("some/model", "''").encode())
@example(GOOD.replace("runs/first", "x" * 400).encode())
def test_file_of_any_bytes_is_refused_by_name(run: Run, content: bytes) -> None:
    said = refused(run, content)
    assert "run.yaml" in said or "some/model" in said


@given(st.lists(pieces, max_size=25).map("".join))
@examples(60)
def test_file_of_any_yaml_tokens_is_refused(run: Run, content: str) -> None:
    refused(run, content.encode())


@given(
    st.lists(
        st.tuples(
            st.integers(0, len(GOOD) - 1), st.sampled_from(["drop", "double", "flip", "cut"]), st.integers(0, 255)
        ),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_run_file_is_refused(run: Run, damages: list[tuple[int, str, int]]) -> None:
    content = bytearray(GOOD.encode())
    for at, how, byte in damages:
        at = min(at, max(len(content) - 1, 0))
        if how == "drop":
            del content[at : at + 1]
        elif how == "double":
            content[at:at] = content[at : at + 10]
        elif how == "flip":
            content[at : at + 1] = bytes([byte])
        else:
            del content[at + byte :]
    refused(run, bytes(content))


@given(keys, plain)
@examples(80)
def test_value_of_any_type_under_any_key_is_refused(run: Run, key: str, value: object) -> None:
    values = yaml.safe_load(GOOD)
    *sections, leaf = key.split(".")
    here = values
    for section in sections:
        here = here.setdefault(section, {})
    here[leaf] = value
    refused(run, yaml.dump(values, allow_unicode=True).encode("utf-8", "surrogatepass"))


@given(keys | st.text(max_size=12), st.text(max_size=16) | pieces)
@example("lora.", "3")
@example("..", "3")
@example("lora.targets", "&a [*a]")
@example("training", "{1: 2}")
def test_override_of_any_text_is_refused(run: Run, key: str, value: str) -> None:
    override = f"{key}={value}"
    # These are the shell's and the command line's own: a process cannot be given a null, and an option is no override.
    if "\0" not in override and not override.startswith("-"):
        refused(run, GOOD.encode(), [override])


def test_same_good_file_gets_as_far_as_its_model(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    # What is refused above is refused for what was done to it.
    assert "some/model" in refused(run, GOOD.encode())
    assert Path("runs").exists() is False
