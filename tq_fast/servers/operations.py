"""What decoding asks of a model, as requests to its server.

    candidates  completions, max_tokens 1, logprobs
    prior       completions, max_tokens 1, logprob_token_ids
    rollouts    completions, n, seed, stop_token_ids
    score       completions, max_tokens 1, prompt_logprobs

docs/develop/server-engine.md says what a server makes of them, and what they cost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config import require_int
from ..errors import InvalidArgument, UnsupportedModel
from .answers import (
    DrawnTokens,
    fault_of,
    read_choices,
    read_drawn,
    read_next_logprobs,
    read_score,
)
from .http import Connection

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Prompts in one request: a request costs the server some milliseconds whatever is in it, and all
# that is in it is lost with its connection.
_PROMPTS_PER_REQUEST = 64
# vLLM takes no more ids in `logprob_token_ids`.
_MAX_NAMED_IDS = 128
# vLLM raises a temperature below this one to it.
_LEAST_TEMPERATURE = 0.01
# A seed and the n seeds after it stay below 2^63.
_SEED_BITS = 62

# A server takes what is not said from the model's generation_config.json: everything is said.
_ALWAYS: Mapping[str, Any] = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": True,
    "return_tokens_as_token_ids": True,
}


@dataclasses.dataclass(frozen=True)
class SamplingLaw:
    """The law that roll-outs are drawn from.

    Attributes:
        temperature: 0 for the arg max.
        top_k: keep this many tokens; 0 keeps all. Before top-p.
        top_p: keep the smallest set of at least this mass; 1.0 keeps all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature and not self.temperature >= _LEAST_TEMPERATURE:
            raise InvalidArgument(
                f"temperature must be 0 or at least {_LEAST_TEMPERATURE} at a server, which raises "
                f"lower ones to it, got {self.temperature!r}"
            )

    @property
    def is_own(self) -> bool:
        """Whether it is the model's own law, or its arg max, whose log-probs are the model's."""
        truncates = self.top_k != 0 or self.top_p < 1.0
        return self.temperature == 0.0 or (self.temperature == 1.0 and not truncates)


ARG_MAX = SamplingLaw(temperature=0.0)


class NextTokens(NamedTuple):
    """Candidates of G prefixes.

    Attributes:
        ids: `[G, k]`, by log-prob descending, then by id ascending.
        logprobs: `[G, k]`, of the model's own law over its whole vocabulary.
    """

    ids: list[list[int]]
    logprobs: list[list[float]]


@dataclasses.dataclass(frozen=True)
class RolloutRequest:
    """Roll-outs to draw after one prefix.

    Attributes:
        prefix: token ids, the candidate included.
        max_tokens: tokens after it, at most.
        seed: of the draws, any integer; roll-out i is drawn with `seed + i`, so that it is the same
            whether it is asked for alone or with others.
        num: how many.
    """

    prefix: Sequence[int]
    max_tokens: int
    seed: int
    num: int = 1

    def __post_init__(self) -> None:
        require_int("max_tokens", self.max_tokens)
        require_int("num", self.num)


