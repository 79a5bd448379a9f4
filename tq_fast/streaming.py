"""Responses token by token, while they are decoded."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple, TypeVar

from .errors import InvalidArgument
from .results import DecodeResult, PromptResult, StepTrace
from .rollouts.stopping import StopStrings

_Token = TypeVar("_Token")
_Result = TypeVar("_Result")


class ChosenToken(NamedTuple):
    """A token that a method has settled: of the prompt `idx`, and whether it is the last one."""

    idx: int
    step: StepTrace
    is_last: bool


@dataclasses.dataclass(frozen=True)
class StreamedToken:
    """One token of a response that is being decoded.

    Attributes:
        token_id: the token.
        text: what it adds to the text. Empty for a special token, for a token that ends within a
            character, and where the text may be the beginning of a stop string; later pieces hold
            what was kept back. The pieces together are the text of the result. "" without a
            tokenizer.
        step: how the token was chosen.
    """

    token_id: int
    text: str
    step: StepTrace


class TokenStream(Iterator[StreamedToken]):
    """The tokens of one response, each as soon as it is chosen.

    Nothing runs between two tokens. A stream that is not read to its end is closed by `close`, at
    the end of a `with` block, or when nobody holds it any more; its buffers are free then.

    Args:
        tokens: what is decoded; it returns the result.
        pieces: makes text of token ids; None without a tokenizer.
    """

    def __init__(
        self, tokens: Generator[ChosenToken, None, DecodeResult], pieces: TextPieces | None
    ) -> None:
        self._tokens = tokens
        self._pieces = pieces
        self._num_tokens = 0
        self._result: DecodeResult | None = None

    def __next__(self) -> StreamedToken:
        try:
            chosen = next(self._tokens)
        except StopIteration as end:
            self._result = self._result or end.value
            raise
        self._num_tokens += 1
        token, text = chosen.step.token_id, ""
        if self._pieces is not None:
            text = self._pieces.add(token, is_last=chosen.is_last)
        return StreamedToken(token, text, chosen.step)

    @property
    def result(self) -> DecodeResult:
        """The whole result, as `decode` returns it, once the stream has been read to its end.

        Raises:
            InvalidArgument: the stream has not ended, or was closed before its end.
        """
        if self._result is None:
            raise InvalidArgument(
                "result is there when the stream has been read to its end, which it was not: "
                f"tokens so far: {self._num_tokens}"
            )
        return self._result

    def close(self) -> None:
        """End the decode here; no further token comes, and there is no result."""
        self._tokens.close()

    def __enter__(self) -> TokenStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class TextPieces:
    """The text of a response in pieces, one a token, that are never taken back.

    A tokenizer that rewrites what it said before (`clean_up_tokenization_spaces`) says less in
    pieces than in one go: the last piece then begins where the two texts part.

    Args:
        stop: the response's stop strings, and its tokenizer.
        skip_special_tokens: whether special tokens are left out.
    """

    def __init__(self, stop: StopStrings, *, skip_special_tokens: bool) -> None:
        self._stop = stop
        self._skips = skip_special_tokens
        self._token_ids: list[int] = []
        self._said = ""

    def add(self, token_id: int, *, is_last: bool) -> str:
        """Return what the text gains by the next token; all that is left where it is the last."""
        self._token_ids.append(token_id)
        ids, skips = self._token_ids, self._skips
        if is_last:
            text = self._stop.text(ids, skip_special_tokens=skips)
            # Letter by letter, which the name of the module does not say.
            num_common = len(os.path.commonprefix([text, self._said]))  # noqa: RUF071
        else:
            text = self._stop.settled_text(ids, skip_special_tokens=skips)
            if not text.startswith(self._said):
                return ""
            num_common = len(self._said)
        self._said = text
        return text[num_common:]


def settled_tokens(idx: int, result: PromptResult) -> Iterator[ChosenToken]:
    """Return the tokens of a response that was chosen as a whole."""
    for number, step in enumerate(result.trace, start=1):
        yield ChosenToken(idx, step, number == len(result.trace))


def resume_within(
    context: Callable[[], contextlib.AbstractContextManager[object]],
    tokens: Generator[_Token, None, _Result],
) -> Generator[_Token, None, _Result]:
    """Return `tokens`, each of which is made within a context of its own.

    A `with` statement in the generator itself would hold for its caller too, between two tokens.
    """
    try:
        while True:
            with context():
                try:
                    token = next(tokens)
                except StopIteration as end:
                    return end.value
            yield token
    finally:
        with context():
            tokens.close()


def read_to_end(tokens: Generator[object, None, _Result]) -> _Result:
    """Run a generator to its end, and return what it returns."""
    while True:
        try:
            next(tokens)
        except StopIteration as end:
            return end.value
