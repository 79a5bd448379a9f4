"""One step of all trees: candidates, roll-outs, rewards, and the choice between them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NoReturn

import torch

from .. import ops
from ..config import Role
from ..copies import download, upload
from ..errors import DecodingError
from ..ops import philox
from ..results import DecodeStats, Response, StepTrace
from ..rollouts.records import ReusedRollout, Rollout, RolloutId, RolloutWave, Root
from ..rollouts.run import run_rollouts
from ..rollouts.streams import stream_keys
from .certificate import kl_divergence
from .choice import Candidates, choose, log_ratios
from .pruning import LazyArgmax, StepValues
from .roles import DecodePlan, Roles


def without_tokens(
    logits: torch.Tensor, token_ids: Sequence[int], rows: Sequence[bool]
) -> torch.Tensor:
    """Return `logits` `[G, V]` with -inf at `token_ids` where `rows` is true; they stay as are."""
    at, ids = upload(logits.device, torch.tensor(rows), torch.tensor(token_ids, dtype=torch.int64))
    columns = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    columns[ids] = True
    return logits.masked_fill(at[:, None] & columns, -math.inf)


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
        vocab_size, proposer = self.plan.vocab_size, self.plan.candidates_from
        next_logits = languages[proposer].next_logits
        is_early = [response.step < config.min_new_tokens for response in self.responses]
        if any(is_early):
            next_logits = without_tokens(next_logits, self.plan.eos, is_early)
        num_tokens = self.plan.num_tokens
        proposed = ops.topk_logprobs(
            next_logits, config.k, vocab_size=num_tokens, backend=config.backend
        )
        sums, own = proposed.lse, proposed.logprobs
        if num_tokens < vocab_size:
            # Ids without a token are never proposed, but are part of the model's law.
            sums = next_logits[:, :vocab_size].float().logsumexp(1)
            own = own + (proposed.lse - sums)[:, None]
        logprobs: dict[Role, torch.Tensor] = {}
        for role, forest in languages.items():
            is_proposer = forest is languages[proposer]
            if is_proposer and not any(is_early):
                logprobs[role] = own
                continue
            logits = forest.next_logits[:, :vocab_size].float()
            logprobs[role] = logits.gather(1, proposed.ids) - logits.logsumexp(1, keepdim=True)
            if is_proposer:
                # Only where tokens were taken out: no tree depends on how far the others are.
                (early,) = upload(logits.device, torch.tensor(is_early))
                logprobs[role] = torch.where(early[:, None], logprobs[role], own)
        drift = []
        if len(languages) == 2:
            forests = (languages["baseline"], languages["sft"])
            laws = [forest.next_logits[:, :vocab_size].float().log_softmax(1) for forest in forests]
            drift = [kl_divergence(*laws)]
        ids, sums, *columns = download(proposed.ids, sums, *logprobs.values(), *drift)
        for tree, lse in enumerate(sums.tolist()):
            if not math.isfinite(lse):
                self._fail(tree, f"the logits sum to {lse}")
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
            wave = run_rollouts(
                self.roles.roller,
                self.roots,
                rollout_ids,
                reused=self.reused,
                merge=self.plan.speed.merge_equal,
                eos=self.plan.eos,
                sampler=self.roles.sampler,
                graphs=self.roles.graphs,
            )
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
        """Return log pi_sft(tau) - log q(tau) of every roll-out of `wave`."""
        sft = self.roles.languages["sft"]
        if sft is self.roles.roller:
            # The model scored its own tokens when it drew them, and its rows are still needed.
            return [rollout.logprob - rollout.proposal_logprob for rollout in wave.rollouts]
        return log_ratios(sft, wave.rollouts, vocab_size=self.plan.num_tokens)

    def commit(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Move the KV of the candidates `(tree, candidate_idx)` into the prefixes of all models."""
        self.commit_roller(chosen)
        tokens = [self.roots[tree].candidates[idx] for tree, idx in chosen]
        for forest in self.roles.forests.values():
            if chosen and forest is not self.roles.roller:
                forest.advance([tree for tree, _ in chosen], tokens)

    def commit_roller(self, chosen: Sequence[tuple[int, int]]) -> None:
        """Move the KV of the candidates `(tree, candidate_idx)` into the roller's prefixes.

        A candidate that was never rolled out has no KV yet and is encoded.
        """
        roller, left = self.roles.roller, list(chosen)
        for wave in self.waves:
            ready = [rollout_id for rollout_id in left if rollout_id in wave.first_row]
            if ready and wave.first_logits is not None:
                rows = [wave.first_row[rollout_id] for rollout_id in ready]
                roller.commit([tree for tree, _ in ready], rows, wave.first_logits, wave.saved)
                left = [rollout_id for rollout_id in left if rollout_id not in wave.first_row]
        if left:
            tokens = [self.roots[tree].candidates[idx] for tree, idx in left]
            roller.advance([tree for tree, _ in left], tokens)

    def reused_after(self, tree: int, choice: int) -> ReusedRollout | None:
        """Return what the next step can reuse of the greedy roll-out of `choice`, if anything.

        Call this before `commit`, which writes over the rows of the cache.
        """
        config = self.config
        is_on = config.rollout == "greedy" and self.plan.speed.reuse_greedy
        if not is_on or not self.waves:
            return None
        rollout_id = RolloutId(tree, choice, 0)
        rollout, rows = self.rollouts.get(rollout_id), self.waves[-1].row_of
        if rollout is None or len(rollout.tokens) < 2 or rollout.tokens[0] in self.plan.eos:
            return None
        child, *rest = rollout.tokens
        if rest[-1] in self.plan.eos or config.horizon is None:
            return ReusedRollout(child, rest, is_finished=True, saved=None)
        if rollout_id not in rows:
            return None
        cache = self.roles.roller.cache
        row = rows[rollout_id]
        saved = cache.save(slice(row, row + 1), 2, len(rollout.tokens))
        return ReusedRollout(child, rest, is_finished=False, saved=saved)

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
