"""What speculative roll-outs could win on the embedded models, at best.

    python -m bench.speculation

A draft for a roll-out's next token comes from the roll-outs of the step before: what followed the
same last tokens there. A pass would verify a few drafts a row, up to the first that is wrong: a
draft is right if the token that the roll-out's own random number draws is the same, so nothing
changes but the number of passes. The bench decodes, replays every roll-out with the drafts that it
would have had, and counts passes (a pass goes on until its slowest row is done); then it times
passes of one token a row and of one more than there are drafts.
Speculation wins where `passes x cost` is below 1. Drafting itself is taken to cost nothing.
"""

from __future__ import annotations

import statistics
import time
import warnings
from collections import defaultdict
from collections.abc import Sequence

import torch

import tq_fast
from tq_fast.forest.language import LanguageForest
from tq_fast.models.loading import load_language_model
from tq_fast.models.tiny import load_tiny_world
from tq_fast.transfer import step as decode_step

_HORIZON = 20
_CONTEXT = 2
# Roll-outs of one step: (tree, candidate, tokens).
Step = list[tuple[int, int, list[int]]]


def record_steps(num_prompts: int, rollout: str, num_rollouts: int) -> list[Step]:
    """Decode, and return what every step rolled out."""
    world = load_tiny_world()
    steps: list[Step] = []
    run = decode_step.run_rollouts

    def record(*args: object, **kwargs: object) -> object:
        rollouts = run(*args, **kwargs)
        steps.append([(b.id.tree, b.candidate, b.tokens) for b in rollouts.rollouts])
        return rollouts

    decode_step.run_rollouts = record
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tq_fast.decode(
                list(world.prompts[:num_prompts]),
                world.baseline,
                world.reward,
                sft=world.sft,
                k=10,
                horizon=_HORIZON,
                rollout=rollout,
                num_rollouts=num_rollouts,
                max_new_tokens=24,
                # Greedy roll-outs that are reused would not be replayed in full.
                speed=tq_fast.speed.SpeedOptions(reuse_greedy=False, refill_slots=False),
            )
    finally:
        decode_step.run_rollouts = run
    return steps


def drafts_from(step: Step) -> dict[tuple[int, ...], int]:
    """What followed the last `_CONTEXT` tokens or fewer: by (tree, *tokens)."""
    drafts: dict[tuple[int, ...], int] = {}
    for tree, candidate, tokens in step:
        text = [candidate, *tokens]
        for length in range(1, _CONTEXT + 1):
            for end in range(length, len(text)):
                drafts[(tree, *text[end - length : end])] = text[end]
    return drafts


def is_right(drafts: dict[tuple[int, ...], int], tree: int, text: Sequence[int], at: int) -> bool:
    """Whether the draft for `text[at]` is that token: what followed most of what stands before."""
    contexts = [(tree, *text[at - n : at]) for n in range(_CONTEXT, 0, -1)]
    return text[at] == next((drafts[c] for c in contexts if c in drafts), None)


def replay(steps: Sequence[Step], num_drafts: int) -> tuple[float, float]:
    """Share of first drafts that are right, and of the passes that are left."""
    right = tried = passes = plain = 0
    drafts: dict[tuple[int, ...], int] = {}
    for step in steps:
        needed: defaultdict[int, int] = defaultdict(int)
        for number, (tree, candidate, tokens) in enumerate(step):
            text, known = [candidate, *tokens], 1
            while known < len(text):
                needed[number] += 1
                accepted = 0
                most = min(num_drafts, len(text) - known)
                while accepted < most and is_right(drafts, tree, text, known + accepted):
                    accepted += 1
                tried += 1
                right += accepted > 0
                known += 1 + accepted
        plain += max(len(tokens) for _, _, tokens in step)
        passes += max(needed.values(), default=0)
        drafts = drafts_from(step)
    return right / tried, passes / plain


def cost_of(num_tokens: int, num_rows: int) -> float:
    """Time of a pass with so many tokens a row over that of one with one."""
    world = load_tiny_world()
    model = load_language_model(
        world.baseline, "baseline", device=torch.device("cpu"), dtype="auto"
    )
    forest = LanguageForest(
        model,
        num_trees=1,
        num_rows=num_rows,
        prefix_capacity=40,
        branch_capacity=_HORIZON,
        backend=None,
    )
    forest.prefill(0, list(range(1, 30)))
    tokens = torch.randint(1, 100, (num_rows, num_tokens))
    tree = torch.zeros(num_rows, dtype=torch.int64)
    seconds: dict[int, list[float]] = {1: [], num_tokens: []}
    for _ in range(40):
        for count in seconds:
            start = time.perf_counter()
            forest.run_branches(model, tokens[:, :count], start=8, tree=tree)
            seconds[count].append(time.perf_counter() - start)
    return statistics.median(seconds[num_tokens]) / statistics.median(seconds[1])


@torch.no_grad()
def main() -> None:
    """Print acceptance, passes, cost, and their product."""
    torch.set_num_threads(1)
    print("prompts  roll-outs  drafts   first right   passes   cost of a pass   passes x cost")
    for num_prompts, rollout, num in ((1, "greedy", 1), (8, "greedy", 1), (8, "sample", 4)):
        steps = record_steps(num_prompts, rollout, num)
        for num_drafts in (1, 2, 4):
            right, passes = replay(steps, num_drafts)
            cost = cost_of(num_drafts + 1, 10 * num * num_prompts)
            print(
                f"{num_prompts:7}  {num:2} {rollout:6}{num_drafts:8}{100 * right:12.0f} %"
                f"{passes:9.2f}{cost:17.2f}{passes * cost:16.2f}"
            )


if __name__ == "__main__":
    main()
