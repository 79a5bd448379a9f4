"""The C++ trajectory ops in each of their vector variants; tests/ops holds the contract itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tq_fast import _native
from tq_fast.ops import linear_trajectory_logprob, trajectory_log_ratio

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_trajectories(rows: int, length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    tokens = torch.randint(0, vocab_size, (rows, length), generator=generator)
    lengths = torch.randint(0, length + 1, (rows,), generator=generator)
    return tokens, lengths


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 31, 2049, 5000])
def test_log_ratio_equals_the_reference(isa_or_amx, num_threads, size, dtype):
    generator = torch.Generator().manual_seed(size)
    p, q = ((torch.randn(5, 7, size, generator=generator) * 3).to(dtype) for _ in range(2))
    tokens, lengths = make_trajectories(5, 7, size)
    got, expected = (trajectory_log_ratio(p, q, tokens, lengths, backend=b) for b in ("cpu", "ref"))
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("softcap", [None, 0.5, 30.0])
@pytest.mark.parametrize(("width", "size"), [(8, 1), (33, 2050), (64, 5000)])
def test_linear_logprob_equals_the_reference(isa_or_amx, num_threads, width, size, softcap, dtype):
    generator = torch.Generator().manual_seed(size)
    hidden = torch.randn(5, 7, width, generator=generator).to(dtype)
    weight = (torch.randn(size, width, generator=generator) * (3 / width**0.5)).to(dtype)
    bias = torch.randn(size, generator=generator)
    tokens, lengths = make_trajectories(5, 7, size)
    got, expected = (
        linear_trajectory_logprob(
            hidden, weight, tokens, lengths, bias=bias, scale=1.3, softcap=softcap, backend=b
        )
        for b in ("cpu", "ref")
    )
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-4)


def test_more_tokens_than_one_product_takes_and_a_wide_state():
    # 1100 tokens need two blocks of rows; a width of 20000 makes the blocks of weight small.
    hidden = torch.randn(11, 100, 20000, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(300, 20000, generator=torch.Generator().manual_seed(1)) / 140
    tokens, lengths = make_trajectories(11, 100, 300)
    lengths[:] = 100
    got = linear_trajectory_logprob(hidden, weight, tokens, lengths, backend="cpu")
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(-1, tokens.unsqueeze(-1))
    torch.testing.assert_close(got, logprobs.sum((1, 2)), rtol=1e-5, atol=1e-3)


@pytest.mark.skipif(
    _native.cpu_isa() != "avx512" or not _native.cpu_has("avx512_bf16"),
    reason="needs a processor that multiplies pairs of bf16",
)
def test_bf16_tokens_alone_and_among_hundreds_give_the_same_bits(num_threads):
    # 500 tokens are three products of many rows; 40 are one of many, 3 one of few.
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(100, 5, 96, generator=generator).bfloat16()
    weight = (torch.randn(1500, 96, generator=generator) / 3).bfloat16()
    tokens = torch.randint(0, 1500, (100, 5), generator=generator)
    lengths = torch.full((100,), 5)
    lengths[7] = 3
    whole = linear_trajectory_logprob(hidden, weight, tokens, lengths)
    for part in (slice(0, 8), slice(7, 8)):
        few = linear_trajectory_logprob(hidden[part], weight, tokens[part], lengths[part])
        assert torch.equal(few, whole[part])


def test_a_head_whose_weight_is_a_parameter_is_taken_without_grad():
    head = torch.nn.Linear(16, 40)
    hidden, (tokens, lengths) = torch.randn(2, 3, 16), make_trajectories(2, 3, 40)
    with torch.no_grad():
        got, expected = (
            linear_trajectory_logprob(
                hidden, head.weight, tokens, lengths, bias=head.bias, backend=backend
            )
            for backend in ("cpu", "ref")
        )
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_opcheck_passes():
    tokens, lengths = make_trajectories(2, 3, 20)
    p, q = torch.randn(2, 3, 20), torch.randn(2, 3, 20)
    op = torch.ops.tq_fast.trajectory_log_ratio.default
    torch.library.opcheck(op, (p, q, tokens, lengths, 20))
    op = torch.ops.tq_fast.linear_trajectory_logprob.default
    weight, hidden = torch.randn(20, 8), torch.randn(2, 3, 8)
    torch.library.opcheck(op, (hidden, weight, tokens, lengths, None, 1.0, None, 20))
    torch.library.opcheck(op, (hidden, weight, tokens, lengths, torch.randn(20), 2.0, 5.0, 20))
