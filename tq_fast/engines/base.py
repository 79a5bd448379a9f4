"""What decoding asks of a language model, wherever the model runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch

from ..rollouts.records import ReusedRollout, Rollout, RolloutId, RolloutWave, Root


class Proposal(NamedTuple):
    """The candidates of every tree, by (log-prob descending, id ascending).

    Attributes:
        ids: int64 `[G, k]`.
        logprobs: fp32 `[G, k]`, natural log, over the full vocabulary.
        lse: fp32 `[G]`, log-sum-exp of what the candidates were chosen from; not finite where that
            is no law.
    """

    ids: torch.Tensor
    logprobs: torch.Tensor
    lse: torch.Tensor


class LanguageEngine(Protocol):
    """A language model at work on G texts, the trees, that grow token by token.

    Tensors may be on any device. What the model knows of a text beside its tokens (KV, say) is the
    engine's own business.
    """

    @property
    def num_token_forwards(self) -> int:
        """Tokens that went through the model so far."""
        ...

    @property
    def peak_kv_bytes(self) -> int:
        """Most bytes of KV held so far; 0 where another process holds them."""
        ...

    def encode(self, trees: Sequence[int], texts: Sequence[list[int]], *, shares: bool) -> None:
        """Begin the empty trees `trees` with `texts[tree]`.

        What a text has in common with another tree need not be encoded again where it `shares`.
        """
        ...

    def propose(self, k: int, early: Sequence[bool]) -> Proposal:
        """Return the k likeliest next tokens of every tree; those that are `early` may not end."""
        ...

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        """Return log p `[G, k]` of the next tokens `ids` `[G, k]`, over the full vocabulary."""
        ...

    def law(self) -> torch.Tensor | None:
        """Return log p `[G, V]` of every next token; None where that is not to be had."""
        ...

    def roll_out(
        self,
        roots: Sequence[Root],
        rollout_ids: Sequence[RolloutId],
        reused: Mapping[tuple[int, int], ReusedRollout],
    ) -> RolloutWave:
        """Roll out at `rollout_ids` (ascending); `roots[g]` is of tree g.

        `reused` are starts of greedy roll-outs by candidate `(tree, candidate_idx)`. A candidate
        that ends the response, or has no horizon, gets no roll-out.
        """
        ...

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        """Return the sum of log p of the tokens of each roll-out, after tree and candidate."""
        ...

    def commit(
        self, chosen: Sequence[tuple[int, int]], tokens: Sequence[int], waves: Sequence[RolloutWave]
    ) -> None:
        """Append `tokens[i]` to the tree of `chosen[i]`, a candidate `(tree, candidate_idx)`.

        `waves` are those that this engine rolled out for the same candidates, if it did.
        """
        ...

    def reusable(self, wave: RolloutWave, rollout: Rollout) -> ReusedRollout | None:
        """Return what of a greedy roll-out serves the step after its candidate is chosen.

        It is asked before `commit`.
        """
        ...

    def clear(self, tree: int) -> None:
        """Empty `tree`."""
        ...

    def drop_tree(self, tree: int) -> None:
        """Take `tree` out; the last tree takes over its place."""
        ...
