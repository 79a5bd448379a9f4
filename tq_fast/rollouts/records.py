"""The records of roll-outs: their places, their starts and their outcomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import torch

from ..config import DecodeConfig
from ..forest import SavedTokens


@dataclasses.dataclass(frozen=True, order=True)
class RolloutId:
    """Where a roll-out belongs.

    Attributes:
        tree: the tree (one prompt of the forest).
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
class Rollout:
    """One roll-out of one candidate.

    Attributes:
        id: where it belongs.
        candidate: the candidate's token id.
        tokens: token ids after the candidate, at most the horizon; an EOS is the last.
        logprob: sum of log pi_BL of the tokens that were drawn at this step, natural log.
        proposal_logprob: sum of the log density that they were really drawn from.
    """

    id: RolloutId
    candidate: int
    tokens: list[int]
    logprob: float = 0.0
    proposal_logprob: float = 0.0


@dataclasses.dataclass(frozen=True)
class Root:
    """The start of a tree's roll-outs at one step.

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
class ReusedRollout:
    """The start of a greedy roll-out that the step before has run already.

    The greedy roll-out of the chosen token continues with its arg-max child. The tokens after this
    child are the child's own greedy roll-out, and the child is a candidate of the next step.

    Attributes:
        candidate: token id of the child.
        tokens: the tokens after it, as far as they were run.
        is_finished: whether it ends there with an EOS.
        saved: KV of all of `tokens` but the last, `[1, H_kv, len - 1, d]` a layer.
    """

    candidate: int
    tokens: list[int]
    is_finished: bool
    saved: SavedTokens | None


@dataclasses.dataclass(frozen=True)
class RolloutWave:
    """The work of one call of `run_rollouts`.

    Attributes:
        rollouts: one for each id, in the same order.
        first_row: the candidate `(tree, candidate_idx)` is this row of `first_logits` and `saved`.
        first_logits: logits `[C, V]` after each candidate that ran.
        saved: KV of these candidates.
        row_of: row of the cache in which a roll-out ended; empty where nobody kept track of rows.
        num_steps: forward passes that were run.
    """

    rollouts: list[Rollout]
    first_row: Mapping[tuple[int, int], int]
    first_logits: torch.Tensor | None
    saved: SavedTokens | None
    row_of: Mapping[RolloutId, int]
    num_steps: int
