"""Base and adapter as one model: what each weight becomes, files as in the source, and what is refused."""

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING

from expertune.adapt.files import read_adapter_base
from expertune.checkpoint.load import fingerprint_of
from expertune.checkpoint.quantize import quantize
from expertune.config import QuantizationConfig
from expertune.errors import CheckpointError, ExportError
from expertune.exporting import merging
from expertune.exporting.engines import stock, trained
from expertune.exporting.engines.trained import dequantized
from expertune.exporting.formats import Options, make_format
from expertune.exporting.merged import MANIFEST, Merged, MergedIntoDequantized, make
from expertune.exporting.opening import read_source
from expertune.exporting.source import ExportSource
from tests.exporting.conftest import base_and_adapter, nothing, source_of
from tests.families import build
from tests.tiny_models import load_tiny, save_random, stock_model, tiny_config

# Experts by themselves, transposed, in either orientation, alternating, two stacks in one list; attention in one piece.
KINDS = ["gpt_oss", "qwen3_vl_moe", "inkling2_text", "ernie4_5_vl_moe", "deepseek_v3", "kimi_linear"]


def written(form: Merged | MergedIntoDequantized, source: ExportSource, folder: Path) -> Path:
    form.require(source)
    folder.mkdir()
    form.write(source, folder, nothing)
    return folder


def dequantized_and_adapter(source: ExportSource, loaded: torch.nn.Module) -> torch.nn.Module:
    """A stock model of the loaded one's 4-bit values with the adapter added, each weight rounded once."""
    expected, packed = dequantized(loaded)
    base_and_adapter(source, expected, torch.bfloat16)
    for name in packed:
        values = expected.get_parameter(name)
        values.data.copy_(values.to(torch.bfloat16))
    return expected


@torch.no_grad()
def largest_difference(expected: torch.nn.Module, found: torch.nn.Module) -> float:
    pairs = [(each, found.get_parameter(name)) for name, each in expected.named_parameters()]
    return max(float((one.float() - other.float()).abs().max()) for one, other in pairs)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind in CONFIG_MAPPING])
