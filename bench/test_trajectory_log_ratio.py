"""trajectory_log_ratio beside log_softmax and gather."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.ceilings import Work
from bench.side_by_side import PROVIDERS, time_provider, turns
from tq_fast.ops import trajectory_log_ratio


def eager(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    def score(logits: Tensor) -> Tensor:
        return logits.float().log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)

    within = torch.arange(tokens.shape[1]) < lengths.unsqueeze(-1)
    return torch.where(within, score(p) - score(q), 0.0).sum(-1)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("rows", "length", "size"), [(40, 20, 32000), (8, 16, 128256)])
def test_trajectory_log_ratio(benchmark, figure, rows, length, size, dtype, provider) -> None:
    def make(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        p, q = (torch.randn(rows, length, size, generator=generator).to(dtype) for _ in range(2))
        tokens = torch.randint(0, size, (rows, length), generator=generator)
        return p, q, tokens, torch.full((rows,), length)

    inputs = turns(make)
    example = next(inputs)
    torch.testing.assert_close(
        trajectory_log_ratio(*example), eager(*example), rtol=1e-5, atol=1e-3
    )
    function = trajectory_log_ratio if provider == "ours" else eager
    group = f"trajectory_log_ratio {rows}x{length}x{size} {dtype}"
    work = Work(2 * example[0].nbytes, 0)
    time_provider(benchmark, figure, provider, group, function, inputs, rounds=8, work=work)
