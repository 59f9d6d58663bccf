"""Model cards: metadata as the Hugging Face hub reads them, and nothing in the text that is for the user alone."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

import expertune
from expertune.config import parse_config
from expertune.errors import CheckpointError
from expertune.report.card import CARD_NAME, Subject, render_card
from expertune.run.beside import card_text, write_card, write_tokenizer
from tests.train.conftest import rows_file, small_mixtral, three_steps

__all__ = ["rows_file", "small_mixtral", "three_steps"]  # fixtures

TINY = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"
BASE = "mistralai/Mixtral-8x7B-v0.1"
COMMIT = "fc7ac94680e38d7348cfa806e51218e6273104b0"

VALUES = {
    "model": BASE,
    "data": {"train": "owner/rows:train", "eval": "/home/mallory/secret-rows.jsonl", "template": "viggo"},
    "lora": {"r": 16, "alpha": 32, "targets": ["attention", "experts"], "rank_pattern": {"w2": 8}},
    "training": {"learning_rate": 2e-4, "max_steps": 40, "run_name": "for-client-x", "hub_token": "hf_abc"},
    "output_dir": "/home/mallory/runs/first",
}
RECORD = {
    "versions": {"expertune": "0.1.0", "torch": "2.13.0", "executable": "/home/mallory/.venv/bin/python"},
    "run": {"status": "finished", "directory": "/home/mallory"},
    "model": {"name": BASE, "base": {"config": {"model_type": "mixtral"}}},
    "data": {
        "train": {
            "source": "owner/rows:train",
            "sha256": {"owner/rows:train": "ab", "secret-rows.jsonl": "cd"},
            "template": "viggo",
            "num_rows": 5103,
            "num_tokens": 552505,
            "train_on": "completion",
        }
    },
    "train": {"loss": [[1, 2.5], [40, 0.25]], "steps": 40},
    "eval": {"loss": [[0, 2.0], [20, 0.5], [40, 0.125]], "before": 2.0, "after": 0.125},
    "task": {
        "before": {"metric": "slot-f1", "rows": 256, "slot_f1": 0.0, "exact_match": 0.0},
        "after": {
            **{"metric": "slot-f1", "rows": 256, "slot_f1": 0.857, "exact_match": 0.367},
            "examples": [{"prompt": "A patient", "expected": "x", "answered": "y", "right": False}],
        },
    },
    "tasks": {
        "viggo": {
            "none": {"figures": {"slot_f1": {"value": 0.0, "stderr": None}}, "examples": 714, "shots": 0},
            "adapter": {"figures": {"slot_f1": {"value": 0.84, "stderr": 0.01}}, "examples": 714, "shots": 0},
        }
    },
}
PRIVATE = ("/home", "mallory", "secret", "client", "hf_abc", "patient")


def subject(**changed: Any) -> Subject:
    given: dict[str, Any] = {"record": RECORD, "config": parse_config(VALUES), "base": BASE, "revision": COMMIT}
    return Subject(**given | changed)


def test_metadata_name_base_and_datasets_of_the_hub_and_leave_the_license_to_the_user() -> None:
    data = ModelCard(render_card(subject())).data.to_dict()
    assert data == {
        "base_model": BASE,
        "base_model_relation": "adapter",
        "datasets": ["owner/rows"],
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["expertune", "lora", "qlora", "mixture-of-experts", "transformers"],
    }


def test_base_that_was_a_folder_is_called_by_its_architecture() -> None:
    text = render_card(subject(base="/home/mallory/secret-mixtral", revision=None))
    assert "base_model:" not in text
    assert "# mixtral: a LoRA adapter" in text
    assert "a mixtral model in a local folder (set `base_model` above to its name on the hub)" in text
    assert not [word for word in PRIVATE if word in text.lower()]


def test_card_has_recipe_losses_and_scores_and_nothing_that_is_for_the_user_alone() -> None:
    text = render_card(subject())
    for row in (
        "| slot F1 on 256 held-out examples | 0.0000 | 0.8570 |",
        "| loss on held-out examples | 2.0000 | 0.1250 |",
        "| viggo: slot_f1, 0 shots, 714 examples | 0.0000 | 0.8400 ± 0.0100 |",
        "| adapter | rank 16, alpha 32, dropout 0, on attention, experts |",
        "| rank by projection | w2: 8 |",
        "| examples | 5,103, 552,505 tokens, trained on: completion |",
        "| learning_rate | 0.0002 |",
        "| training loss | 2.5000 at step 1, 0.2500 at step 40 |",
        "Sentence: {{ prompt }}",
    ):
        assert row in text
    assert not [word for word in PRIVATE if word in text.lower()]


def test_card_of_a_run_that_trains_from_components_has_the_rank_of_its_file() -> None:
    values = VALUES | {"lora": {"r": 16, "alpha": 32, "init": "pissa", "targets": ["attention"]}}
    text = render_card(subject(config=parse_config(values)))
    # Alpha goes with the rank, so that the scale of the file is the one that was trained with.
    assert "| adapter | rank 32, alpha 64, dropout 0, on attention |" in text
    assert (
        "| first factors | principal components (pissa), trained with rank 16 and alpha 32; they are taken away in the "
        "files, which doubles the rank |" in text
    )
    assert "--max-lora-rank 32" in render_card(subject(config=parse_config(values), form="vllm"))


def test_earlier_state_has_its_own_loss_and_no_score_of_the_last() -> None:
    text = render_card(subject(adapter="checkpoint-20"))
    assert "This is its state at checkpoint-20." in text
    assert "| loss on held-out examples | 2.0000 | 0.5000 |" in text
    assert "0.8570" not in text
    assert "0.8400" not in text


def test_export_says_in_which_engines_it_was_verified() -> None:
    figures = {"tolerance": 1e-4, "differences": {"base": 1e-6, "exported": 2e-6, "effect": 1.5}}
    reached = {"experts": {"reached": 125, "of": 128}}
    relative = {"relative_tolerance": 1e-5, "relative_difference": 3e-8}
    engines = [
        {"engine": "llama.cpp (b10605)", "verdict": "verified", "reason": None, "figures": figures | reached},
        {"engine": "rounding", "verdict": "verified", "figures": figures | reached | {"measure": "mean"}},
        {"engine": "a loader", "verdict": "verified", "figures": relative},
        {"engine": "other", "verdict": "not verified", "reason": "no /home/mallory/engine; give [x]", "figures": {}},
    ]
    verification = {"engines": engines, "notes": ["texts are split otherwise"]}
    text = render_card(subject(form="gguf-adapter", verification=verification, where="owner/mine"))
    assert "| llama.cpp (b10605) | verified | 2.0e-06 | 1.0e-04 | 1.5e+00 | 125 of 128 |" in text
    assert "| rounding | verified | 2.0e-06 (mean) | 1.0e-04 (mean) | 1.5e+00 (mean) | 125 of 128 |" in text
    assert "| a loader | verified | 3.0e-08 (relative) | 1.0e-05 (relative) | - | - |" in text
    assert "| other | not verified | - | - | - | - |" in text
    assert r"- other: no ... give \[x\]" in text
    assert "texts are split otherwise" in text
    assert "in nats" in text
    alone = render_card(subject(form="vllm", verification={"engines": engines[2:]}))
    assert "in nats" not in alone
    assert "/home" not in text
    assert "llama-server --model BASE.gguf --lora adapter.gguf" in text
    assert ModelCard(text).data.library_name == "gguf"
    loss = {"base": 2.0, "exported": 0.25, "reference": 0.25, "trained": 0.2}
    merged = [{"engine": "it", "verdict": "verified", "figures": figures | {"loss": loss, "examples": 64}}]
    text = render_card(subject(form="merged", verification={"engines": merged}))
    assert (
        "In it its loss on 64 evaluation examples is 0.2500 (2.0000 of the base alone, 0.2000 of the run's own model, "
        "in 4 bits)." in text
    )
    assert "of the adapter on the 4-bit base that it was trained on" in text
    assert "--max-lora-rank 32" in render_card(subject(form="vllm", rank=32))


def test_record_that_came_from_elsewhere_can_bring_no_markup_and_no_traceback() -> None:
    record = copy.deepcopy(RECORD)
    record["versions"]["expertune"] = "<script>[x](y)`|"
    record["tasks"]["a | b\n# c"] = record["tasks"].pop("viggo")
    text = render_card(subject(record=record))
    assert "<script>" not in text
    assert "| a \\| b # c: slot_f1" in text
    record["train"]["loss"] = [7]
    with pytest.raises(CheckpointError, match=r"record\.json: damaged where the model card takes its figures from"):
        card_text(subject(record=record))


def test_run_leaves_a_card_beside_its_adapter_and_keeps_one_that_a_user_has_made_his_own(three_steps: Path) -> None:
    run_card = three_steps / "adapter" / CARD_NAME
    text = run_card.read_text(encoding="utf-8")
    record = expertune.RunRecord.load(three_steps)
    assert f"| {record['eval']['after']:.4f} |" in text
    assert str(three_steps.parent) not in text
    assert "small-mixtral" not in text
    assert "rows.jsonl" not in text
    assert yaml.safe_load(text.split("---")[1])["library_name"] == "peft"
    assert not (three_steps / "adapter" / "tokenizer_config.json").exists()
    config = expertune.load_config(three_steps, ["output_dir=elsewhere"])
    try:
        run_card.write_text("mine", encoding="utf-8")
        write_card(record.values, config, three_steps / "adapter")
        assert run_card.read_text(encoding="utf-8") == "mine"
    finally:
        run_card.write_text(text, encoding="utf-8")
    write_card(record.values, config, three_steps / "adapter")
    assert run_card.read_text(encoding="utf-8") == text


def test_tokenizer_lies_beside_the_adapter_where_the_run_had_another_chat_template(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    own = tokenizer.chat_template
    for template in ("viggo", None, "chat"):
        write_tokenizer(template, tokenizer, tmp_path)
        assert not list(tmp_path.iterdir())
    (folder := tmp_path / "adapter").mkdir()
    (tmp_path / "mine").write_text("kept")
    (folder / "tokenizer_config.json").symlink_to(tmp_path / "mine")
    write_tokenizer("chatml", tokenizer, folder)
    assert (tmp_path / "mine").read_text() == "kept"
    assert tokenizer.chat_template == own
    shared = AutoTokenizer.from_pretrained(folder)
    message = [{"role": "user", "content": "Who?"}]
    assert shared.apply_chat_template(message, tokenize=False, add_generation_prompt=True).endswith(
        f"Who?{tokenizer.eos_token}\n<|im_start|>assistant\n"
    )
    assert shared("A sentence.").input_ids == tokenizer("A sentence.").input_ids
    written = [path.read_text(encoding="utf-8") for path in folder.iterdir()]
    assert not [text for text in written if str(TINY) in text]
    assert json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "second").mkdir()
    write_tokenizer("chatml", shared, tmp_path / "second")  # which has it already
    assert not list((tmp_path / "second").iterdir())
