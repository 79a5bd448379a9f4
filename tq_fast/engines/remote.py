"""A language model behind a URL, asked for the next tokens of whole texts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch

from ..config import DecodeConfig
from ..rollouts.records import ReusedRollout, Rollout, RolloutId, RolloutWave, Root
from ..rollouts.streams import stream_keys
from ..servers import DrawnTokens, LanguageServer, RolloutRequest, SamplingLaw
from .base import Proposal


class ServerEngine:
    """The engine of a model that a server holds; see `LanguageEngine` for what its methods do.

    The server keeps nothing for a tree but what its cache of prefixes happens to hold: every
    request carries the whole text.

    Args:
        server: the model, opened for these settings.
        num_trees: trees at first.
        config: k and roll-outs are read.
        eos: ids that end a response.
        scores_own: whether the log-probs of its own roll-outs under the model itself are needed
            where they were drawn from another law, after temperature and truncation.
    """

    peak_kv_bytes = 0

    def __init__(
        self,
        server: LanguageServer,
        num_trees: int,
        *,
        config: DecodeConfig,
        eos: tuple[int, ...],
        scores_own: bool,
    ) -> None:
        self.server = server
        self.config = config
        self.eos = eos
        self.sampling = rollout_law(config)
        self.scores_own = scores_own and not self.sampling.is_own
        self.texts: list[list[int]] = [[] for _ in range(num_trees)]
        # Tokens that were drawn or scored: what the server encodes again is not known.
        self.num_token_forwards = 0

    def encode(self, trees: Sequence[int], texts: Sequence[list[int]], *, shares: bool) -> None:
        for tree in trees:
            self.texts[tree] = list(texts[tree])

    def propose(self, k: int, early: Sequence[bool]) -> Proposal:
        ids = torch.empty(len(self.texts), k, dtype=torch.int64)
        logprobs = torch.empty(len(self.texts), k)
        for is_early in sorted(set(early)):
            trees = [tree for tree, at in enumerate(early) if at == is_early]
            without = self.eos if is_early else ()
            found = self.server.candidates([self.texts[t] for t in trees], k, without=without)
            ids[trees], logprobs[trees] = torch.tensor(found.ids), torch.tensor(found.logprobs)
        self.num_token_forwards += len(self.texts)
        # The server's numbers are log-probs already.
        return Proposal(ids, logprobs, torch.zeros(len(self.texts)))

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        self.num_token_forwards += len(self.texts)
        return torch.tensor(self.server.prior(self.texts, ids.tolist()))

    def law(self) -> None:
        return None

    def roll_out(
        self,
        roots: Sequence[Root],
        rollout_ids: Sequence[RolloutId],
        reused: Mapping[tuple[int, int], ReusedRollout],
    ) -> RolloutWave:
        rollouts = {
            r: Rollout(r, roots[r.tree].candidates[r.candidate_idx], []) for r in rollout_ids
        }
        live = [
            r
            for r in rollout_ids
            if roots[r.tree].horizon and rollouts[r].candidate not in self.eos
        ]
        known = {r: self._known(roots[r.tree], reused.get(r.candidate)) for r in live}
        asked = [r for r in live if not self._is_done(roots[r.tree], known[r])]
        drawn = self._draw(roots, asked, rollouts, known)
        for r in live:
            rollouts[r] = self._rollout(rollouts[r], known[r], drawn.get(r))
        if self.scores_own:
            sums = self.score(list(rollouts.values()))
            rollouts = {
                r: dataclasses.replace(one, logprob=logprob)
                for (r, one), logprob in zip(rollouts.items(), sums, strict=True)
            }
        num_steps = max((len(one.tokens) for one in drawn.values()), default=0)
        return RolloutWave(list(rollouts.values()), {}, None, None, {}, num_steps)

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        self.num_token_forwards += sum(len(rollout.tokens) for rollout in rollouts)
        prefixes = [[*self.texts[one.id.tree], one.candidate] for one in rollouts]
        return self.server.score(prefixes, [one.tokens for one in rollouts])

    def commit(
        self, chosen: Sequence[tuple[int, int]], tokens: Sequence[int], waves: Sequence[RolloutWave]
    ) -> None:
        for (tree, _), token in zip(chosen, tokens, strict=True):
            self.texts[tree].append(token)

    def reusable(self, wave: RolloutWave, rollout: Rollout) -> ReusedRollout:
        child, *rest = rollout.tokens
        is_finished = rest[-1] in self.eos or self.config.horizon is None
        return ReusedRollout(child, rest, is_finished=is_finished, saved=None)

    def clear(self, tree: int) -> None:
        self.texts[tree] = []

    def drop_tree(self, tree: int) -> None:
        self.texts[tree] = self.texts[-1]
        self.texts.pop()

    def _known(self, root: Root, reused: ReusedRollout | None) -> ReusedRollout | None:
        """`reused`, cut to the root's horizon."""
        if reused is None:
            return None
        return dataclasses.replace(reused, tokens=reused.tokens[: root.horizon])

    def _is_done(self, root: Root, known: ReusedRollout | None) -> bool:
        return known is not None and (known.is_finished or len(known.tokens) == root.horizon)

    def _draw(
        self,
        roots: Sequence[Root],
        asked: Sequence[RolloutId],
        rollouts: Mapping[RolloutId, Rollout],
        known: Mapping[RolloutId, ReusedRollout | None],
    ) -> dict[RolloutId, DrawnTokens]:
        """Draw what is missing of the roll-outs `asked`."""
        runs = _runs(asked)
        keys = stream_keys(
            [
                (roots[r.tree].key, roots[r.tree].step, rollouts[r].candidate, 0)
                for r in (run[0] for run in runs)
            ]
        )
        requests = []
        for run, key in zip(runs, keys.tolist(), strict=True):
            first = run[0]
            before = known[first]
            tokens = [] if before is None else before.tokens
            requests.append(
                RolloutRequest(
                    [*self.texts[first.tree], rollouts[first].candidate, *tokens],
                    roots[first.tree].horizon - len(tokens),
                    seed=request_seed(self.config.seed, key) + first.number,
                    num=len(run),
                )
            )
        answers = self.server.rollouts(requests, self.sampling, self.eos) if requests else []
        drawn = {
            r: one
            for run, answer in zip(runs, answers, strict=True)
            for r, one in zip(run, answer, strict=True)
        }
        self.num_token_forwards += sum(len(one.tokens) for one in drawn.values())
        return drawn

    def _rollout(
        self, bare: Rollout, known: ReusedRollout | None, drawn: DrawnTokens | None
    ) -> Rollout:
        tokens = [] if known is None else list(known.tokens)
        logprob = 0.0
        if drawn is not None:
            tokens += drawn.tokens
            logprob = math.fsum(drawn.logprobs)
        proposal = 0.0 if self.sampling.temperature == 0.0 else logprob
        return dataclasses.replace(bare, tokens=tokens, logprob=logprob, proposal_logprob=proposal)


def rollout_law(config: DecodeConfig) -> SamplingLaw:
    """Return the law that the roll-outs of `config` are drawn from."""
    if config.rollout == "greedy":
        return SamplingLaw(temperature=0.0)
    return SamplingLaw(config.rollout_temperature, config.rollout_top_k, config.rollout_top_p)


def request_seed(seed: int, key: int) -> int:
    """Return the seed of a request whose random stream has `key`, under the decode's `seed`.

    Both count alike in all their bits; a server takes 62 of them.
    """
    word = (key ^ (seed * 0x9E3779B97F4A7C15)) % 2**64
    word = ((word ^ (word >> 31)) * 0xBF58476D1CE4E5B9) % 2**64
    return (word ^ (word >> 29)) % 2**62


def _runs(rollout_ids: Sequence[RolloutId]) -> list[list[RolloutId]]:
    """Group roll-outs of one candidate whose numbers follow one another: they are one request."""
    runs: list[list[RolloutId]] = []
    for r in rollout_ids:
        last = runs[-1][-1] if runs else None
        if last is not None and (r.candidate, r.number) == (last.candidate, last.number + 1):
            runs[-1].append(r)
        else:
            runs.append([r])
    return runs
