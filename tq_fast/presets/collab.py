"""Collab (arXiv 2503.21720): several baselines propose and roll out, the best of them speaks.

    Q_j(s, z) = E_{tau ~ rho_j} r([s, z], tau)
    (z, j) = arg max log pi_prior(z | s) + Q_j(s, z) / alpha

over the k candidates of every baseline j; sampled, a token is drawn from the softmax over the union
of the candidates, each under the baseline that has the best Q for it. With one baseline this is
direct Transfer Q*, token for token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch

from ..config import DecodeConfig, Role
from ..copies import download
from ..decoder import TransferMethod
from ..engines.base import LanguageEngine
from ..errors import InvalidArgument
from ..models.served import require_local
from ..prompts import Prompt
from ..results import DecodeResult, DecodeStats, Response, StepTrace
from ..rewards.base import drop_from
from ..session import Session
from ..session.method import Report
from ..streaming import ChosenToken
from ..transfer.budget import BatchShape, MemoryPerPrompt
from ..transfer.choice import Candidates, choose
from ..transfer.pruning import StepValues
from ..transfer.roles import DecodePlan, Roles, memory_per_prompt, open_roles
from ..transfer.step import Step
from .call import OpenMethod, PresetCall

# Multiplied by the number of the baseline, it parts the random streams of their roll-outs.
_STREAM = 0x9E3779B97F4A7C15
# Stands for a place among the candidates of a baseline that did not propose a token.
_NO_CANDIDATE = -1


def open_collab(
    name: str,
    models: Mapping[str, Any],
    options: Mapping[str, Any],
    *,
    baselines: Sequence[Any] | None,
) -> OpenMethod:
    """Open decoding with several baselines."""
    if not isinstance(baselines, (list, tuple)) or not baselines:
        raise InvalidArgument(f"baselines must be a list of at least one model, got {baselines!r}")
    if models.get("baseline") is not None:
        raise InvalidArgument("baseline has no part in 'collab'; it takes a list, baselines")
    named: dict[str, Any] = {str(_role(i)): model for i, model in enumerate(baselines)}
    for role, model in named.items():
        if model is None:
            raise InvalidArgument(f"baselines must be models, but that of {role} is None")
    call = PresetCall(name, options, {**models, **named})
    call.require("reward")
    return call.open(CollabMethod)


def _role(number: int) -> Role:
    """The role of a baseline: "baseline", "baseline_2", ..."""
    return cast(Role, "baseline" if number == 0 else f"baseline_{number + 1}")


class CollabMethod:
    """Collab as a session runs it.

    Args:
        session: models and the reward.
        config: settings of Transfer Q*.
    """

    def __init__(self, session: Session, config: DecodeConfig) -> None:
        require_local(session.languages, "collab", "it compares the log-probs of all baselines")
        self.session = session
        self.config = config
        self.agents = [role for role in session.languages if role != "sft"]
        # The settings, checks and certificates are those of Transfer Q* with the first baseline.
        self.transfer = TransferMethod(session, config)
        self.rows_per_prompt = self.transfer.rows_per_prompt
        self.tokens_per_prompt = config.max_new_tokens
        self.num_new, self.room = self.transfer.num_new, self.transfer.room

    def _languages(self, agent: Role) -> dict[Role, Any]:
        """The models beside which an agent decodes, as Transfer Q* has them."""
        languages: dict[Role, Any] = {"baseline": self.session.languages[agent]}
        if "sft" in self.session.languages:
            languages["sft"] = self.session.languages["sft"]
        return languages

    def memory(self, prompts: Sequence[Prompt]) -> MemoryPerPrompt:
        """Return the bytes of a prompt and of a roll-out under every baseline."""
        plan, per_prompt, per_row = self.transfer.plan, 0, 0
        for number, agent in enumerate(self.agents):
            rewards = self.session.rewards if number == 0 else {}
            needed = memory_per_prompt(self._languages(agent), rewards, prompts, plan)
            per_prompt, per_row = per_prompt + needed.per_prompt, per_row + needed.per_row
        return MemoryPerPrompt(per_prompt, per_row, self.rows_per_prompt)

    def decode(
        self, responses: list[Response], shape: BatchShape, stats: DecodeStats, report: Report
    ) -> Iterator[ChosenToken]:
        """Decode the first prompts together, over a forest for every baseline."""
        # Bounds on the reward could settle a choice early, but not between several baselines.
        speed = dataclasses.replace(self.transfer.plan.speed, lazy_argmax=False)
        plan = dataclasses.replace(self.transfer.plan, max_rows=shape.max_rows, speed=speed)
        active = responses[: shape.num_prompts]
        loop = _CollabLoop(self._open(active, plan), active, plan)
        own = loop.stats
        try:
            while loop.active:
                for response, is_finished in loop.step():
                    report.token(response.idx)
                    if is_finished:
                        unused = self.tokens_per_prompt - len(response.token_ids)
                        result = self.transfer.finish(response)
                        report.finish(response.idx, result, num_unused=unused)
                    yield ChosenToken(response.idx, response.trace[-1], is_finished)
        finally:
            loop.count(self.agents)
            stats.add(own)

    def _open(self, active: Sequence[Response], plan: DecodePlan) -> list[Roles]:
        """Open a forest for every baseline; the SFT model and the reward have one for all."""
        prompts = [response.prompt for response in active]
        first = open_roles(
            self._languages(self.agents[0]),
            self.session.rewards,
            prompts,
            [],
            plan,
            self.session.forests,
        )
        opened = [first]
        for agent in self.agents[1:]:
            alone = {"baseline": self.session.languages[agent]}
            roles = open_roles(cast(Any, alone), {}, prompts, [], plan, self.session.forests)
            languages = {**first.languages, "baseline": roles.roller}
            opened.append(dataclasses.replace(roles, languages=languages, rewards=first.rewards))
        return opened

    def conclude(self, result: DecodeResult) -> None:
        """Warn of roll-outs that are too few."""
        self.transfer.conclude(result)


class _CollabLoop:
    """The loop over one forest for each baseline.

    Args:
        agents: the models of each baseline.
        responses: the prompts.
        plan: the settings of the decode.
    """

    def __init__(
        self, agents: Sequence[Roles], responses: Sequence[Response], plan: DecodePlan
    ) -> None:
        self.agents = list(agents)
        self.active = list(responses)
        self.plan = plan
        self.stats = DecodeStats()
        with self.stats.phase("prefill"):
            texts = [list(response.prompt.token_ids) for response in responses]
            for engine in self._engines():
                engine.encode(range(len(texts)), texts, shares=plan.speed.share_prefixes)

    def _engines(self) -> list[LanguageEngine]:
        """Every language model's engine once."""
        engines = [engine for roles in self.agents for engine in roles.languages.values()]
        return list({id(engine): engine for engine in engines}.values())

    def step(self) -> list[tuple[Response, bool]]:
        """Append a token to every response; return each with whether it is now complete."""
        steps = [self._evaluate(number, roles) for number, roles in enumerate(self.agents)]
        with self.stats.phase("reweight"):
            traces = self._choose(steps)
        with self.stats.phase("commit"):
            is_finished = [
                self.plan.is_complete([*response.token_ids, trace.token_id])
                for response, trace in zip(self.active, traces, strict=True)
            ]
            self._commit(steps, traces, is_finished)
            for response, trace in zip(self.active, traces, strict=True):
                response.token_ids.append(trace.token_id)
                response.trace.append(trace)
            self.stats.num_steps += len(traces)
            appended = list(zip(self.active, is_finished, strict=True))
            for scorer in self.agents[0].scorers.values():
                scorer.forget(self.active)
        for tree in reversed(range(len(appended))):
            if is_finished[tree]:
                self._drop(tree)
        return appended

    def _evaluate(self, number: int, roles: Roles) -> Step:
        """Propose, roll out and score the candidates of one baseline."""
        responses = self.active
        if number:
            responses = [
                dataclasses.replace(response, prompt=_with_stream(response.prompt, number))
                for response in responses
            ]
        step = Step(roles, responses, [None] * len(responses), self.plan, self.stats)
        step.evaluate()
        return step

    def _choose(self, steps: Sequence[Step]) -> list[StepTrace]:
        """Choose among the candidates of all baselines."""
        config, prior, keys = self.plan.config, self.plan.prior, steps[0].keys
        candidates, values = self._merge(steps)
        traces = choose(candidates, values, prior=prior, keys=keys, lazy=None, config=config)
        agents = torch.arange(len(steps)).repeat_interleave(steps[0].candidates.ids.shape[1])
        if len(steps) == 1:
            return [dataclasses.replace(trace, agents=agents) for trace in traces]
        kept = torch.stack([_best_of_each(trace) for trace in traces])
        logprobs = {
            role: found.masked_fill(~kept, -torch.inf) if role == prior else found
            for role, found in candidates.logprobs.items()
        }
        reduced = dataclasses.replace(candidates, logprobs=logprobs)
        traces = choose(reduced, values, prior=prior, keys=keys, lazy=None, config=config)
        return [_without(trace, agents, own) for trace, own in zip(traces, kept, strict=True)]

    def _merge(self, steps: Sequence[Step]) -> tuple[Candidates, StepValues]:
        """The candidates of all baselines side by side, `[G, J k]`, and their rewards."""
        ids = torch.cat([step.candidates.ids for step in steps], 1)
        logprobs = {
            role: torch.cat([step.candidates.logprobs[role] for step in steps], 1)
            for role in steps[0].candidates.logprobs
        }
        if len(steps) > 1:
            # What "baseline" says of every candidate is what the first one says.
            own = steps[0].candidates.logprobs["baseline"]
            others = self.agents[0].languages["baseline"].logprobs(ids[:, own.shape[1] :])
            logprobs["baseline"] = torch.cat([own, *download(others)], 1)
        values = StepValues.beside([step.values for step in steps])
        return Candidates(ids, logprobs, steps[0].candidates.kl_baseline_to_sft), values

    def _commit(
        self, steps: Sequence[Step], traces: Sequence[StepTrace], is_finished: Sequence[bool]
    ) -> None:
        """Move the chosen tokens into the prefixes of all models."""
        staying = [tree for tree, ended in enumerate(is_finished) if not ended]
        tokens = [traces[tree].token_id for tree in staying]
        if not staying:
            return
        waves = {id(step.roles.roller): step for step in steps}
        for engine in self._engines():
            step = waves.get(id(engine))
            chosen = [(tree, _NO_CANDIDATE) for tree in staying]
            if step is not None:
                own = [step.roots[tree].candidates for tree in staying]
                chosen = [
                    (tree, ids.index(token) if token in ids else _NO_CANDIDATE)
                    for tree, ids, token in zip(staying, own, tokens, strict=True)
                ]
            engine.commit(chosen, tokens, () if step is None else step.waves)

    def _drop(self, tree: int) -> None:
        drop_from(self.active, tree)
        for engine in self._engines():
            engine.drop_tree(tree)
        for scorer in self.agents[0].scorers.values():
            scorer.drop_tree(tree)

    def count(self, names: Sequence[Role]) -> None:
        """Write what went through the models into `stats`."""
        parts: dict[str, Any] = dict(self.agents[0].by_role)
        for name, roles in zip(names[1:], self.agents[1:], strict=True):
            parts[name] = roles.roller
        for role, part in parts.items():
            self.stats.token_forwards[role] = part.num_token_forwards
            self.stats.peak_kv_bytes[role] = part.peak_kv_bytes


