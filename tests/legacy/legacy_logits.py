"""Runs in the legacy environment: logits of a base model, and of the same model with an adapter, by stock PEFT.

    python legacy_logits.py JOB.json

The job names `model`, `adapter`, `input` (safetensors with input_ids) and `output` (safetensors, written).
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def main(job: dict[str, str]) -> None:
    input_ids = load_file(job["input"])["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(model, job["adapter"])
    model.eval()
    require_all_loaded(model, job["adapter"])
    with torch.no_grad():
        adapted = model(input_ids).logits
        with model.disable_adapter():
            base = model(input_ids).logits
    save_file({"adapted": adapted.contiguous(), "base": base.contiguous()}, job["output"])


def require_all_loaded(model: PeftModel, adapter: str) -> None:
    """PEFT only warns of adapter tensors that fit nothing, and starts from scratch what the file lacks."""
    written = load_file(Path(adapter) / "adapter_model.safetensors")
    live = {
        name.replace(".default.", "."): parameter for name, parameter in model.named_parameters() if ".lora_" in name
    }
    assert live.keys() == written.keys(), sorted(live.keys() ^ written.keys())[:4]
    for name, tensor in written.items():
        assert torch.equal(live[name], tensor), name


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
