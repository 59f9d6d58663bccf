"""Arithmetic on 4-bit experts: torch, bitsandbytes' codec and (on a GPU) triton; no Hugging Face."""
