"""How far something is: an estimate that holds still, bars on a terminal, lines elsewhere."""

import io

import pytest
from rich.console import Console

from expertune.run.progress import Bar, Bars, Estimate, in_words


class Clock:
    """Seconds that pass when a test says so."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_estimate_of_slow_steps_counts_down_and_is_never_blank_after_the_first() -> None:
    clock = Clock()
    estimate = Estimate(10, clock=clock)
    assert estimate.words == ""
    seen = []
    for second in range(1, 601):
        clock.now = float(second)
        if second % 120 == 0:
            estimate.update(second // 120, 10)
        if second >= 120:
            seen.append(estimate.seconds)
    # Two minutes a step: at each second what is left by then.
    assert seen == [pytest.approx(1200 - second) for second in range(120, 601)]


def test_estimate_of_a_resumed_run_counts_its_own_steps() -> None:
    clock = Clock()
    estimate = Estimate(100, done=90, clock=clock)
    clock.now = 8.0
    estimate.update(92, 100)
    assert estimate.seconds == 32.0
    clock.now = 100.0
    assert estimate.seconds == 0.0


@pytest.mark.parametrize(
    ("seconds", "words"), [(0, "0 s"), (59, "59 s"), (61, "1 min"), (3540, "59 min"), (4800, "1 h 20 min")]
)
def test_times_in_words(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_long_task_without_a_terminal_says_how_far_it_is_now_and_then() -> None:
    clock, written = Clock(), io.StringIO()
    with Bars(Console(file=written, width=200), clock).task("scoring the adapter", "rows answered") as progress:
        for done in range(0, 101):
            clock.now = done * 0.5
            progress(done, 100)
    assert written.getvalue().splitlines() == [
        "scoring the adapter: 20/100 rows answered, about 40 s left",
        "scoring the adapter: 40/100 rows answered, about 30 s left",
        "scoring the adapter: 60/100 rows answered, about 20 s left",
        "scoring the adapter: 80/100 rows answered, about 10 s left",
    ]


def test_task_on_a_terminal_is_a_bar_beside_the_trainings_own() -> None:
    written = io.StringIO()
    bars = Bars(Console(file=written, width=200, force_terminal=True))
    training = Bar(bars, "step", "", stays=True)
    training.update(3, 9)
    with bars.task("evaluation", "examples") as progress:
        progress(1, 4)
        assert bars.opened() is not None
        bars.closed()
    training.update(9, 9)
    training.close()
    text = written.getvalue()
    assert "evaluation 1/4" in text
    assert "step 9/9" in text.splitlines()[-1] or "step 9/9" in text
