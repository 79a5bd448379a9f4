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


def draw(progress: JobProgress[int], clock: Clock, keys: list[int], seconds: float) -> None:
    """A step that takes `seconds` and draws a token of each of `keys`."""
    clock.now += seconds
    progress.step()
    for key in keys:
        progress.work(1)
        progress.token(key)


def test_without_a_terminal_there_is_a_line_now_and_then(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", work_of(4), num_before=1) as progress:
        for _ in range(10):
            draw(progress, clock, [0], 2.0)
        progress.end(0)
    # The first step ends after 2 s. When the last one to be timed ends, after 10 and 20 s, one
    # token was drawn in two seconds; 5 of 40 are done then, and 10.
    assert lines_of(console) == [
        "1/5 prompts, 0.4 tokens/s, 180 prompts/h, 1 min 10 s left",
        "1/5 prompts, 0.5 tokens/s, 180 prompts/h, 1 min left",
    ]


def test_lines_get_rare_in_a_long_job(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", {0: 40_000}) as progress:
        for _ in range(10_000):
            draw(progress, clock, [0], 1.0)
    assert 50 < len(lines_of(console)) < 120


def test_a_prompt_that_ends_early_counts_as_all_its_work(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", work_of(2)) as progress:
        clock.now = 20.0
        progress.end(0)
    assert lines_of(console) == ["1/2 prompts, 180 prompts/h, 20 s left"]


def test_prompts_that_fail_say_nothing_of_the_time_that_others_take(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", work_of(10), announces=True) as progress:
        clock.now = 0.01
        # They cannot be read, which is known before the first step.
        for key in range(4):
            progress.end(key, is_failed=True)
        assert lines_of(console) == []
        for _ in range(12):
            draw(progress, clock, [9], 1.0)
    said, later = lines_of(console)
    # Six prompts of ten tokens are left, of which one is drawn in a second.
    assert said.startswith("360 prompts an hour: at most about 1 min for 6 prompts; the first step")
    assert later == "4/10 prompts, 0.9 tokens/s, 360 prompts/h, 50 s left, 4 failed"


def test_a_prompt_that_fails_midway_is_no_work_that_was_done(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", work_of(3)) as progress:
        for _ in range(8):
            draw(progress, clock, [0], 1.0)
        progress.end(0, is_failed=True)
        clock.now = 20.0
        progress.end(1)
    assert lines_of(console) == ["2/3 prompts, 0.4 tokens/s, 180 prompts/h, 20 s left, 1 failed"]


def test_tokens_of_prompts_that_begin_again_count_once(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", work_of(2)) as progress:
        for _ in range(5):
            draw(progress, clock, [0, 1], 0.0)
        progress.work(5)
        progress.end(1)
        progress.restart([0, 1])
        for now in (10.0, 20.0):
            draw(progress, clock, [0], now - clock.now)
    assert progress.rate == pytest.approx(7 / 20)
    # Ten of twenty tokens belong to the prompt that is done, and one was drawn in ten seconds.
    assert lines_of(console)[-1] == "1/2 prompts, 0.3 tokens/s, 36 prompts/h, 1 min 20 s left"


def test_a_terminal_gets_a_bar_with_rate_and_time_left(clock: Clock) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=80, color_system=None)
    with JobProgress(console, "prompts", work_of(2)) as progress:
        for _ in range(10):
            draw(progress, clock, [0], 0.6)
        progress.end(0)
    assert "1/2 prompts, 1.7 tokens/s, 600 prompts/h, 6 s left" in console.file.getvalue()


def test_what_all_takes_is_said_once_without_the_time_before_the_first_step(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(
        console, "prompts", dict.fromkeys(range(200), 128), announces=True
    ) as progress:
        draw(progress, clock, list(range(8)), 90.0)
        for _ in range(20):
            draw(progress, clock, list(range(8)), 3.5)
    (said,) = [line for line in lines_of(console) if "an hour" in line]
    # 200 x 128 tokens, eight in 3.5 seconds.
    assert said == (
        "64 prompts an hour: at most about 3 h 7 min for 200 prompts; the first step, with "
        "prompts and warm-up, took 1 min 30 s"
    )


def test_nothing_is_said_of_the_time_before_steps_were_measured_for_a_while(clock: Clock) -> None:
    console = Console(file=io.StringIO())
    with JobProgress(console, "prompts", work_of(8), announces=True) as progress:
        clock.now = 60.0
        for _ in range(5):
            draw(progress, clock, [0], 1.0)
        assert lines_of(console) == ["0/8 prompts"]
        clock.now += 10.0
        draw(progress, clock, [0], 0.0)
    first, said, second = lines_of(console)
    assert "left" not in first and "an hour" in said and "left" in second


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
    # After 20 s one of ten parts of the work is done. After 40 s four of them are no work any more.
    assert lines_of(console) == [
        "4/7 responses, s/cheap, 72 responses/h, 3 min left",
        "5/7 responses, s/dear, 45 responses/h, 3 min 20 s left, 1 failed",
    ]


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        *[(0.4, "0 s"), (59.4, "59 s"), (59.6, "1 min"), (185, "3 min 5 s")],
        *[(3599.6, "1 h"), (3723, "1 h 2 min"), (11_520, "3 h 12 min")],
    ],
)
def test_times_are_short(seconds: float, words: str) -> None:
    assert format_seconds(seconds) == words
