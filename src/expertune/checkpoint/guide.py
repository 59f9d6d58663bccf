"""The README.md of an NF4 folder, for whoever finds the folder and not its maker."""

from collections.abc import Mapping
from typing import Any

_TEXT = """\
# A model in 4 bits, as Expertune reads it

`expertune quantize` wrote this folder from {source}.
Its experts and the linear layers of its decoder are {scheme}; embeddings, routers, norms and the output head are as in
the source.

## Load it

The weights are packed for Expertune, and nothing else reads them. In a run file, `model:` is the path of this folder.
In Python, import `expertune` before the model is loaded:

```python
import expertune
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("this-folder")
```

Without `import expertune`, transformers prints a line "Unknown quantization type, got expertune" and a table of the
weights' shapes, and ends in "RuntimeError: You set `ignore_mismatched_sizes` to `False`, thus raising an error". Leave
that argument as it is: with True the weights would be random.

Load it whole onto one device: weights cannot be left on disk or in the host's memory by `device_map`. In a run file,
`placement: disk` and `placement: host` do that.

## Adapters

An adapter that was trained on this folder is saved in a folder of its own, never here, and this folder is never
changed. As its base model it names {source},
because vLLM, SGLang, llama.cpp and PEFT without Expertune cannot read this folder: give them that model in 16 bits, and
the adapter.

## Copy it, change it

Copy all files. `expertune.json` has the size and sha256 of each of them but this one. They are compared when the folder
is first used on a machine, and when a file has changed since; `expertune quantize --verify this-folder` does it now. To
have another tokenizer, chat template or config, change it in the source and quantize again.
"""


def guide(manifest: Mapping[str, Any]) -> str:
    """The text of the file.

    Args:
        manifest: content of `expertune.json`.
    """
    source, quantization = manifest["source"], manifest["quantization"]
    if source.get("revision"):
        name = f"{source['model']} (commit {source['revision'][:12]})"
    else:
        name = "the checkpoint that `source` in `expertune.json` names"
    return _TEXT.format(source=name, scheme="MXFP4 and NF4" if quantization["scheme"] == "mxfp4" else "NF4")
