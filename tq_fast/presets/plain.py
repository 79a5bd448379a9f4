"""Decoding without a search: responses from one law, or the best of n of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ..config import DecodeConfig, Role, is_real, require_int
from ..errors import InvalidArgument
from ..forest.support import check_runs
from ..models.options import ROLES
from ..prompts import Prompt
from ..results import (
    Certificate,
    DecodeResult,
    DecodeStats,
    KlKind,
    PromptResult,
    Response,
    StageTrace,
    StepTrace,
)
from ..session import Session
from ..session.method import Report
from ..streaming import ChosenToken, settled_tokens
from ..transfer.budget import BatchShape, MemoryPerPrompt
from .call import OpenMethod, PresetCall
from .drawing import Drawn
from .rounds import Round
from .scoring import TextScorer, check_scoring, local_models, score_others
from .served import Law, open_texts
from .sources import Source, TextSource, ValueLike, mixture_law


def open_plain(name: str, models: Mapping[str, Any], options: Mapping[str, Any]) -> OpenMethod:
    """Open the plain decoding of the model that the method is named after."""
    roles = ("sft",) if name == "sft" else ("baseline", "sft")
    call = PresetCall(name, options, {role: models[role] for role in roles})
    call.require(name)
    weights: dict[Role, float] = {"sft": 1.0} if name == "sft" else {"baseline": 1.0, "sft": 0.0}
    return call.open(_mixture(weights))


def open_dera(
    name: str, models: Mapping[str, Any], options: Mapping[str, Any], *, mix: float
) -> OpenMethod:
    """Open DeRA with the weight `mix` of the baseline."""
    call = PresetCall(name, options, {role: models[role] for role in ROLES})
    call.require("sft", "baseline")
    if not is_real(mix) or not math.isfinite(mix) or mix < 0:
        raise InvalidArgument(f"mix must be a finite number of at least 0, got {mix!r}")
    weights: dict[Role, float] = {"sft": 1.0 - mix, "baseline": float(mix)}
    return call.open(_mixture(weights))


def open_best_of_n(
    name: str,
    models: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    n: int,
    source: Source,
    value: ValueLike | None,
) -> OpenMethod:
    """Open the best of `n` texts from `source`."""
    require_int("n", n)
    chosen = TextSource(name, source, value)
    call = PresetCall(name, options, chosen.models_of(models, options))
    chosen.require(call)
    call.require("reward")

    def make(session: Session, config: DecodeConfig) -> PlainMethod:
        law = chosen.law(session, config, is_greedy=False, measures_sft=n == 1)
        return PlainMethod(session, law, config, num=n)

    return call.open(make)


def open_value_guided(
    name: str, models: Mapping[str, Any], options: Mapping[str, Any], *, value: ValueLike | None
) -> OpenMethod:
    """Open decoding from the prior under the value head `value`."""
    if value is None:
        raise InvalidArgument(f"value is needed by the method {name!r}, got None")
    chosen = TextSource(name, "value", value)
    call = PresetCall(name, options, chosen.models_of(models, options))
    chosen.require(call)

    def make(session: Session, config: DecodeConfig) -> PlainMethod:
        is_greedy = config.strategy == "greedy"
        law = chosen.law(session, config, is_greedy=is_greedy, measures_sft=True)
        return PlainMethod(session, law, config)

    return call.open(make)


def _mixture(weights: Mapping[Role, float]) -> Callable[[Session, DecodeConfig], PlainMethod]:
    def make(session: Session, config: DecodeConfig) -> PlainMethod:
        is_greedy = config.strategy == "greedy"
        law = mixture_law(session, weights, config, is_greedy=is_greedy)
        return PlainMethod(session, law, config)

    return make


class PlainMethod:
    """Plain sampling as a session runs it.

    Args:
        session: models, and the reward that chooses among several responses or scores a single one.
        law: what responses are drawn from.
        config: strategy, rollout_temperature, rollout_top_k, rollout_top_p, max_new_tokens,
            min_new_tokens, stop, eos_token_id, num_return_sequences, skip_special_tokens, seed and
            backend are read.
        num: responses drawn for a prompt; the reward chooses the first of the highest score.
        keeps_all: whether the stage that holds all of them is there even where they are one.
    """

    def __init__(
        self,
        session: Session,
        law: Law,
        config: DecodeConfig,
        *,
        num: int = 1,
        keeps_all: bool = False,
    ) -> None:
        self.session = session
        self.keeps_all = keeps_all
        self.law = law
        self.config = config
        session.stop_strings(config)
        check_scoring(session, law.roles)
        self.rows_per_prompt = num
        self.rounds = [Round(num, config.max_new_tokens)]
        self.tokens_per_prompt = num * config.max_new_tokens
        self.num_new = config.max_new_tokens
        self.room = f"max_new_tokens={config.max_new_tokens}"

    def memory(self, prompts: Sequence[Prompt]) -> MemoryPerPrompt:
        """Return the bytes of a prompt and of a response, for the longest of `prompts`."""
        return text_memory(self.session, self.law, prompts, self.config, rows=self.rows_per_prompt)

    def decode(
        self, responses: list[Response], shape: BatchShape, stats: DecodeStats, report: Report
    ) -> Iterator[ChosenToken]:
        """Decode the first prompts over one forest for each model, in waves of responses."""
        group = responses[: shape.num_prompts]
        num = self.rows_per_prompt
        per_wave = max(1, min(num, shape.max_rows // len(group)))
        own, counted = DecodeStats(), report.bar.num_done
        try:
            drawn = self._draw(group, per_wave, own, report)
            scores = self._score(group, drawn, per_wave, own)
            results = self._finish(group, drawn, scores, own)
        except torch.OutOfMemoryError:
            report.bar.advance(counted - report.bar.num_done)
            raise
        stats.add(own)
        for response, result in zip(group, results, strict=True):
            stats.num_steps += len(result.sequence)
            report.finish(response.idx, result, num_unused=0)
        for response, result in zip(group, results, strict=True):
            yield from settled_tokens(response.idx, result)

    def conclude(self, result: DecodeResult) -> None:
        """Nothing is estimated, so that there is nothing to warn of."""

    def _draw(
        self, group: Sequence[Response], per_wave: int, stats: DecodeStats, report: Report
    ) -> list[Drawn]:
        """Return every response of every prompt, ordered by prompt and then by number."""
        num, most = self.rows_per_prompt, self.config.max_new_tokens
        texts = open_texts(
            self.session,
            self.law,
            group,
            num_rows=len(group) * per_wave,
            config=self.config,
            keeps_texts=False,
        )
        with stats.phase("prefill"):
            texts.prefill()
        drawn: list[Drawn] = []
        before: dict[int, list[int]] = {tree: [] for tree in range(len(group))}
        with stats.phase("rollout"):
            for start in range(0, num, per_wave):
                numbers = range(start, min(start + per_wave, num))
                new = texts.draw(numbers, stage=0, before=before, on_depth=report.bar.advance)
                longest = max(len(one.token_ids) for one in new)
                report.bar.advance(len(new) * (most - longest))
                stats.rollout_steps += longest - 1
                drawn += new
        texts.count(stats)
        return sorted(drawn, key=lambda one: one.tree)

    def _score(
        self,
        group: Sequence[Response],
        drawn: Sequence[Drawn],
        per_wave: int,
        stats: DecodeStats,
    ) -> list[float]:
        """Return the score of every response; empty without a reward."""
        if "reward" not in self.session.rewards:
            return []
        with stats.phase("reward"):
            rows = len(group) * per_wave
            scorer = TextScorer(self.session, group, num_rows=rows, config=self.config)
            scores = scorer.score([(one.tree, one.token_ids) for one in drawn])
            scorer.count(stats)
        stats.rollouts_run = len(drawn)
        return scores

    def _finish(
        self,
        group: Sequence[Response],
        drawn: Sequence[Drawn],
        scores: Sequence[float],
        stats: DecodeStats,
    ) -> list[PromptResult]:
        """Return the result of each prompt: its first response of the highest score."""
        num, results = self.rows_per_prompt, []
        chosen = []
        for start in range(0, len(drawn), num):
            own = list(scores[start : start + num])
            chosen.append(own.index(max(own)) if own else 0)
        winners = [drawn[tree * num + best] for tree, best in enumerate(chosen)]
        texts = [one.token_ids for one in winners]
        others = score_others(self.session, self.law.roles, group, texts, self.config, stats)
        for tree, winner in enumerate(winners):
            mine = drawn[tree * num : (tree + 1) * num]
            rewards = torch.tensor(scores[tree * num : (tree + 1) * num], dtype=torch.float32)
            stages = []
            if num > 1 or self.keeps_all:
                stages = [StageTrace(0, rewards, chosen[tree], [one.token_ids for one in mine])]
            logprobs = {role: sums[tree] for role, sums in others.items()}
            extra_kl = best_of_kl(num) if num > 1 else None
            certificate = certify_text(
                winner.columns, self.law, extra_kl=extra_kl, logprobs=logprobs
            )
            results.append(
                PromptResult(
                    self.session.text_of(winner.token_ids, self.config),
                    torch.tensor(winner.token_ids),
                    trace_tokens(winner.columns, winner.token_ids, rewards),
                    certificate,
                    stages,
                )
            )
        return results


def best_of_kl(num: int) -> float:
    """Return the bound on the divergence of the best of `num` from the law drawn from, nats."""
    return math.log(num) - (num - 1) / num


def text_memory(
    session: Session,
    law: Law,
    prompts: Sequence[Prompt],
    config: DecodeConfig,
    *,
    rows: int,
    keeps_texts: bool = False,
) -> MemoryPerPrompt:
    """Return the bytes of a prompt and of a row of whole texts, for the longest of `prompts`."""
    models = local_models(session, law.roles)
    longest, most = max(len(prompt.token_ids) for prompt in prompts), config.max_new_tokens
    per_token = sum(check_runs(model) for model in models)
    logits = 2 * 4 * session.vocab_size * len(models)
    reward = session.rewards.get("reward")
    if reward is not None and law.reads_reward:
        # The reward model runs beside the prior, too, over a forest of its own.
        per_token += reward.kv_bytes_per_token()
    scored = 0 if reward is None else reward.kv_bytes_per_token() * (longest + most)
    per_prompt, per_row = per_token * longest + scored, per_token * most + logits + scored
    if keeps_texts:
        per_prompt += per_token * most
        if "sft" not in law.roles:
            # The texts are read by the SFT model in the end, while the other forests still stand.
            for model in local_models(session, ["sft"]):
                per_prompt += check_runs(model) * (longest + most)
    return MemoryPerPrompt(per_prompt, per_row, rows)


def trace_tokens(
    columns: Mapping[str, torch.Tensor], token_ids: Sequence[int], rewards: torch.Tensor
) -> list[StepTrace]:
    """Trace one candidate a step, the token that was drawn; the first step holds all scores.

    Args:
        columns: what the law recorded of every token, `[T]`.
        token_ids: the tokens.
        rewards: fp32 `[n]`.
    """
    unknown = torch.full((len(token_ids),), math.nan, dtype=torch.float32)
    q, values = columns.get("q", unknown), columns.get("value")
    scores = [rewards[None]] + [torch.empty(1, 0, dtype=torch.float32)] * (len(token_ids) - 1)

    def divergence(role: str, step: int) -> float | None:
        found = columns.get(f"kl:{role}")
        return None if found is None else float(found[step])

    return [
        StepTrace(
            candidates=torch.tensor([token]),
            rewards=scores[step],
            q=q[step, None],
            q_stderr=unknown[step, None],
            ess=unknown[step, None],
            prior_logprobs=columns["policy"][step, None],
            final_logprobs=columns["drawn"][step, None],
            kl_to_sft=divergence("sft", step),
            kl_to_baseline=divergence("baseline", step),
            choice=0,
            value=None if values is None else float(values[step]),
        )
        for step, token in enumerate(token_ids)
    ]


def certify_text(
    columns: Mapping[str, torch.Tensor],
    law: Law,
    *,
    extra_kl: float | None,
    logprobs: Mapping[str, float] | None = None,
    is_approximate: bool = False,
) -> Certificate:
    """Return the certificate of a text that was drawn from `law`, or chosen among several.

    Args:
        columns: what the law recorded of every token, `[T]`.
        law: what the tokens were drawn from.
        extra_kl: bound on the divergence that the choice adds, nats; None where the method makes
            none, whatever came of this one text. The best of n diverges from the law that it was
            drawn from by at most log n - (n - 1) / n, and the certificate gives this bound in place
            of the divergence. To a model it adds the log-ratio of the text itself, so that the mean
            over responses bounds the divergence.
        logprobs: log-prob of the whole text under models that the law does not read, by role.
        is_approximate: whether `extra_kl` is a bound under an assumption that holds roughly.

    The divergence of a single text is exact, whatever truncates the law that it was drawn from.
    """
    # The log-ratio of one text is the divergence on the average alone.
    is_approximate = is_approximate or (extra_kl is None and bool(logprobs))
    bound: KlKind = "approximate" if is_approximate else "at most"
    is_exact = extra_kl is None and not logprobs
    totals: dict[str, float | None] = {"sft": None, "baseline": None}
    for role, logprob in (logprobs or {}).items():
        totals[role] = (extra_kl or 0.0) + float(columns["drawn"].sum()) - logprob
    for role in ("sft", "baseline"):
        if f"logprob:{role}" not in columns:
            continue
        if extra_kl is None:
            totals[role] = float(columns[f"kl:{role}"].sum())
        else:
            ratios = columns["drawn"] - columns[f"logprob:{role}"]
            totals[role] = extra_kl + float(ratios.sum())
    return Certificate(
        kl_to_sft=totals["sft"],
        kl_to_baseline=totals["baseline"],
        log_prior_mass=0.0,
        prior=law.prior,
        kl_bound=None,
        kl_kind="exact" if is_exact else bound,
    )
