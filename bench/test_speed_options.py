"""Each speed option alone: decodes with it and without it in turns, also where it cannot help.

Ratios are of medians: above 1, the option wins. No option but `reuse_greedy` and `cpu_layers` finds
work in one greedy roll-out a candidate of a model without an end of sequence: there the others
cannot help.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from pytest_benchmark.fixture import BenchmarkFixture
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

import tq_fast
from bench.decode_models import prompt_of, random_duo
from tq_fast.config import SpeedOptions
from tq_fast.models.tiny import load_tiny_world

ROUNDS = 3
NONE = SpeedOptions(**{field.name: False for field in dataclasses.fields(SpeedOptions)})
# The embedded models sample roll-outs to the end, all prompts together.
SAMPLED = {"k": 10, "num_rollouts": 4, "horizon": None, "max_new_tokens": 24, "alpha": 1.0}
GREEDY = {"k": 10, "horizon": 20, "rollout": "greedy", "strategy": "greedy", "eos_token_id": ()}


@dataclasses.dataclass(frozen=True)
class Case:
    """Speed options where they have work: on the embedded models, or the random ones of 134 M."""

    option: tuple[str, ...]
    embedded: bool
    options: dict[str, Any]
    num_prompts: int = 8


CASES = {
    "merge_equal": Case(("merge_equal",), True, SAMPLED),
    "score_once": Case(("score_once",), True, SAMPLED),
    "lazy_argmax": Case(("lazy_argmax",), True, SAMPLED),
    "lazy_argmax and merge_equal": Case(("lazy_argmax", "merge_equal"), True, SAMPLED),
    "refill_slots": Case(
        ("refill_slots",), True, {**SAMPLED, "horizon": 6, "max_new_tokens": 48}, 24
    ),
    "reuse_greedy": Case(("reuse_greedy",), False, {**GREEDY, "max_new_tokens": 4}, 1),
    "share_prefixes": Case(("share_prefixes",), False, {**GREEDY, "max_new_tokens": 1}, 4),
    "cpu_layers": Case(("cpu_layers",), False, {**GREEDY, "max_new_tokens": 4}, 1),
}


class Embedded:
    """The embedded trio, loaded once."""

    def __init__(self) -> None:
        transformers.logging.disable_progress_bar()
        world = load_tiny_world()
        self.prompts = list(world.prompts)
        self.models = {
            "baseline": AutoModelForCausalLM.from_pretrained(world.baseline).eval(),
            "sft": AutoModelForCausalLM.from_pretrained(world.sft).eval(),
            "reward": AutoModelForSequenceClassification.from_pretrained(world.reward).eval(),
            "tokenizer": AutoTokenizer.from_pretrained(world.baseline),
            "reward_tokenizer": AutoTokenizer.from_pretrained(world.reward),
            # The embedded reward stays within 3.3 of 0 on what its models write.
            "reward_bounds": (-4.0, 4.0),
        }

    def decode(self, speed: SpeedOptions, num_prompts: int, **options: Any) -> tq_fast.DecodeResult:
        decoder = tq_fast.TransferDecoder(**self.models, speed=speed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return decoder.decode(self.prompts[:num_prompts], **options)


class Random:
    """The random-weight models of 134 M parameters, and prompts that have 192 tokens in common."""

    def __init__(self) -> None:
        self.duo = random_duo()

    def decode(self, speed: SpeedOptions, num_prompts: int, **options: Any) -> tq_fast.DecodeResult:
        common = prompt_of(192)
        prompts = [torch.cat([common, prompt_of(16 + i)]) for i in range(num_prompts)]
        decoder = tq_fast.TransferDecoder(self.duo.baseline, self.duo.reward, speed=speed)
        return decoder.decode(prompts, **options)


@pytest.fixture(scope="module")
def embedded() -> Embedded:
    return Embedded()


@pytest.fixture(scope="module")
def random_models() -> Random:
    return Random()


def alternate(
    benchmark: BenchmarkFixture,
    run: Callable[[SpeedOptions], tq_fast.DecodeResult],
    off: SpeedOptions,
    on: SpeedOptions,
) -> tuple[float, float, tq_fast.DecodeResult, tq_fast.DecodeResult]:
    """Time `run` with `off` and with `on` in turns; check that the tokens are the same."""
    seconds: dict[SpeedOptions, list[float]] = {off: [], on: []}
    results: dict[SpeedOptions, tq_fast.DecodeResult] = {}
    run(on)

    def both() -> None:
        for which in (off, on):
            start = time.perf_counter()
            results[which] = run(which)
            seconds[which].append(time.perf_counter() - start)

    benchmark.pedantic(both, rounds=ROUNDS)
    for ours, plain in zip(results[on].sequences, results[off].sequences, strict=True):
        assert torch.equal(ours, plain)
    medians = [statistics.median(seconds[which]) for which in (off, on)]
    return medians[0], medians[1], results[off], results[on]


@pytest.mark.parametrize("name", CASES)
def test_speed_option(
    benchmark: BenchmarkFixture,
    figure: Callable[[str], None],
    embedded: Embedded,
    random_models: Random,
    name: str,
) -> None:
    benchmark.group = f"option: {name}"
    case = CASES[name]
    models = embedded if case.embedded else random_models
    speed = dataclasses.replace(NONE, **dict.fromkeys(case.option, True))
    before = torch.get_num_threads()
    torch.set_num_threads(1 if case.embedded else before)
    try:
        without, ours, plain, result = alternate(
            benchmark,
            lambda which: models.decode(which, case.num_prompts, **case.options),
            NONE,
            speed,
        )
    finally:
        torch.set_num_threads(before)
    forwards = {
        role: result.stats.token_forwards[role] / plain.stats.token_forwards[role]
        for role in ("baseline", "reward")
    }
    benchmark.extra_info.update(option=name, ratio=without / ours, forwards=forwards)
    figure(
        f"{name}: {without / ours:.2f}x ({1e3 * without:.0f} ms without, {1e3 * ours:.0f} ms with),"
        f" token-forwards of the baseline {forwards['baseline']:.2f}x, of the reward "
        f"{forwards['reward']:.2f}x"
    )


@pytest.mark.parametrize(
    "name", [field.name for field in dataclasses.fields(SpeedOptions) if field.name != "cpu_layers"]
)
def test_speed_option_that_cannot_help(
    benchmark: BenchmarkFixture, figure: Callable[[str], None], random_models: Random, name: str
) -> None:
    benchmark.group = "speed that cannot help"
    options = {**GREEDY, "max_new_tokens": 2}
    if name == "reuse_greedy":
        # A horizon of one leaves nothing to reuse.
        options["horizon"] = 1
    speed = dataclasses.replace(NONE, cpu_layers=True)
    without, ours, _, _ = alternate(
        benchmark,
        lambda which: random_models.decode(which, 1, **options),
        speed,
        dataclasses.replace(speed, **{name: True}),
    )
    benchmark.extra_info.update(option=name, ratio=without / ours, cannot_help=True)
    figure(f"{name} where it cannot help: {without / ours:.3f}x")
