"""Whatever a model folder holds, reading it ends in one error that names a file, soon, and leaves nothing behind.

Damages are drawn by hypothesis: values of config.json, safetensors headers, the index, bytes anywhere.
"""

import contextlib
import copy
import json
import os
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import save_file
from typer.testing import CliRunner

from expertune.checkpoint.load import fingerprint_of
from expertune.checkpoint.quantize import quantize
from expertune.checkpoint.reader import INDEX_NAME
from expertune.cli import app
from expertune.config import parse_config
from expertune.errors import ExpertuneError
from expertune.planning import make_plan
from tests.examples import examples
from tests.tiny_models import load_tiny, save_tiny_model

SHARD = "model.safetensors"
SECONDS = 15
# Beside what the process has: a tiny model needs a hundredth of it.
BYTES = 3 * 2**30


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("base"), "mixtral")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """At most so much memory and time for what is done within."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + BYTES, before[1]))
    started = time.monotonic()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
    assert time.monotonic() - started < SECONDS


def read_in_every_way(folder: Path, beside: Path) -> int:
    """Plan, load, take the fingerprint and quantize; how many of these were refused, each in one clear error."""
    values = {"model": str(folder), "data": {"train": str(beside / "rows.jsonl")}, "output_dir": str(beside / "run")}
    out = beside / "out"
    ways: list[Callable[[], Any]] = [
        lambda: make_plan(parse_config(values)),
        lambda: load_tiny(folder),
        lambda: fingerprint_of(folder),
        lambda: quantize(str(folder), out),
    ]
    refused = 0
    for way in ways:
        with bounded():
            said = error_of(way)
        assert not (beside / "run").exists()
        if said is not None:
            refused += 1
            assert str(beside) in said
            assert len(said) < 1500
            if out.exists():  # what was finished before a weight turned out to be damaged, and that is told
                assert "finished file" in said
                assert (out / "expertune.partial.json").is_file()
    return refused


def error_of(way: Callable[[], Any]) -> str | None:
    """What is said where it is refused; None where it is not."""
    try:
        way()
    except ExpertuneError as error:
        return str(error)
    return None


@contextlib.contextmanager
def damaged(base: Path, **files: bytes | None) -> Iterator[tuple[Path, Path]]:
    """A copy of the folder with other files in it, and the folder around it."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(base, Path(temporary) / "model", copy_function=os.link))
        for key, content in files.items():
            path = (
                folder
                / {"config": "config.json", "shard": SHARD, "index": INDEX_NAME, "answers": "generation_config.json"}[
                    key
                ]
            )
            path.unlink(missing_ok=True)
            if content is not None:
                path.write_bytes(content)
        yield folder, Path(temporary)


def header_of(shard: Path) -> tuple[dict[str, Any], bytes]:
    content = shard.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def shard_of(header: Any, data: bytes, length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([10**4, 10**6, 10**12, 10**30, -(10**12)])
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["mixtral", "llama", "deepseek_v3", "gpt_oss", "bfloat16"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=4,
)
KEYS = st.sampled_from(
    [
        *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "head_dim"),
        *("num_key_value_heads", "num_local_experts", "num_experts_per_tok", "vocab_size", "max_position_embeddings"),
        *("hidden_act", "rms_norm_eps", "rope_parameters", "rope_scaling", "sliding_window", "tie_word_embeddings"),
        *("dtype", "torch_dtype", "quantization_config", "text_config", "architectures", "auto_map", "pad_token_id"),
    ]
)


@examples(25)
@given(changes=st.dictionaries(KEYS, ANYTHING, min_size=1, max_size=2), without=st.none() | KEYS)
@example(changes={"num_hidden_layers": 10**9}, without=None)
@example(changes={"num_local_experts": 10**6}, without=None)
@example(changes={"head_dim": 10**10}, without=None)
@example(changes={"num_attention_heads": 0}, without=None)
@example(changes={"model_type": ["mixtral"]}, without=None)
@example(changes={}, without="model_type")
def test_config_of_any_values_ends_in_one_error(base: Path, changes: dict[str, Any], without: str | None) -> None:
    values = json.loads((base / "config.json").read_text(encoding="utf-8")) | changes
    values.pop(without or "", None)
    with damaged(base, config=json.dumps(values).encode()) as (folder, beside):
        read_in_every_way(folder, beside)


@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"\xff\xfe{", b'{"a": ', b"[" * 200_000, b'{"a":' * 100_000, b'{"x": %s}' % (b"9" * 5000)],
    ids=["empty", "list", "null", "no utf-8", "cut off", "deep list", "deep mapping", "long number"],
)
def test_config_that_is_no_mapping_ends_in_one_error(base: Path, content: bytes) -> None:
    with damaged(base, config=content) as (folder, beside):
        assert read_in_every_way(folder, beside) == 4


ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "I64", "BOOL", "F8_E4M3", "FOO", None, 3, [], {}]),
        "shape": st.lists(st.integers(-1, 65) | st.sampled_from([10**9, 10**400, 1.5, "64", None, True]), max_size=4)
        | st.sampled_from([None, "64", {}, [1] * 1000]),
        "data_offsets": st.lists(st.integers(-9, 9) | st.sampled_from([10**12, 0.5, "a", None]), max_size=3)
        | st.sampled_from([None, "ab", {}]),
    },
)
NAMES = st.sampled_from(
    [
        *("", "\x00", "a" * 5000, "é.weight", "model.layers.99.x", "x.experts.99999999999999999999.w1.weight"),
        *("model.layers.0.block_sparse_moe.experts.99.w1.weight", "model.layers.0.mlp.experts.gate_up_proj"),
        *("model.layers.0.self_attn.q_proj.weight.quant_state.bitsandbytes__nf4", "lm_head.weight.absmax"),
    ]
)


