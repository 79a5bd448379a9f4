"""Whole responses scored by the target reward, or by a model that did not draw them."""

from __future__ import annotations

from collections.abc import Sequence

from ..config import DecodeConfig, Role
from ..forest.language import LanguageForest
from ..forest.logprobs import score_rows
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
            compiled_modules=session.speed.compiled_modules,
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


def score_others(
    session: Session,
    known: Sequence[Role],
    responses: Sequence[Response],
    texts: Sequence[Sequence[int]],
    config: DecodeConfig,
    stats: DecodeStats,
) -> dict[str, list[float]]:
    """Return log pi(y | x) of a text for each prompt, under the SFT model, by role.

    Only texts that were kept are scored, which costs one pass where measuring all draws along the
    way would cost one a draw. Nothing is scored without an SFT model, or where it is among `known`.
    """
    if "sft" not in session.languages or "sft" in known:
        return {}
    prompts = [list(response.prompt.token_ids) for response in responses]
    with stats.phase("prefill"):
        forest = LanguageForest(
            session.languages["sft"],
            num_trees=len(prompts),
            num_rows=len(prompts),
            prefix_capacity=max(map(len, prompts)),
            branch_capacity=config.max_new_tokens,
            backend=config.backend,
            cpu_layers=session.speed.cpu_layers,
            compiled_modules=session.speed.compiled_modules,
        )
        # The last token leads the rows, because the first token of a row is not scored.
        starts = [prompt[:-1] for prompt in prompts]
        trees = [tree for tree, start in enumerate(starts) if start]
        forest.encode(trees, starts, shares=session.speed.share_prefixes)
        rows = [[prompt[-1], *ids] for prompt, ids in zip(prompts, texts, strict=True)]
        sums = score_rows(forest, rows, range(len(rows)), vocab_size=session.num_tokens)
    own = DecodeStats()
    own.token_forwards["sft"] = forest.num_token_forwards
    own.peak_kv_bytes["sft"] = forest.peak_kv_bytes
    stats.add(own)
    return {"sft": sums}