def _with_stream(prompt: Prompt, number: int) -> Prompt:
    """The prompt with the random streams of baseline `number`."""
    key = (prompt.key ^ number * _STREAM) % 2**64
    return dataclasses.replace(prompt, key=key - 2**64 if key >= 2**63 else key)


def _best_of_each(trace: StepTrace) -> torch.Tensor:
    """Which candidates have the best Q for their token, bool `[k]`; the first of equals."""
    best: dict[int, int] = {}
    for i, (token, q) in enumerate(zip(trace.candidates.tolist(), trace.q.tolist(), strict=True)):
        if token not in best or q > float(trace.q[best[token]]):
            best[token] = i
    kept = torch.zeros(len(trace.candidates), dtype=torch.bool)
    kept[list(best.values())] = True
    return kept


def _without(trace: StepTrace, agents: torch.Tensor, kept: torch.Tensor) -> StepTrace:
    """The step with those candidates alone that took part in the choice."""
    return dataclasses.replace(
        trace,
        candidates=trace.candidates[kept],
        rewards=trace.rewards[kept],
        q=trace.q[kept],
        q_stderr=trace.q_stderr[kept],
        ess=trace.ess[kept],
        prior_logprobs=trace.prior_logprobs[kept],
        final_logprobs=trace.final_logprobs[kept],
        choice=int(kept[: trace.choice].sum()),
        agents=agents[kept],
    )
