"""The table of families and formats: what its page says is what was found, and the same is found again."""

import ast
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from tools.export_table import ORDER, PAGE, RESULTS, general, page
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

from expertune.exporting.engines import gguf_converter
from tests.exporting import every_family
from tests.exporting.every_family import CASES, KINDS

FAMILIES: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8"))["families"]
RUN = {kind: held for kind, held in FAMILIES.items() if held}


def test_page_is_what_the_tool_makes_of_the_results() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(json.loads(RESULTS.read_text(encoding="utf-8")))


def test_one_cause_is_one_line_whenever_the_server_said_it() -> None:
    assert general("llamacpp: 0.00.006.937 E srv          init: exiting", "mixtral") == "llamacpp: srv init: exiting"


def test_every_family_that_trains_and_every_format_is_in_the_table() -> None:
    assert set(CASES) == set(ORDER)
    assert list(FAMILIES) == KINDS
    assert {kind for kind, held in FAMILIES.items() if held and set(CASES) - {"vllm"} - set(held)} == set()


def test_exports_that_an_engine_does_not_take_are_those_that_are_known() -> None:
    failed = [(kind, each) for kind, held in FAMILIES.items() for each in held if held[each]["verdict"] == "failed"]
    # llama.cpp holds gate and up of this family as one stack, and finds no place for an adapter on each.
    assert failed == [("granitemoe_swa", "gguf-adapter")]


@pytest.mark.skipif(find_spec("mlx_lm") is None, reason="mlx-lm is not installed: pip install 'expertune[mlx]'")
def test_families_that_mlx_lm_has_no_model_file_for_are_those_it_is_said_not_to_know() -> None:
    found = find_spec("mlx_lm")
    assert found is not None
    assert found.submodule_search_locations
    files = {path.stem for path in (Path(found.submodule_search_locations[0]) / "models").glob("*.py")}
    said = {kind for kind, held in RUN.items() if f"Model type {kind} not supported" in str(held["mlx"].get("reason"))}
    assert said == RUN.keys() - files - {"minimax_m2"}  # which it reads with the file of another one


@pytest.mark.skipif(
    gguf_converter.scripts_folder() is None, reason="llama.cpp is not installed: pip install 'expertune[gguf]'"
)
def test_architectures_that_llamacpps_converter_lacks_are_those_it_is_said_not_to_know() -> None:
    folder = gguf_converter.scripts_folder()
    assert folder is not None
    tree = ast.parse((folder / "conversion" / "__init__.py").read_text(encoding="utf-8"))
    maps = [node.value for node in tree.body if isinstance(node, ast.AnnAssign) and node.target.id == "TEXT_MODEL_MAP"]  # type: ignore[union-attr]
    known = ast.literal_eval(maps[0])  # type: ignore[arg-type]
    for kind, held in RUN.items():
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind) or MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES[kind]
        assert (f"Model {name} is not supported" in str(held["gguf-adapter"].get("reason"))) == (name not in known), (
            kind
        )


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUN)
def test_each_export_comes_out_as_the_table_says(kind: str) -> None:
    cases = [each for each in FAMILIES[kind] if each != "vllm"]
    with every_family.copied_programs():
        found = every_family.outcomes(kind, cases)
    assert {each: (found[each]["verdict"], found[each]["targets"]) for each in cases} == {
        each: (FAMILIES[kind][each]["verdict"], FAMILIES[kind][each]["targets"]) for each in cases
    }
