"""Log-probabilities by llama.cpp's own runtime, through xllamacpp. Imports nothing of Expertune.

    python llamacpp.py REQUEST.json

The request: `prompts`, lists of token ids; `positions`, which of them to answer, counted over all prompts; and `cases`,
by name: `model`, a GGUF file; `adapter`, another, or none; `vocabulary`, how many tokens there are; `plain`, a token
that is a letter; and `texts`, pairs of a text and its token ids, to see whether llama.cpp splits texts as the model's
own tokenizer does. Of each case `CASE.safetensors` beside the request holds `logprobs` [P, V], float32, `positions`
[P], and of `texts` how many were split `alike`.

What is read are the probabilities that llama.cpp's server gives of the next token (`n_probs`): they are those of the
logits, before anything is sampled. The server holds back a token that is not whole UTF-8, and its probabilities with
it; so the token that is sampled is always `plain`, by a bias, which these probabilities do not contain. Keys and values
are held in float32, and attention is computed without shortcuts, so that what differs is the weights' own rounding.
"""

import json
import os
import sys
import urllib.request
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

os.environ["GGML_NO_BACKTRACE"] = "1"  # where it aborts, it would start a debugger
import xllamacpp as llama


def main() -> None:
    """Answer the cases of a request, in order; what has been answered stays where a later one fails."""
    path = Path(sys.argv[1])
    request = json.loads(path.read_text(encoding="utf-8"))
    for name, case in request["cases"].items():
        server = start(case, max(map(len, request["prompts"])))
        tensors = answer(server, case, request["prompts"], request["positions"])
        if case.get("texts"):
            tensors["alike"] = np.array(sum(split(server, text) == ids for text, ids in case["texts"]))
        save_file(tensors, path.parent / f"{name}.safetensors", {"engine": f"xllamacpp {version('xllamacpp')}"})
        del server


def start(case: dict[str, Any], length: int) -> Any:
    """A server with a model, and an adapter where the case has one."""
    parameters = llama.CommonParams()
    parameters.model.path = case["model"]
    if case.get("adapter"):
        parameters.lora_adapters = [llama.CommonAdapterLoraInfo(case["adapter"], 1.0)]
    parameters.n_ctx = length + 8
    parameters.n_parallel = 1
    parameters.port = 0  # a free one
    parameters.warmup = parameters.fit_params = False
    parameters.verbosity = 1  # errors
    if threads := os.environ.get("OMP_NUM_THREADS", ""):
        parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = int(threads)
    parameters.cache_type_k = parameters.cache_type_v = llama.ggml_type.GGML_TYPE_F32
    parameters.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    try:
        return llama.Server(parameters)
    except RuntimeError:
        raise SystemExit(1) from None  # llama.cpp has said why


def answer(server: Any, case: dict[str, Any], prompts: list[list[int]], positions: list[int]) -> dict[str, np.ndarray]:
    """Log-probabilities after the starts of prompts; consecutive ones share what is in the server's cache."""
    places = [(ids, end) for ids in prompts for end in range(1, len(ids) + 1)]
    rows = []
    for index in positions:
        ids, end = places[index]
        request = {
            "prompt": ids[:end],
            "n_predict": 1,
            "n_probs": case["vocabulary"],
            "temperature": 0.0,
            "logit_bias": [[case["plain"], 1e6]],
        }
        said = server.handle_completions(request)
        if "choices" not in said:
            raise SystemExit(f"llama.cpp: {said}")
        row = np.full(case["vocabulary"], np.nan, np.float32)
        for each in said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]:
            if each["id"] < len(row):
                row[each["id"]] = each["logprob"]
        rows.append(row)
    return {"logprobs": np.stack(rows), "positions": np.array(positions)}


def split(server: Any, text: str) -> list[int]:
    """A text's token ids, without special tokens."""
    body = json.dumps({"content": text, "add_special": False}).encode("utf-8")
    request = urllib.request.Request(
        f"{server.listening_address}/tokenize", data=body, headers={"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answered:
        tokens: list[int] = json.load(answered)["tokens"]
    return tokens


if __name__ == "__main__":
    main()