def test_every_weight_is_that_of_base_and_adapter_rounded_once_into_either_base(kind: str, tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", build.tiny_config(kind))
    loaded = load_tiny(folder)
    targets = ["experts", *(["attention"] if kind == "kimi_linear" else [])]
    source = source_of(loaded, folder, tmp_path / "run", targets=targets)
    merged = stock_model(written(Merged(), source, tmp_path / "merged"))
    assert largest_difference(base_and_adapter(source, stock_model(folder), torch.bfloat16), merged) == 0
    merged = stock_model(written(MergedIntoDequantized(), source, tmp_path / "dequantized"))
    assert largest_difference(dequantized_and_adapter(source, loaded.model), merged) == 0


def test_magnitudes_of_dora_are_folded_into_either_base_and_other_formats_are_refused(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", tiny_config())
    loaded = load_tiny(folder)
    source = source_of(loaded, folder, tmp_path / "run", targets=["w1", "w2", "attention"], use_dora=True)
    assert len(dict(source.magnitudes())) == 2 * (2 + 4)
    merged = stock_model(written(Merged(), source, tmp_path / "merged"))
    assert largest_difference(base_and_adapter(source, stock_model(folder), torch.bfloat16), merged) <= 2**-8
    merged = stock_model(written(MergedIntoDequantized(), source, tmp_path / "dequantized"))
    assert largest_difference(dequantized_and_adapter(source, loaded.model), merged) <= 2**-8
    with pytest.raises(ExportError, match=r"PEFT has no DoRA on stacked experts.*--to merged"):
        make_format("peft", Options()).require(source)


@pytest.mark.parametrize("quantization", [{"fit": "mse"}, {"layers": {"attention": 16}}])
def test_adapter_of_an_nf4_folder_is_merged_into_what_the_folder_was_made_of_and_into_its_own_values(
    quantization: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_random(tmp_path / "model", tiny_config())
    quantize(str(folder), tmp_path / "nf4", QuantizationConfig(**quantization))
    loaded = load_tiny(tmp_path / "nf4")
    source = source_of(loaded, folder, tmp_path / "run")
    assert source.fingerprint.held == loaded.fingerprint.held  # what the exported adapter says of its training
    # Of the 4-bit bytes nothing is taken, but the comparison shows the model as it was trained.
    assert source.context.config.quantization == QuantizationConfig()
    trained_with = fingerprint_of(folder, quantization=source.as_trained)
    assert trained_with.held == loaded.fingerprint.held
    merged = stock_model(written(Merged(), source, tmp_path / "merged"))
    assert largest_difference(base_and_adapter(source, stock_model(folder), torch.bfloat16), merged) == 0
    source = source_of(loaded, folder, tmp_path / "run", onto="dequantized")
    merged = stock_model(written(MergedIntoDequantized(), source, tmp_path / "dequantized"))
    assert largest_difference(dequantized_and_adapter(source, loaded.model), merged) == 0


def test_what_a_received_adapter_says_of_its_base_is_data(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", tiny_config())
    source = source_of(load_tiny(folder), folder, tmp_path / "run")

    def saying(**values: Any) -> None:
        path = tmp_path / "run" / "adapter" / "adapter_model.safetensors"
        with safe_open(path, framework="pt") as file:
            notes, tensors = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        notes["expertune.base"] = json.dumps(source.fingerprint.to_json() | values)
        save_file(tensors, path, metadata=notes)

    def read(onto: str) -> ExportSource:
        return read_source(source.context, tmp_path / "run" / "adapter", source.base, onto)

    # A name that this base has not matters where the 4-bit values are taken, and nowhere else.
    saying(layers={"no_such_proj": 16})
    read("source")
    with pytest.raises(
        CheckpointError, match=r"run/adapter: its 4-bit weights are not of this base: .*'no_such_proj' fits no linear"
    ):
        read("dequantized")
    for key, value in {"layers": {"(([a-z_.0-9])+)+X": 16}, "fit": "foo"}.items():
        saying(**{key: value})
        for onto in ("source", "dequantized"):
            with pytest.raises(CheckpointError, match=rf"safetensors: expertune\.base: damaged at {key}: "):
                read(onto)


def test_adapter_goes_into_the_values_of_its_own_4_bit_weights_alone_and_onto_16_bits_from_any(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", tiny_config())
    quantize(str(folder), tmp_path / "mixed", QuantizationConfig(layers={"attention": 16}))
    loaded = load_tiny(folder)
    with pytest.raises(
        CheckpointError, match=r"other 4-bit weights .*quantization\.layers was \{\} and is \{k_proj: 16, "
    ):
        source_of(loaded, tmp_path / "mixed", tmp_path / "run", onto="dequantized")
    source = source_of(loaded, tmp_path / "mixed", tmp_path / "run")
    assert source.fingerprint.held.layers == {}
    form = make_format("peft", Options())
    form.require(source)
    (tmp_path / "peft").mkdir()
    form.write(source, tmp_path / "peft", nothing)
    assert read_adapter_base(tmp_path / "peft") == loaded.fingerprint


def test_reference_rounds_each_weight_to_the_dtype_that_the_merged_one_has(tmp_path: Path) -> None:
    """A router in float32 beside experts in bfloat16."""
    folder = save_random(tmp_path / "model", tiny_config())
    tensors = load_file(folder / "model.safetensors")
    tensors |= {name: each.float() * 1.001 for name, each in tensors.items() if name.endswith(".gate.weight")}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    loaded = load_tiny(folder)
    source = source_of(loaded, folder, tmp_path / "run", targets=["experts", "router", "attention"])
    updates = {
        f"{name}.{side}": each.contiguous()
        for name, *pair in source.updates()
        for side, each in zip(("left", "right"), pair, strict=True)
    }
    save_file(updates, tmp_path / "updates.safetensors")
    for form in (Merged(), MergedIntoDequantized()):
        out = written(form, source, tmp_path / type(form).__name__)
        [engine] = form.engines(source, out, folder)
        assert engine.rounded is not None
        assert set(engine.rounded.values()) == {"float32", "bfloat16"}
        case = {"updates": str(tmp_path / "updates.safetensors"), "rounded": engine.rounded}
        if form.__class__ is Merged:
            expected = stock_model(folder)
            stock.update(expected, case)
        else:
            expected, packed = trained.dequantized(loaded.model)
            trained.update(expected, packed, case)
        assert largest_difference(expected, stock_model(out)) == 0


@pytest.fixture
def sharded(tmp_path: Path) -> ExportSource:
    """An adapter of the experts alone, on a model in several shards."""
    model = stock_model(save_random(tmp_path / "one", tiny_config()), torch.bfloat16)
    model.save_pretrained(tmp_path / "model", max_shard_size="250KB")
    return source_of(load_tiny(tmp_path / "model"), tmp_path / "model", tmp_path / "run")


def test_factors_are_the_tensors_of_the_mapped_file_and_no_copies(sharded: ExportSource) -> None:
    experts = [pair for held in sharded.factors.experts.values() for pairs in held.values() for pair in pairs]
    assert {id(factor) for pair in experts for factor in (pair.a, pair.b)} == set(
        map(id, sharded.adapter.tensors.values())
    )


def files_of(folder: Path) -> dict[str, Path]:
    return {path.name: path for path in folder.glob("*.safetensors")}


def test_shards_names_dtypes_and_index_are_the_sources_and_what_has_no_adapter_is_copied(
    sharded: ExportSource, tmp_path: Path
) -> None:
    for name in ("trainer_state.json", "notes.txt"):
        (sharded.base.folder / name).write_text("{}")
    out = written(Merged(), sharded, tmp_path / "out")
    beside = {path.name for path in out.iterdir() if path.suffix != ".safetensors"}
    assert beside <= {"config.json", "generation_config.json", "model.safetensors.index.json", MANIFEST}
    before, after = files_of(sharded.base.folder), files_of(out)
    assert before.keys() == after.keys()
    assert len(before) > 1
    for name in ("config.json", "model.safetensors.index.json"):
        assert (out / name).read_bytes() == (sharded.base.folder / name).read_bytes()
    for name, path in before.items():
        with safe_open(path, "pt") as old, safe_open(after[name], "pt") as new:
            assert old.metadata() == new.metadata()
            assert list(old.keys()) == list(new.keys())
            for key in old.keys():  # noqa: SIM118 - not a mapping
                one, other = old.get_tensor(key), new.get_tensor(key)
                assert one.dtype == other.dtype
                assert torch.equal(one, other) == (".experts." not in key), key


def test_merge_that_was_killed_goes_on_with_the_shards_that_are_not_finished(
    sharded: ExportSource, tmp_path: Path
) -> None:
    form, out = Merged(), tmp_path / "out"
    whole = files_of(written(form, sharded, tmp_path / "whole"))
    seen: list[str] = []

    def killed(name: str, done: int, total: int) -> None:
        seen.append(name)
        if len(set(seen)) == 2:
            raise KeyboardInterrupt

    out.mkdir()
    with pytest.raises(KeyboardInterrupt):
        form.write(sharded, out, killed)
    assert list(files_of(out)) == seen[:1]
    again: list[str] = []
    form.write(sharded, out, lambda name, done, total: again.append(name))
    assert seen[0] not in again
    changed = out / seen[1]
    content = bytearray(changed.read_bytes())
    content[-1] ^= 1
    changed.write_bytes(content)
    again.clear()
    form.write(sharded, out, lambda name, done, total: again.append(name))
    assert set(again) == {changed.name}
    assert {name: path.read_bytes() for name, path in files_of(out).items()} == {
        name: path.read_bytes() for name, path in whole.items()
    }


def test_failed_write_that_the_system_tells_of_once_is_raised_and_no_shard_is_put_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shard = tmp_path / "model.safetensors"
    save_file({"weight": torch.ones(4, 4)}, shard)
    calls: list[int] = []

    def fsync(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 1:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(merging, "_FLUSHED_BYTES", 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        merging.merge_shard(shard, tmp_path / "out" / shard.name, {}, nothing)
    assert list((tmp_path / "out").iterdir()) == []


def test_what_another_adapter_has_started_is_not_gone_on_with(sharded: ExportSource, tmp_path: Path) -> None:
    out = written(Merged(), sharded, tmp_path / "out")
    values = json.loads((out / MANIFEST).read_text())
    values["merged"]["adapter"]["adapter_model.safetensors"] = "0" * 64
    (out / MANIFEST).write_text(json.dumps(values))
    with pytest.raises(ExportError, match=r"out: was started with another adapter.*choose another --out"):
        Merged().write(sharded, out, nothing)


def test_four_bit_folder_is_merged_into_its_own_values_and_refused_for_others(
    mixtral_source: ExportSource, tmp_path: Path
) -> None:
    source_folder = mixtral_source.base.folder
    quantize(str(source_folder), tmp_path / "nf4")
    loaded = load_tiny(tmp_path / "nf4")
    source = source_of(loaded, tmp_path / "nf4", tmp_path / "run")
    with pytest.raises(ExportError, match=r"nf4 holds 4-bit weights, and no 16-bit.*--model MODEL.*--base dequantized"):
        make("merged", Options()).require(source)
    merged = stock_model(written(MergedIntoDequantized(), source, tmp_path / "out"))
    assert largest_difference(dequantized_and_adapter(source, loaded.model), merged) == 0


# PEFT speaks of tied weights in general.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")
def test_adapter_of_an_output_head_that_is_the_embedding_is_not_merged(tmp_path: Path) -> None:
    folder = save_random(tmp_path / "model", tiny_config(tie_word_embeddings=True))
    source = source_of(load_tiny(folder), folder, tmp_path / "run", targets=["experts", "lm_head"])
    for form in (Merged(), MergedIntoDequantized()):
        with pytest.raises(ExportError, match=r"lm_head\.weight .* --to peft"):
            form.require(source)
