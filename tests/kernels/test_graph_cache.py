"""Graphs that torch.compile makes of a model are alike in every process, so that they are found in torch's cache."""

import json
from pathlib import Path

import pytest

from tests.processes import run_program

MODEL = """
import json
import torch
from torch import nn
from torch._dynamo.utils import counters
from expertune.experts.module import Nf4Experts
from expertune.kernels.lora import LoraUpdate
from tests.experts.families import build_experts, random_routing

def experts(name):
    torch.manual_seed(0)
    made = Nf4Experts(build_experts("MixtralExperts"), name)
    for expert in range(made.num_experts):
        for projection in made.spec.projections:
            made.write(expert, projection, torch.randn(made.spec.shape(projection)))
    return made

def run(earlier, names, order):
    gone = [experts(name) for name in earlier]
    del gone
    made = {name: experts(name) for name in order}
    layers = nn.ModuleList(made[name] for name in names)
    spec = layers[0].spec
    torch.manual_seed(1)
    # Each layer has its own factors: gradients of shared ones would be summed, by C++ that takes seconds to compile.
    def update():
        a = torch.randn(spec.num_experts, 4, spec.hidden_size, requires_grad=True)
        b = torch.randn(spec.num_experts, spec.intermediate_size, 4, requires_grad=True)
        return LoraUpdate(0, a, b, 2.0)

    updates = [update() for _ in layers]
    hidden = torch.randn(5, spec.hidden_size)
    index, weights = random_routing(5, spec.num_experts)

    def forward(hidden):
        for layer, update in zip(layers, updates):
            hidden = layer(hidden, index, weights, [update])
        return hidden

    arguments = []
    def keep(graph, _inputs):
        arguments.extend(node.args[4] for node in graph.graph.nodes if "expert_mlp" in str(node.target))
        return graph
    torch.compile(forward, backend=keep, fullgraph=True)(hidden)
    torch._dynamo.reset()
    torch.compile(forward, fullgraph=True)(hidden).sum().backward()
    found = {name: counters["inductor"][f"fxgraph_cache_{name}"] for name in ("hit", "miss", "bypass")}
    print(json.dumps({"arguments": arguments, "cache": found}))

# Patterns to look for, trying out the CPU's instruction sets and compiling headers ahead would take far longer than the
# two graphs.
torch._inductor.config.pattern_matcher = False
torch._inductor.config.compile_threads = 1
torch._inductor.config.cpp_cache_precompile_headers = False
torch._inductor.config.cpp.vec_isa_ok = False
"""
NAMES = ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]


@pytest.mark.targets  # needs seconds of compiling, and breaks with torch or the operator alone
def test_compiled_layers_have_the_same_arguments_in_another_process_and_come_from_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    calls = [f"run([], {NAMES}, {NAMES})", f"run({NAMES[:1]} * 3, {NAMES}, {NAMES[::-1]})"]
    ended = [run_program(MODEL + call) for call in calls]
    for process in ended:
        assert process.status == 0, process.err[-2000:]
    first, second = (json.loads(process.out.splitlines()[-1]) for process in ended)
    assert first["arguments"] == second["arguments"] == NAMES
    assert first["cache"]["bypass"] == second["cache"]["bypass"] == 0
    assert (second["cache"]["miss"], second["cache"]["hit"]) == (0, first["cache"]["miss"])
