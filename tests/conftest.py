"""What every room's tests share: a seed, and a quiet Hugging Face that never goes online."""

import os

# Before huggingface_hub is imported: it reads this once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

# Property tests here move tensors about; how long one example takes says nothing.
hypothesis.settings.register_profile("expertune", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.load_profile("expertune")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