class LanguageServer:
    """A language model behind a URL.

    Token ids and log-probs are lists of Python's; log-probs are natural logs. Every operation sends
    its requests together and waits for all.

    Args:
        connection: to the server.
        model: the name under which it serves the model.
        max_length: tokens of prompt and continuation, at most; None: not known.
        num_logprobs: how many of the likeliest tokens are asked for where candidates are.
        num_ids: ids from here on are no tokens of the tokenizer, and never candidates.
        vocab_size: ids that the model knows; None: not known.
        tokenizer: the model's, on this machine; None: there is none.

    Raises:
        ServerUnavailable: the server stayed away, in any of the operations.
        UnsupportedModel: it answers something that cannot be used; the message says what.
        InvalidArgument: a prefix is empty, or does not fit into the server's context.
    """

    def __init__(
        self,
        connection: Connection,
        model: str,
        *,
        max_length: int | None,
        num_logprobs: int,
        num_ids: int,
        vocab_size: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.connection = connection
        self.model = model
        self.max_length = max_length
        self.num_logprobs = num_logprobs
        self.num_ids = num_ids
        self.vocab_size = vocab_size
        self.tokenizer = tokenizer

    def candidates(
        self, prefixes: Sequence[Sequence[int]], k: int, *, without: Collection[int] = ()
    ) -> NextTokens:
        """Return the k likeliest next tokens of each prefix, those of `without` left out."""
        bodies = [
            self._body(ARG_MAX, prefixes[part], 1, logprobs=self.num_logprobs)
            for part in _slices(len(prefixes))
        ]
        choices = self._complete(
            bodies, lambda choice: len(read_next_logprobs(choice)) >= self.num_logprobs
        )
        rows = [self._likeliest(read_next_logprobs(choice), k, without) for choice in choices]
        return NextTokens(
            [[token for token, _ in row] for row in rows],
            [[logprob for _, logprob in row] for row in rows],
        )

    def _likeliest(
        self, named: Mapping[int, float], k: int, without: Collection[int]
    ) -> list[tuple[int, float]]:
        """Return the k likeliest (id, log-prob) of those that the server names."""
        left = [
            (token, logprob)
            for token, logprob in named.items()
            if token < self.num_ids and token not in without
        ]
        left.sort(key=lambda pair: (-pair[1], pair[0]))
        # The server breaks ties as it likes: tokens that it does not name may be as likely as the
        # last that it names, and come before them by their ids.
        if len(left) < k or (left[k - 1][1] <= min(named.values()) and len(named) < self.num_ids):
            raise UnsupportedModel(
                f"the {self.num_logprobs} likeliest tokens that the server names do not tell which "
                f"are the {k} candidates, because some are as likely as the last, or no tokens; "
                "start it with a greater --max-logprobs"
            )
        return left[:k]

    def prior(
        self, prefixes: Sequence[Sequence[int]], ids: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        """Return the log-probs `[G, k]` of `ids` `[G, k]` as next tokens, over all tokens."""
        parts = [
            (row, ids[row][start : start + _MAX_NAMED_IDS])
            for row in range(len(ids))
            for start in range(0, len(ids[row]), _MAX_NAMED_IDS)
        ]
        bodies = [
            self._body(
                ARG_MAX, [prefixes[row]], 1, logprobs=len(part), logprob_token_ids=list(part)
            )
            for row, part in parts
        ]
        found: list[list[float]] = [[] for _ in ids]
        for (row, part), choice in zip(parts, self._complete(bodies), strict=True):
            named = read_next_logprobs(choice)
            missing = [token for token in part if token not in named]
            if missing:
                raise UnsupportedModel(
                    f"the server does not name the log-prob of the id {missing[0]}, for which it "
                    "was asked by logprob_token_ids; vLLM 0.32 does"
                )
            found[row] += [named[token] for token in part]
        return found

    def rollouts(
        self, requests: Sequence[RolloutRequest], law: SamplingLaw, end_ids: Collection[int]
    ) -> list[list[DrawnTokens]]:
        """Draw the roll-outs of each of `requests`.

        Args:
            requests: what to draw.
            law: what to draw from. The log-probs of greedy roll-outs are those of the model's own
                law.
            end_ids: ids that end a roll-out; the model's own do not unless they are among them.

        Raises:
            InvalidArgument: several greedy roll-outs of one prefix, which would all be equal.
        """
        is_greedy = law.temperature == 0.0
        groups = _greedy_groups(requests) if is_greedy else [[i] for i in range(len(requests))]
        bodies = []
        for group in groups:
            first = requests[group[0]]
            # vLLM draws the i-th of n with `seed + i`, and with no seed where it is -1.
            drawn = {} if is_greedy else {"n": first.num, "seed": first.seed % 2**_SEED_BITS}
            prefixes = [requests[i].prefix for i in group]
            ends = sorted(end_ids)
            bodies.append(
                self._body(
                    law, prefixes, first.max_tokens, logprobs=0, stop_token_ids=ends, **drawn
                )
            )
        choices = iter(self._complete(bodies))
        answers: dict[int, list[DrawnTokens]] = {}
        for i in (i for group in groups for i in group):
            request = requests[i]
            answers[i] = [
                read_drawn(next(choices), request.max_tokens, end_ids) for _ in range(request.num)
            ]
        return [answers[i] for i in range(len(requests))]

    def score(
        self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[float]:
        """Return the log-prob of each continuation after its prefix, summed over its tokens.

        The server encodes prefix and continuation anew for it: what it has cached of the prefix
        lacks the log-probs of its tokens.
        """
        texts = [
            [*prefix, *continuation]
            for prefix, continuation in zip(prefixes, continuations, strict=True)
        ]
        asked = [i for i, continuation in enumerate(continuations) if continuation]
        bodies = [
            self._body(ARG_MAX, [texts[i] for i in asked[part]], 1, prompt_logprobs=0)
            for part in _slices(len(asked))
        ]
        scores = [0.0] * len(texts)
        for i, choice in zip(asked, self._complete(bodies), strict=True):
            scores[i] = read_score(choice, texts[i], len(prefixes[i]))
        return scores

    def close(self) -> None:
        """Close the connection."""
        self.connection.close()

    def _body(
        self, law: SamplingLaw, prefixes: Sequence[Sequence[int]], max_tokens: int, **fields: Any
    ) -> dict[str, Any]:
        """Return the request for completions of `prefixes`, after checking that they fit."""
        for prefix in prefixes:
            if not prefix:
                raise InvalidArgument("a prefix must have at least one token, got none")
            if self.max_length is not None and len(prefix) + max_tokens > self.max_length:
                # A server would cut the continuation short, or refuse.
                raise InvalidArgument(
                    f"a prefix of {len(prefix)} tokens and {max_tokens} after it do not fit into "
                    f"the server's context of {self.max_length} tokens (--max-model-len)"
                )
        return completion_body(self.model, law, prefixes, max_tokens, **fields)

    def _complete(
        self,
        bodies: Sequence[Mapping[str, Any]],
        is_whole: Callable[[Mapping[str, Any]], bool] = lambda choice: True,
    ) -> list[Mapping[str, Any]]:
        """Return all choices of all `bodies`, in order."""
        found: list[Mapping[str, Any]] = []
        answers = self.connection.post("/v1/completions", bodies, fault_of(is_whole))
        for body, answer in zip(bodies, answers, strict=True):
            choices, num = read_choices(answer), len(body["prompt"]) * body.get("n", 1)
            if len(choices) != num:
                raise UnsupportedModel(
                    f"the server gave {len(choices)} choices where {num} were asked for"
                )
            found += choices
        return found


def completion_body(
    model: str, law: SamplingLaw, prefixes: Sequence[Sequence[int]], max_tokens: int, **fields: Any
) -> dict[str, Any]:
    """Return the request for `max_tokens` tokens after each of `prefixes`, drawn from `law`."""
    return {
        **_ALWAYS,
        **dataclasses.asdict(law),
        "model": model,
        "prompt": [list(prefix) for prefix in prefixes],
        "max_tokens": max_tokens,
        **fields,
    }


def _slices(num: int) -> list[slice]:
    return [slice(i, i + _PROMPTS_PER_REQUEST) for i in range(0, num, _PROMPTS_PER_REQUEST)]


def _greedy_groups(requests: Sequence[RolloutRequest]) -> list[list[int]]:
    """Return the places of requests that can go together, which draw nothing and end alike."""
    by_length: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        if request.num != 1:
            raise InvalidArgument(f"num must be 1 for greedy roll-outs, got {request.num}")
        by_length.setdefault(request.max_tokens, []).append(i)
    return [places[part] for places in by_length.values() for part in _slices(len(places))]
