"""What every room's tests share: one environment wherever they run, one thread, one seed, and no way online."""

import gc
import os
from collections.abc import Callable
from pathlib import Path

# What a machine or a CI service may have set, and what would change words, colors, widths, files or memory: read when
# libraries are imported, and handed on to the processes that tests start.
_NOT_OURS = {
    *("FORCE_COLOR", "NO_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "PY_COLORS", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
    *("GITHUB_ACTIONS", "COLUMNS", "LINES", "PYTHONWARNINGS", "GLIBC_TUNABLES"),
}
for _name in list(os.environ):
    if _name in _NOT_OURS or _name.startswith(("MALLOC_", "WANDB_", "TRACKIO_")):
        del os.environ[_name]
# On tensors this small a second thread only waits for the first, and for very long where other work holds the cores;
# and sums that threads share out differ in their last bits.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
# Nothing here needs a GPU, and what is claimed of the CPU is tested on it where there is one too.
os.environ["CUDA_VISIBLE_DEVICES"] = ""
# Triton's kernels run in its interpreter, on the CPU; tests that compile them do so in processes of their own.
os.environ["TRITON_INTERPRET"] = "1"

import hypothesis  # noqa: E402 - after the environment that it reads
import pytest  # noqa: E402
import torch  # noqa: E402

from tests.examples import THOROUGH  # noqa: E402

# Property tests here move tensors about, and draw them: how long one example takes, or the drawing of it, says nothing.
hypothesis.settings.register_profile(
    "expertune",
    deadline=None,
    max_examples=10,
    derandomize=True,
    database=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
hypothesis.settings.load_profile("expertune")
hypothesis.settings.register_profile("thorough", max_examples=THOROUGH)  # of the rest as the profile that is loaded


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    # Last of all, after pytest has looked for what tests left: an interpreter takes itself apart with all it has made.
    config.add_cleanup(gc.unfreeze)


def pytest_collection_finish() -> None:
    # What was made when libraries were imported stays; each run collects twice, and would look through all of it.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The tiny checkpoint of a family, written once."""
    from tests.tiny_models import save_tiny_model  # which imports most of the product

    folders: dict[str, Path] = {}

    def folder_of(family: str) -> Path:
        if family not in folders:
            folders[family] = save_tiny_model(tmp_path_factory.mktemp(family), family)
        return folders[family]

    return folder_of
