"""What every room's tests share: one thread, one seed, and a Hugging Face that never goes online."""

import os

# Read once, when torch and huggingface_hub are imported; processes that tests start inherit them. On tensors this
# small a second thread only waits for the first, and for very long where other work holds the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Triton's kernels run in its interpreter, on the CPU; tests that compile them do so in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import pytest
import torch

# Property tests here move tensors about; how long one example takes says nothing.
hypothesis.settings.register_profile("expertune", deadline=None, max_examples=25, derandomize=True, database=None)
hypothesis.settings.load_profile("expertune")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
