"""What is used of PEFT without a public name still does in these releases what it is used for."""

from peft import LoraConfig
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

from expertune.adapt.internals import is_excluded, is_refused, with_all_linear


def test_peft_refuses_a_convolution_of_mamba_and_no_module_of_a_plain_model() -> None:
    mamba = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=1))
    assert is_refused(mamba, "backbone.layers.0.mixer.conv1d")
    assert not is_refused(mamba, "backbone.layers.0.mixer.in_proj")


def test_peft_excludes_by_exclude_modules_and_by_nothing_else() -> None:
    config = LoraConfig(target_modules=["q_proj"], exclude_modules=["layers.0.q_proj"])
    assert is_excluded(config, "layers.0.q_proj")
    assert not is_excluded(config, "layers.1.q_proj")
    assert not is_excluded(config, "layers.1.v_proj")


def test_peft_spells_out_all_linear_as_the_names_of_the_models_linears() -> None:
    model = nn.ModuleDict({"one": nn.Linear(2, 2), "norm": nn.LayerNorm(2), "two": nn.Linear(2, 2)})
    assert with_all_linear(LoraConfig(target_modules="all-linear"), model).target_modules == {"one", "two"}
