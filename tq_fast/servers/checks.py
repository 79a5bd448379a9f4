"""Opens a model behind a URL, after finding out by trying that it answers exactly.

What a server computes follows from its command line and from the model's files, which are out of
sight here. Each check sends a few tokens, looks at what comes back, and refuses by a sentence that
says what to change.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..config import require_int
from ..errors import InvalidArgument, UnsupportedModel, warn_caller
from .answers import fault_of, read_choices, read_next_logprobs
from .http import Connection, RequestRefused
from .operations import ARG_MAX, LanguageServer, SamplingLaw, completion_body
from .rewards import RewardServer
from .server import Server
from .tokenizers import check_same_tokenizer, load_server_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the checks send: ids that every vocabulary has.
_PROBES = ([3], [5, 8], [13, 4, 11], [3, 5, 8, 13], [7, 7], [12, 3, 9])
# A text that fills blocks of a cache, and what follows it.
_LONG_PROBE = [3 + i * i % 11 for i in range(80)]
_CONTINUATION = [5, 8, 13]
# Sums of log-probs of as many tokens differ by less in half precision, and by nats where a server
# names those of other tokens.
_NEAR_SCORE = 0.25
# Logits above 1/8 in bf16, and above 1 in fp16, are multiples of this; so are their differences.
_HALF_GRID = 2.0**-10
# Rounding of fp32 log-probs whose logits lie on the grid.
_ON_GRID = 8e-6
# One difference in sixty lies on the grid by chance; so many never do, nor half of all.
_MIN_STEPS = 8
# The tokens after a roll-out's last full block are encoded again with each roll-out.
_GOOD_BLOCK_SIZE = 32
# Ids are below this, whatever the vocabulary.
_NO_ID = 2**31 - 1


def open_language_server(
    server: Server,
    *,
    k: int,
    law: SamplingLaw,
    end_ids: Collection[int] = (),
    needs_scores: bool = False,
    is_known: bool = False,
) -> LanguageServer:
    """Return the language model behind `server`, ready for these settings.

    Args:
        server: where it is.
        k: candidates that will be asked for.
        law: what roll-outs will be drawn from.
        end_ids: ids that candidates may have to leave out.
        needs_scores: whether continuations will be scored.
        is_known: whether it was opened before, so that its tokenizer need not be compared again.

    Raises:
        ServerUnavailable: nobody answers.
        InvalidArgument: the model is not served, or the tokenizer is another one.
        UnsupportedModel: the server cannot do what these settings ask for; the message says what to
            change in its command line.
    """
    require_int("k", k)
    connection = Connection(server)
    try:
        served = _served_model(connection)
        model = str(served["id"])
        tokenizer = _tokenizer_of(connection, served, is_known=is_known)
        vocab_size = _vocab_size(connection, model)
        known = [num for num in (_num_ids(tokenizer), vocab_size) if num is not None]
        num_ids = min(known, default=_NO_ID)
        top = _likeliest(connection, model, k + len(set(end_ids)) + 1, vocab_size or _NO_ID)
        _check_law(connection, model, law, top)
        _warn_of_cost_and_precision(connection, top)
        language = LanguageServer(
            connection,
            model,
            max_length=served.get("max_model_len"),
            num_logprobs=len(top[0]),
            num_ids=num_ids,
            vocab_size=vocab_size,
            tokenizer=tokenizer,
        )
        if needs_scores:
            _check_scores(language)
        return language
    except BaseException:
        connection.close()
        raise


def open_reward_server(server: Server, *, label: int | None = None) -> RewardServer:
    """Return the sequence classifier behind `server`.

    Args:
        server: where it is.
        label: which label is the reward; None: the only one.

    Raises:
        ServerUnavailable: nobody answers.
        InvalidArgument: the model is not served, the tokenizer is another one, or there are several
            labels and none was named.
        UnsupportedModel: it is no classifier, or answers through an activation.
    """
    connection = Connection(server)
    try:
        served = _served_model(connection)
        model, tokenizer = str(served["id"]), _tokenizer_of(connection, served)
        reward = RewardServer(connection, model, tokenizer=tokenizer)
        try:
            bare = reward.classify(_PROBES, use_activation=False)
        except RequestRefused as error:
            if error.status not in (404, 405):
                raise
            raise UnsupportedModel(
                f"the server has no /classify: start it with --runner pooling --convert classify, "
                f"for a sequence classifier ({error})"
            ) from error
        active = reward.classify(_PROBES, use_activation=True)
        scores = [score for of_text in bare for score in of_text]
        if bare == active and all(0.0 <= score <= 1.0 for score in scores):
            raise UnsupportedModel(
                "the reward server answers between 0 and 1 with and without use_activation: it "
                "puts scores through a sigmoid or a softmax, which no request switches off; start "
                "it with --pooler-config '{\"use_activation\": false}'"
            )
        num_labels = len(bare[0])
        if label is None and num_labels != 1:
            raise InvalidArgument(
                f"label must say which of the server's {num_labels} labels is the reward, got None"
            )
        if label is not None and not 0 <= label < num_labels:
            raise InvalidArgument(f"label must be in [0, {num_labels}), got {label}")
        reward.label, reward.num_labels = label or 0, num_labels
        return reward
    except BaseException:
        connection.close()
        raise


def _served_model(connection: Connection) -> Mapping[str, Any]:
    """What the server says of the model that is asked for."""
    server = connection.server
    answer = connection.get("/v1/models")
    try:
        served = {str(model["id"]): model for model in answer["data"]}
    except (KeyError, TypeError) as error:
        raise InvalidArgument(
            f"url: {server.root}/v1/models is no list of models; is {server.url!r} the URL of a "
            "server with the OpenAI API?"
        ) from error
    names = ", ".join(map(repr, served)) or "nothing"
    if server.model is None:
        if len(served) != 1:
            raise InvalidArgument(
                f"model must be one of those that {server.url} serves ({names}), got None"
            )
        return next(iter(served.values()))
    if server.model not in served:
        raise InvalidArgument(
            f"model={server.model!r} is not served at {server.url}, which serves {names}"
        )
    return served[server.model]


def _tokenizer_of(
    connection: Connection, served: Mapping[str, Any], *, is_known: bool = False
) -> PreTrainedTokenizerBase | None:
    tokenizer = load_server_tokenizer(connection.server.tokenizer, served)
    if tokenizer is not None and not is_known:
        check_same_tokenizer(connection, str(served["id"]), tokenizer)
    return tokenizer


def _num_ids(tokenizer: PreTrainedTokenizerBase | None) -> int | None:
    return None if tokenizer is None else max(tokenizer.get_vocab().values(), default=-1) + 1


def _vocab_size(connection: Connection, model: str) -> int | None:
    """The size of the model's vocabulary, as the server names it where an id is beyond it."""
    fields = {"logprobs": 1, "logprob_token_ids": [_NO_ID]}
    try:
        connection.post(
            "/v1/completions", [completion_body(model, ARG_MAX, [_PROBES[0]], 1, **fields)]
        )
    except RequestRefused as error:
        if error.status in (404, 405):
            raise UnsupportedModel(
                f"the server completes no texts: start it with a language model and without "
                f"--runner pooling ({error})"
            ) from error
        said = re.search(r"[Vv]ocabulary size: (\d+)", error.detail)
        return int(said.group(1)) if said else None
    return None


