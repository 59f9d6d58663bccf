"""Adapters for vLLM: what is written, and where vLLM is installed what its own loader makes of it."""

import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertune.adapt.factors import Factors, read_factors, stacked
from expertune.checkpoint.adapter_folder import CONFIG_NAME, WEIGHTS_NAME
from expertune.errors import ExportError
from expertune.exporting.formats import Options, Verdict, make_format
from expertune.exporting.source import ExportSource
from expertune.exporting.vllm import VLLM_PYTHON, VllmAdapter, make, vllm_python
from tests.exporting.sources import random_source
from tests.families.build import tiny_config
from tests.tiny_models import FolderOf, save_random, stock_model

Tensors = dict[str, Tensor]
MODEL = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"

installed = pytest.mark.skipif(vllm_python() is None, reason=f"needs {VLLM_PYTHON}: the python of vLLM's environment")
absent = pytest.mark.skipif(vllm_python() is not None, reason="asks vLLM where it is installed")


def swap_w1_and_w3(tensors: Tensors, config: dict[str, float]) -> None:
    for name in [name for name in tensors if ".w1." in name]:
        other = name.replace(".w1.", ".w3.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def drop_an_expert(tensors: Tensors, config: dict[str, float]) -> None:
    for name in [name for name in tensors if ".experts.2." in name]:
        del tensors[name]


def halve_alpha(tensors: Tensors, config: dict[str, float]) -> None:
    config["lora_alpha"] /= 2


def transpose_b(tensors: Tensors, config: dict[str, float]) -> None:
    for name in [name for name in tensors if name.endswith("lora_B.weight")]:
        tensors[name] = tensors[name].T.contiguous()


def rename_a_module(tensors: Tensors, config: dict[str, float]) -> None:
    for name in [name for name in tensors if "self_attn" in name]:
        tensors[name.replace("self_attn", "attention")] = tensors.pop(name)


def written(source: ExportSource, folder: Path) -> VllmAdapter:
    form = make("vllm", Options())
    form.require(source)
    form.write(source, folder, lambda *_: None)
    return form


def read(folder: Path) -> tuple[dict[str, float], Tensors]:
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    return config, load_file(folder / WEIGHTS_NAME)


def gpt_oss(tmp_path: Path) -> Path:
    """A family that vLLM holds as stacks, its output features alternating."""
    return save_random(tmp_path / "stacked", tiny_config("gpt_oss"))


def update(pair: Factors) -> Tensor:
    return pair.scale * (pair.b.double() @ pair.a.double())


def of_experts(projections: Mapping[str, Sequence[Factors]]) -> dict[str, Factors]:
    return {name: stacked(pairs) for name, pairs in projections.items()}


def assert_same(found: Mapping[str, Factors], expected: Mapping[str, Factors]) -> None:
    assert found.keys() >= expected.keys()
    for name, pair in found.items():
        wanted = update(expected[name]) if name in expected else torch.zeros_like(update(pair))
        torch.testing.assert_close(update(pair), wanted, rtol=1e-5, atol=1e-6)


@absent
@pytest.mark.parametrize("projections", [("gate", "up", "down"), ("up",)], ids=["w1, w2 and w3", "w3 alone"])
def test_written_adapter_has_one_allowed_rank_and_every_projection_of_an_expert(
    family_folder: FolderOf, tmp_path: Path, projections: tuple[str, ...]
) -> None:
    source = random_source(family_folder("mixtral"), projections)
    written(source, tmp_path)
    config, tensors = read(tmp_path)
    assert {min(tensor.shape) for tensor in tensors.values()} == {config["r"]} == {8}
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    found = read_factors(config, tensors, source.names, "file")
    assert_same(found.linears, source.factors.linears)
    for module, held in found.experts.items():
        assert held.keys() == {"gate", "up", "down"}
        assert_same(of_experts(held), of_experts(source.factors.experts[module]))


@absent
def test_adapter_of_stacked_experts_is_written_as_stacks(tmp_path: Path) -> None:
    source = random_source(gpt_oss(tmp_path))
    written(source, tmp_path / "out")
    config, tensors = read(tmp_path / "out")
    stem, spec = "base_model.model.model.layers.0.mlp.experts.base_layer", next(iter(source.names.specs.values()))
    outputs, inputs = spec.shape("gate")
    assert config["r"] == 8
    assert tensors[f"{stem}.lora_A.weight"].shape == (spec.num_experts * 8, inputs)
    assert tensors[f"{stem}.lora_B.weight"].shape == (2 * outputs, spec.num_experts * 8)
    stacks = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    found = read_factors(config | stacks, tensors, source.names, "file")
    for module, held in found.experts.items():
        assert_same(of_experts(held), of_experts(source.factors.experts[module]))


@absent
def test_rank_that_vllm_does_not_take_is_refused(family_folder: FolderOf) -> None:
    source = random_source(family_folder("mixtral"))
    name, pair = next(iter(source.factors.linears.items()))
    source.factors.linears[name] = Factors(torch.zeros(600, pair.a.shape[1]), torch.zeros(len(pair.b), 600), 1.0)
    with pytest.raises(ExportError, match="the adapter has rank 600, and vLLM takes 512 at most"):
        make("vllm", Options()).require(source)


def loaded(form: VllmAdapter, source: ExportSource, folder: Path) -> Verdict:
    """What vLLM's loader makes of an adapter that has been written."""
    (engine,) = form.engines(source, folder, source.base.folder)
    assert engine.verdict is not None
    return engine.verdict(source, engine)


@installed
@pytest.mark.slow
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "granitemoe", "deepseek_v3", "gpt_oss"])
def test_vllm_multiplies_by_the_adapter(family_folder: FolderOf, tmp_path: Path, family: str) -> None:
    source = random_source(gpt_oss(tmp_path) if family == "gpt_oss" else family_folder(family))
    verdict = loaded(written(source, tmp_path / "out"), source, tmp_path / "out")
    assert (verdict.verdict, verdict.reason) == ("verified", None)


