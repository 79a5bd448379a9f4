"""The k x n tree of every prompt: all roll-outs of a step, one forward pass a depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..forest import SavedTokens
from ..forest.language import LanguageForest
from .graphs import RolloutGraphs
from .records import ReusedRollout, Rollout, RolloutId, RolloutWave, Root
from .state import RolloutSampler, RolloutState
from .streams import stream_keys


def run_rollouts(
    forest: LanguageForest,
    roots: Sequence[Root],
    rollout_ids: Sequence[RolloutId],
    *,
    reused: Mapping[tuple[int, int], ReusedRollout],
    merge: bool,
    eos: tuple[int, ...],
    sampler: RolloutSampler,
    graphs: RolloutGraphs | None,
) -> RolloutWave:
    """Roll out at `rollout_ids`, all trees together.

    Args:
        forest: the baseline; `roots[g]` is of its tree g.
        roots: one a tree.
        rollout_ids: ascending. A candidate that is an EOS, or has no horizon, gets no roll-out.
        reused: roll-outs whose start was run before, by candidate `(tree, candidate_idx)`; greedy
            roll-outs only.
        merge: roll-outs that are still equal share a row.
        eos: ids that end a roll-out.
        sampler: how roll-outs are drawn.
        graphs: run the depths after the first, if given.
    """
    done: dict[RolloutId, Rollout] = {}
    live = []
    for rollout_id in rollout_ids:
        root = roots[rollout_id.tree]
        token = root.candidates[rollout_id.candidate_idx]
        if root.horizon and token not in eos:
            live.append(rollout_id)
        else:
            done[rollout_id] = Rollout(rollout_id, token, [])
    if not live:
        return RolloutWave([done[rollout_id] for rollout_id in rollout_ids], {}, None, None, {}, 0)
    merge = merge and sampler.config.rollout == "sample"
    run = _Run(forest, roots, live, reused, sampler, merge)
    run.advance(graphs)
    done.update((rollout.id, rollout) for rollout in run.rollouts())
    return RolloutWave(
        [done[rollout_id] for rollout_id in rollout_ids],
        run.first_row,
        run.first_logits,
        run.saved,
        run.row_of_id(),
        run.num_steps,
    )


class _Run:
    """One call of `run_rollouts`: which roll-out is in which row, depth after depth.

    While no rows are shared, roll-out i of the state is in row i of the cache, the finished ones
    behind the others.
    """

    def __init__(
        self,
        forest: LanguageForest,
        roots: Sequence[Root],
        rollout_ids: Sequence[RolloutId],
        known: Mapping[tuple[int, int], ReusedRollout],
        sampler: RolloutSampler,
        merge: bool,
    ) -> None:
        self.forest, self.rollout_ids, self.sampler = forest, rollout_ids, sampler
        own = [roots[rollout_id.tree] for rollout_id in rollout_ids]
        self.candidates = [
            root.candidates[rollout_id.candidate_idx]
            for root, rollout_id in zip(own, rollout_ids, strict=True)
        ]
        keys = stream_keys(
            [
                (root.key, root.step, token, rollout_id.number)
                for root, token, rollout_id in zip(own, self.candidates, rollout_ids, strict=True)
            ]
        )
        self.horizons = [root.horizon for root in own]
        self.state = RolloutState.begin(keys.to(forest.device), self.horizons)
        self.known = {
            i: known[p.candidate] for i, p in enumerate(rollout_ids) if p.candidate in known
        }
        self.num_active = len(rollout_ids)
        self.num_steps = 0
        self._make_rows(merge)
        self.first_logits: torch.Tensor | None = None
        self.saved: SavedTokens | None = None

    def _make_rows(self, merge: bool) -> None:
        """A row for each roll-out, or for each candidate where roll-outs are merged."""
        rollout_ids, device = self.rollout_ids, self.forest.device
        first: dict[RolloutId | tuple[int, int], int] = {}
        for i, rollout_id in enumerate(rollout_ids):
            first.setdefault(rollout_id.candidate if merge else rollout_id, i)
        self.first_row: dict[tuple[int, int], int] = {}
        for row, i in enumerate(first.values()):
            self.first_row.setdefault(rollout_ids[i].candidate, row)
        trees = [rollout_ids[i].tree for i in first.values()]
        self.row_tree = torch.tensor(trees, device=device)
        self.tokens = torch.tensor([self.candidates[i] for i in first.values()], device=device)
        num_trees = self.forest.cache.num_trees
        self.is_uniform = len({trees.count(tree) for tree in range(num_trees)}) == 1
        # Row of each active roll-out; None: roll-out i has row i.
        self.row_of: torch.Tensor | None = None
        self.is_traced = len(first) == len(rollout_ids)
        if not self.is_traced:
            rows = [self.first_row[rollout_id.candidate] for rollout_id in rollout_ids]
            self.row_of = torch.tensor(rows, device=device)

    def advance(self, graphs: RolloutGraphs | None) -> None:
        """Run one forward pass and one draw a depth until every roll-out is finished or full."""
        state, depth = self.state, 0
        while depth is not None:
            tree = None if self.is_uniform else self.row_tree
            logits = self.forest.forward_rows(self.tokens, start=depth, tree=tree)
            self.num_steps += 1
            if depth == 0:
                self.first_logits = logits
                self.saved = self.forest.cache.save(slice(len(self.tokens)), 0, 1)
                self._fill_reused()
            if self.row_of is not None:
                logits = logits.index_select(0, self.row_of)
            self.sampler.advance(logits, state, depth)
            if depth == 0 and graphs is not None and self._finish_in(graphs):
                return
            depth = self._next_depth(depth)

    def _finish_in(self, graphs: RolloutGraphs) -> bool:
        """Leave all depths after the first to `graphs`; False where the model cannot be captured.

        Roll-outs part at once there: on a GPU a few rows more cost less than to tell which are
        still equal.
        """
        assert not self.resting, "what graphs ran is not known in part"
        if self.row_of is not None:
            self.forest.cache.take_rows(self.row_of, 1)
            self.row_tree = self.row_tree[self.row_of]
            self.is_uniform = self.forest.cache.num_trees == 1
            self.row_of = None
        num_depths = graphs.run(self.state, self.row_tree, max(self.horizons))
        if num_depths is None:
            return False
        self.num_steps += num_depths
        self.is_traced = False
        return True

    def rollouts(self) -> list[Rollout]:
        """What came of every roll-out."""
        state, where = self.state, self.state.origin.argsort()
        columns = (state.tokens, state.lengths, state.logprob, state.proposal_logprob)
        rows = zip(*(column[where].tolist() for column in columns), strict=True)
        return [
            Rollout(rollout_id, candidate, tokens[:length], logprob, proposal)
            for rollout_id, candidate, (tokens, length, logprob, proposal) in zip(
                self.rollout_ids, self.candidates, rows, strict=True
            )
        ]

    def row_of_id(self) -> dict[RolloutId, int]:
        """Row of the cache that holds each roll-out; empty where that was not kept track of."""
        if not self.is_traced:
            return {}
        return dict(zip(self.rollout_ids, self.state.origin.argsort().tolist(), strict=True))

    def _fill_reused(self) -> None:
        """What is known of a roll-out is not drawn: it rests until its first unknown token."""
        state, device = self.state, self.forest.device
        for i, known in self.known.items():
            tokens = known.tokens[: state.tokens.shape[1]]
            state.tokens[i, : len(tokens)] = torch.tensor(tokens, device=device)
            state.lengths[i] = len(tokens)
            state.finished[i] = True
        self.resting = {
            i: known
            for i, known in self.known.items()
            if not known.is_finished and len(known.tokens) < self.horizons[i]
        }

    def _next_depth(self, depth: int) -> int | None:
        """Make the rows of the next forward pass; return its depth, None after the last."""
        running = (~self.state.finished[: self.num_active]).nonzero().squeeze(1)
        if self.resting:
            joining = min(len(known.tokens) for known in self.resting.values())
            if depth + 1 == joining or running.numel() == 0:
                self._join(running, joining)
                return joining
        if running.numel() == 0:
            return None
        if self.row_of is not None:
            self._branch(running, depth)
        elif running.numel() <= 0.75 * self.num_active or (depth == 0 and self.known):
            # Finished rows leave once a quarter is idle: a forward pass costs little less with a
            # few rows fewer, and moving rows costs a copy of their KV.
            idle = self.state.finished[: self.num_active].nonzero().squeeze(1)
            self._reorder(torch.cat([running, idle]), len(running), depth + 1)
        if self.row_of is None:
            self.tokens = self.state.tokens[: self.num_active, depth]
        return depth + 1

    def _reorder(self, order: torch.Tensor, num_active: int, num_tokens: int) -> None:
        """Row i becomes row `order[i]`, its roll-out with it; the first `num_active` go on."""
        if not torch.equal(order, torch.arange(len(order), device=order.device)):
            self.forest.cache.take_rows(order, num_tokens)
            self.state.permute(order)
        if num_active != self.num_active or not self.is_uniform:
            self.row_tree = self._trees(num_active)
            self.is_uniform = self.forest.cache.num_trees == 1
        self.num_active = num_active

    def _trees(self, num_active: int) -> torch.Tensor:
        trees = torch.tensor(
            [rollout_id.tree for rollout_id in self.rollout_ids], device=self.forest.device
        )
        return trees[self.state.origin[:num_active]]

    def _join(self, running: torch.Tensor, depth: int) -> None:
        """Those whose known tokens end here run again, with the KV that they have from before."""
        state, cache = self.state, self.forest.cache
        joining = [i for i, known in self.resting.items() if len(known.tokens) == depth]
        place_of = {origin: i for i, origin in enumerate(state.origin.tolist())}
        rows = torch.tensor([place_of[i] for i in joining], device=self.forest.device)
        going = torch.cat([running, rows])
        # Stable: within a tree, those that ran stay in front.
        going = going[self._trees(len(state.origin))[going].argsort(stable=True)]
        is_left = torch.ones_like(state.finished)
        is_left[going] = False
        self._reorder(torch.cat([going, is_left.nonzero().squeeze(1)]), len(going), depth)
        place_of = {origin: i for i, origin in enumerate(state.origin.tolist())}
        for i in joining:
            cache.write(place_of[i], 1, self.resting.pop(i).saved)
            state.finished[place_of[i]] = False
        self.tokens = state.tokens[: self.num_active, depth - 1]

    def _branch(self, running: torch.Tensor, depth: int) -> None:
        """Roll-outs of a row that drew different tokens part; one row for each that is left."""
        state, vocab = self.state, self.forest.vocab_size
        idle = state.finished[: self.num_active].nonzero().squeeze(1)
        state.permute(torch.cat([running, idle]))
        self.num_active = num = len(running)
        pairs = self.row_of[running] * vocab + state.tokens[:num, depth]
        rows, row_of = pairs.unique(return_inverse=True)
        source = rows // vocab
        self.tokens = rows % vocab
        if not torch.equal(source, torch.arange(len(self.row_tree), device=source.device)):
            self.forest.cache.take_rows(source, depth + 1)
        self.row_tree = self.row_tree[source]
        self.is_uniform = self.forest.cache.num_trees == 1
        self.row_of = row_of
        if len(rows) == num:
            # All have parted: roll-out i is in row i from here on.
            state.permute(row_of.argsort())
            self.row_of = None
