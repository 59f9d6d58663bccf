"""Examples that end the help of each command; tests hold them to the commands' own arguments."""

EXAMPLES = {
    "init": (
        "expertune init owner/model rows.jsonl",
        "expertune init ./model rows.csv 'data.columns={prompt: question, completion: reply}'",
    ),
    "plan": (
        "expertune plan run.yaml",
        "expertune plan run.yaml --gpu rtx-4090 lora.r=32",
        "expertune plan run.yaml --memory 24GB --json",
        "expertune plan run.yaml --gpu h100 --devices 8",
    ),
    "data": ("expertune data run.yaml", "expertune data run.yaml --examples 5 data.template=chatml"),
    "train": (
        "expertune train run.yaml",
        "expertune train run.yaml training.max_steps=20 output_dir=runs/short",
        "expertune train run.yaml --resume",
    ),
    "evaluate": (
        "expertune evaluate runs/first",
        "expertune evaluate runs/first --adapter checkpoint-50 --rows 100",
        "expertune evaluate runs/first --tasks viggo",
    ),
    "generate": (
        "expertune generate runs/first --prompt 'What is the capital of Malta?'",
        "expertune generate runs/first --prompt 'Who was born there?' --column context='Valletta is ...' --compare",
        "expertune generate runs/first --prompt-file questions.txt --json > answers.jsonl",
        "expertune generate runs/first --prompt 'A poem, please.' --temperature 0.8 --top-p 0.95 --seed 1",
        "cat question.txt | expertune generate runs/first --prompt - > answer.txt",
    ),
    "chat": (
        "expertune chat runs/first",
        "expertune chat runs/first --system 'Answer in one sentence.' --temperature 0.7",
        "expertune chat runs/first --base-only",
    ),
    "quantize": (
        "expertune quantize owner/model model-nf4",
        "expertune quantize --verify model-nf4",
    ),
    "export": (
        "expertune export runs/first --to peft",
        "expertune export runs/first --to gguf --out first-gguf",
        "expertune export runs/first --to merged --adapter checkpoint-50",
    ),
    "verify": ("expertune verify runs/first/exports/peft", "expertune verify first-gguf --run runs/first"),
    "report": ("expertune report runs/first",),
    "compare": ("expertune compare runs/first runs/second", "expertune compare runs/* --out sweep.html"),
    "doctor": ("expertune doctor", "expertune doctor --json > machine.json"),
}


def epilog(command: str) -> str:
    """The end of a command's help; its lines stay as they are, so that they can be copied."""
    return "\n".join(["\b", "Examples:", *(f"  {line}" for line in EXAMPLES[command])])
