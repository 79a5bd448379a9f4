"""Whole responses scored by the target reward, over a forest of its own."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import DecodeConfig
from ..results import DecodeStats, Response
from ..rewards.base import Opening
from ..rewards.scorer import Scorer
from ..session import Session


class TextScorer:
    """The reward over the prompts of a group.

    Args:
        session: has the reward.
        responses: the prompts.
        num_rows: texts of one call, at most.
        config: max_new_tokens, stop and backend are read.
    """

    def __init__(
        self,
        session: Session,
        responses: Sequence[Response],
        *,
        num_rows: int,
        config: DecodeConfig,
    ) -> None:
        self.responses = responses
        self.num_rows = num_rows
        opening = Opening(
            [response.prompt for response in responses],
            num_rows,
            max_new=config.max_new_tokens,
            backend=config.backend,
        )
        self._scorer = Scorer(
            session.rewards["reward"].open(opening),
            len(responses),
            bounds=session.reward_bounds,
            remembers=False,
            stop=session.stop_strings(config),
        )

    def score(self, texts: Sequence[tuple[int, Sequence[int]]]) -> list[float]:
        """Return the reward of each (tree, whole response), ascending by tree."""
        scores: list[float] = []
        for start in range(0, len(texts), self.num_rows):
            chunk = [(tree, tuple(ids)) for tree, ids in texts[start : start + self.num_rows]]
            scores += self._scorer.score_texts(chunk, self.responses)
        return scores

    def keep(self, texts: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Keep what the reward knows of texts of the last call, which will be continued."""
        self._scorer.keep(texts)

    def count(self, stats: DecodeStats) -> None:
        """Write what went through the reward's model into `stats`."""
        own = DecodeStats()
        own.token_forwards["reward"] = self._scorer.num_token_forwards
        own.peak_kv_bytes["reward"] = self._scorer.peak_kv_bytes
        stats.add(own)
