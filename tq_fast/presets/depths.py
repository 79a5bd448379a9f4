"""Tokens of whole responses on a GPU: the models' passes, the draw and its record in one graph."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ..config import Role
from ..forest.language import LanguageForest, StateForest
from ..rollouts.graphs import DepthGraphs
from ..transfer.roles import distinct
from .laws import Output, TokenLaw, record_draw


def gather(
    forests: Mapping[Role, LanguageForest],
    logits: Mapping[LanguageForest, torch.Tensor],
    states: torch.Tensor | None,
) -> dict[Role, Output]:
    """What the models give after a pass.

    Args:
        forests: by role.
        logits: what each forest returned, `[n, V]`.
        states: the reward model's `[n, D]`, where they are read.
    """
    found = {}
    for forest, of_forest in logits.items():
        hidden = None if forest.hidden is None else forest.hidden[:, -1]
        found[forest] = Output(of_forest, beside(hidden, states))
    return {role: found[forest] for role, forest in forests.items()}


def beside(hidden: torch.Tensor | None, states: torch.Tensor | None) -> torch.Tensor | None:
    """The prior's states with the reward model's behind them, where both are read."""
    if hidden is None or states is None:
        return hidden
    return torch.cat([hidden.float(), states.float().to(hidden.device)], 1)


class TextGraphs(DepthGraphs):
    """The tokens of responses from the second on, drawn from a law.

    Args:
        forests: of the models that the law reads, by role.
        states: the reward model's backbone, where the law reads its states.
        law: what tokens are drawn from.
        eos: int64 `[E]`, ids that end a response.
        num_tokens: of a response, at most.
    """

    def __init__(
        self,
        forests: Mapping[Role, LanguageForest],
        states: StateForest | None,
        law: TokenLaw,
        *,
        eos: torch.Tensor,
        num_tokens: int,
    ) -> None:
        languages = list(distinct(forests).values())
        super().__init__(
            [*languages, *([] if states is None else [states])],
            num_tokens=num_tokens,
            columns=law.columns,
            keeps_finished=True,
        )
        # Which of the forests has which role; the last one may be that of the states.
        self.places = {role: languages.index(forest) for role, forest in forests.items()}
        self.num_languages = len(languages)
        self.law, self.eos = law, eos

    def advance(self, tokens: torch.Tensor) -> None:
        num = len(tokens)
        # The first token of a response is the first of its branch.
        at = {"depth": self.depth - 1, "tree": self.state.tree[:num]}
        forests = self.forests
        found = [
            forest.forward_depth(tokens, **at, lengths=lengths)
            for forest, lengths in zip(forests, self.lengths, strict=True)
        ]
        states = found.pop() if len(found) > self.num_languages else None
        by_role = {role: forests[place] for role, place in self.places.items()}
        outputs = gather(by_role, dict(zip(forests, found, strict=False)), states)
        draw = self.law.draw(outputs, self.state.keys[:num], self.depth, None)
        record_draw(draw, self.state, self.depth, eos=self.eos)
