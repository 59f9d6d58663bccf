"""The histogram of example lengths: what `max_length` should be is seen in it."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from expertune.storage import write_whole


def plot_lengths(lengths: Sequence[int] | np.ndarray, path: str | Path, max_length: int) -> None:
    """Write a PNG histogram of example lengths, with a line where examples are cut.

    Args:
        lengths: tokens of each example before the cut (`TokenizedExample.uncut_length`).
        path: the PNG file.
        max_length: where the line is drawn.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    # A Figure of its own, not pyplot: no global state, no window, whatever backend the user's notebook has.
    figure = Figure(figsize=(8, 4.5))
    axes = figure.subplots()
    # One shape, where bars are twenty to draw.
    counts, _, _ = axes.hist(lengths, bins=20, histtype="stepfilled", color="#4c72b0")
    num_cut = int((np.asarray(lengths) > max_length).sum())
    axes.axvline(max_length, color="#c44e52", linestyle="--")
    title = f"max_length {max_length}, dashed: {num_cut} of {len(lengths)} examples are cut"
    axes.set_title(title, fontsize=10, color="#c44e52", y=1.01)
    axes.set_xlabel("Length of input_ids")
    axes.set_ylabel("Frequency")
    axes.set_xlim(left=0)
    axes.spines[["top", "right"]].set_visible(False)
    for axis in (axes.xaxis, axes.yaxis):  # a tick costs as much as anything here
        axis.set_major_locator(MaxNLocator(6, integer=True, steps=[1, 2, 5, 10]))
    # Room for the widest number, by its characters: a layout of matplotlib's own draws everything twice to measure it.
    characters = len(str(int(1.05 * np.max(counts))))
    figure.subplots_adjust(bottom=0.11, top=0.93, left=(0.34 + 0.09 * characters) / 8, right=0.985)

    with write_whole(Path(path)) as file:
        figure.savefig(file, format="png", dpi=120, pil_kwargs={"compress_level": 1})
