"""linear_trajectory_logprob beside the whole logits, and beside the bare fp32 product.

The bare product gives no log-probability. Eager code that rounds its logits to bf16 is off by
tenths of a nat over a response, so it is timed without being compared.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.ceilings import Work
from bench.side_by_side import time_provider, turns
from tq_fast.ops import linear_trajectory_logprob


def bare_product(hidden: Tensor, weight: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    return hidden.flatten(0, 1).float() @ weight.float().T


def eager(hidden: Tensor, weight: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    logprobs = functional.linear(hidden.float(), weight.float()).log_softmax(-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).sum((1, 2))


def eager_rounded(hidden: Tensor, weight: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
    logprobs = functional.linear(hidden, weight).float().log_softmax(-1)
    return logprobs.gather(-1, tokens.unsqueeze(-1)).sum((1, 2))


FUNCTIONS = {
    "eager": eager,
    "eager, logits in the input type": eager_rounded,
    "bare fp32 product": bare_product,
    "ours": linear_trajectory_logprob,
}


@pytest.mark.parametrize("provider", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize(
    ("rows", "length", "size", "width"), [(40, 20, 32000, 768), (8, 16, 128256, 1024)]
)
def test_linear_trajectory_logprob(
    benchmark, figure, rows, length, size, width, dtype, provider
) -> None:
    def make(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        hidden = torch.randn(rows, length, width, generator=generator).to(dtype)
        weight = (torch.randn(size, width, generator=generator) * (3 / width**0.5)).to(dtype)
        tokens = torch.randint(0, size, (rows, length), generator=generator)
        return hidden, weight, tokens, torch.full((rows,), length)

    inputs = turns(make)
    example = next(inputs)
    torch.testing.assert_close(
        linear_trajectory_logprob(*example), eager(*example), rtol=1e-5, atol=1e-3
    )
    group = f"linear_trajectory_logprob {rows}x{length}, {width} -> {size} {dtype}"
    hidden, weight = example[:2]
    work = Work(hidden.nbytes + weight.nbytes, 2 * rows * length * size * width)
    function = FUNCTIONS[provider]
    time_provider(
        benchmark, figure, provider, group, function, inputs, rounds=6, work=work, dtype=dtype
    )
