"""The loop of Transfer Q* (arXiv 2405.20495, Algorithm 1) over one forest, and nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import NoReturn

import torch

from . import ops
from .cache import share_prefix
from .config import DecodeConfig
from .errors import DecodingError
from .estimators import kl_divergence
from .levers import Levers
from .models.language import LanguageForest
from .models.reward import RewardSession, drop_from
from .ops import philox
from .results import DecodeStats, Response, StepTrace
from .reweighting import Candidates, choose, log_ratios
from .rollouts import Branch, Head, KnownRollout, Place, Rollouts, run_rollouts, stream_keys
from .scoring import Scorer
from .values import LazyArgmax, StepValues


@dataclasses.dataclass(frozen=True)
class Players:
    """The models of one decode, each over a forest with one tree a slot.

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


@dataclasses.dataclass(frozen=True)
class Rules:
    """What one decode keeps to from its first step to its last.

    Attributes:
        config: how to decode.
        prior: the role whose policy is reweighted.
        eos: ids that end a response.
        reward_bounds: (lo, hi) of the reward, where declared.
        max_rows: roll-outs that run together, at most.
        levers: speed levers.
    """

    config: DecodeConfig
    prior: str
    eos: tuple[int, ...]
    reward_bounds: tuple[float, float] | None
    max_rows: int
    levers: Levers

    @property
    def is_lazy(self) -> bool:
        """Whether roll-outs are run only until the choice is settled."""
        is_bounded = self.reward_bounds is not None
        return self.levers.lazy_argmax and is_bounded and not self.config.is_published


@dataclasses.dataclass
class _Step:
    """One step of all trees: what was proposed, what has come in, what can be committed."""

    heads: list[Head]
    candidates: Candidates
    values: StepValues
    keys: torch.Tensor
    lazy: LazyArgmax | None
    waves: list[Rollouts] = dataclasses.field(default_factory=list)
    branches: dict[Place, Branch] = dataclasses.field(default_factory=dict)


