"""How far something is: an estimate that holds still, bars on a terminal, lines elsewhere."""

import io
import re
import threading
import time

import pytest
from rich.console import Console
from transformers import TrainerControl, TrainerState, TrainingArguments

from expertune.run.progress import BYTES, Bar, Bars, Estimate, in_words
from expertune.train.callbacks import History, ProgressBar


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
    clock.now = 39.0
    assert estimate.seconds == 1.0


def test_estimate_that_is_used_up_before_the_end_says_nothing_rather_than_no_time() -> None:
    clock = Clock()
    estimate = Estimate(256, clock=clock)
    clock.now = 20.0
    estimate.update(128, 256)
    assert estimate.words == "about 20 s left"
    clock.now = 41.0
    assert estimate.words == ""
    estimate.update(256, 256)
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


def test_a_pass_of_minutes_without_a_terminal_is_told_every_ten_seconds_and_later_every_minute() -> None:
    clock, written = Clock(), io.StringIO()
    bars = Bars(Console(file=written, width=200), clock)
    with bars.task("evaluation", "examples") as progress:
        progress(0, 300)
        for second in range(1, 3601):
            clock.now = float(second)
            bars.break_silence()  # as the thread does, each second
    said = written.getvalue().splitlines()
    assert said[:2] == ["evaluation: 0/300 examples, 10 s so far", "evaluation: 0/300 examples, 20 s so far"]
    assert said[-1] == "evaluation: 0/300 examples, 1 h 0 min so far"
    assert len(set(said)) == len(said)
    assert 60 < len(said) < 90


def test_the_thread_breaks_the_silence_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("expertune.run.progress._SECONDS_PER_LINE", 0.2)
    written, before = io.StringIO(), threading.active_count()
    with Bars(Console(file=written, width=200)).task("loading the model"):
        deadline = time.monotonic() + 10
        while not written.getvalue() and time.monotonic() < deadline:
            time.sleep(0.05)
    assert written.getvalue().startswith("loading the model, ")
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() == before


def test_only_the_innermost_speaks_and_not_while_lines_are_printed() -> None:
    clock, written = Clock(), io.StringIO()
    bars = Bars(Console(file=written, width=200), clock)
    with bars.task("step") as steps:
        steps(3, 9)
        with bars.task("evaluation", "examples") as progress:
            clock.now = 9.0
            bars.print("step 3/9  loss 1.0")
            clock.now = 18.0
            progress(1, 4)
            clock.now = 19.0
            progress(2, 4)
    assert written.getvalue().splitlines() == ["step 3/9  loss 1.0", "evaluation: 2/4 examples, about 19 s left"]


def test_bytes_are_told_in_their_unit() -> None:
    clock, written = Clock(), io.StringIO()
    with Bars(Console(file=written, width=200), clock).task("loading", BYTES) as progress:
        clock.now = 20.0
        progress(24_000_000_000, 93_405_585_408)
    assert written.getvalue() == "loading: 24.00 of 93.41 GB, about 58 s left\n"


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_a_bar_keeps_the_step_and_the_time_left_in_any_terminal(width: int) -> None:
    clock, written = Clock(), io.StringIO()
    console = Console(file=written, width=width, force_terminal=True, color_system=None)
    bar = Bar(Bars(console, clock), "step", "", stays=True)
    bar.update(0, 500)
    clock.now = 100.0
    bar.update(10, 500, "loss 1.2345  1,234 tokens/s  memory 12.34 GB  imbalance 1.23")
    bar.close()
    last = re.sub(r"\x1b\[[^a-zA-Z]*[a-zA-Z]|\r", "\n", written.getvalue()).strip().splitlines()[-1]
    assert last.startswith("step 10/500")
    assert last.rstrip().endswith("about 1 h 22 min left")
    assert "\u2026" not in last
    assert ("loss 1.2345" in last) == (width >= 60)
    assert ("memory 12.34 GB" in last) == (width >= 80)
    assert len(last) <= width


@pytest.mark.parametrize(
    ("terminal", "columns", "folds"), [(True, None, True), (False, None, False), (False, "40", True)]
)
def test_lines_break_between_words_where_a_reader_has_fewer_columns_and_paths_stay_whole(
    terminal: bool, columns: str | None, folds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if columns:
        monkeypatch.setenv("COLUMNS", columns)
    written = io.StringIO()
    path = f"runs/{'long-name-' * 5}/lengths.png"
    line = f"data: 5,103 training examples, 0 skipped; lengths in {path}, 1,735 tokens/s  memory 1.19 GB"
    Bars(Console(file=written, width=None if columns else 40, force_terminal=terminal)).print(line)
    shown = written.getvalue().splitlines()
    if not folds:
        assert shown == [line]
        return
    assert len(shown) > 1
    assert all(len(each) <= 40 or each == f"{path}," for each in shown)
    assert " ".join(shown).split() == line.split()


@pytest.mark.parametrize("show", ["print", "print_folded"])
def test_lines_are_no_markup_and_move_no_cursor(show: str) -> None:
    written = io.StringIO()
    bars = Bars(Console(file=written, width=200, force_terminal=True))
    getattr(bars, show)("pip install 'expertune[gguf]' [/x] a[/b] :smile: \x1b[2J 12")
    assert written.getvalue() == "pip install 'expertune[gguf]' [/x] a[/b] :smile: \\x1b[2J 12\n"


def test_what_is_under_way_is_no_markup_and_moves_no_cursor() -> None:
    clock, written = Clock(), io.StringIO()
    with Bars(Console(file=written, width=200), clock).task("reading a[/b]\x1b[2J", "rows") as progress:
        clock.now = 20.0
        progress(1, 2)
    drawn = io.StringIO()
    with Bars(Console(file=drawn, width=200, force_terminal=True)).task("reading a[/b]\x1b[2J", "rows") as progress:
        progress(1, 2)
    assert written.getvalue().startswith("reading a[/b]\\x1b[2J: 1/2 rows")
    assert "reading a[/b]\\x1b[2J" in drawn.getvalue()


def test_step_line_has_the_parts_of_the_loss_that_have_a_series() -> None:
    history, written = History(), io.StringIO()
    parts = {"loss": 0.125, "reward": 0.5, "kl": 0.03, "aux_loss": 1.25, "rewards/slot-f1/mean": 0.5}
    history.series = {name: [[1, 9.0], [2, value]] for name, value in parts.items()}
    bar = ProgressBar(lambda: history, Bars(Console(file=written, width=200)))
    args, state = TrainingArguments("o", disable_tqdm=True, report_to=[], use_cpu=True), TrainerState()
    bar.on_train_begin(args, state, TrainerControl())
    bar.on_log(args, state, TrainerControl(), {"loss": 0.125})
    assert "loss 0.1250" in written.getvalue()
    assert "reward 0.500  KL 0.030  load balancing 1.250" in written.getvalue()
