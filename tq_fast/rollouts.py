"""The k x n tree of every prompt: all roll-outs of a step, one forward pass a depth."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from . import ops
from .config import DecodeConfig
from .models.language import LanguageForest
from .ops.philox import philox4x32


@dataclasses.dataclass(frozen=True)
class Branch:
    """One roll-out of one candidate: its place in the forest, and what came of it.

    Attributes:
        tree: the tree (slot of the forest) it belongs to.
        candidate_idx: which of the tree's k candidates it starts with.
        candidate: that candidate's token id.
        tokens: token ids after the candidate, at most the horizon; an EOS is the last.
        logprob: sum of log pi_BL of `tokens`, natural log.
        proposal_logprob: sum of the log density that they were really drawn from.
    """

    tree: int
    candidate_idx: int
    candidate: int
    tokens: list[int]
    logprob: float = 0.0
    proposal_logprob: float = 0.0


@dataclasses.dataclass(frozen=True)
class Rollouts:
    """All roll-outs of one step.

    Attributes:
        branches: every roll-out, by tree, then candidate, then roll-out.
        first_row: row in the cache that holds the candidate `(tree, candidate_idx)`.
        first_logits: logits after the candidate `(tree, candidate_idx)`: a row of this `[N, V]`.
        logits_row: which row of `first_logits`.
        num_steps: forward passes that were run.
    """

    branches: list[Branch]
    first_row: dict[tuple[int, int], int]
    first_logits: torch.Tensor | None
    logits_row: dict[tuple[int, int], int]
    num_steps: int


class _State:
    """Roll-outs in the making, in the order of the cache's rows."""

    def __init__(self, num_rows: int, horizon: int, keys: torch.Tensor) -> None:
        device = keys.device
        self.keys = keys
        self.tokens = torch.zeros(num_rows, horizon, dtype=torch.int64, device=device)
        self.lengths = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.finished = torch.zeros(num_rows, dtype=torch.bool, device=device)
        self.logprob = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.proposal_logprob = torch.zeros(num_rows, dtype=torch.float32, device=device)
        self.origin = torch.arange(num_rows, device=device)

    def fields(self) -> list[torch.Tensor]:
        return [
            self.keys,
            self.tokens,
            self.lengths,
            self.finished,
            self.logprob,
            self.proposal_logprob,
            self.origin,
        ]

    def permute(self, order: torch.Tensor) -> None:
        num_rows = order.shape[0]
        for field in self.fields():
            field[:num_rows] = field[order]


def rollout_keys(
    prompt_keys: Sequence[int], step: int, candidates: Sequence[int], indices: Sequence[int]
) -> torch.Tensor:
    """Return the key `[N]` (int64) of each roll-out's random stream.

    It depends on the prompt, the step, the candidate's token id and the roll-out's number, never
    on where the roll-out happens to stand.
    """
    prompt = torch.tensor(prompt_keys, dtype=torch.int64)
    counter = torch.stack(
        [
            torch.tensor(candidates, dtype=torch.int64),
            torch.full((len(candidates),), step, dtype=torch.int64),
            torch.tensor(indices, dtype=torch.int64),
            torch.zeros(len(candidates), dtype=torch.int64),
        ]
    )
    words = philox4x32(tuple(counter.unbind()), (prompt & 0xFFFFFFFF, (prompt >> 32) & 0xFFFFFFFF))
    return words[0] | (words[1] << 32)


