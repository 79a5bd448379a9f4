"""One reward at work on the roll-outs of a forest: what is scored, what is known, what is wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch

from ..errors import DecodingError, RewardError, ServerUnavailable
from ..prompts import Prompt
from ..results import Response
from ..rollouts.records import Rollout
from ..rollouts.stopping import StopStrings
from .base import RewardSession, WrongScores, drop_from

# Values are fp32: a greater score would be infinite there.
_MAX_SCORE = torch.finfo(torch.float32).max


class Scorer:
    """Scores roll-outs by one reward, every text once, and checks what the reward returns.

    Args:
        session: the reward over the forest.
        num_trees: trees of the forest.
        bounds: (lo, hi) where the reward is declared bounded.
        remembers: texts of this and the last call are not scored again.
        stop: strings that end what is scored.
    """

    def __init__(
        self,
        session: RewardSession,
        num_trees: int,
        *,
        bounds: tuple[float, float] | None,
        remembers: bool,
        stop: StopStrings | None = None,
    ) -> None:
        self.session = session
        self.bounds = bounds
        self.remembers = remembers
        self.stop = stop or StopStrings()
        self._known: list[dict[tuple[int, ...], float]] = [{} for _ in range(num_trees)]

    @property
    def num_token_forwards(self) -> int:
        """Tokens that went through the reward's model so far."""
        return self.session.num_token_forwards

    @property
    def peak_kv_bytes(self) -> int:
        """Most bytes of KV that the reward held so far."""
        return self.session.peak_kv_bytes

    def score(self, rollouts: Sequence[Rollout], responses: Sequence[Response]) -> list[float]:
        """Return the reward of each roll-out's whole response.

        Args:
            rollouts: what was rolled out.
            responses: the response of each tree, with the tokens emitted so far.

        Raises:
            RewardError: it raised, returned another number of scores, one that is not finite, or
                one outside of the declared bounds.
            ServerUnavailable: the reward is behind a URL, and its server stayed away.
        """
        texts = []
        for rollout in rollouts:
            tree = rollout.id.tree
            emitted = responses[tree].token_ids
            texts.append((tree, (*emitted, rollout.candidate, *rollout.tokens)))
        if not self.remembers:
            return self.score_texts(texts, responses)
        new = list(
            dict.fromkeys((tree, text) for tree, text in texts if text not in self._known[tree])
        )
        if new:
            for (tree, text), score in zip(new, self.score_texts(new, responses), strict=True):
                self._known[tree][text] = score
        return [self._known[tree][text] for tree, text in texts]

    def forget(self, responses: Sequence[Response]) -> None:
        """Keep only texts that can come again: those that begin with what was emitted."""
        for tree, response in enumerate(responses):
            emitted = tuple(response.token_ids)
            known = self._known[tree]
            self._known[tree] = {
                text: score for text, score in known.items() if text[: len(emitted)] == emitted
            }

    def keep(self, texts: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Keep what is known of (tree, whole response) that were scored last, one a tree."""
        cut = [self.stop.cut(token_ids) for _, token_ids in texts]
        self.session.keep([tree for tree, _ in texts], cut)

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        """`tree` is of another prompt from now on."""
        self._known[tree] = {}
        self.session.replace_tree(tree, prompt)

    def drop_tree(self, tree: int) -> None:
        """Forget `tree`; the last tree takes over its place."""
        drop_from(self._known, tree)
        self.session.drop_tree(tree)

    def score_texts(
        self, texts: Sequence[tuple[int, tuple[int, ...]]], responses: Sequence[Response]
    ) -> list[float]:
        """Return the reward of each (tree, whole response), whether it is known or not; checked.

        Raises:
            RewardError: as `score` does, and ServerUnavailable.
        """
        try:
            responses_cut = [self.stop.cut(token_ids) for _, token_ids in texts]
            scores = self.session.score([tree for tree, _ in texts], responses_cut)
        except (torch.OutOfMemoryError, DecodingError, ServerUnavailable):
            raise
        except WrongScores as error:
            _fail(responses[texts[0][0]], str(error), error)
        except Exception as error:
            _fail(responses[texts[0][0]], f"the reward raised {error!r}", error)
        if len(scores) != len(texts):
            message = f"the reward returned {len(scores)} scores for {len(texts)} responses"
            _fail(responses[texts[0][0]], message)
        for (tree, _), score in zip(texts, scores, strict=True):
            if not abs(score) <= _MAX_SCORE:
                _fail(responses[tree], f"the reward returned {score}")
            if self.bounds is not None and not self.bounds[0] <= score <= self.bounds[1]:
                _fail(
                    responses[tree],
                    f"the reward returned {score}, outside of its reward_bounds {self.bounds}",
                )
        return scores


def _fail(response: Response, message: str, cause: BaseException | None = None) -> NoReturn:
    raise RewardError(message, prompt_idx=response.idx, step=response.step) from cause
