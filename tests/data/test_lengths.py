import struct

import pytest

from expertune.data import plot_lengths
from expertune.data.examples import length_histogram, length_summary
from tests.processes import run_program


def test_histogram_is_a_png_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "figures" / "lengths.png"
    plot_lengths([100, 120, 300, 900], path, max_length=320)
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", content[16:24])
    assert width > height > 300
    assert [entry.name for entry in path.parent.iterdir()] == ["lengths.png"]


def test_failed_drawing_keeps_the_old_file(tmp_path):
    path = tmp_path / "lengths.png"
    plot_lengths([1, 2, 3], path, max_length=320)
    before = path.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        plot_lengths(["not a length"], path, max_length=None)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["lengths.png"]


def test_drawing_does_not_touch_pyplot(tmp_path):
    code = (
        "import sys\n"
        "from expertune.data import plot_lengths\n"
        f"plot_lengths([1, 2, 3], {str(tmp_path / 'lengths.png')!r}, max_length=2)\n"
        "print('matplotlib.pyplot' in sys.modules)\n"
    )
    assert run_program(code).out.strip() == "False"


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([7], {"min": 7, "median": 7, "p95": 7, "max": 7}),
        (list(range(101)), {"min": 0, "median": 50, "p95": 95, "max": 100}),
        ([5, 1, 3], {"min": 1, "median": 3, "p95": 5, "max": 5}),
    ],
)
def test_length_summary_gives_lengths_that_examples_have(lengths, expected):
    assert length_summary(lengths) == expected


def test_histogram_of_lengths_counts_every_example_once():
    assert length_histogram([7, 7, 1, 4], bins=7) == {"width": 1.0, "counts": [0, 1, 0, 0, 1, 0, 2]}
    assert length_histogram([0], bins=2) == {"width": 0.5, "counts": [1, 0]}
