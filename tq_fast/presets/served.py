"""Whole texts, or what is left of them, drawn by a server (by a forest: `drawing.py`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch

from ..config import DecodeConfig, Role
from ..engines.remote import request_seed, rollout_law
from ..errors import InvalidArgument
from ..models.served import ServedModel
from ..results import DecodeStats, Response
from ..rollouts.streams import stream_keys
from ..servers import DrawnTokens, LanguageServer, RolloutRequest, SamplingLaw
from ..session import Session
from .drawing import NO_CANDIDATE, Drawn, TextForest
from .laws import TokenLaw


@dataclasses.dataclass(frozen=True)
class ServedLaw:
    """The law of a model behind a URL, after temperature and truncation, drawn from by its server.

    Attributes:
        role: the model.
        server: the same, opened for this law.
        eos: ids that end a response.
        sampling: temperature and truncation.
    """

    role: Role
    server: LanguageServer
    eos: tuple[int, ...]
    sampling: SamplingLaw

    reads_hidden: Role | None = None
    reads_reward: bool = False

    @property
    def roles(self) -> tuple[Role, ...]:
        """The model, where the server names its own log-probs; else it is measured like others."""
        return (self.role,) if self.sampling.is_own else ()

    @property
    def columns(self) -> tuple[str, ...]:
        of_model = [f"{kind}:{role}" for role in self.roles for kind in ("logprob", "kl")]
        return ("policy", "drawn", *of_model)

    @property
    def prior(self) -> str:
        return self.role


# What whole texts are drawn from: a law over the forests of models, or a server's.
Law: TypeAlias = TokenLaw | ServedLaw


def served_law(session: Session, role: Role, config: DecodeConfig, *, is_greedy: bool) -> ServedLaw:
    """Return the law of the served model `role`, after its server was found to serve it.

    Raises:
        InvalidArgument: min_new_tokens is set, for which a server names other log-probs.
        UnsupportedModel: the server cannot draw from it; the message says what to change there.
    """
    model = session.languages[role]
    assert isinstance(model, ServedModel), "a model of this process has another law"
    if config.min_new_tokens:
        raise InvalidArgument(
            f"min_new_tokens={config.min_new_tokens} cannot be honoured for whole texts of a model "
            f"behind a URL ({role})"
        )
    sampling = (
        SamplingLaw(temperature=0.0)
        if is_greedy
        else rollout_law(dataclasses.replace(config, rollout="sample"))
    )
    eos = session.end_ids(config)
    # Measuring the law after truncation takes the log-probs of whole texts under the model itself.
    server = model.open(k=1, law=sampling, end_ids=(), needs_scores=not sampling.is_own)
    return ServedLaw(role, server, eos, sampling)


def open_texts(
    session: Session,
    law: Law,
    responses: Sequence[Response],
    *,
    num_rows: int,
    config: DecodeConfig,
    keeps_texts: bool,
) -> TextForest | ServedTexts:
    """Return what draws texts from `law`; the arguments are those of `TextForest`."""
    if isinstance(law, ServedLaw):
        return ServedTexts(session, law, responses, config=config)
    return TextForest(
        session, law, responses, num_rows=num_rows, config=config, keeps_texts=keeps_texts
    )


class ServedTexts:
    """The texts of some prompts, which a server draws; in the place of a `TextForest`.

    Args:
        session: the models.
        law: what tokens are drawn from.
        responses: the prompts.
        config: max_new_tokens, stop and seed are read.
    """

    def __init__(
        self,
        session: Session,
        law: ServedLaw,
        responses: Sequence[Response],
        *,
        config: DecodeConfig,
    ) -> None:
        self.law = law
        self.config = config
        self.responses = responses
        self.stop = session.stop_strings(config)
        self.num_drawn = 0

    def prefill(self) -> None:
        """The server encodes what it is sent."""

    def seek(self, texts: Mapping[int, Sequence[int]]) -> None:
        """Every request carries its whole text."""

    def keep(self, drawn: Sequence[Drawn]) -> None:
        """The server keeps what it likes."""

    def draw(
        self,
        numbers: Sequence[int],
        *,
        stage: int,
        before: Mapping[int, Sequence[int]],
        limit: int | None = None,
        on_depth: Callable[[int], None] = lambda num: None,
    ) -> list[Drawn]:
        """Draw a continuation of each of `numbers`, which follow one another, for every tree.

        The arguments are those of `TextForest.draw`.

        Raises:
            ServerUnavailable: the server stayed away.
        """
        trees = sorted(before)
        keys = stream_keys(
            [(self.responses[tree].prompt.key, stage, NO_CANDIDATE, 0) for tree in trees]
        )
        is_greedy = self.law.sampling.temperature == 0.0
        requests = []
        for tree, key in zip(trees, keys.tolist(), strict=True):
            left = self.config.max_new_tokens - len(before[tree])
            requests.append(
                RolloutRequest(
                    [*self.responses[tree].prompt.token_ids, *before[tree]],
                    left if limit is None else min(limit, left),
                    seed=request_seed(self.config.seed, key) + numbers[0],
                    # Greedy texts are all the same.
                    num=1 if is_greedy else len(numbers),
                )
            )
        answers = self.law.server.rollouts(requests, self.law.sampling, self.law.eos)
        drawn = [
            self._drawn(tree, before[tree], answer[0 if is_greedy else i])
            for tree, answer in zip(trees, answers, strict=True)
            for i in range(len(numbers))
        ]
        longest = max(len(one.token_ids) for one in drawn)
        for _ in range(longest):
            on_depth(len(drawn))
        return drawn

    def _drawn(self, tree: int, before: Sequence[int], answer: DrawnTokens) -> Drawn:
        num = len(answer.tokens)
        if self.stop:
            texts = ([*before, *answer.tokens[:end]] for end in range(1, num + 1))
            met = [end for end, text in enumerate(texts, 1) if self.stop.is_met(text)]
            num = min(met, default=num)
        self.num_drawn += num
        logprobs = torch.tensor(answer.logprobs[:num], dtype=torch.float32)
        is_greedy, role = self.law.sampling.temperature == 0.0, self.law.role
        columns = {"drawn": torch.zeros(num) if is_greedy else logprobs}
        if self.law.sampling.is_own:
            kl = -logprobs if is_greedy else torch.zeros(num)
            columns |= {"policy": logprobs, f"logprob:{role}": logprobs, f"kl:{role}": kl}
        else:
            columns["policy"] = torch.full((num,), torch.nan)
        return Drawn(tree, 0, answer.tokens[:num], columns)

    def count(self, stats: DecodeStats) -> None:
        """Write what was drawn into `stats`; what the server encoded is not known."""
        own = DecodeStats()
        own.token_forwards[self.law.role] = self.num_drawn
        stats.add(own)