class ForestDecoder:
    """Decodes prompts over a forest of slots, one token of every slot a step.

    A prompt whose response is complete makes room for the next one that waits.

    Args:
        players: the models, with `num_slots` trees.
        responses: what is to be decoded; those that have tokens already go on from there.
        rules: what to keep to.
        num_slots: responses at a time.
        stats: counts are added here.
    """

    def __init__(
        self,
        players: Players,
        responses: Sequence[Response],
        rules: Rules,
        *,
        num_slots: int,
        stats: DecodeStats,
    ) -> None:
        self.players = players
        self.active = list(responses[:num_slots])
        self.waiting = deque(responses[num_slots:])
        self.rules = rules
        self.config = rules.config
        self.stats = stats
        self.languages = {"baseline": players.baseline}
        if players.sft is not None:
            self.languages["sft"] = players.sft
        self.vocab_size = min(forest.vocab_size for forest in self.languages.values())
        self.known: list[KnownRollout | None] = [None] * len(self.active)
        remembers = rules.levers.score_once
        self.scorer = Scorer(
            players.reward, self.active, bounds=rules.reward_bounds, remembers=remembers
        )
        self.baseline_scorer = None
        if rules.config.needs_baseline_reward:
            self.baseline_scorer = Scorer(
                players.baseline_reward, self.active, bounds=None, remembers=remembers
            )

    def run(self, on_token: Callable[[Response, bool], None]) -> None:
        """Decode every response to its end; `on_token(response, is_finished)` after each token."""
        self._prefill(range(len(self.active)))
        while self.active:
            for response, is_finished in self._step():
                on_token(response, is_finished)

    def _prefill(self, trees: Sequence[int]) -> None:
        """Encode the prompts of `trees`, whose prefixes are empty."""
        texts = [[*r.prompt.token_ids, *r.token_ids] for r in self.active]
        with self.stats.phase("prefill"):
            for forest in self.languages.values():
                for tree in trees:
                    known = 0
                    if self.rules.levers.share_prefixes:
                        # Without its last token, after which the tip is.
                        known = share_prefix(forest.cache, tree, texts[tree][:-1], texts)
                    forest.prefill(tree, texts[tree][known:])

    def _step(self) -> list[tuple[Response, bool]]:
        """Choose one more token for every response; return them, and which are complete."""
        with self.stats.phase("candidates"):
            step = self._open_step()
        while places := self._next_places(step):
            self._evaluate(step, places)
        with self.stats.phase("reweight"):
            traces = choose(
                step.candidates,
                step.values,
                prior=self.rules.prior,
                keys=step.keys,
                lazy=step.lazy,
                config=self.config,
            )
        with self.stats.phase("commit"):
            return self._commit(step, traces)

    def _open_step(self) -> _Step:
        proposer, config = self.languages[self.config.candidates_from], self.config
        proposed = ops.topk_logprobs(
            proposer.tip, config.k, vocab_size=self.vocab_size, backend=config.backend
        )
        for tree, lse in enumerate(proposed.lse.tolist()):
            if not math.isfinite(lse):
                self._fail(tree, f"the logits sum to {lse}")
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
        heads = [
            Head(ids, response.prompt.key, response.step, config.horizon_at(response.step))
            for ids, response in zip(proposed.ids.tolist(), self.active, strict=True)
        ]
        keys = stream_keys([(head.key, head.step, 0, 0) for head in heads]).to(proposed.ids.device)
        lazy = None
        if self.rules.is_lazy:
            noise = torch.zeros_like(proposed.logprobs)
            if config.strategy == "sample":
                noise = philox.gumbel(config.seed, keys[:, None], 0, proposed.ids)
            lazy = LazyArgmax(logprobs[self.rules.prior], noise, self.rules.reward_bounds, config)
        values = StepValues([head.num_rollouts(self.rules.eos, config) for head in heads])
        return _Step(heads, Candidates(proposed.ids, logprobs, drift), values, keys, lazy)

    def _next_places(self, step: _Step) -> list[Place]:
        """Roll-outs to run next; none when every tree can choose."""
        if step.lazy is None:
            places = step.values.missing_places()
        else:
            with self.stats.phase("reweight"):
                places = step.lazy.next_places(step.values)
        return places[: self.rules.max_rows]

    def _evaluate(self, step: _Step, places: Sequence[Place]) -> None:
        """Roll out and score at `places`."""
        config, phase = self.config, self.stats.phase
        with phase("rollout"):
            rollouts = run_rollouts(
                self.players.baseline,
                step.heads,
                places,
                known=self._known_rollouts(step.heads),
                merge=self.rules.levers.merge_equal,
                eos=self.rules.eos,
                config=config,
                vocab_size=self.vocab_size,
            )
            for branch in rollouts.branches:
                if math.isnan(branch.logprob):
                    self._fail(branch.place.tree, "a roll-out met logits that are not finite")
                step.branches[branch.place] = branch
        step.waves.append(rollouts)
        self.stats.rollout_steps += rollouts.num_steps
        with phase("reward"):
            scores = self.scorer.score(rollouts.branches)
            baseline_scores = ratios = None
            if self.baseline_scorer is not None:
                baseline_scores = self.baseline_scorer.score(rollouts.branches)
            if config.needs_log_ratio:
                sft = self.players.sft
                ratios = log_ratios(sft, rollouts.branches, vocab_size=self.vocab_size)
        step.values.note(rollouts.branches, scores, baseline_scores, ratios)

    def _commit(self, step: _Step, traces: Sequence[StepTrace]) -> list[tuple[Response, bool]]:
        """Append the chosen tokens, move their KV into the prefixes, fill the slots that end."""
        is_finished = [
            trace.token_id in self.rules.eos or response.step + 1 == self.config.max_new_tokens
            for response, trace in zip(self.active, traces, strict=True)
        ]
        staying = [tree for tree, ended in enumerate(is_finished) if not ended]
        self.known = [self._known_after(step, tree, traces[tree]) for tree in range(len(traces))]
        self._move_kv(step, [(tree, traces[tree].choice) for tree in staying])
        if staying and self.players.sft is not None:
            self.players.sft.advance(staying, [traces[tree].token_id for tree in staying])
        appended = list(zip(self.active, is_finished, strict=True))
        for response, trace in zip(self.active, traces, strict=True):
            response.token_ids.append(trace.token_id)
            response.trace.append(trace)
        self.stats.num_steps += len(appended)
        self._count_skipped(step)
        for scorer in self._scorers():
            scorer.forget()
        for tree in reversed(range(len(is_finished))):
            if is_finished[tree]:
                self._replace(tree)
        return appended

    def _move_kv(self, step: _Step, chosen: Sequence[tuple[int, int]]) -> None:
        """Move the KV of the chosen candidates into the prefixes; encode what never ran."""
        baseline, left = self.players.baseline, list(chosen)
        for wave in step.waves:
            ready = [place for place in left if place in wave.first_row]
            if ready:
                rows = [wave.first_row[place] for place in ready]
                tips = wave.first_logits[rows]
                baseline.commit([tree for tree, _ in ready], rows, tips, wave.saved)
                left = [place for place in left if place not in wave.first_row]
        if left:
            tokens = [step.heads[tree].candidates[idx] for tree, idx in left]
            baseline.advance([tree for tree, _ in left], tokens)

    def _known_after(self, step: _Step, tree: int, trace: StepTrace) -> KnownRollout | None:
        """What the chosen token's greedy roll-out says of the next step's."""
        config = self.config
        is_on = config.rollout == "greedy" and self.rules.levers.reuse_greedy
        if not is_on or not step.waves:
            return None
        place = Place(tree, trace.choice, 0)
        branch, rows = step.branches.get(place), step.waves[-1].row_of
        if branch is None or len(branch.tokens) < 2 or branch.tokens[0] in self.rules.eos:
            return None
        child, *rest = branch.tokens
        if rest[-1] in self.rules.eos or config.horizon is None:
            return KnownRollout(child, rest, is_finished=True, saved=None)
        if place not in rows:
            return None
        cache = self.players.baseline.cache
        saved = cache.save([rows[place]], 2, len(branch.tokens))
        return KnownRollout(child, rest, is_finished=False, saved=saved)

    def _known_rollouts(self, heads: Sequence[Head]) -> dict[tuple[int, int], KnownRollout]:
        return {
            (tree, head.candidates.index(known.candidate)): known
            for tree, (head, known) in enumerate(zip(heads, self.known, strict=True))
            if known is not None and known.candidate in head.candidates
        }

    def _replace(self, tree: int) -> None:
        """Give the slot of a complete response to one that waits, or take it out."""
        scorers = self._scorers()
        if not self.waiting:
            drop_from(self.active, tree)
            drop_from(self.known, tree)
            for player in (*self.languages.values(), *scorers):
                player.drop_tree(tree)
            return
        response = self.waiting.popleft()
        self.active[tree], self.known[tree] = response, None
        for forest in self.languages.values():
            forest.cache.truncate(tree, 0)
        for scorer in scorers:
            scorer.replace_tree(tree, response.prompt)
        self._prefill([tree])

    def _scorers(self) -> list[Scorer]:
        return [self.scorer, *([self.baseline_scorer] if self.baseline_scorer else [])]

    def _count_skipped(self, step: _Step) -> None:
        run = sum(bool(branch.tokens) for branch in step.branches.values())
        possible = sum(
            len(head.candidates) * self.config.rollouts_per_candidate
            for head in step.heads
            if head.horizon
        )
        self.stats.rollouts_run += run
        self.stats.rollouts_skipped += possible - run

    def _fail(self, tree: int, message: str) -> NoReturn:
        response = self.active[tree]
        raise DecodingError(message, prompt_idx=response.idx, step=response.step)
