"""An NF4 folder in stock transformers: it loads, generates and trains there, once `expertune` is imported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel, Trainer, TrainingArguments

import expertune
from expertune.adapt.attach import attach
from expertune.checkpoint.hf_quantizer import as_loaded
from expertune.checkpoint.meta import auto_class
from expertune.config import LoraSection, QuantizationConfig
from expertune.errors import CheckpointError, ExportError
from expertune.experts.module import Nf4Experts
from expertune.layers.nf4_linear import Nf4Linear
from tests.checkpoint.conftest import FolderOf, Rewrite
from tests.checkpoint.nf4_folders import quantized
from tests.families import build
from tests.processes import BENEATH, run_program
from tests.tiny_models import (
    FAMILIES,
    changed,
    frozen_bytes,
    load_tiny,
    random_rows,
    save_random,
    save_tiny_model,
)


@pytest.fixture(scope="module")
def folder(mixtral: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(mixtral, tmp_path_factory.mktemp("quantized") / "mixtral")


def by_transformers(folder: Path, **settings: Any) -> PreTrainedModel:
    assert expertune.__version__
    model, report = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def logits(model: Any) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return model(random_rows(3, 16)).logits


@pytest.mark.parametrize("family", FAMILIES)
def test_bytes_and_logits_are_those_of_load_model(family: str, family_folder: FolderOf, tmp_path: Path) -> None:
    out = quantized(family_folder(family), tmp_path / "out")
    theirs, ours = by_transformers(out, dtype=torch.float32), load_tiny(out).model
    assert changed(frozen_bytes(ours), frozen_bytes(theirs)) == []
    assert torch.equal(logits(theirs), logits(ours))


@pytest.mark.parametrize(
    ("kind", "because"),
    [
        ("gpt_oss", "its experts have biases, interleaved rows and transposed weights"),
        ("qwen4_exp_text", "one of its linears is called `..._weight`"),
        ("qwen3_omni_moe_thinker", "its blocks initialize the experts inside them"),
        ("nemotron_h", "its experts have no gate"),
    ],
)
def test_families_that_lay_things_out_otherwise_load_alike(kind: str, because: str, tmp_path: Path) -> None:
    config = build.tiny_config(kind)
    out = quantized(save_random(tmp_path / "source", config), tmp_path / "out")
    theirs, report = auto_class(config).from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not any(report[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), because
    ours = load_tiny(out).model
    assert changed(frozen_bytes(ours), frozen_bytes(theirs)) == []
    assert torch.equal(logits(theirs), logits(ours))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, "auto"])
def test_dtype_is_the_one_that_was_asked_for(dtype: torch.dtype | str, folder: Path) -> None:
    model = by_transformers(folder, dtype=dtype)
    expected = torch.bfloat16 if dtype == "auto" else dtype
    assert model.dtype == expected
    assert isinstance(expected, torch.dtype)
    assert torch.equal(logits(model), logits(load_tiny(folder, expected).model))


def test_experts_and_linears_are_four_bit(folder: Path) -> None:
    model = by_transformers(folder)
    experts = [module for module in model.modules() if isinstance(module, Nf4Experts)]
    assert len(experts) == 2
    assert all(module.gate_up.packed.dtype == torch.uint8 for module in experts)
    assert sum(isinstance(module, Nf4Linear) for module in model.modules()) == 8
    assert model.is_quantized


@pytest.mark.parametrize("num_experts", [3, 4])
def test_padding_of_a_file_is_no_tensor_of_the_model(num_experts: int, tmp_path: Path) -> None:
    source = save_tiny_model(tmp_path / "source", "mixtral", num_local_experts=num_experts)
    out = quantized(source, tmp_path / "out")
    assert torch.equal(logits(by_transformers(out, dtype=torch.float32)), logits(load_tiny(source).model))


def test_without_double_quantization(mixtral: Path, tmp_path: Path) -> None:
    out = quantized(mixtral, tmp_path / "out", quantization=QuantizationConfig(double_quantization=False))
    direct = load_tiny(mixtral, double_quantization=False).model
    assert torch.equal(logits(by_transformers(out, dtype=torch.float32)), logits(direct))


def test_tied_head_is_tied(rewrite: Rewrite, tmp_path: Path) -> None:
    source = rewrite(lambda tensors: tensors.pop("lm_head.weight"), tie_word_embeddings=True)
    model = by_transformers(quantized(source, tmp_path / "out"), dtype=torch.float32)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert torch.equal(logits(model), logits(load_tiny(source).model))


def test_generates(folder: Path) -> None:
    model = by_transformers(folder, dtype=torch.float32)
    prompt = random_rows(1, 5)
    answer = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    ids = prompt
    for _ in range(answer.shape[1] - 5):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(answer, ids)


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Eight rows, learned by heart."""

    def __init__(self) -> None:
        self.rows = random_rows(8, 10)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def train(model: Any, out: Path) -> list[float]:
    arguments = TrainingArguments(
        str(out), max_steps=12, learning_rate=1e-2, per_device_train_batch_size=8, logging_steps=1, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Rows())
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT's own question
def test_trains_under_a_stock_trainer_with_pefts_own_lora(folder: Path, tmp_path: Path) -> None:
    model = by_transformers(folder, dtype=torch.float32)
    before = frozen_bytes(model)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    losses = train(adapted, tmp_path)
    assert losses[-1] < losses[0] - 0.1
    assert changed(before, frozen_bytes(adapted.unload())) == []