@installed
@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (swap_w1_and_w3, "4 of 10 of its layers multiply by something else: w1, w3"),
        (drop_an_expert, r"model.layers.0.block_sparse_moe.experts.2.w1 has no adapter, which others"),
        (halve_alpha, "10 of 10 of its layers multiply by something else: q_proj, o_proj, w1, w3, w2"),
        (transpose_b, ""),
        (rename_a_module, "vLLM has no layer for model.layers.0.attention.o_proj, and would leave"),
    ],
    ids=lambda value: value.__name__.replace("_", " ") if callable(value) else "",
)
def test_wrong_adapter_is_told_apart_by_vllms_loader(
    family_folder: FolderOf, tmp_path: Path, damage: Callable[..., None], reason: str
) -> None:
    source = random_source(family_folder("mixtral"))
    form = written(source, tmp_path)
    config, tensors = read(tmp_path)
    damage(tensors, config)
    save_file(tensors, tmp_path / WEIGHTS_NAME)
    (tmp_path / CONFIG_NAME).write_text(json.dumps(config), encoding="utf-8")
    verdict = loaded(form, source, tmp_path)
    assert verdict.verdict == "failed"
    assert reason in str(verdict.reason)


# Of a merged model the log-probability of each token of each prompt, and the tokens that follow it.
ANSWER = """
import json, os, sys
os.environ |= {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"}
os.environ |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model = LLM(model=sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=256, max_num_seqs=4)
    prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
    answers = model.generate(prompts, SamplingParams(temperature=0, max_tokens=8, prompt_logprobs=0))
    logprobs = [[next(iter(each.values())).logprob for each in answer.prompt_logprobs[1:]] for answer in answers]
    print(json.dumps([logprobs, [list(answer.outputs[0].token_ids) for answer in answers]]))
"""


@installed
@pytest.mark.slow
def test_merged_model_is_computed_by_vllm_as_by_transformers(tmp_path: Path) -> None:
    source = random_source(MODEL)
    (tmp_path / "out").mkdir()
    for name in (CONFIG_NAME, WEIGHTS_NAME):
        (tmp_path / name).touch()
    source.adapter.where = str(tmp_path)
    make_format("merged", Options()).write(source, tmp_path / "out", lambda *_: None)
    prompts = [example.input_ids for example in source.examples]
    (tmp_path / "answer.py").write_text(ANSWER, encoding="utf-8")
    command = [str(vllm_python()), str(tmp_path / "answer.py"), str(tmp_path / "out"), json.dumps(prompts)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    logprobs, followed = json.loads(done.stdout.splitlines()[-1])
    model = stock_model(tmp_path / "out")
    for ids, theirs, tokens in zip(prompts, logprobs, followed, strict=True):
        with torch.no_grad():
            own = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            greedy = model.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :]
        torch.testing.assert_close(torch.tensor(theirs), own[range(len(ids) - 1), ids[1:]], atol=1e-3, rtol=0)
        assert tokens == greedy.tolist()


@installed
@pytest.mark.slow
def test_family_that_vllm_runs_with_transformers_code_is_refused(tmp_path: Path) -> None:
    source = random_source(save_random(tmp_path / "model", tiny_config("dots1")))
    with pytest.raises(
        ExportError, match="looks for an adapter of each expert under gate_proj, down_proj, up_proj, w1"
    ):
        make("vllm", Options()).require(source)


@absent
def test_export_without_vllm_is_not_verified_and_says_how_to_have_it(family_folder: FolderOf, tmp_path: Path) -> None:
    source = random_source(family_folder("mixtral"))
    (engine,) = written(source, tmp_path).engines(source, tmp_path, source.base.folder)
    assert engine.missing == (
        "pip install vllm in an environment of its own, and set EXPERTUNE_VLLM_PYTHON to its python"
    )
