"""Runs in the legacy environment: the tutorial's training, with its libraries, from a given adapter on given rows.

    python legacy_train.py JOB.json

4-bit base with double quantization, k-bit preparation, gradient checkpointing, rows one by one and padded on the left
with EOS, transformers' own Trainer. The job names `model`, `adapter`, `rows` (a list of input_ids and labels),
`max_length`, `compute_dtype`, `skip_modules` (linears left in 16 bits; null is transformers' choice), `training`
(TrainingArguments) and `output` (JSON, written: the loss of each step).
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, prepare_model_for_kbit_training
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

EOS = 2


class InOrder(Trainer):
    """Trainer that takes the rows in the order given."""

    def _get_train_sampler(self, *args: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def main(job: dict[str, Any]) -> None:
    dtype = getattr(torch, job["compute_dtype"])
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=job["skip_modules"],
    )
    model = AutoModelForCausalLM.from_pretrained(
        job["model"], quantization_config=quantization, dtype=dtype, device_map="cpu"
    )
    model = prepare_model_for_kbit_training(model, gradient_checkpointing_kwargs={"use_reentrant": False})
    model = PeftModel.from_pretrained(model, job["adapter"], is_trainable=True)
    # bitsandbytes repacks 4-bit weights when evaluated on a CPU with AVX512-BF16; training must never see that.
    model.train()

    def pad(rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        def left(values: list[list[int]], fill: int) -> torch.Tensor:
            return torch.tensor([[fill] * (job["max_length"] - len(value)) + value for value in values])

        return {
            "input_ids": left([row["input_ids"] for row in rows], EOS),
            "labels": left([row["labels"] for row in rows], -100),
            "attention_mask": left([[1] * len(row["labels"]) for row in rows], 0),
        }

    arguments = TrainingArguments(
        **job["training"],
        use_cpu=True,
        bf16=dtype == torch.bfloat16,
        optim="adamw_torch",
        gradient_checkpointing=True,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )
    trainer = InOrder(model=model, args=arguments, train_dataset=job["rows"], data_collator=pad)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(job["output"]).write_text(json.dumps({"losses": losses}), encoding="utf-8")


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
