"""Adapt: attach LoRA to experts and linears as one PeftModel, check it, write files that stock PEFT reads."""
