"""Whole responses scored by the target reward, or by a model that did not draw them."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel

from ..config import DecodeConfig, Role
from ..forest.language import LanguageForest
from ..forest.logprobs import score_rows
from ..models.served import LanguageModel, ServedModel
from ..results import DecodeStats, Response
from ..rewards.base import Opening
from ..rewards.scorer import Scorer
from ..session import Session
from ..transfer.roles import distinct


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
    """Return log pi(y | x) of a text for each prompt, by role, under the models not in `known`.

    Only texts that were kept are scored, which costs one pass where measuring all draws along the
    way would cost one a draw.
    """
    prompts = [list(response.prompt.token_ids) for response in responses]
    found: dict[str, list[float]] = {}
    for role, model in _unknown(session, known).items():
        if isinstance(model, ServedModel):
            with stats.phase("reward"):
                found[role] = model.open_for_scores().score(prompts, texts)
        else:
            found[role] = _score(session, role, prompts, texts, config, stats)
    return found


def check_scoring(session: Session, known: Sequence[Role]) -> None:
    """Let servers show that they can score texts, where `score_others` will ask them.

    Raises:
        UnsupportedModel: one cannot; the message says what to change in its command line.
    """
    for model in _unknown(session, known).values():
        if isinstance(model, ServedModel):
            model.open_for_scores()


def local_models(session: Session, roles: Sequence[Role]) -> list[PreTrainedModel]:
    """Return the models of `roles` that are in this process, each once."""
    languages = {role: session.languages[role] for role in roles if role in session.languages}
    return [model for model in distinct(languages).values() if not isinstance(model, ServedModel)]


def _unknown(session: Session, known: Sequence[Role]) -> dict[Role, LanguageModel]:
    return {role: model for role, model in session.languages.items() if role not in known}


def _score(
    session: Session,
    role: Role,
    prompts: Sequence[list[int]],
    texts: Sequence[Sequence[int]],
    config: DecodeConfig,
    stats: DecodeStats,
) -> list[float]:
    """Return log pi(y | x) of each text under a model of this process."""
    with stats.phase("prefill"):
        forest = LanguageForest(
            session.languages[role],
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
    own.token_forwards[role] = forest.num_token_forwards
    own.peak_kv_bytes[role] = forest.peak_kv_bytes
    stats.add(own)
    return sums
