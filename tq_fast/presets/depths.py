"""Tokens of whole responses on a GPU: the models' passes, the draw and its record in one graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from ..config import Role
from ..forest.language import LanguageForest, StateForest
from ..rollouts.graphs import DepthGraphs
from .laws import Output, TokenLaw, record_draw

# What the models give after the last token of each row, from what each forest returned.
Gather = Callable[[Mapping[LanguageForest, torch.Tensor], torch.Tensor | None], dict[Role, Output]]


class TextGraphs(DepthGraphs):
    """The tokens of responses from the second on, drawn from a law.

    Args:
        forests: of the models that the law reads.
        states: the reward model's backbone, where the law reads its states.
        law: what tokens are drawn from.
        gather: puts the results of the forests together for the law.
        eos: int64 `[E]`, ids that end a response.
        num_tokens: of a response, at most.
    """

    def __init__(
        self,
        forests: Sequence[LanguageForest],
        states: StateForest | None,
        law: TokenLaw,
        *,
        gather: Gather,
        eos: torch.Tensor,
        num_tokens: int,
    ) -> None:
        super().__init__(
            [*forests, *([] if states is None else [states])],
            num_tokens=num_tokens,
            columns=law.columns,
            keeps_finished=True,
        )
        self.languages, self.states = forests, states
        self.law, self.gather, self.eos = law, gather, eos

    def advance(self, tokens: torch.Tensor) -> None:
        num = len(tokens)
        # The first token of a response is the first of its branch.
        at = {"depth": self.depth - 1, "tree": self.state.tree[:num]}
        states = None
        if self.states is not None:
            states = self.states.forward_depth(tokens, **at, lengths=self.lengths[-1])
        logits = {
            forest: forest.forward_depth(tokens, **at, lengths=lengths)
            for forest, lengths in zip(self.languages, self.lengths, strict=False)
        }
        draw = self.law.draw(self.gather(logits, states), self.state.keys[:num], self.depth, None)
        record_draw(draw, self.state, self.depth, eos=self.eos)
