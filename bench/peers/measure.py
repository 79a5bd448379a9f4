"""Both sides of a case, in turns."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable
from typing import Any

from bench.peers import checks
from bench.peers.cases import (
    ALPHA,
    HORIZON,
    SAMPLED_TOKENS,
    Case,
    K,
    prompt_of,
)
from bench.peers.serving import DecodeSettings
from bench.peers.workers import Worker

SIDES = ("tq_fast", "vLLM")
# The first steps of a decode encode the prompts and warm the passes of every shape.
WARM_STEPS = 2
# Phases of tq_fast by the name that they have beside those of vLLM.
PHASES = {"rollout": "roll-outs"}


@dataclasses.dataclass
class Row:
    """What was measured of a case.

    Attributes:
        case: the case.
        seconds: seconds a step (of all prompts), an encoding or a draw, by side and turn.
        tokens: tokens that one such time stands for.
        agreement: what was found equal before.
        phases: seconds a step by phase, by side; empty where there is one phase only.
    """

    case: Case
    seconds: dict[str, list[float]]
    tokens: int
    agreement: str
    phases: dict[str, dict[str, float]] = dataclasses.field(default_factory=dict)

    def rate(self, side: str) -> float:
        """The tokens a second of the median turn."""
        return self.tokens / statistics.median(self.seconds[side])

    @property
    def ratio(self) -> float:
        """How many times as fast as vLLM ours is, by the medians."""
        return self.rate("tq_fast") / self.rate("vLLM")

    @property
    def best_ratio(self) -> float:
        """The ratio of the fastest turns, which other work on the machine changes least."""
        return min(self.seconds["vLLM"]) / min(self.seconds["tq_fast"])

    @property
    def spread(self) -> tuple[float, float]:
        """The least and the greatest ratio of one turn."""
        pairs = zip(self.seconds["tq_fast"], self.seconds["vLLM"], strict=True)
        ratios = [theirs / ours for ours, theirs in pairs]
        return min(ratios), max(ratios)


def measure(workers: dict[str, Worker], case: Case, *, turns: int, steps: int) -> Row:
    """Time one case on both sides in turns.

    Args:
        workers: by side.
        case: of the dtype that the workers have.
        turns: of each side.
        steps: of a turn of a decode, whose median is taken.

    Raises:
        Disagreement: the sides do not compute the same; nothing is to be reported then.
        WorkerFailed: a side failed.
    """
    if case.kind == "transfer":
        return _measure_transfer(workers, case, turns=turns, steps=steps)
    if case.kind == "encode":
        return _measure_encode(workers, case, turns=turns)
    return _measure_sample(workers, case, turns=turns)


def _measure_transfer(workers: dict[str, Worker], case: Case, *, turns: int, steps: int) -> Row:
    prompts = [prompt_of(case.prompt_len, idx) for idx in range(case.number)]
    max_steps = WARM_STEPS + turns * steps
    settings = DecodeSettings(K, HORIZON, ALPHA, WARM_STEPS, max_steps)
    for worker in workers.values():
        worker.call("begin", prompts=prompts, settings=dataclasses.asdict(settings))
    found = _in_turns(workers, turns, lambda worker, turn: worker.call("decode", num_steps=steps))
    records = [workers[side].call("end")["steps"] for side in SIDES]
    agreement = checks.check_transfer(*records, dtype=case.dtype)
    phases = {}
    for side, answers in found.items():
        names = {name: None for answer in answers for name in answer["phases"]}
        phases[side] = {
            PHASES.get(name, name): statistics.median(
                answer["phases"].get(name, 0.0) / steps for answer in answers
            )
            for name in names
        }
    seconds = {
        side: [statistics.median(answer["seconds"]) for answer in answers]
        for side, answers in found.items()
    }
    return Row(case, seconds, case.number, agreement, phases)


def _measure_encode(workers: dict[str, Worker], case: Case, *, turns: int) -> Row:
    def encode(worker: Worker, turn: int) -> dict[str, Any]:
        return worker.call("encode", prompt=prompt_of(case.prompt_len, "turn", turn))

    found = _in_turns(workers, turns, encode, warm=True)
    tokens = [[answer["next_token"] for answer in found[side]] for side in SIDES]
    said = checks.check_next_tokens(*tokens, dtype=case.dtype)
    return Row(case, _seconds(found), case.prompt_len, said)


def _measure_sample(workers: dict[str, Worker], case: Case, *, turns: int) -> Row:
    number, length = case.number, SAMPLED_TOKENS

    def sample(worker: Worker, turn: int) -> dict[str, Any]:
        prompt = prompt_of(case.prompt_len, number, "turn", turn)
        return worker.call("sample", prompt=prompt, number=number, num_tokens=length)

    found = _in_turns(workers, turns, sample, warm=True)
    for answers in found.values():
        for answer in answers:
            checks.check_lengths(answer["lengths"], number=number, length=length)
    said = f"{number} responses of {length} tokens each"
    return Row(case, _seconds(found), number * length, said)


def _in_turns(
    workers: dict[str, Worker],
    turns: int,
    call: Callable[[Worker, int], dict[str, Any]],
    *,
    warm: bool = False,
) -> dict[str, list[dict[str, Any]]]:
    """Return the answers of `call(worker, turn)` by side; `warm`: after one that is left out."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for turn in range(-1 if warm else 0, turns):
        # The side that begins changes, so that what slows the machine down slows both.
        for side in SIDES if turn % 2 else SIDES[::-1]:
            answer = call(workers[side], turn)
            if turn >= 0:
                found[side].append(answer)
    return found


def _seconds(found: dict[str, list[dict[str, Any]]]) -> dict[str, list[float]]:
    return {side: [answer["seconds"] for answer in answers] for side, answers in found.items()}
