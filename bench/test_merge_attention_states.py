"""merge_attention_states beside the lines that one would write, and torch.compile of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.ceilings import Work
from bench.side_by_side import time_provider, turns
from tq_fast.ops import merge_attention_states


def eager(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    lse = torch.logaddexp(lse_a, lse_b)
    shares = [(part - lse).exp().unsqueeze(-1) for part in (lse_a, lse_b)]
    return (out_a * shares[0] + out_b * shares[1]).to(out_a.dtype), lse


def ours(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor):
    return merge_attention_states((out_a, lse_a), (out_b, lse_b))


# Neither of the first two takes empty states: they give NaN.
PROVIDERS = {"eager": eager, "compiled": eager, "ours": ours}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("rows", "heads", "size"), [(10, 12, 64), (160, 16, 128)])
def test_merge_attention_states(benchmark, figure, rows, heads, size, dtype, provider) -> None:
    def make(seed: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(seed)
        outs = torch.randn(2, rows, heads, 1, size, generator=generator).to(dtype)
        lses = torch.randn(2, rows, heads, 1, generator=generator)
        return outs[0], lses[0], outs[1], lses[1]

    inputs = turns(make)
    example = next(inputs)
    for a, b in zip(ours(*example), eager(*example), strict=True):
        torch.testing.assert_close(a, b, rtol=torch.finfo(a.dtype).eps, atol=1e-5)
    group = f"merge_attention_states {rows}x{heads}x1x{size} {dtype}"
    function = PROVIDERS[provider]
    work = Work(sum(x.nbytes for x in example) * 3 / 2, 0)
    time_provider(benchmark, figure, provider, group, function, inputs, rounds=200, work=work)