def run_rollouts(
    forest: LanguageForest,
    candidates: Sequence[Sequence[int]],
    *,
    horizon: int,
    prompt_keys: Sequence[int],
    step: int,
    eos: tuple[int, ...],
    config: DecodeConfig,
    vocab_size: int,
) -> Rollouts:
    """Roll every candidate out, all trees and branches together.

    Args:
        forest: the baseline; `candidates[g]` are for its tree g.
        candidates: k token ids a tree. An EOS candidate needs no roll-out, and gets none.
        horizon: tokens after the candidate; with 0 nothing runs.
        prompt_keys: one key a tree, of its random stream.
        step: response tokens emitted so far.
        eos: ids that end a roll-out.
        config: how roll-outs are drawn.
        vocab_size: ids from here on are padding and never drawn.
    """
    num = config.rollouts_per_candidate if horizon else 1
    places = [
        (tree, idx, i)
        for tree, ids in enumerate(candidates)
        for idx, token in enumerate(ids)
        for i in range(1 if token in eos else num)
    ]
    live = [place for place in places if candidates[place[0]][place[1]] not in eos]
    if not horizon or not live:
        branches = [Branch(tree, idx, candidates[tree][idx], []) for tree, idx, _ in places]
        return Rollouts(branches, {}, None, {}, 0)

    device = forest.device
    tokens = [candidates[tree][idx] for tree, idx, _ in live]
    keys = rollout_keys(
        [prompt_keys[tree] for tree, _, _ in live], step, tokens, [i for _, _, i in live]
    ).to(device)
    row_tree = torch.tensor([tree for tree, _, _ in live], device=device)
    uniform = len(live) == len(candidates) * len(candidates[0]) * num
    state = _State(len(live), horizon, keys)
    first_logits, num_steps = _advance(
        forest,
        state,
        torch.tensor(tokens, device=device),
        None if uniform else row_tree,
        row_tree,
        eos=torch.tensor(eos, dtype=torch.int64, device=device),
        config=config,
        vocab_size=vocab_size,
    )
    row_of = torch.empty_like(state.origin)
    row_of[state.origin] = torch.arange(len(live), device=device)
    done = {place: row for place, row in zip(live, row_of.tolist(), strict=True)}
    all_tokens, lengths = state.tokens.tolist(), state.lengths.tolist()
    logprob, proposal = state.logprob.tolist(), state.proposal_logprob.tolist()
    branches = []
    for place in places:
        tree, idx, _ = place
        branch = Branch(tree, idx, candidates[tree][idx], [])
        if place in done:
            row = done[place]
            drawn = all_tokens[row][: lengths[row]]
            branch = dataclasses.replace(
                branch, tokens=drawn, logprob=logprob[row], proposal_logprob=proposal[row]
            )
        branches.append(branch)
    first = [(tree, idx, number) for number, (tree, idx, i) in enumerate(live) if i == 0]
    return Rollouts(
        branches,
        {(tree, idx): done[(tree, idx, 0)] for tree, idx, _ in first},
        first_logits,
        {(tree, idx): number for tree, idx, number in first},
        num_steps,
    )


def _advance(
    forest: LanguageForest,
    state: _State,
    tokens: torch.Tensor,
    tree: torch.Tensor | None,
    row_tree: torch.Tensor,
    *,
    eos: torch.Tensor,
    config: DecodeConfig,
    vocab_size: int,
) -> tuple[torch.Tensor, int]:
    """Run one forward pass and one draw a depth until every row is finished or full."""
    first_logits = None
    horizon = state.tokens.shape[1]
    active = tokens.shape[0]
    for depth in range(horizon):
        logits = forest.forward_rows(tokens, start=depth, tree=tree)
        if first_logits is None:
            first_logits = logits
        ops.advance_rollouts_(
            logits,
            state.keys[:active],
            depth,
            state.tokens[:active],
            state.lengths[:active],
            state.finished[:active],
            state.logprob[:active],
            state.proposal_logprob[:active],
            eos,
            temperature=0.0 if config.rollout == "greedy" else config.rollout_temperature,
            top_k=config.rollout_top_k,
            top_p=config.rollout_top_p,
            vocab_size=vocab_size,
            seed=config.seed,
            backend=config.backend,
        )
        if depth + 1 == horizon:
            break
        running = (~state.finished[:active]).nonzero().squeeze(1)
        if running.numel() == 0:
            break
        # Finished rows leave once a quarter is idle: a forward pass costs little less with a few
        # rows fewer, and moving rows costs a copy of their KV.
        if running.numel() <= 0.75 * active:
            order = torch.cat([running, state.finished[:active].nonzero().squeeze(1)])
            forest.cache.permute_rows(order, depth + 1)
            state.permute(order)
            active = running.numel()
            tree = row_tree[state.origin[:active]]
        tokens = state.tokens[:active, depth]
    return first_logits, depth + 1
