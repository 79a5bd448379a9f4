"""The loop of Transfer Q* (arXiv 2405.20495, Algorithm 1) over one forest, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from . import estimators, ops
from .config import DecodeConfig
from .errors import DecodingError, RewardError
from .models.language import LanguageForest
from .models.reward import RewardSession, drop_from
from .prompts import Prompt
from .results import DecodeStats, StepTrace
from .rollouts import Branch, Rollouts, run_rollouts


@dataclasses.dataclass(frozen=True)
class Players:
    """The models of one decode, each over a forest with one tree a prompt.

    Attributes:
        baseline: pi_BL; it rolls out.
        sft: pi_sft, or None.
        reward: the target reward.
        baseline_reward: the reward that the baseline was aligned to, or None.
    """

    baseline: LanguageForest
    sft: LanguageForest | None
    reward: RewardSession
    baseline_reward: RewardSession | None


@dataclasses.dataclass
class Response:
    """One prompt's response in the making: `idx` is the prompt's position in the call."""

    idx: int
    prompt: Prompt
    token_ids: list[int] = dataclasses.field(default_factory=list)
    trace: list[StepTrace] = dataclasses.field(default_factory=list)


class ForestDecoder:
    """Decodes the prompts of one forest together, one token each a step."""

    def __init__(
        self,
        players: Players,
        responses: Sequence[Response],
        config: DecodeConfig,
        *,
        prior: str,
        eos: tuple[int, ...],
        stats: DecodeStats,
    ) -> None:
        self.players = players
        self.active = list(responses)
        self.config = config
        self.prior = prior
        self.eos = eos
        self.stats = stats
        forests = [forest for forest in (players.baseline, players.sft) if forest is not None]
        self.vocab_size = min(forest.vocab_size for forest in forests)

    def run(self, on_token: Callable[[Response, bool], None]) -> None:
        """Decode every response to its end; `on_token(response, is_finished)` after each token."""
        with self.stats.phase("prefill"):
            for forest in (self.players.baseline, self.players.sft):
                if forest is not None:
                    for tree, response in enumerate(self.active):
                        forest.prefill(tree, response.prompt.token_ids)
        for step in range(self.config.max_new_tokens):
            if not self.active:
                return
            self._step(step, on_token)

    def _step(self, step: int, on_token: Callable[[Response, bool], None]) -> None:
        stats, config = self.stats, self.config
        with stats.phase("candidates"):
            ids, logprobs = self._candidates(step)
            candidates = ids.tolist()
        horizon = config.horizon
        if horizon is None:
            horizon = config.max_new_tokens - step - 1
        with stats.phase("rollout"):
            rollouts = run_rollouts(
                self.players.baseline,
                candidates,
                horizon=horizon,
                prompt_keys=[response.prompt.key for response in self.active],
                step=step,
                eos=self.eos,
                config=config,
                vocab_size=self.vocab_size,
            )
        self._count(rollouts, len(candidates), horizon)
        branches = rollouts.branches
        with stats.phase("reward"):
            scores = self._score(self.players.reward, branches, candidates, step)
            baseline_scores = None
            if self.players.baseline_reward is not None:
                session = self.players.baseline_reward
                baseline_scores = self._score(session, branches, candidates, step)
        with stats.phase("reweight"):
            traces = self._reweigh(
                step, ids, logprobs, candidates, branches, scores, baseline_scores
            )
        with stats.phase("commit"):
            finished = self._commit(step, rollouts, traces)
        for response, is_finished in finished:
            on_token(response, is_finished)

    def _candidates(self, step: int) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Candidates `[G, k]` and, for each language model, their log-probs `[G, k]`."""
        tips = {"baseline": self.players.baseline.tip}
        if self.players.sft is not None:
            tips["sft"] = self.players.sft.tip
        proposed = ops.topk_logprobs(
            tips[self.config.candidates_from],
            self.config.k,
            vocab_size=self.vocab_size,
            backend=self.config.backend,
        )
        for tree, lse in enumerate(proposed.lse.tolist()):
            if not math.isfinite(lse):
                self._fail(DecodingError, tree, step, "the logits are not finite")
        logprobs = {self.config.candidates_from: proposed.logprobs}
        for role, tip in tips.items():
            if role not in logprobs:
                logits = tip[:, : self.vocab_size].float()
                logprobs[role] = logits.gather(1, proposed.ids) - logits.logsumexp(1, keepdim=True)
        return proposed.ids, logprobs

    def _score(
        self,
        session: RewardSession,
        branches: Sequence[Branch],
        candidates: Sequence[Sequence[int]],
        step: int,
    ) -> list[float]:
        responses = [
            [*self.active[b.tree].token_ids, candidates[b.tree][b.candidate_idx], *b.tokens]
            for b in branches
        ]
        trees = [branch.tree for branch in branches]
        try:
            scores = session.score(trees, responses)
        except Exception as error:
            if isinstance(error, (KeyboardInterrupt, torch.OutOfMemoryError)):
                raise
            self._fail(RewardError, 0, step, f"the reward raised {error!r}", error)
        if len(scores) != len(branches):
            message = f"the reward returned {len(scores)} scores for {len(branches)} responses"
            self._fail(RewardError, 0, step, message)
        for branch, score in zip(branches, scores, strict=True):
            if not math.isfinite(score):
                self._fail(RewardError, branch.tree, step, f"the reward returned {score}")
        return scores

    def _reweigh(
        self,
        step: int,
        ids: torch.Tensor,
        logprobs: dict[str, torch.Tensor],
        candidates: Sequence[Sequence[int]],
        branches: Sequence[Branch],
        scores: Sequence[float],
        baseline_scores: Sequence[float] | None,
    ) -> list[StepTrace]:
        """Turn scores into values, reweight the prior and choose one candidate a tree."""
        config = self.config
        lengths, rewards = self._by_candidate(branches, scores, ids)
        log_weights = baseline_rewards = log_ratio = None
        if baseline_scores is not None:
            _, baseline_rewards = self._by_candidate(branches, baseline_scores, ids)
        if config.transfer == "indirect" and config.weights == "log_ratio":
            ratios = self._log_ratios(branches, candidates)
            _, log_ratio = self._by_candidate(branches, ratios, ids)
        values, num_values = rewards, lengths
        if config.transfer == "indirect" and config.weights == "published":
            published = estimators.published_values(config, rewards, baseline_rewards, lengths)
            values, num_values = published[..., None], torch.ones_like(lengths)
        else:
            log_weights = estimators.log_weights(config, rewards, baseline_rewards, log_ratio)
        chosen = ops.reweight_sample(
            logprobs[self.prior],
            ids,
            values,
            log_weights,
            num_values,
            alpha=config.alpha,
            estimator=config.estimator,
            greedy=config.strategy == "greedy",
            seed=config.seed,
            keys=torch.tensor([r.prompt.key for r in self.active], device=ids.device),
            step=step,
            backend=config.backend,
        )
        divergence = {
            role: estimators.kl_divergence(chosen.final_logprobs, logprobs[role]).tolist()
            for role in logprobs
        }
        used = torch.arange(rewards.shape[2], device=ids.device) < lengths[..., None]
        shown = torch.where(used, rewards, math.nan).cpu()
        columns = [t.cpu() for t in (ids, chosen.q, chosen.q_stderr, chosen.ess)]
        policies = [t.cpu() for t in (logprobs[self.prior], chosen.final_logprobs)]
        return [
            StepTrace(
                candidates=columns[0][tree],
                rewards=shown[tree],
                q=columns[1][tree],
                q_stderr=columns[2][tree],
                ess=columns[3][tree],
                prior_logprobs=policies[0][tree],
                final_logprobs=policies[1][tree],
                kl_to_sft=divergence["sft"][tree] if "sft" in divergence else None,
                kl_to_baseline=divergence["baseline"][tree],
                choice=choice,
            )
            for tree, choice in enumerate(chosen.choice.tolist())
        ]

    def _by_candidate(
        self, branches: Sequence[Branch], numbers: Sequence[float], ids: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return how many numbers each candidate has `[G, k]`, and the numbers `[G, k, n]`."""
        table: list[list[list[float]]] = [[[] for _ in row] for row in ids]
        for branch, number in zip(branches, numbers, strict=True):
            table[branch.tree][branch.candidate_idx].append(number)
        lengths = torch.tensor([[len(cell) for cell in row] for row in table], device=ids.device)
        width = int(lengths.max())
        padded = [[cell + [0.0] * (width - len(cell)) for cell in row] for row in table]
        return lengths, torch.tensor(padded, dtype=torch.float32, device=ids.device)

    def _log_ratios(
        self, branches: Sequence[Branch], candidates: Sequence[Sequence[int]]
    ) -> list[float]:
        """log pi_sft(tau) - log q(tau) of every roll-out, q being what it was drawn from."""
        ratios = [0.0] * len(branches)
        drawn = [i for i, branch in enumerate(branches) if branch.tokens]
        if drawn:
            rows = [
                [candidates[branches[i].tree][branches[i].candidate_idx], *branches[i].tokens]
                for i in drawn
            ]
            sft = self.players.sft.score_rows(
                rows, [branches[i].tree for i in drawn], vocab_size=self.vocab_size
            )
            for i, logprob in zip(drawn, sft, strict=True):
                ratios[i] = logprob - branches[i].proposal_logprob
        return ratios

    def _commit(
        self, step: int, rollouts: Rollouts, traces: Sequence[StepTrace]
    ) -> list[tuple[Response, bool]]:
        """Append the chosen tokens, move their KV into the prefixes, drop what is complete."""
        is_last = step + 1 == self.config.max_new_tokens
        appended, staying = [], []
        for tree, (response, trace) in enumerate(zip(self.active, traces, strict=True)):
            response.token_ids.append(trace.token_id)
            response.trace.append(trace)
            is_finished = is_last or trace.token_id in self.eos
            appended.append((response, is_finished))
            if not is_finished:
                staying.append((tree, trace))
        self.stats.num_steps += len(appended)
        if staying:
            trees = [tree for tree, _ in staying]
            tokens = [trace.token_id for _, trace in staying]
            chosen = [(tree, trace.choice) for tree, trace in staying]
            if rollouts.first_logits is None:
                self.players.baseline.advance(trees, tokens)
            else:
                tips = rollouts.first_logits[[rollouts.logits_row[key] for key in chosen]]
                rows = [rollouts.first_row[key] for key in chosen]
                self.players.baseline.commit(trees, rows, tips)
            if self.players.sft is not None:
                self.players.sft.advance(trees, tokens)
        for tree in reversed(range(len(appended))):
            if appended[tree][1]:
                self._drop(tree)
        return appended

    def _drop(self, tree: int) -> None:
        drop_from(self.active, tree)
        players = self.players
        for player in (players.baseline, players.sft, players.reward, players.baseline_reward):
            if player is not None:
                player.drop_tree(tree)

    def _count(self, rollouts: Rollouts, num_trees: int, horizon: int) -> None:
        run = sum(bool(branch.tokens) for branch in rollouts.branches)
        wanted = num_trees * self.config.k * self.config.rollouts_per_candidate if horizon else 0
        self.stats.rollout_steps += rollouts.num_steps
        self.stats.rollouts_run += run
        self.stats.rollouts_skipped += wanted - run

    def _fail(
        self,
        kind: type[DecodingError],
        tree: int,
        step: int,
        message: str,
        cause: BaseException | None = None,
    ) -> None:
        raise kind(message, prompt_idx=self.active[tree].idx, step=step) from cause
