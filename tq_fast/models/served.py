"""A language model behind a URL, as a session has it beside the models of this process."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Mapping
from typing import Any, TypeAlias

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import InvalidArgument
from ..forest.language import vocab_size_of
from ..rewards.lengths import positions_of
from ..servers import LanguageServer, SamplingLaw, Server, open_language_server


class ServedModel:
    """A model that a server holds, after the server was found to answer.

    Args:
        server: where it is.
        role: the argument's name, for messages.
        tokenizer: the caller's, which reads the prompts; None: the server's own is looked for.

    Attributes:
        name: what the server calls the model.
        tokenizer: the model's, on this machine; None: there is none.
        vocab_size: number of ids that the model knows.
        limit: tokens of prompt and response, at most; None where nothing says.

    Raises:
        ServerUnavailable: nobody answers.
        InvalidArgument: the model is not served, the tokenizer is another one, or nothing says how
            large its vocabulary is.
    """

    def __init__(self, server: Server, role: str, tokenizer: Any = None) -> None:
        if server.tokenizer is None and tokenizer is not None:
            server = dataclasses.replace(server, tokenizer=tokenizer)
        self.server = server
        opened = open_language_server(server, k=1, law=SamplingLaw(temperature=0.0))
        opened.close()
        self.name = opened.model
        self.tokenizer: PreTrainedTokenizerBase | None = opened.tokenizer
        self.limit = opened.max_length
        if opened.vocab_size is None and self.tokenizer is None:
            raise InvalidArgument(
                f"{role}: neither the server at {server.url} nor a tokenizer says how many token "
                "ids there are; pass Server(..., tokenizer=)"
            )
        self._opened: dict[Hashable, LanguageServer] = {}
        known = 0 if self.tokenizer is None else len(self.tokenizer)
        self.vocab_size = known if opened.vocab_size is None else opened.vocab_size

    def open(
        self, *, k: int, law: SamplingLaw, end_ids: Collection[int], needs_scores: bool
    ) -> LanguageServer:
        """Return the model ready for these settings, as `open_language_server` does.

        The same settings share one connection.
        """
        ends = tuple(sorted(set(end_ids)))
        key = k, law, ends, needs_scores
        if key not in self._opened:
            self._opened[key] = open_language_server(
                self.server,
                k=k,
                law=law,
                end_ids=ends,
                needs_scores=needs_scores,
                is_known=True,
            )
        return self._opened[key]

    def open_for_scores(self) -> LanguageServer:
        """Return the model ready to score whole texts."""
        return self.open(k=1, law=SamplingLaw(temperature=0.0), end_ids=(), needs_scores=True)


LanguageModel: TypeAlias = PreTrainedModel | ServedModel


def require_local(models: Mapping[Any, LanguageModel], method: str, reason: str) -> None:
    """Refuse a model behind a URL, for the `reason` that `method` cannot use it.

    Raises:
        InvalidArgument: the message names the role and the URL.
    """
    for role, model in models.items():
        if isinstance(model, ServedModel):
            raise InvalidArgument(
                f"{role} is behind the URL {model.server.url}, where {method!r} cannot use it: "
                f"{reason}"
            )


def is_local(model: LanguageModel) -> bool:
    """Whether `model` is one of this process."""
    return not isinstance(model, ServedModel)


def vocabulary_size(model: LanguageModel) -> int:
    """Number of ids that `model` predicts, padding of the vocabulary included."""
    return model.vocab_size if isinstance(model, ServedModel) else vocab_size_of(model)


def position_limit(model: LanguageModel) -> int | None:
    """Tokens of prompt and response, at most; None where nothing says."""
    return model.limit if isinstance(model, ServedModel) else positions_of(model)
