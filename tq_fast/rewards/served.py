"""A sequence classifier behind a URL as a reward: it reads whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ..errors import InvalidArgument
from ..prompts import Prompt
from ..servers import RewardServer
from .base import Opening, RewardSession, Texts, drop_from
from .classifier import ClassifierReward
from .options import RewardOptions


class ServedReward(ClassifierReward):
    """A classifier that a server holds; texts are rendered and tokenised here.

    Args:
        server: the classifier, opened.
        role: the argument's name, for messages.
        texts: decodes with the baseline's tokenizer.
        options: how prompts and responses are read.

    Raises:
        InvalidArgument: there is no tokenizer for it on this machine, or texts are to be read as
            pairs, for which a request of token ids has no place.
    """

    model: Any

    def __init__(
        self, server: RewardServer, role: str, texts: Texts, *, options: RewardOptions
    ) -> None:
        url = server.connection.server.url
        if options.pair:
            raise InvalidArgument(
                f"reward_options.pair cannot be honoured by the {role} at {url}, which is sent "
                "token ids"
            )
        if server.tokenizer is None or texts.tokenizer is None:
            lacking = f"{role}_tokenizer" if server.tokenizer is None else "tokenizer"
            raise InvalidArgument(
                f"the {role} at {url} is sent token ids of its own tokenizer; pass {lacking}="
            )
        super().__init__(
            cast(Any, server),
            server.tokenizer,
            texts,
            # A server with one label needs no index.
            server.label if server.num_labels > 1 else None,
            options=options,
            num_labels=server.num_labels,
        )
        self.server = server
        self.pad = server.tokenizer.pad_token_id

    @property
    def name(self) -> str:
        return self.server.model

    def open(self, opening: Opening) -> RewardSession:
        """Start on the prompts of a forest; nothing is kept but their form."""
        return _ServedSession(self, opening.prompts)


class _ServedSession:
    peak_kv_bytes = 0

    def __init__(self, reward: ServedReward, prompts: Sequence[Prompt]) -> None:
        self.reward = reward
        self.forms = [reward.form(prompt) for prompt in prompts]
        self.num_token_forwards = 0

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        rows = [
            self._without_padding(self.reward.read(self.forms[tree], response).token_ids)
            for tree, response in zip(trees, responses, strict=True)
        ]
        self.num_token_forwards += sum(map(len, rows))
        return self.reward.server.rewards(rows)

    def _without_padding(self, row: list[int]) -> list[int]:
        """Leave out padding at the end, before which classifiers of transformers read the score.

        A server reads it at the last token that it is sent. Where the tokenizer pads with its end
        token, every finished response ends so. One token stays.
        """
        end = len(row)
        while end > 1 and row[end - 1] == self.reward.pad:
            end -= 1
        return row[:end]

    def keep(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> None:
        return

    def replace_tree(self, tree: int, prompt: Prompt) -> None:
        self.forms[tree] = self.reward.form(prompt)

    def drop_tree(self, tree: int) -> None:
        drop_from(self.forms, tree)