def test_trains_under_a_stock_trainer_with_adapters_on_experts(folder: Path, tmp_path: Path) -> None:
    model = by_transformers(folder, dtype=torch.float32)
    lora = LoraSection(r=4, targets=["experts"])
    adapted = attach(as_loaded(model), lora, str(folder))
    losses = train(adapted, tmp_path / "run")
    assert losses[-1] < losses[0] - 0.1
    adapted.eval()
    adapted.save_pretrained(str(tmp_path / "adapter"))
    again = attach(load_tiny(folder), LoraSection(init_from=str(tmp_path / "adapter")), str(folder))
    torch.testing.assert_close(logits(again.eval()), logits(adapted), rtol=0, atol=1e-5)


def test_model_of_another_origin_is_not_taken_for_a_folders(mixtral: Path) -> None:
    with pytest.raises(ValueError, match="not loaded by transformers from an NF4 folder"):
        as_loaded(load_tiny(mixtral).model)


def test_is_not_saved_as_something_that_it_is_not(folder: Path, tmp_path: Path) -> None:
    for model in (by_transformers(folder), load_tiny(folder).model):
        with pytest.raises(
            ExportError, match=r"copy its NF4 folder .* Adapters are saved by save_pretrained of the Peft"
        ):
            model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_without_its_head_computes_the_same_hidden_states(folder: Path) -> None:
    rows = random_rows(2, 8)
    with torch.no_grad():
        bare = AutoModel.from_pretrained(folder, dtype=torch.float32)(rows).last_hidden_state
        whole = by_transformers(folder, dtype=torch.float32).model(rows).last_hidden_state
    assert torch.equal(bare, whole)


@pytest.mark.parametrize("ask", ["by name", "auto"])
def test_device_map_that_leaves_a_part_on_disk_is_refused_by_its_name(ask: str, folder: Path, tmp_path: Path) -> None:
    modules = ["model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head"]
    by_name = {"device_map": dict.fromkeys(modules, "cpu") | {"model.layers.1": "disk"}}
    asked = by_name if ask == "by name" else {"device_map": "auto", "max_memory": {"cpu": 60_000}}
    with pytest.raises(
        ValueError, match=r"device_map leaves .+ on disk: an NF4 folder is loaded whole onto one device"
    ):
        AutoModelForCausalLM.from_pretrained(folder, offload_folder=str(tmp_path), **asked)


@pytest.mark.parametrize("name", ["layer-00001.safetensors", "rest.safetensors", "config.json", "expertune.json"])
def test_folder_with_one_changed_byte_is_refused(name: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    path = copy / name
    content = path.read_bytes()
    # In the middle of the weights; a digit of a JSON file.
    at = len(content) - 200 if name.endswith(".safetensors") else max(content.rfind(b"%d" % n) for n in range(1, 8))
    path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
        by_transformers(copy)


def test_folder_that_has_lost_its_manifest_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    (copy / "expertune.json").unlink()
    with pytest.raises(CheckpointError, match=r"no expertune\.json here"):
        by_transformers(copy)


ORDERS = {
    "expertune first": "import expertune; from transformers import AutoModelForCausalLM",
    "transformers first": "from transformers import AutoModelForCausalLM; import expertune",
    "models first": "from transformers import MixtralForCausalLM, AutoModelForCausalLM; import expertune",
}


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_imports_does_not_matter(order: str, folder: Path) -> None:
    code = f"""
import json, sys
{ORDERS[order]}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
print(json.dumps(type(model.model.layers[0].mlp.experts).__name__))
"""
    ended = run_program(code, str(folder), imports=BENEATH)
    assert ended.status == 0, ended.err[-4000:]
    assert json.loads(ended.out) == "Nf4Experts"


def test_without_the_import_transformers_says_what_the_folders_readme_names(folder: Path) -> None:
    code = "import sys; from transformers import AutoModelForCausalLM as A; A.from_pretrained(sys.argv[1])"
    # A command of ours that ran before has set another verbosity.
    ended = run_program(code, str(folder), imports=BENEATH, TRANSFORMERS_VERBOSITY="warning")
    assert ended.status == 1
    readme = " ".join((folder / "README.md").read_text(encoding="utf-8").split())
    for said in (
        "Unknown quantization type, got expertune",
        "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error",
    ):
        assert said in ended.err
        assert said in readme