def _likeliest(connection: Connection, model: str, least: int, most: int) -> list[dict[int, float]]:
    """Return the likeliest tokens after each probe: `least` of them, or more if the server may."""
    least = min(least, most)
    # More than are needed tell where tokens are equally likely; 20 is what vLLM gives by default.
    sizes = sorted({least, min(max(20, least), most), min(2 * least + 8, most)}, reverse=True)
    for num in sizes:
        try:
            return _next_logprobs(connection, model, ARG_MAX, num)
        except RequestRefused as error:
            if error.status != 400:
                raise
            if num == least:
                raise UnsupportedModel(
                    f"the server refuses the {least} log-probs that these settings need (k, the "
                    f"ids that end a response, and one more to see ties); start it with "
                    f"--max-logprobs {max(20, 2 * least + 8)} ({error.detail})"
                ) from error
    raise AssertionError("the loop returns or raises at its last size")


def _next_logprobs(
    connection: Connection, model: str, law: SamplingLaw, num: int
) -> list[dict[int, float]]:
    """Return the log-probs of the `num` likeliest tokens after each probe, likeliest first."""
    body = completion_body(model, law, _PROBES, 1, logprobs=num, seed=0)
    whole = fault_of(lambda choice: len(read_next_logprobs(choice)) >= num)
    (answer,) = connection.post("/v1/completions", [body], whole)
    named = map(read_next_logprobs, read_choices(answer))
    return [dict(sorted(of.items(), key=lambda pair: -pair[1])[:num]) for of in named]


