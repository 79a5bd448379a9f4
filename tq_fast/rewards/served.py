"""A sequence classifier behind a URL as a reward: it reads whole texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from ..errors import InvalidArgument
from ..prompts import Prompt
from ..servers import RewardServer
from .base import Opening, RewardSession, Texts
from .classifier import ClassifierReward, WholeTexts, without_padding
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


class _ServedSession(WholeTexts):
    def __init__(self, reward: ServedReward, prompts: Sequence[Prompt]) -> None:
        super().__init__(reward, prompts)
        self.server, self.pad = reward.server, reward.pad

    def score(self, trees: Sequence[int], responses: Sequence[Sequence[int]]) -> list[float]:
        # A server reads the score at the last token that it is sent. Where the tokenizer pads with
        # its end token, every finished response ends so.
        rows = [without_padding(row.token_ids, self.pad) for row in self.rows(trees, responses)]
        self.num_token_forwards += sum(map(len, rows))
        return self.server.rewards(rows)
