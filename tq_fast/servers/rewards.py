"""A reward model behind a URL: classify requests, the scores without an activation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UnsupportedModel
from .answers import misshapen
from .http import Connection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts in one request: a request costs the server some milliseconds whatever is in it, and all that
# is in it is lost with its connection.
_TEXTS_PER_REQUEST = 64

Text = str | Sequence[int]


class RewardServer:
    """A sequence classifier behind a URL.

    Args:
        connection: to the server.
        model: the name under which it serves the model.
        label: which label is the reward.
        num_labels: scores that the model gives a text.
        tokenizer: the model's, on this machine; None: there is none.

    Raises:
        ServerUnavailable: the server stayed away, in any of the operations.
        UnsupportedModel: it answers something that cannot be used; the message says what.
        RequestRefused: it refuses a text, as one that is too long for it.
    """

    def __init__(
        self,
        connection: Connection,
        model: str,
        *,
        label: int = 0,
        num_labels: int = 1,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.connection = connection
        self.model = model
        self.label = label
        self.num_labels = num_labels
        self.tokenizer = tokenizer

    def rewards(self, texts: Sequence[Text]) -> list[float]:
        """Return the score of each text, before any activation.

        Args:
            texts: token ids, which the server reads as they are, or strings, to which it adds what
                its tokenizer adds.
        """
        return [scores[self.label] for scores in self.classify(texts, use_activation=False)]

    def classify(self, texts: Sequence[Text], *, use_activation: bool) -> list[list[float]]:
        """Return the scores of all labels of each text."""
        given = [text if isinstance(text, str) else list(text) for text in texts]
        # One request holds texts of one kind.
        strings = [i for i, text in enumerate(given) if isinstance(text, str)]
        ids = [i for i, text in enumerate(given) if not isinstance(text, str)]
        groups = [
            kind[start : start + _TEXTS_PER_REQUEST]
            for kind in (strings, ids)
            for start in range(0, len(kind), _TEXTS_PER_REQUEST)
        ]
        bodies = [
            {
                "model": self.model,
                "input": [given[i] for i in group],
                "use_activation": use_activation,
            }
            for group in groups
        ]
        scores: list[list[float]] = [[]] * len(texts)
        answers = self.connection.post("/classify", bodies)
        for group, answer in zip(groups, answers, strict=True):
            for i, of_text in zip(group, _read_scores(answer, len(group)), strict=True):
                scores[i] = of_text
        return scores

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()


def _read_scores(answer: Any, num: int) -> list[list[float]]:
    try:
        data = sorted(answer["data"], key=lambda item: item["index"])
        scores = [[float(score) for score in item["probs"]] for item in data]
    except (KeyError, TypeError, ValueError) as error:
        raise misshapen("data with an index and probs", error) from error
    if len(scores) != num:
        raise UnsupportedModel(f"the server scored {len(scores)} texts where {num} were given")
    return scores
