"""The C++ merge_attention_states in each of its vector variants; tests/ops holds the contract."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tq_fast.ops import merge_attention_states, merge_attention_states_ref

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def make_states(rows: int, size: int, dtype: torch.dtype) -> list[Tensor]:
    """out_a, lse_a, out_b, lse_b; every seventh row of either is empty and holds NaN."""
    generator = torch.Generator().manual_seed(rows + size)
    outs = torch.randn(2, rows, size, generator=generator).to(dtype)
    lses = torch.randn(2, rows, generator=generator) * 5
    outs[0, ::7], lses[0, ::7] = torch.nan, -torch.inf
    outs[1, 3::7], lses[1, 3::7] = torch.nan, torch.inf
    return [outs[0], lses[0], outs[1], lses[1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "size"), [(1, 1), (9, 15), (30, 16), (40, 80), (2000, 65)])
def test_every_variant_and_number_of_threads_gives_the_reference(
    isa, num_threads, dtype, rows, size
):
    states = make_states(rows, size, dtype)
    got = merge_attention_states(tuple(states[:2]), tuple(states[2:]), backend="cpu")
    lse = torch.stack([states[1], states[3]]).double()
    shares = lse.where(lse.isfinite(), -torch.inf).softmax(0).unsqueeze(-1)
    outs = torch.stack([states[0], states[2]]).double()
    expected = (shares * outs.where(shares > 0, 0.0)).sum(0)
    # Values of order 1 are what the tolerance is for; these reach 5.
    atol = 5 * tolerances.MERGE_OUT[dtype]
    torch.testing.assert_close(got.out.double(), expected, rtol=0, atol=atol)
    reference = merge_attention_states_ref(tuple(states[:2]), tuple(states[2:]))
    torch.testing.assert_close(got.lse, reference.lse, rtol=tolerances.LSE_REL, atol=2e-6)


def test_a_row_does_not_depend_on_the_others():
    states = make_states(500, 64, torch.bfloat16)
    whole = merge_attention_states(tuple(states[:2]), tuple(states[2:]), backend="cpu")
    few = [state[120:123] for state in states]
    part = merge_attention_states(tuple(few[:2]), tuple(few[2:]), backend="cpu")
    assert torch.equal(part.out, whole.out[120:123])
    assert torch.equal(part.lse, whole.lse[120:123])


@pytest.mark.parametrize("is_strided", [False, True])
def test_opcheck_passes(is_strided):
    # It compares inputs, too, and there NaN would be unequal to itself.
    outs, lses = torch.randn(2, 8, 6), torch.randn(2, 8)
    if is_strided:
        outs, lses = outs[:, ::2].transpose(1, 2), torch.randn(2, 6)
    op = torch.ops.tq_fast.merge_attention_states.default
    torch.library.opcheck(op, (outs[0], lses[0], outs[1], lses[1]))
