"""What is rolled out, and what came of it: the k x n branches of every tree."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ..config import DecodeConfig
from ..forest import SavedTokens
from ..ops.philox import philox4x32


@dataclasses.dataclass(frozen=True, order=True)
class Place:
    """Where a roll-out belongs.

    Attributes:
        tree: the tree (slot of the forest).
        candidate_idx: which of the tree's k candidates it starts with.
        number: which of the candidate's n roll-outs it is.
    """

    tree: int
    candidate_idx: int
    number: int

    @property
    def candidate(self) -> tuple[int, int]:
        """The candidate `(tree, candidate_idx)`."""
        return self.tree, self.candidate_idx


@dataclasses.dataclass(frozen=True)
class Branch:
    """One roll-out of one candidate: its place, and what came of it.

    Attributes:
        place: where it belongs.
        candidate: the candidate's token id.
        tokens: token ids after the candidate, at most the horizon; an EOS is the last.
        logprob: sum of log pi_BL of the tokens that were drawn at this step, natural log.
        proposal_logprob: sum of the log density that they were really drawn from.
    """

    place: Place
    candidate: int
    tokens: list[int]
    logprob: float = 0.0
    proposal_logprob: float = 0.0


@dataclasses.dataclass(frozen=True)
class Head:
    """What a tree's roll-outs start from, at one step.

    Attributes:
        candidates: k token ids.
        key: of the prompt's random stream.
        step: response tokens emitted so far.
        horizon: tokens after the candidate, at most.
    """

    candidates: Sequence[int]
    key: int
    step: int
    horizon: int

    def num_rollouts(self, eos: tuple[int, ...], config: DecodeConfig) -> list[int]:
        """Texts to score for each candidate: one where there is nothing to roll out."""
        num = config.rollouts_per_candidate if self.horizon else 1
        return [1 if token in eos else num for token in self.candidates]


@dataclasses.dataclass(frozen=True)
class KnownRollout:
    """A greedy roll-out of which the start is known: that of the arg-max child of a chosen token.

    Attributes:
        candidate: token id of the child.
        tokens: what follows it, as far as known.
        is_finished: whether it ends there with an EOS.
        saved: KV of all of `tokens` but the last, `[1, H_kv, len - 1, d]` a layer.
    """

    candidate: int
    tokens: list[int]
    is_finished: bool
    saved: SavedTokens | None


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """What one call of `run_rollouts` did.

    Attributes:
        branches: one for each place, in the same order.
        first_row: the candidate `(tree, candidate_idx)` is this row of `first_logits` and `saved`.
        first_logits: logits `[C, V]` after each candidate that ran.
        saved: KV of these candidates.
        row_of: row of the cache in which the roll-out of a place ended; empty where that was not
            kept track of.
        num_steps: forward passes that were run.
    """

    branches: list[Branch]
    first_row: Mapping[tuple[int, int], int]
    first_logits: torch.Tensor | None
    saved: SavedTokens | None
    row_of: Mapping[Place, int]
    num_steps: int


def stream_keys(places: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
    """Return the key `[N]` (int64) of a random stream for each `(prompt key, step, token, number)`.

    A stream depends on these alone, never on where in the forest a prompt or a roll-out happens to
    stand.
    """
    prompt, step, token, number = torch.tensor(places, dtype=torch.int64).reshape(-1, 4).unbind(1)
    counter = (token, step, number, torch.zeros_like(step))
    words = philox4x32(counter, (prompt & 0xFFFFFFFF, (prompt >> 32) & 0xFFFFFFFF))
    return words[0] | (words[1] << 32)
