"""Adapt: attach LoRA to experts and linears as one PeftModel, prove that it works, write it as stock PEFT reads it."""
