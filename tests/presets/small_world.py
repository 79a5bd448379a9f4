"""The laws of contests between texts, written down over a language of five tokens.

Both continuations of every contest are enumerated, with the weights by which the reward chooses
among them and, where it takes part, the text that was there. Nothing of the package is used.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

Text = tuple[int, ...]
Law = Mapping[Text, float]
Worth = Callable[[Sequence[int]], float]


class Contest(NamedTuple):
    """The law of the texts after a contest, and what its certificate must pay for it.

    Attributes:
        law: of the texts.
        stays: probability that a text which was challenged stayed.
        held: probability that there was a contest.
        choice_kl: mean divergence of choosing among the new texts, nats.
    """

    law: dict[Text, float]
    stays: float
    held: float
    choice_kl: float


def conditional(law: Law, before: Text, limit: int | None = None) -> dict[Text, float]:
    """The law of what follows `before`, `before` itself included, cut after `limit` tokens."""
    end = None if limit is None else len(before) + limit
    total = sum(mass for text, mass in law.items() if text[: len(before)] == before)
    found: dict[Text, float] = defaultdict(float)
    for text, mass in law.items():
        if text[: len(before)] == before:
            found[text[:end]] += mass / total
    return found


def hold_contest(
    texts: Law,
    source: Law,
    cut: Callable[[Text], int | None],
    worth: Worth,
    *,
    alpha: float | None,
    defends: bool,
    limit: int | None = None,
    kept: int | None = None,
) -> Contest:
    """Let two continuations of each text compete, by arg max, or by a softmax at `alpha`."""
    law: dict[Text, float] = defaultdict(float)
    stays = held = choice_kl = 0.0
    for text, mass in texts.items():
        place = cut(text)
        if place is None:
            law[text] += mass
            continue
        held += mass
        before = text[:place]
        follow = conditional(source, before, limit).items()
        for one, mass_one in follow:
            for two, mass_two in follow:
                both = mass * mass_one * mass_two
                rewards = [worth(one), worth(two)]
                shares = _shares([worth(text), *rewards] if defends else rewards, alpha)
                if defends:
                    law[text] += both * shares[0]
                    stays += both * shares[0]
                    shares = shares[1:]
                end = None if kept is None else place + kept
                for winner, share in zip((one, two), shares, strict=True):
                    law[winner[:end]] += both * share
                choice_kl += both * sum(shares) * _choice_kl(rewards, alpha)
    return Contest(dict(law), stays, held, choice_kl)


def _shares(rewards: Sequence[float], alpha: float | None) -> list[float]:
    if alpha is None:
        best = list(rewards).index(max(rewards))
        return [float(i == best) for i in range(len(rewards))]
    weights = [math.exp((reward - max(rewards)) / alpha) for reward in rewards]
    return [weight / sum(weights) for weight in weights]


def _choice_kl(rewards: Sequence[float], alpha: float | None) -> float:
    if alpha is None:
        return math.log(2) - 1 / 2
    return sum(w * math.log(2 * w) for w in _shares(rewards, alpha) if w > 0)


def divergence(law: Law, other: Law) -> float:
    """KL(law || other) in nats."""
    return sum(mass * math.log(mass / other[text]) for text, mass in law.items() if mass > 0)


def entropy(chance: float) -> float:
    """The entropy of a coin, nats."""
    return -sum(p * math.log(p) for p in (chance, 1 - chance) if p > 0)