def _check_law(
    connection: Connection, model: str, law: SamplingLaw, top: Sequence[Mapping[int, float]]
) -> None:
    """Refuse log-probs that are none, or not those of the law that is drawn from.

    Args:
        connection: to the server.
        model: its name there.
        law: what will be drawn from.
        top: log-probs of the likeliest tokens under the model's own law.
    """
    if any(math.fsum(map(math.exp, of.values())) > 1.001 for of in top):
        raise UnsupportedModel(
            "the probabilities that the server names sum to more than 1, so that its numbers are "
            "no natural logs of them; start it with --logprobs-mode processed_logprobs"
        )
    if law.is_own:
        return
    # Of two tokens at half the temperature, the model's own log-probs and those drawn from differ.
    drawn = _next_logprobs(connection, model, SamplingLaw(temperature=0.5, top_k=2), 2)
    from_own = from_drawn = 0.0
    for own, named in zip(top, drawn, strict=True):
        values = list(own.values())
        if len(values) > 2 and values[1] == values[2]:
            # The two likeliest are three, which all stay.
            continue
        lse = math.log(math.fsum(math.exp(2 * value) for value in values[:2]))
        for token, logprob in named.items():
            expected = own.get(token, -math.inf)
            from_own += min(abs(logprob - expected), 1.0)
            from_drawn += min(abs(logprob - (2 * expected - lse)), 1.0)
    if from_drawn >= from_own:
        raise UnsupportedModel(
            f"roll-outs are drawn with temperature {law.temperature:g}, top-k {law.top_k} and "
            f"top-p {law.top_p:g}, and the server names the log-probs before these; start it with "
            "--logprobs-mode processed_logprobs"
        )


def _check_scores(language: LanguageServer) -> None:
    """Refuse scores that differ from what the log-probs of the next tokens add up to."""
    num = len(_CONTINUATION)
    prefixes = [[*_LONG_PROBE, *_CONTINUATION[:i]] for i in range(num)]
    prior = language.prior(prefixes, [[token] for token in _CONTINUATION])
    expected = math.fsum(row[0] for row in prior)
    # The text is in the cache by now, whose rows have no log-probs.
    for _ in range(2):
        (score,) = language.score([_LONG_PROBE], [_CONTINUATION])
        if not abs(score - expected) <= _NEAR_SCORE:
            raise UnsupportedModel(
                f"the server scores {num} tokens with {score:.3f} by prompt_logprobs and with "
                f"{expected:.3f} token by token; start it with --no-enable-prefix-caching"
            )


def _warn_of_cost_and_precision(connection: Connection, top: Sequence[Mapping[int, float]]) -> None:
    """Warn of what makes decoding slower or coarser than it has to be, as far as it shows."""
    steps = [
        (max(of.values()) - value) / _HALF_GRID
        for of in top
        for value in of.values()
        if value < max(of.values())
    ]
    num_coarse = sum(abs(step - round(step)) * _HALF_GRID < _ON_GRID for step in steps)
    if num_coarse >= max(_MIN_STEPS, len(steps) / 2):
        warn_caller(
            "the server rounds logits to half precision, which puts errors of some hundredths on "
            "log-probs and makes candidates tie; start it with --dtype float32, or with "
            '--hf-overrides \'{"head_dtype": "float32"}\' for the last layer alone'
        )
    try:
        metrics = str(connection.get("/metrics"))
    except RequestRefused:
        # What stands before the server may pass the API alone: nobody can be asked.
        return
    cache = re.search(r"^vllm:cache_config_info\{(.*)\}", metrics, re.MULTILINE)
    settings = dict(re.findall(r'(\w+)="([^"]*)"', cache.group(1))) if cache else {}
    if settings.get("enable_prefix_caching") == "False":
        warn_caller(
            "the server encodes the whole prefix of every candidate and roll-out anew; start it "
            "with --enable-prefix-caching"
        )
    size = settings.get("block_size", "")
    if size.isdigit() and int(size) > _GOOD_BLOCK_SIZE:
        warn_caller(
            f"the server caches prefixes in blocks of {size} tokens and encodes the tokens after "
            f"the last full block with every roll-out; start it with --block-size "
            f"{_GOOD_BLOCK_SIZE} or less"
        )
