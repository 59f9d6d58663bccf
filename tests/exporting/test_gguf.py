"""GGUF files of llama.cpp's converters, computed with by its runtime; skipped where `expertune[gguf]` is missing."""

import json
import re
import shutil
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from expertune.checkpoint.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from expertune.checkpoint.formats.nf4_folder import read_nf4_folder
from expertune.checkpoint.hub import ModelSource
from expertune.checkpoint.quantize import quantize
from expertune.errors import ConfigError, ExportError
from expertune.exporting import programs
from expertune.exporting.engines import gguf_converter, gguf_tensors
from expertune.exporting.formats import Engine, Options, make_format
from expertune.exporting.gguf import ADAPTER_FILE
from expertune.exporting.verify import verify
from tests.exporting.sources import random_source
from tests.tiny_models import save_tiny_model

MODEL = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"
ENGINES = Path(gguf_converter.__file__).parent

installed = pytest.mark.skipif(
    gguf_converter.scripts_folder() is None or find_spec("xllamacpp") is None,
    reason="llama.cpp is not installed: pip install 'expertune[gguf]'",
)
pytestmark = pytest.mark.usefixtures("copied_processes")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, copied_processes):
    """The export of an adapter on attention, router, head and all projections, and what came of its verification."""
    source = random_source(MODEL, linears=("q_proj", "k_proj", "o_proj", "gate", "lm_head"))
    folder = tmp_path_factory.mktemp("export") / "adapter"
    folder.mkdir()
    form = make_format("gguf-adapter", Options())
    form.require(source)
    form.write(source, folder, lambda *_: None)
    [verdict] = verify(source, form, folder, MODEL)
    return source, form, folder, verdict


@pytest.fixture
def read_gguf(monkeypatch):
    """Gives a GGUF file as llama.cpp's own reader has it; what is assigned to its arrays is in the file."""
    monkeypatch.syspath_prepend(str(gguf_converter.scripts_folder() / "gguf-py"))
    from gguf import GGUFReader

    return lambda path: GGUFReader(path, "r+")


@installed
def test_an_adapter_on_everything_is_verified_in_llamacpp(adapter):
    verdict = adapter[3]
    assert (verdict.verdict, verdict.reason) == ("verified", None)
    differences = verdict.figures["differences"]
    assert differences["exported"] < 1e-4 < 0.5 < differences["effect"]


@installed
def test_the_name_in_a_file_is_neither_the_runs_nor_a_folders(adapter, read_gguf):
    source, _, folder, _ = adapter
    name = read_gguf(folder / "adapter.gguf").fields["general.name"].contents()
    kind = source.model.config.model_type
    assert re.sub("[^a-z0-9]+", "-", name.lower()) == f"{kind}-{source.adapter_name}"


@installed
def test_wrong_adapters_are_told_from_the_right_one(adapter, read_gguf, tmp_path):
    source, form, folder, verdict = adapter
    cases = {}
    for name, damage in DAMAGES.items():
        damaged = shutil.copy(folder / ADAPTER_FILE, tmp_path / f"{name}.gguf")
        reader = read_gguf(damaged)
        damage({tensor.name: tensor.data for tensor in reader.tensors}, reader.fields)
        del reader
        [engine] = form.engines(source, folder, MODEL)
        cases[name] = engine.exported | {"adapter": str(damaged)}
    found = run_llamacpp(cases, source.prompts(), tmp_path)
    # The undamaged one agrees with the reference: it has been verified.
    right = found.pop("nothing")
    differences = {name: float((answer["logprobs"] - right["logprobs"]).abs().max()) for name, answer in found.items()}
    assert min(differences.values()) > 10 * verdict.figures["tolerance"], differences


