"""topk_logprobs beside torch.topk and torch.logsumexp."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.ceilings import Work
from bench.side_by_side import PROVIDERS, time_provider, turns
from tq_fast.ops import topk_logprobs

K = 10


def eager(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, ids = torch.topk(logits, K)
    lse = torch.logsumexp(logits.float(), -1)
    return ids, values.float() - lse.unsqueeze(-1), lse


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(("rows", "size"), [(1, 128256), (32, 128256), (40, 32000)])
def test_topk_logprobs(benchmark, figure, rows, size, dtype, provider) -> None:
    def make(seed: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return ((torch.randn(rows, size, generator=generator) * 2).to(dtype),)

    inputs = turns(make)
    (logits,) = next(inputs)
    got, expected = topk_logprobs(logits, K), logits.double().logsumexp(-1)
    torch.testing.assert_close(got.lse.double(), expected, rtol=2e-6, atol=0)
    ordered = logits.float().sort(dim=-1, descending=True, stable=True)
    assert torch.equal(got.ids, ordered.indices[:, :K])
    function = (lambda x: topk_logprobs(x, K)) if provider == "ours" else eager
    group = f"topk_logprobs {rows}x{size} {dtype}, k={K}"
    time_provider(benchmark, figure, provider, group, function, inputs, work=Work(logits.nbytes, 0))
