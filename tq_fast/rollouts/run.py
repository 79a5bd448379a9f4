"""The k x n tree of every prompt: all roll-outs of a step, one forward pass a depth."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..copies import download, upload
from ..forest import SavedTokens
from ..forest.language import LanguageForest
from .graphs import RolloutGraphs
from .records import ReusedRollout, Rollout, RolloutId, RolloutWave, Root
from .rows import RowMap
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
    tokens = {r: roots[r.tree].candidates[r.candidate_idx] for r in rollout_ids}
    rollouts = {r: Rollout(r, token, []) for r, token in tokens.items()}
    live = [r for r, token in tokens.items() if roots[r.tree].horizon and token not in eos]
    if not live:
        return RolloutWave(list(rollouts.values()), {}, None, None, {}, 0)
    merge = merge and sampler.config.rollout == "sample"
    run = _Run(forest, roots, live, reused, sampler, merge)
    run.advance(graphs)
    run.fetch()
    rollouts.update((rollout.id, rollout) for rollout in run.rollouts())
    return RolloutWave(
        list(rollouts.values()),
        run.first_row,
        run.first_logits,
        run.saved,
        run.row_of_id(),
        run.num_steps,
    )


class _Run:
    """One call of `run_rollouts`, depth after depth."""

    def __init__(
        self,
        forest: LanguageForest,
        roots: Sequence[Root],
        rollout_ids: Sequence[RolloutId],
        reused: Mapping[tuple[int, int], ReusedRollout],
        sampler: RolloutSampler,
        merge: bool,
    ) -> None:
        self.forest, self.rollout_ids, self.sampler = forest, rollout_ids, sampler
        own = [(roots[r.tree], roots[r.tree].candidates[r.candidate_idx], r) for r in rollout_ids]
        self.candidates = [token for _, token, _ in own]
        keys = stream_keys([(root.key, root.step, token, r.number) for root, token, r in own])
        self.horizons = [root.horizon for root, _, _ in own]
        owners = [r.candidate for r in rollout_ids]
        self.first_row = {owner: row for row, owner in enumerate(dict.fromkeys(owners))}
        row_of = [self.first_row[owner] for owner in owners]
        trees = [r.tree for r in rollout_ids]
        columns = map(torch.tensor, (self.candidates, self.horizons, trees, row_of))
        there = upload(forest.device, keys, *columns)
        self.first_tokens = there[1]
        self.state = RolloutState.begin(there[0], there[2], there[3], num_tokens=max(self.horizons))
        self.reused = {i: reused[owner] for i, owner in enumerate(owners) if owner in reused}
        self._fill_reused()
        if merge:
            self.rows = RowMap(self.state, there[4], len(self.first_row))
        else:
            self.rows = RowMap(self.state)
            self.first_row = {owner: row for row, owner in reversed([*enumerate(owners)])}
        # Finished roll-outs have no rows where some are shared, and graphs report none at all.
        self.is_traced = not self.rows.is_shared
        self.num_steps = 0
        self.first_logits: torch.Tensor | None = None
        self.saved: SavedTokens | None = None

    def _fill_reused(self) -> None:
        """Write down known tokens, which are not drawn: the roll-out rests behind them."""
        # Roll-outs that go on once their known tokens end, by their places at the beginning.
        self.resting: dict[int, ReusedRollout] = {}
        if not self.reused:
            return
        tokens = torch.zeros(self.state.tokens.shape, dtype=torch.int64)
        lengths = torch.zeros(len(self.horizons), dtype=torch.int64)
        for i, known in self.reused.items():
            lengths[i] = num = min(len(known.tokens), self.horizons[i])
            tokens[i, :num] = torch.tensor(known.tokens[:num])
            if not known.is_finished and len(known.tokens) < self.horizons[i]:
                self.resting[i] = known
        state = self.state
        state.tokens, state.lengths = upload(self.forest.device, tokens, lengths)
        state.finished = state.lengths > 0

    def advance(self, graphs: RolloutGraphs | None) -> None:
        """Run one forward pass and one draw a depth until every roll-out is finished or full."""
        depth = 0
        tokens = self.first_tokens[self.rows.leaders]
        while self.rows.num_active:
            rows = self.rows
            logits = self.forest.forward_rows(tokens, start=depth, tree=rows.tree)
            self.num_steps += 1
            if depth == 0:
                # The next pass of this size writes to the memory of this one, if it is a graph.
                self.first_logits = logits if self.forest.graphs is None else logits.clone()
                self.saved = self.forest.cache.save(slice(len(tokens)), 0, 1)
            if rows.is_shared:
                logits = logits.index_select(0, rows.row_of)
            self.sampler.advance(logits, self.state, depth)
            # Roll-outs rest on a GPU only after graphs have failed: they report no rows to reuse.
            if depth == 0 and graphs is not None and not self.resting and self._finish_in(graphs):
                return
            depth = self._make_rows(depth)
            tokens = self.rows.tokens(depth - 1)

    def _finish_in(self, graphs: RolloutGraphs) -> bool:
        """Leave all depths after the first to `graphs`; False where the model cannot be captured.

        Roll-outs part at once there: on a GPU a few rows more cost less than to tell which are
        still equal.
        """
        if self.rows.is_shared:
            self._take_rows(self.rows.row_of, 1)
            self.rows = RowMap(self.state)
        num_depths = graphs.run(self.state, max(self.horizons))
        if num_depths is None:
            return False
        self.num_steps += num_depths
        self.is_traced = False
        return True

    def _make_rows(self, depth: int) -> int:
        """Make the rows of the pass after the draw at `depth`, none after the last.

        Returns:
            The depth of that pass.
        """
        rows = self.rows
        if rows.is_shared:
            order = rows.split(depth)
        else:
            # Reused roll-outs rest for several depths: they leave at once.
            order = rows.compact(0.0 if depth == 0 and self.reused else 0.25)
        self._take_rows(order, depth + 1)
        joining = min((len(known.tokens) for known in self.resting.values()), default=None)
        if joining is None or (rows.num_active and joining > depth + 1):
            return depth + 1
        self._join(joining)
        return joining

    def _join(self, depth: int) -> None:
        """Run roll-outs again whose reused tokens end here, with the KV of the step before."""
        joining = [i for i, known in self.resting.items() if len(known.tokens) == depth]
        self._take_rows(self.rows.join(joining), depth)
        places = self.state.places.tolist()
        for i in joining:
            saved = self.resting.pop(i).saved
            assert saved is not None, "a roll-out that goes on has its KV saved"
            self.forest.cache.write(places[i], 1, saved)

    def _take_rows(self, order: torch.Tensor | None, num_tokens: int) -> None:
        if order is not None:
            self.forest.cache.take_rows(order, num_tokens)

    def fetch(self) -> None:
        """Read what came of the roll-outs from the device."""
        state = self.state
        self.ended = download(
            state.origin, state.tokens, state.lengths, state.logprob, state.proposal_logprob
        )
        # Where each roll-out of the beginning is now.
        self.places = self.ended[0].argsort()

    def rollouts(self) -> list[Rollout]:
        """Return what came of every roll-out."""
        columns = [field[self.places].tolist() for field in self.ended[1:]]
        return [
            Rollout(rollout_id, candidate, tokens[:length], logprob, proposal)
            for rollout_id, candidate, tokens, length, logprob, proposal in zip(
                self.rollout_ids, self.candidates, *columns, strict=True
            )
        ]

    def row_of_id(self) -> dict[RolloutId, int]:
        """Row of the cache that holds each roll-out; empty where that was not kept track of."""
        places = self.places.tolist() if self.is_traced else []
        return dict(zip(self.rollout_ids, places, strict=False))
