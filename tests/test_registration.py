"""What PEFT and transformers are made to do is there in these releases, and touches no model without 4-bit experts."""

import importlib
from pathlib import Path

import pytest

from expertune.registration import WRAPPED
from tests.processes import BENEATH, run_program

PLACES = [(module, path, taker) for module, names in WRAPPED.items() for path, taker in names.items()]


@pytest.mark.parametrize(("module", "path", "taker"), PLACES, ids=[f"{module}:{path}" for module, path, _ in PLACES])
def test_this_release_still_has_what_is_wrapped(module: str, path: str, taker: str) -> None:
    found = importlib.import_module(module)
    for name in path.split("."):
        found = getattr(found, name)
    assert getattr(found, "expertune", False)
    file, _, function = taker.rpartition(".")
    assert callable(getattr(importlib.import_module(f"expertune.adapt.{file}"), function))


def test_transformers_reads_the_names_in_its_files_once_and_finds_the_same() -> None:
    code = """
from functools import lru_cache
import expertune
import transformers.models
from transformers.utils import import_utils
enlarged = import_utils.create_import_structure_from_path
read = enlarged.cache_info()
file = transformers.models.__file__
found = import_utils.define_import_structure(file)
import_utils.create_import_structure_from_path = lru_cache(enlarged.__wrapped__)
assert found == import_utils.define_import_structure.__wrapped__(file)
print(read.hits >= 400, read.misses < read.hits + 100)
"""
    ended = run_program(code, imports="import sys")
    assert ended.out.splitlines()[-1:] == ["True True"], ended.err


def test_peft_before_expertune_and_a_dense_model_that_is_none_of_our_business(tmp_path: Path) -> None:
    code = f"""
import sys, torch
import peft, transformers, expertune
from importlib import import_module
from expertune.registration import WRAPPED
for module, names in WRAPPED.items():
    for path in names:
        found = import_module(module)
        for name in path.split("."):
            found = getattr(found, name)
        assert found.expertune, path

from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
build = lambda: torch.manual_seed(0) and LlamaForCausalLM(LlamaConfig(**sizes)).eval()
model = get_peft_model(build(), LoraConfig(target_modules="all-linear", init_lora_weights=False))
model.save_pretrained({str(tmp_path)!r})
again = PeftModel.from_pretrained(build(), {str(tmp_path)!r})
ids = torch.arange(8)[None]
assert torch.equal(model.eval()(ids).logits, again(ids).logits)
assert type(model.base_model).__name__ == "LoraModel"
print(sorted(name for name in sys.modules if name.startswith("expertune.adapt")))
"""
    ended = run_program(code, imports=BENEATH)
    assert ended.out.splitlines()[-1:] == ["[]"], ended.err


def test_expertune_before_the_libraries_even_where_a_module_was_only_looked_for_at_first() -> None:
    code = """
import sys, importlib.util
import expertune
assert not {"transformers", "peft"} & sys.modules.keys()
importlib.util.find_spec("peft.peft_model")
importlib.util.find_spec("transformers.quantizers.auto")
from peft import PeftModel
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
assert PeftModel.load_adapter.expertune
assert "expertune" in AUTO_QUANTIZER_MAPPING
"""
    ended = run_program(code, imports=BENEATH)
    assert ended.status == 0, ended.err
