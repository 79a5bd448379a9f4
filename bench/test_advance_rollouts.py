"""advance_rollouts_ beside the same update in eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.ceilings import Work
from bench.side_by_side import PROVIDERS, time_provider, turns
from tq_fast.ops import advance_rollouts_


def make_state(rows: int) -> list[Tensor]:
    """Return tokens, lengths, finished and both sums; lengths never reach the capacity."""
    return [
        torch.zeros(rows, 4096, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.bool),
        torch.zeros(rows),
        torch.zeros(rows),
    ]


def eager(logits: Tensor, keys: Tensor, eos: Tensor, state: list[Tensor]) -> None:
    tokens, lengths, finished, sums, proposal_sums = state
    logprobs = logits.float().log_softmax(-1)
    ids = torch.multinomial(logprobs.exp(), 1)
    chosen = logprobs.gather(-1, ids).squeeze(-1)
    live = ~finished
    slot = lengths.unsqueeze(-1)
    tokens.scatter_(-1, slot, torch.where(live.unsqueeze(-1), ids, tokens.gather(-1, slot)))
    lengths.add_(live)
    sums.add_(torch.where(live, chosen, 0.0))
    proposal_sums.add_(torch.where(live, chosen, 0.0))
    finished.logical_or_(live & (ids == eos).any(-1))


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(("rows", "size"), [(10, 32000), (160, 32000), (32, 128256)])
def test_advance_rollouts(benchmark, figure, rows, size, provider) -> None:
    keys, eos = torch.arange(rows), torch.tensor([-1])

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(rows, size, generator=generator) * 2).to(torch.bfloat16)
        return logits, keys, eos, make_state(rows)

    def ours(logits: Tensor, keys: Tensor, eos: Tensor, state: list[Tensor]) -> None:
        advance_rollouts_(logits, keys, 0, *state, eos)

    inputs = turns(make)
    logits, _, _, _ = next(inputs)
    states = [make_state(rows) for _ in range(2)]
    advance_rollouts_(logits, keys, 0, *states[0], eos)
    advance_rollouts_(logits, keys, 0, *states[1], eos, backend="ref")
    same = states[0][0][:, 0] == states[1][0][:, 0]
    assert same.float().mean() > 0.95
    torch.testing.assert_close(states[0][3][same], states[1][3][same], rtol=1e-5, atol=1e-5)
    function = ours if provider == "ours" else eager
    group = f"advance_rollouts_ {rows}x{size} bf16"
    work = Work(logits.nbytes, 0)
    time_provider(benchmark, figure, provider, group, function, inputs, rounds=10, work=work)