@installed
@pytest.mark.parametrize("is_rounded", [False, True])
def test_one_expert_that_is_another_or_was_not_merged_is_found_in_a_merged_file(
    is_rounded, adapter, read_gguf, tmp_path
):
    _, form, folder, _ = adapter
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    files = {"base": str(form._bases["f32", None])}
    files["adapter"] = str(shutil.copy(folder / ADAPTER_FILE, tmp_path / ADAPTER_FILE))
    merged = Path(shutil.copy(files["base"], tmp_path / "merged.gguf"))
    base, factors = ({each.name: each.data for each in read_gguf(file).tensors} for file in files.values())
    written = {each.name: each.data for each in read_gguf(merged).tensors}
    factors["blk.1.ffn_down_exps.weight.lora_b"][:] /= 4
    factors["blk.1.ffn_down_exps.weight.lora_b"][2] = 0
    for name in [name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")]:
        a, b = (factors[f"{name}.lora_{factor}"] for factor in "ab")
        written[name] += read_gguf(files["adapter"]).fields["adapter.lora.alpha"].contents() / a.shape[-2] * b @ a
        if is_rounded:
            written[name][:] = dequantize(quantize(written[name], GGMLQuantizationType.BF16), GGMLQuantizationType.BF16)
    request = files | {"merged": str(merged), "rounded": "bf16" if is_rounded else "f32", "allowed": 0.25}
    found = gguf_tensors.compare(request)
    assert found["wrong"] == found["unplaced"] == []
    assert found["largest"] < 0.05
    gate, up = (written[f"blk.{layer}.ffn_{which}_exps.weight"] for layer, which in ((0, "gate"), (2, "up")))
    gate[1] = base["blk.0.ffn_gate_exps.weight"][1]
    up[0] = written["blk.2.ffn_gate_exps.weight"][0]
    written["blk.1.attn_norm.weight"] *= 1.2
    # The adapter does not change this expert, and it got what another's is changed by: a little of what it is itself.
    down, before = (each["blk.1.ffn_down_exps.weight"] for each in (written, base))
    down[2] += down[3] - before[3]
    assert np.square(down[2] - before[2]).sum() < 0.25**2 * np.square(before[2]).sum()
    assert sorted(gguf_tensors.compare(request)["wrong"]) == [
        ["blk.0.ffn_gate_exps.weight", 1],
        ["blk.1.attn_norm.weight", None],
        ["blk.1.ffn_down_exps.weight", 2],
        ["blk.2.ffn_up_exps.weight", 0],
    ]


@installed
def test_a_merged_file_that_is_damaged_fails_without_the_runtime_too_and_one_with_other_names_is_not_verified(
    adapter, tmp_path, monkeypatch
):
    source, form, _, _ = adapter
    whole = make_format("gguf", Options(type="f32"))
    whole._bases = form._bases
    monkeypatch.setattr(type(whole), "_missing", "pip install xllamacpp")
    content = form._bases["f32", None].read_bytes()
    names = (b"blk.1.ffn_gate_exps.weight", b"blk.1.ffn_gate_some.weight")
    cases = {
        "cut": (content[: len(content) // 2], "failed", "model-f32.gguf cannot be read: ValueError: "),
        "other": (b"no such file", "failed", "model-f32.gguf cannot be read: ValueError: GGUF magic invalid"),
        "named": (
            content.replace(*names),
            "not verified",
            "the file has no tensors of these names, which the adapter changes: blk.1.ffn_gate_exps.weight",
        ),
    }
    for name, (written, verdict, reason) in cases.items():
        (out := tmp_path / name).mkdir()
        (out / "model-f32.gguf").write_bytes(written)
        found = whole._verdict(source, Engine("tensors", "", {}, {"folder": str(out), "base": str(MODEL)}))
        assert found.verdict == verdict, found
        assert found.reason.startswith(reason), found


@installed
@pytest.mark.slow
def test_a_merged_model_is_verified_in_llamacpp(tmp_path):
    source, form = with_files(random_source(MODEL), tmp_path), make_format("gguf", Options())
    form.write(source, tmp_path / "out", lambda *_: None)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model-bf16.gguf"]
    [verdict, tensors] = verify(source, form, tmp_path / "out", MODEL)
    assert (verdict.verdict, tensors.verdict) == ("verified", "verified")
    # Of random tokens; llama.cpp does not know how the model's tokenizer splits these, and one is seen to be otherwise.
    assert verdict.reason == "1 of 4 texts are split into other tokens"
    assert verdict.figures["texts"] == {"alike": 3, "of": 4}


@installed
@pytest.mark.slow
@pytest.mark.parametrize(("kind", "base"), [("f32", "source"), ("f16", "source"), ("q8_0", "dequantized")])
def test_a_merged_model_is_verified_in_each_type_and_one_wrong_expert_is_named(kind, base, read_gguf, tmp_path):
    source, form = with_files(random_source(MODEL), tmp_path), make_format("gguf", Options(base, kind))
    form.write(source, tmp_path / "out", lambda *_: None)
    found = verify(source, form, tmp_path / "out", MODEL)
    assert [each.verdict for each in found] == ["verified", "verified"], found
    assert found[1].figures["relative_difference"] < 0.05
    [file] = (tmp_path / "out").glob("*.gguf")
    down = next(each for each in read_gguf(file).tensors if each.name == "blk.1.ffn_down_exps.weight").data
    down[2] = down[3]
    del down
    [_, damaged] = form.engines(source, tmp_path / "out", MODEL)
    found = damaged.verdict(source, damaged)
    assert (found.verdict, found.disagreeing) == ("failed", ["expert 2 of blk.1.ffn_down_exps.weight"])


@installed
@pytest.mark.slow
def test_a_family_that_llamacpp_lacks_is_refused_by_name(tmp_path):
    source = random_source(save_tiny_model(tmp_path / "model"))
    config = json.loads((tmp_path / "model" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    for name in ("gguf-adapter", "gguf"):
        with pytest.raises(ExportError, match=r"does not take this model: .*NobodysForCausalLM is not supported"):
            make_format(name, Options()).require(source)


@installed
def test_an_adapter_of_a_head_that_shares_its_weights_is_refused(tmp_path):
    source = random_source(save_tiny_model(tmp_path / "model", tie_word_embeddings=True), linears=("lm_head",))
    with pytest.raises(ExportError, match=r"lm_head, which shares its weights with the embeddings.*--to gguf"):
        make_format("gguf-adapter", Options()).require(source)


@installed
def test_tokenizer_without_a_single_letter_leaves_the_adapter_unverified_and_says_why(tmp_path):
    source = random_source(MODEL)
    words = WordLevel({"<unk>": 0, "12": 1, "ab": 2}, unk_token="<unk>")
    source.__dict__["tokenizer"] = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words), unk_token="<unk>")
    [engine] = make_format("gguf-adapter", Options()).engines(source, tmp_path, MODEL)
    assert engine.missing == "no token of this model is a single letter, with which llama.cpp's server has to be asked"


@installed
@pytest.mark.slow
def test_base_in_4_bits_is_tried_before_the_work_and_verified_in_its_own_values(tmp_path):
    quantize(str(MODEL), tmp_path / "nf4")
    source = read_of(tmp_path / "nf4", random_source(MODEL))
    source, form = with_files(source, tmp_path), make_format("gguf", Options("dequantized"))
    form.require(source)
    form.write(source, tmp_path / "out", lambda *_: None)
    assert [each.verdict for each in verify(source, form, tmp_path / "out", tmp_path / "nf4")] == ["verified"] * 2
    config = json.loads((tmp_path / "nf4" / "config.json").read_text(encoding="utf-8"))
    (tmp_path / "nf4" / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    with pytest.raises(ExportError, match=r"does not take this model: .*NobodysForCausalLM is not supported"):
        form.require(source)


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        (
            "gguf",
            "q4_k_m",
            "writes f32, f16, bf16, q8_0; write f16, and run `llama-quantize model-f16.gguf model-q4_k_m",
        ),
        ("gguf-adapter", "q8_0", "writes f32, f16, bf16"),
        ("peft", "f16", "has no choice of it"),
    ],
)
def test_a_type_that_a_format_lacks_is_refused(name, kind, says):
    with pytest.raises(ConfigError, match=says):
        make_format(name, Options(type=kind))


def read_of(folder, source):
    """The same adapter, of a base in 4 bits."""
    part = replace(source, base=ModelSource(folder), index=read_nf4_folder(folder).index)
    part.__dict__.update({name: source.__dict__[name] for name in ("examples", "plain_tokens")})
    return part


def with_files(source, folder):
    """The source with files of an adapter, and a folder to export to."""
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (folder / name).touch()
    (folder / "out").mkdir()
    source.adapter.where = str(folder)
    return source


def exchange(tensors, fields):
    for factor in "ab":
        gate, up = (tensors[f"blk.1.ffn_{name}_exps.weight.lora_{factor}"] for name in ("gate", "up"))
        gate[:], up[:] = up.copy(), gate.copy()


def drop_an_expert(tensors, fields):
    tensors["blk.2.ffn_down_exps.weight.lora_b"][3] = 0


def halve_alpha(tensors, fields):
    field = fields["adapter.lora.alpha"]
    field.parts[field.data[0]][0] /= 2


def transpose_b(tensors, fields):
    b = tensors["blk.0.attn_q.weight.lora_b"]
    b[:] = b.T.copy().reshape(b.shape)


DAMAGES = {
    "nothing": lambda tensors, fields: None,
    "exchanged": exchange,
    "dropped": drop_an_expert,
    "halved": halve_alpha,
    "transposed": transpose_b,
}


def run_llamacpp(cases, prompts, folder):
    (folder / "request.json").write_text(
        json.dumps({"prompts": prompts, "positions": list(range(0, 48, 6)), "cases": cases})
    )
    status, errors = programs.start([sys.executable, str(ENGINES / "llamacpp.py"), str(folder / "request.json")], 900)
    assert status == 0, errors
    return {name: load_file(folder / f"{name}.safetensors") for name in cases}
