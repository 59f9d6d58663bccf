"""Exporting: a run's adapter, or base and adapter as one model, in the form that an engine reads; then run there."""

FORMATS = {
    "peft": "peft",
    "peft-fused": "peft",
    "merged": "merged",
    "gguf-adapter": "gguf",
    "gguf": "gguf",
    "mlx": "mlx",
    "mlx-merged": "mlx",
    "vllm": "vllm",
}
"""Names of formats, and the module of this folder that has each: known without importing torch."""

TYPED = ("gguf-adapter", "gguf")
"""Those whose numbers a user may choose."""

MERGED = ("merged", "gguf")
"""Whole models, whose base a user may choose."""
