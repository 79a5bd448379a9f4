"""A language model of this process over a forest of shared prefixes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch

from .. import ops
from ..config import DecodeConfig
from ..copies import upload
from ..forest.graphs import has_graphs
from ..forest.language import LanguageForest
from ..forest.logprobs import score_rows
from ..forest.store import ForestStore, Lease
from ..rollouts.graphs import RolloutGraphs
from ..rollouts.records import ReusedRollout, Rollout, RolloutId, RolloutWave, Root
from ..rollouts.run import run_rollouts
from ..rollouts.state import RolloutSampler
from .base import Proposal


class ForestEngine:
    """The engine of a model of transformers; see `LanguageEngine` for what its methods do.

    Args:
        forest: the model and its trees.
        config: k, roll-outs and backend are read.
        eos: ids that end a response.
        vocab_size: ids that log-probs are normalised over.
        num_tokens: ids from here on have no token and are never chosen.
        merges: equal sampled roll-outs share a row until they part.
        graphs: whether the depths of roll-outs run as CUDA graphs, on a GPU.
        forests: where the forest comes from, and its graphs stay.
        lease: of the forest.
    """

    def __init__(
        self,
        forest: LanguageForest,
        *,
        config: DecodeConfig,
        eos: tuple[int, ...],
        vocab_size: int,
        num_tokens: int,
        merges: bool,
        graphs: bool,
        forests: ForestStore,
        lease: Lease,
    ) -> None:
        self.forest, self._lease = forest, lease
        self.config = config
        self.eos = eos
        self.vocab_size, self.num_tokens = vocab_size, num_tokens
        self.merges = merges
        self.sampler = RolloutSampler(
            torch.tensor(eos, dtype=torch.int64, device=forest.device), num_tokens, config
        )
        self.graphs: RolloutGraphs | None = None
        if graphs and has_graphs(forest.device):
            sampler = self.sampler
            self.graphs = forests.graphs_for(
                forest, (config, eos, num_tokens), lambda: RolloutGraphs(forest, sampler)
            )

    @property
    def num_token_forwards(self) -> int:
        return self.forest.num_token_forwards

    @property
    def peak_kv_bytes(self) -> int:
        return self.forest.peak_kv_bytes

    def encode(self, trees: Sequence[int], texts: Sequence[list[int]], *, shares: bool) -> None:
        self.forest.encode(trees, texts, shares=shares)

    def propose(self, k: int, early: Sequence[bool]) -> Proposal:
        next_logits = self.forest.next_logits
        allowed = without_tokens(next_logits, self.eos, early) if any(early) else next_logits
        ids, own, lse = ops.topk_logprobs(
            allowed, k, vocab_size=self.num_tokens, backend=self.config.backend
        )
        if self.num_tokens < self.vocab_size:
            # Ids without a token are never proposed, but are part of the model's law.
            whole = allowed[:, : self.vocab_size].float().logsumexp(1)
            own, lse = own + (lse - whole)[:, None], whole
        if any(early):
            # Only where tokens were taken out: no tree depends on how far the others are.
            (at,) = upload(ids.device, torch.tensor(early))
            own = torch.where(at[:, None], self.logprobs(ids), own)
        return Proposal(ids, own, lse)

    def logprobs(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self.forest.next_logits[:, : self.vocab_size].float()
        is_here = ids.device.type == "cpu"
        (there,) = upload(logits.device, ids) if is_here else (ids.to(logits.device),)
        return logits.gather(1, there) - logits.logsumexp(1, keepdim=True)

    def law(self) -> torch.Tensor:
        return self.forest.next_logits[:, : self.vocab_size].float().log_softmax(1)

    def roll_out(
        self,
        roots: Sequence[Root],
        rollout_ids: Sequence[RolloutId],
        reused: Mapping[tuple[int, int], ReusedRollout],
    ) -> RolloutWave:
        return run_rollouts(
            self.forest,
            roots,
            rollout_ids,
            reused=reused,
            merge=self.merges,
            eos=self.eos,
            sampler=self.sampler,
            graphs=self.graphs,
        )

    def score(self, rollouts: Sequence[Rollout]) -> list[float]:
        sums = [0.0] * len(rollouts)
        drawn = [i for i, rollout in enumerate(rollouts) if rollout.tokens]
        if drawn:
            rows = [[rollouts[i].candidate, *rollouts[i].tokens] for i in drawn]
            trees = [rollouts[i].id.tree for i in drawn]
            found = score_rows(self.forest, rows, trees, vocab_size=self.num_tokens)
            for i, logprob in zip(drawn, found, strict=True):
                sums[i] = logprob
        return sums

    def commit(
        self, chosen: Sequence[tuple[int, int]], tokens: Sequence[int], waves: Sequence[RolloutWave]
    ) -> None:
        """A candidate that was rolled out has KV, which moves; any other is encoded."""
        left = dict(zip(chosen, tokens, strict=True))
        for wave in waves:
            ready = [candidate for candidate in left if candidate in wave.first_row]
            if ready and wave.first_logits is not None:
                rows = [wave.first_row[candidate] for candidate in ready]
                trees = [tree for tree, _ in ready]
                self.forest.commit(trees, rows, wave.first_logits, wave.saved)
                for candidate in ready:
                    del left[candidate]
        if left:
            self.forest.advance([tree for tree, _ in left], list(left.values()))

    def reusable(self, wave: RolloutWave, rollout: Rollout) -> ReusedRollout | None:
        child, *rest = rollout.tokens
        if rest[-1] in self.eos or self.config.horizon is None:
            return ReusedRollout(child, rest, is_finished=True, saved=None)
        row = wave.row_of.get(rollout.id)
        if row is None:
            return None
        saved = self.forest.cache.save(slice(row, row + 1), 2, len(rollout.tokens))
        return ReusedRollout(child, rest, is_finished=False, saved=saved)

    def clear(self, tree: int) -> None:
        self.forest.cache.truncate(tree, 0)

    def drop_tree(self, tree: int) -> None:
        self.forest.drop_tree(tree)


def without_tokens(
    logits: torch.Tensor, token_ids: Sequence[int], rows: Sequence[bool]
) -> torch.Tensor:
    """Return `logits` `[G, V]` with -inf at `token_ids` where `rows` is true; they stay as are."""
    at, ids = upload(logits.device, torch.tensor(rows), torch.tensor(token_ids, dtype=torch.int64))
    columns = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
    columns[ids] = True
    return logits.masked_fill(at[:, None] & columns, -math.inf)
