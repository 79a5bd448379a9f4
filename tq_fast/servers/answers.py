"""What a server's answers say, read and checked.

A token is named by its id ("token_id:264"), which `return_tokens_as_token_ids` asks for: by their
texts, two tokens that both decode to the replacement character would be one.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal

from ..errors import UnsupportedModel

# vLLM writes this for a log-prob of minus infinity, which JSON does not have.
_MINUS_INFINITY = -9999.0


@dataclasses.dataclass(frozen=True)
class DrawnTokens:
    """What the server drew after one prefix.

    Attributes:
        tokens: token ids, at least one; an end id is the last.
        logprobs: of each, the log-prob under the law that it was drawn from.
        finish: "stop" where an end id is the last, "length" where all tokens asked for are there.
    """

    tokens: list[int]
    logprobs: list[float]
    finish: Literal["stop", "length"]


def read_choices(answer: Any) -> list[Mapping[str, Any]]:
    """Return the choices of a completion: prompt by prompt, the n of each together."""
    try:
        return sorted(answer["choices"], key=lambda choice: choice["index"])
    except (KeyError, TypeError) as error:
        raise misshapen("choices with an index", error) from error


def read_next_logprobs(choice: Mapping[str, Any]) -> dict[int, float]:
    """Return the log-probs that the server names of the first token that it generated."""
    try:
        named = choice["logprobs"]["top_logprobs"][0]
        return {_token_id(name): _logprob(logprob) for name, logprob in named.items()}
    except (KeyError, TypeError, IndexError, AttributeError, ValueError) as error:
        raise misshapen("logprobs.top_logprobs", error) from error


def read_drawn(choice: Mapping[str, Any], max_tokens: int, end_ids: Collection[int]) -> DrawnTokens:
    """Return what was drawn; refuse a roll-out that ended where none was to end."""
    try:
        tokens = [_token_id(name) for name in choice["logprobs"]["tokens"]]
        logprobs = [float(logprob) for logprob in choice["logprobs"]["token_logprobs"]]
        finish = choice["finish_reason"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise misshapen("logprobs of tokens, and finish_reason", error) from error
    if finish == "stop" and tokens and tokens[-1] in end_ids:
        return DrawnTokens(tokens, logprobs, "stop")
    if finish == "length" and len(tokens) == max_tokens:
        return DrawnTokens(tokens, logprobs, "length")
    raise UnsupportedModel(
        f"the server ended a roll-out of at most {max_tokens} tokens after {len(tokens)}, for the "
        f"reason {finish!r} ({choice.get('stop_reason')!r}): it has stop tokens of its own "
        "(--override-generation-config) or too short a context (--max-model-len)"
    )


def read_score(choice: Mapping[str, Any], tokens: Sequence[int], start: int) -> float:
    """Return the sum of the log-probs of `tokens[start:]`, all of `tokens` being the prompt."""
    try:
        rows = choice["prompt_logprobs"]
        if len(rows) != len(tokens):
            raise ValueError(f"{len(rows)} rows for {len(tokens)} tokens")
        wanted = zip(rows[start:], tokens[start:], strict=True)
        return math.fsum(float(row[str(token)]["logprob"]) for row, token in wanted)
    except (KeyError, TypeError, ValueError) as error:
        raise misshapen("prompt_logprobs, one row a token", error) from error


def fault_of(
    is_whole: Callable[[Mapping[str, Any]], bool],
) -> Callable[[Any], str | None]:
    """Return what says of an answer whether a choice is not whole, so that it is asked for again.

    vLLM mixes up the log-probs of requests that are in one batch, where one of them names ids by
    `logprob_token_ids` and another does not: the other then lacks what it asked for. It also ends
    what it was doing with "abort" when it is shut down.
    """

    def fault(answer: Any) -> str | None:
        choices = read_choices(answer)
        if any(choice.get("finish_reason") == "abort" for choice in choices):
            return "the server gave up a request before its end"
        if not all(map(is_whole, choices)):
            return (
                "an answer lacks log-probs that were asked for, as happens where another client of "
                "the server asks for logprob_token_ids at the same time"
            )
        return None

    return fault


def _logprob(number: float) -> float:
    return float(number) if number > _MINUS_INFINITY else -math.inf


def _token_id(name: str) -> int:
    prefix, _, digits = name.partition(":")
    if prefix != "token_id":
        raise ValueError(f"a token is named {name!r} instead of 'token_id:<id>'")
    return int(digits)


def misshapen(expected: str, error: Exception) -> UnsupportedModel:
    """Return the error to raise where an answer lacks what `expected` says."""
    return UnsupportedModel(
        f"the server's answer lacks {expected}, as vLLM 0.32 gives them "
        f"({type(error).__name__}: {error})"
    )
