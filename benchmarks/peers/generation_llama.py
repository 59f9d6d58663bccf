"""llama.cpp's own server, through xllamacpp, in this process: sequences are requests at the same time."""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

os.environ["GGML_NO_BACKTRACE"] = "1"
import xllamacpp as llama

from benchmarks.peers.generation_serving import own_stdout, serve

_SEQUENCES, _CONTEXT = 32, 640


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    args = parser.parse_args()
    answers = own_stdout()
    parameters = llama.CommonParams()
    parameters.model.path = args.model
    parameters.n_ctx = _SEQUENCES * _CONTEXT
    parameters.n_parallel = _SEQUENCES
    parameters.port = 0  # a free one
    parameters.warmup = parameters.fit_params = False
    parameters.verbosity = 1  # errors
    threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = threads
    server = llama.Server(parameters)

    def one(prompt: list[int], new: int) -> None:
        request = {
            **{"prompt": prompt, "n_predict": new, "ignore_eos": True, "temperature": 0.0},
            **{"cache_prompt": False, "samplers": ["temperature"]},
        }
        said: dict[str, Any] = server.handle_completions(request)
        usage = said.get("usage", {})
        if usage.get("completion_tokens") != new or usage.get("prompt_tokens") != len(prompt):
            raise RuntimeError(f"llama.cpp was asked for {new} tokens after {len(prompt)}, and said {said}")

    with ThreadPoolExecutor(_SEQUENCES) as pool:
        serve(
            lambda prompts, new: list(pool.map(one, prompts, [new] * len(prompts))),
            {},
            answers,
            threads=threads,
            versions={"xllamacpp": version("xllamacpp")},
            notes=[
                "Q4_0, its output head Q6_K; keys and values in float16",
                f"built for {llama.get_system_info() if hasattr(llama, 'get_system_info') else 'x86-64'}",
            ],
        )


if __name__ == "__main__":
    main()
