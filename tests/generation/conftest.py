"""The embedded Mixtral with an adapter, loaded once for a file of tests."""

import warnings
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from expertune.adapt.attach import attach
from expertune.checkpoint.load import load_model
from expertune.config import LoraSection, QuantizationConfig
from expertune.data import encode_prompt

TINY = Path(__file__).parents[2] / "src" / "expertune" / "assets" / "tiny-mixtral"
PROMPTS = [
    "Sentence: I like FIFA 12.\nMeaning:",
    "It",
    "What is the capital of France? The answer to this question is",
    "Once upon a time",
]


@pytest.fixture(scope="module")
def model():
    """The embedded Mixtral in float32, with an adapter that changes its answers."""
    loaded = load_model(TINY, QuantizationConfig(), torch.float32, "cpu")
    torch.manual_seed(1)  # factors A are drawn as well
    with warnings.catch_warnings():
        # PEFT asks transformers for a property by its old name.
        warnings.simplefilter("ignore", FutureWarning)
        model = attach(loaded, LoraSection(targets=["attention"]), str(TINY))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def base(model):
    """The transformers model under the adapter, its settings restored afterwards."""
    base = model.get_base_model()
    own, context = base.generation_config, base.config.max_position_embeddings
    yield base
    base.generation_config, base.config.max_position_embeddings = own, context
    base.config.use_cache = True


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture
def prompts(tokenizer):
    return [encode_prompt(prompt, tokenizer) for prompt in PROMPTS]


@pytest.fixture
def widths(base):
    """Tokens of each forward pass."""
    seen = []
    hook = base.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    yield seen
    hook.remove()
