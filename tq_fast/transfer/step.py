"""One step of all trees: candidates, roll-outs, rewards, and the choice between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from ..copies import download
from ..errors import DecodingError
from ..ops import philox
from ..results import DecodeStats, Response, StepTrace
from ..rollouts.records import ReusedRollout, Rollout, RolloutId, RolloutWave, Root
from ..rollouts.streams import stream_keys
from .certificate import kl_divergence
from .choice import Candidates, choose
from .pruning import LazyArgmax, StepValues
from .roles import DecodePlan, Roles


class Step:
    """One step of the loop: the choice of the next token of every tree.

    Args:
        roles: the models.
        responses: one for each tree, none of them complete.
        reused: for each tree, the start of a greedy roll-out that the step before has run already.
        plan: the settings of the decode.
        stats: where counts and times are added.
    """

    def __init__(
        self,
        roles: Roles,
        responses: Sequence[Response],
        reused: Sequence[ReusedRollout | None],
        plan: DecodePlan,
        stats: DecodeStats,
    ) -> None:
        self.roles = roles
        self.responses = responses
        self.plan = plan
        self.config = plan.config
        self.stats = stats
        self.waves: list[RolloutWave] = []
        self.rollouts: dict[RolloutId, Rollout] = {}
        with stats.phase("candidates"):
            self._propose()
        self.reused: Mapping[tuple[int, int], ReusedRollout] = {
            (tree, root.candidates.index(start.candidate)): start
            for tree, (root, start) in enumerate(zip(self.roots, reused, strict=True))
            if start is not None and start.candidate in root.candidates
        }

    def evaluate(self) -> None:
        """Roll out and score until every choice is settled."""
        while rollout_ids := self._next_ids():
            self._evaluate(rollout_ids)
        self._count_skipped()

    def run(self) -> list[StepTrace]:
        """Roll out and score until every choice is settled, then choose the tokens."""
        self.evaluate()
        with self.stats.phase("reweight"):
            return choose(
                self.candidates,
                self.values,
                prior=self.plan.prior,
                keys=self.keys,
                lazy=self.lazy,
                config=self.config,
            )

    def _propose(self) -> None:
        """Propose the k likeliest next tokens of every tree and prepare the choice between them."""
        languages, config = self.roles.languages, self.config
        proposer = languages[self.plan.candidates_from]
        is_early = [response.step < config.min_new_tokens for response in self.responses]
        ids, own, lse = proposer.propose(config.k, is_early)
        logprobs = {
            role: own if engine is proposer else engine.logprobs(ids)
            for role, engine in languages.items()
        }
        drift = self._drift()
        ids, lse, *columns = download(ids, lse, *logprobs.values(), *drift)
        for tree, total in enumerate(lse.tolist()):
            if not math.isfinite(total):
                self._fail(tree, f"the logits sum to {total}")
        on_host = dict(zip(logprobs, columns, strict=False))
        self.candidates = Candidates(ids, on_host, columns[-1] if drift else None)
        self.roots = [
            Root(of_tree, response.prompt.key, response.step, config.horizon_at(response.step))
            for of_tree, response in zip(ids.tolist(), self.responses, strict=True)
        ]
        self.keys = stream_keys([(root.key, root.step, 0, 0) for root in self.roots])
        self.lazy = None
        if self.plan.is_lazy and self.plan.reward_bounds is not None:
            prior = on_host[self.plan.prior]
            noise = torch.zeros_like(prior)
            if config.strategy == "sample":
                noise = philox.gumbel(config.seed, self.keys[:, None], 0, ids)
            self.lazy = LazyArgmax(prior, noise, self.plan.reward_bounds, config)
        self.values = StepValues([root.num_rollouts(self.plan.eos, config) for root in self.roots])

    def _drift(self) -> list[torch.Tensor]:
        """KL(pi_BL || pi_sft) `[G]` over the full vocabulary; none where a law is not to be had."""
        if len(self.roles.languages) < 2:
            return []
        ours, theirs = (self.roles.languages[role].law() for role in ("baseline", "sft"))
        if ours is None or theirs is None:
            return []
        return [kl_divergence(ours, theirs.to(ours.device))]

    def _next_ids(self) -> list[RolloutId]:
        """Return the roll-outs to run next; none when every tree can choose."""
        if self.lazy is None:
            rollout_ids = self.values.missing_ids()
        else:
            with self.stats.phase("reweight"):
                rollout_ids = self.lazy.next_ids(self.values)
        return rollout_ids[: self.plan.max_rows]

    def _evaluate(self, rollout_ids: Sequence[RolloutId]) -> None:
        """Run and score the roll-outs `rollout_ids`."""
        config, phase = self.config, self.stats.phase
        with phase("rollout"):
            wave = self.roles.roller.roll_out(self.roots, rollout_ids, self.reused)
            for rollout in wave.rollouts:
                if math.isnan(rollout.logprob):
                    self._fail(rollout.id.tree, "a roll-out met logits that are not finite")
                self.rollouts[rollout.id] = rollout
        self.waves.append(wave)
        self.stats.rollout_steps += wave.num_steps
        with phase("reward"):
            scores = {
                role: scorer.score(wave.rollouts, self.responses)
                for role, scorer in self.roles.scorers.items()
            }
            ratios = None
            if config.needs_log_ratio:
                ratios = self._log_ratios(wave)
        baseline_scores = None
        if "baseline_reward" in self.roles.rewards:
            baseline_scores = scores.get("baseline_reward", scores["reward"])
        self.values.record(wave.rollouts, scores["reward"], baseline_scores, ratios)

    def _log_ratios(self, wave: RolloutWave) -> list[float]:
        """Return log pi_sft(tau) - log q(tau) of every roll-out of `wave`, drawn from q."""
        sft = self.roles.languages["sft"]
        if sft is self.roles.roller:
            # The model scored its own tokens when it drew them, and its rows are still needed.
            sums = [rollout.logprob for rollout in wave.rollouts]
        else:
            sums = sft.score(wave.rollouts)
        return [
            logprob - rollout.proposal_logprob
            for logprob, rollout in zip(sums, wave.rollouts, strict=True)
        ]

    def commit(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Append the candidates `(tree, candidate_idx)` to the trees of all models."""
        if not chosen:
            return
        tokens = [self.roots[tree].candidates[idx] for tree, idx in chosen]
        for engine in self.roles.engines.values():
            engine.commit(chosen, tokens, self.waves if engine is self.roles.roller else ())

    def reused_after(self, tree: int, choice: int) -> ReusedRollout | None:
        """Return what the next step can reuse of the greedy roll-out of `choice`, if anything.

        Call this before `commit`, which may write over what is reused.
        """
        config = self.config
        is_on = config.rollout == "greedy" and self.plan.speed.reuse_greedy
        if not is_on or not self.waves:
            return None
        rollout = self.rollouts.get(RolloutId(tree, choice, 0))
        if rollout is None or len(rollout.tokens) < 2 or rollout.tokens[0] in self.plan.eos:
            return None
        return self.roles.roller.reusable(self.waves[-1], rollout)

    def _count_skipped(self) -> None:
        run = sum(bool(rollout.tokens) for rollout in self.rollouts.values())
        possible = sum(
            len(root.candidates) * self.config.rollouts_per_candidate
            for root in self.roots
            if root.horizon
        )
        self.stats.rollouts_run += run
        self.stats.rollouts_skipped += possible - run

    def _fail(self, tree: int, message: str) -> NoReturn:
        response = self.responses[tree]
        raise DecodingError(message, prompt_idx=response.idx, step=response.step)
