"""Progress: tokens, items and time, and when a line is printed."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from tq_fast.cli import progress as progress_line
from tq_fast.cli.progress import JobProgress, format_seconds


class Clock:
    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress_line, "time", clock)
    return clock


def lines_of(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def work_of(num_prompts: int) -> dict[int, int]:
    return dict.fromkeys(range(num_prompts), 10)


def test_without_a_terminal_there_is_a_line_now_and_then(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", work_of(4), num_before=1) as progress:
        for _ in range(10):
            clock.now += 2.0
            progress.token(0)
        progress.end(0)
    # After 10 s 5 of 40 tokens are done, after 20 s 10.
    assert lines_of(console) == [
        "1/5 prompts, 0.5 tokens/s, 1:10 left",
        "1/5 prompts, 0.5 tokens/s, 1:00 left",
    ]


def test_a_prompt_that_ends_early_counts_as_all_its_work(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", work_of(2)) as progress:
        clock.now = 20.0
        progress.end(0, is_failed=True)
    assert lines_of(console) == ["1/2 prompts, 20 s left, 1 failed"]


def test_tokens_of_prompts_that_begin_again_count_once(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", work_of(2)) as progress:
        for _ in range(5):
            progress.token(0)
            progress.token(1)
        progress.end(1)
        progress.restart([0, 1])
        clock.now = 20.0
        progress.token(0)
    assert progress.rate == pytest.approx(6 / 20)
    assert lines_of(console) == ["1/2 prompts, 0.3 tokens/s, 16 s left"]


def test_a_terminal_gets_a_bar_with_rate_and_time_left(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with JobProgress(console, "prompts", work_of(2)) as progress:
        clock.now = 5.0
        for _ in range(10):
            progress.token(0)
        progress.end(0)
    assert "1/2 prompts, 2.0 tokens/s, 5 s left" in console.file.getvalue()


def test_items_of_unequal_work_say_what_is_left_by_work_and_to_what_they_belong(
    clock: Clock,
) -> None:
    console = Console(file=io.StringIO())
    work = {("cheap", 0): 1.0, ("cheap", 1): 1.0, ("dear", 0): 4.0, ("dear", 1): 4.0}
    with JobProgress(console, "responses", work, num_before=3) as progress:
        clock.now += 20.0
        progress.end(("cheap", 0), label="s/cheap")
        clock.now += 20.0
        progress.end(("dear", 0), label="s/dear", is_failed=True)
    # After 20 s one of ten parts of the work is done, after 40 s five.
    assert lines_of(console) == [
        "4/7 responses, s/cheap, 3:00 left",
        "5/7 responses, s/dear, 40 s left, 1 failed",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 s"), (59.4, "59 s"), (59.6, "1:00"), (185, "3:05"), (3723, "1:02:03")],
)
def test_times_are_short(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words
