"""What a job is going to take, as far as that is known before it begins."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence

from ..presets.call import OpenMethod
from ..presets.cost import MethodCost, draws_texts
from ..prompts import Prompt


@dataclasses.dataclass(frozen=True)
class Forecast:
    """The work of the prompts that are to be decoded.

    Attributes:
        num_prompts: prompts that the models can read.
        shortest: tokens of the shortest of them; 0 where there are none.
        longest: tokens of the longest of them; 0 where there are none.
        token_forwards: tokens that go through each model, by role.
        is_bound: whether these numbers are bounds, or estimates.
        tokens_per_prompt: tokens that are drawn for a prompt, at most, as progress counts them.
        scores_texts: whether whole texts or blocks are drawn, and scored once they are.
    """

    num_prompts: int
    shortest: int
    longest: int
    token_forwards: Mapping[str, int]
    is_bound: bool
    tokens_per_prompt: int
    scores_texts: bool


def forecast(opened: OpenMethod, prompts: Sequence[Prompt]) -> Forecast:
    """Return what `opened` takes for `prompts`; nothing is decoded."""
    method = opened.method
    cost, num = MethodCost(method), method.config.num_return_sequences
    counts: Counter[str] = Counter()
    for prompt in prompts:
        counts += cost.of_prompt(prompt)
    lengths = [len(prompt.token_ids) for prompt in prompts] or [0]
    return Forecast(
        num_prompts=len(prompts),
        shortest=min(lengths),
        longest=max(lengths),
        token_forwards={role: num * count for role, count in counts.items()},
        is_bound=cost.is_bound,
        tokens_per_prompt=num * method.tokens_per_prompt,
        scores_texts=draws_texts(method) and "reward" in opened.session.rewards,
    )
