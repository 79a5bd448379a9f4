"""The loop of Transfer Q* (arXiv 2405.20495, Algorithm 1) over one forest, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

import torch

from . import ops
from .config import DecodeConfig
from .errors import DecodingError, RewardError
from .estimators import kl_divergence
from .models.language import LanguageForest
from .models.reward import RewardSession, drop_from
from .prompts import Prompt
from .results import DecodeStats, StepTrace
from .reweighting import Candidates, choose, log_ratios
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
    """Decodes the prompts of one forest together, one token each a step.

    Args:
        players: the models.
        responses: one empty response a tree.
        config: how to decode.
        prior: the role whose policy is reweighted.
        eos: ids that end a response.
        stats: counts are added here.
    """

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
        self.languages = {"baseline": players.baseline}
        if players.sft is not None:
            self.languages["sft"] = players.sft
        self.vocab_size = min(forest.vocab_size for forest in self.languages.values())

    def run(self, on_token: Callable[[Response, bool], None]) -> None:
        """Decode every response to its end; `on_token(response, is_finished)` after each token."""
        with self.stats.phase("prefill"):
            for forest in self.languages.values():
                for tree, response in enumerate(self.active):
                    forest.prefill(tree, response.prompt.token_ids)
        for step in range(self.config.max_new_tokens):
            if not self.active:
                return
            for response, is_finished in self._step(step):
                on_token(response, is_finished)

    def _step(self, step: int) -> list[tuple[Response, bool]]:
        """Choose one more token for every response; return them, and which are complete."""
        phase, config = self.stats.phase, self.config
        keys = [response.prompt.key for response in self.active]
        with phase("candidates"):
            candidates = self._candidates(step)
        with phase("rollout"):
            rollouts = run_rollouts(
                self.players.baseline,
                candidates.ids.tolist(),
                horizon=config.horizon_at(step),
                prompt_keys=keys,
                step=step,
                eos=self.eos,
                config=config,
                vocab_size=self.vocab_size,
            )
            branches = rollouts.branches
            self._check_drawn(branches, step)
            self._count(rollouts, step)
        with phase("reward"):
            scores = self._score(self.players.reward, branches, step)
            baseline_scores = ratios = None
            if config.needs_baseline_reward:
                baseline_scores = self._score(self.players.baseline_reward, branches, step)
            if config.needs_log_ratio:
                ratios = log_ratios(self.players.sft, branches, vocab_size=self.vocab_size)
        with phase("reweight"):
            traces = choose(
                candidates,
                branches,
                scores,
                baseline_scores=baseline_scores,
                ratios=ratios,
                prior=self.prior,
                keys=keys,
                step=step,
                config=config,
            )
        with phase("commit"):
            return self._commit(step, rollouts, traces)

    def _candidates(self, step: int) -> Candidates:
        proposer, config = self.languages[self.config.candidates_from], self.config
        proposed = ops.topk_logprobs(
            proposer.tip, config.k, vocab_size=self.vocab_size, backend=config.backend
        )
        for tree, lse in enumerate(proposed.lse.tolist()):
            if not math.isfinite(lse):
                self._fail(DecodingError, tree, step, f"the logits sum to {lse}")
        logprobs = {}
        for role, forest in self.languages.items():
            if role == config.candidates_from:
                logprobs[role] = proposed.logprobs
            else:
                logits = forest.tip[:, : self.vocab_size].float()
                logprobs[role] = logits.gather(1, proposed.ids) - logits.logsumexp(1, keepdim=True)
        drift = None
        if self.players.sft is not None:
            tips = (self.players.baseline.tip, self.players.sft.tip)
            laws = [tip[:, : self.vocab_size].float().log_softmax(1) for tip in tips]
            drift = kl_divergence(*laws)
        return Candidates(proposed.ids, logprobs, drift)

    def _check_drawn(self, branches: Sequence[Branch], step: int) -> None:
        for branch in branches:
            if math.isnan(branch.logprob):
                self._fail(
                    DecodingError, branch.tree, step, "a roll-out met logits that are not finite"
                )

    def _score(
        self, session: RewardSession, branches: Sequence[Branch], step: int
    ) -> Sequence[float]:
        responses = [
            [*self.active[branch.tree].token_ids, branch.candidate, *branch.tokens]
            for branch in branches
        ]
        try:
            scores = session.score([branch.tree for branch in branches], responses)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._fail(RewardError, 0, step, f"the reward raised {error!r}", error)
        if len(scores) != len(branches):
            message = f"the reward returned {len(scores)} scores for {len(branches)} responses"
            self._fail(RewardError, 0, step, message)
        for branch, score in zip(branches, scores, strict=True):
            if not math.isfinite(score):
                self._fail(RewardError, branch.tree, step, f"the reward returned {score}")
        return scores

    def _commit(
        self, step: int, rollouts: Rollouts, traces: Sequence[StepTrace]
    ) -> list[tuple[Response, bool]]:
        """Append the chosen tokens, move their KV into the prefixes, drop what is complete."""
        appended, staying = [], []
        for tree, (response, trace) in enumerate(zip(self.active, traces, strict=True)):
            response.token_ids.append(trace.token_id)
            response.trace.append(trace)
            is_last = step + 1 == self.config.max_new_tokens
            appended.append((response, is_last or trace.token_id in self.eos))
            if not appended[tree][1]:
                staying.append(tree)
        self.stats.num_steps += len(appended)
        if staying:
            tokens = [traces[tree].token_id for tree in staying]
            chosen = [(tree, traces[tree].choice) for tree in staying]
            if rollouts.first_logits is None:
                self.players.baseline.advance(staying, tokens)
            else:
                tips = rollouts.first_logits[[rollouts.logits_row[place] for place in chosen]]
                rows = [rollouts.first_row[place] for place in chosen]
                self.players.baseline.commit(staying, rows, tips)
            if self.players.sft is not None:
                self.players.sft.advance(staying, tokens)
        for tree in reversed(range(len(appended))):
            if appended[tree][1]:
                self._drop(tree)
        return appended

    def _drop(self, tree: int) -> None:
        drop_from(self.active, tree)
        for player in vars(self.players).values():
            if player is not None:
                player.drop_tree(tree)

    def _count(self, rollouts: Rollouts, step: int) -> None:
        config = self.config
        run = sum(bool(branch.tokens) for branch in rollouts.branches)
        per_candidate = config.rollouts_per_candidate if config.horizon_at(step) else 0
        self.stats.rollout_steps += rollouts.num_steps
        self.stats.rollouts_run += run
        self.stats.rollouts_skipped += len(self.active) * config.k * per_candidate - run

    def _fail(
        self,
        kind: type[DecodingError],
        tree: int,
        step: int,
        message: str,
        cause: BaseException | None = None,
    ) -> None:
        raise kind(message, prompt_idx=self.active[tree].idx, step=step) from cause