@examples(25)
@given(which=st.integers(0, 33), entry=ENTRIES, name=st.none() | NAMES, drop=st.booleans())
@example(which=3, entry={"shape": [10**9, 10**9]}, name=None, drop=False)
@example(which=3, entry={"shape": [0, 10**18], "data_offsets": [0, 0]}, name=None, drop=False)
def test_safetensors_header_of_any_content_ends_in_one_error(
    base: Path, which: int, entry: dict[str, Any], name: str | None, drop: bool
) -> None:
    header, data = header_of(base / SHARD)
    keys = [key for key in header if key != "__metadata__"]
    key = keys[which % len(keys)]
    header = copy.deepcopy(header)
    header[key] |= entry
    if name is not None:
        header[name] = header.pop(key) if drop else header[key]
    with damaged(base, shard=shard_of(header, data)) as (folder, beside):
        refused = read_in_every_way(folder, beside)
    assert refused or not entry or name is None or not drop


def test_safetensors_file_that_is_cut_off_deep_or_no_file_ends_in_one_error(base: Path) -> None:
    content = (base / SHARD).read_bytes()
    header, data = header_of(base / SHARD)
    cases = [
        *(b"", b"abc", b"\0" * 8, b"\xff" * 8 + content[8:], content[: len(content) // 2], content[:-1]),
        *(shard_of([], data), shard_of(b"null", data), shard_of(b"[" * 100_000, data), shard_of(b"\xff" * 50, data)),
        *(shard_of(header, data, length=10**15), shard_of(header, data, length=30), shard_of(header, b"")),
        shard_of(b'{"x":' + b"[" * 50_000 + b"]" * 50_000 + b"}", data),
    ]
    for case in cases:
        with damaged(base, shard=case) as (folder, beside):
            assert read_in_every_way(folder, beside) == 4, case[:40]
    with damaged(base, shard=None) as (folder, beside):
        os.mkfifo(folder / SHARD)
        assert read_in_every_way(folder, beside) == 4


def test_tensors_that_share_bytes_are_refused_by_name(base: Path) -> None:
    header, data = header_of(base / SHARD)
    first, second = [key for key, value in header.items() if key != "__metadata__" and value["shape"] == [64, 64]][:2]
    header[second]["data_offsets"] = header[first]["data_offsets"]
    with damaged(base, shard=shard_of(header, data)) as (folder, _), pytest.raises(ExpertuneError) as told:
        load_tiny(folder)
    assert "share bytes" in str(told.value)
    assert SHARD in str(told.value)


@examples(15)
@given(
    weight_map=st.dictionaries(st.text(max_size=3) | st.just("lm_head.weight"), ANYTHING | st.just(SHARD), max_size=3)
    | ANYTHING,
    metadata=ANYTHING,
    alone=st.booleans(),
)
@example(weight_map={"x": "../../secret"}, metadata=None, alone=False)
@example(weight_map={"x": "a\0b"}, metadata=None, alone=False)
@example(weight_map={"lm_head.weight": SHARD}, metadata={"total_size": "abc"}, alone=True)
def test_index_of_any_content_ends_in_one_error(base: Path, weight_map: Any, metadata: Any, alone: bool) -> None:
    content = json.dumps({"weight_map": weight_map, "metadata": metadata}).encode()
    files: dict[str, bytes | None] = {"index": content} | ({"shard": None} if alone else {})
    with damaged(base, **files) as (folder, beside):
        read_in_every_way(folder, beside)


@pytest.mark.parametrize("verb", ["plan", "train", "quantize"])
def test_command_on_a_damaged_folder_prints_one_message_and_leaves_nothing(verb: str, base: Path) -> None:
    config = json.dumps({"model_type": "mixtral", "hidden_size": "wide"}).encode()
    with damaged(base, config=config) as (folder, beside):
        (beside / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
        run = beside / "run.yaml"
        run.write_text(
            f"model: {folder}\ndata: {{train: {beside}/rows.jsonl}}\noutput_dir: {beside}/out\n", encoding="utf-8"
        )
        before = sorted(path.name for path in beside.iterdir())
        arguments = [str(folder), str(beside / "out")] if verb == "quantize" else [str(run)]
        result = CliRunner().invoke(app, [verb, *arguments])
        assert result.exit_code == 2
        assert result.stderr.count("expertune: error: ") == 1
        assert f"{folder}/config.json" in result.stderr
        assert "Traceback" not in result.output
        assert sorted(path.name for path in beside.iterdir()) == before


def test_config_of_a_far_larger_model_than_the_files_hold_takes_no_memory(tmp_path: Path) -> None:
    """Within all bounds by itself: 8000 experts of 64 times 1024 weights, three matrices, two layers."""
    folder = save_tiny_model(tmp_path / "model", "mixtral", num_hidden_layers=1)
    values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    values |= {"num_local_experts": 8000, "intermediate_size": 1024}
    (folder / "config.json").write_text(json.dumps(values), encoding="utf-8")
    with bounded(), pytest.raises(ExpertuneError, match="do not belong together"):
        load_tiny(folder)


def test_weights_alone_are_no_model(tmp_path: Path) -> None:
    save_file({"x": torch.ones(2)}, tmp_path / SHARD)
    assert read_in_every_way(tmp_path, tmp_path) == 4
