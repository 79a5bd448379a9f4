"""The C++ topk_logprobs in each of its vector variants; tests/ops holds the contract itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tq_fast.ops import topk_logprobs

SIZES = [1, 2, 15, 16, 17, 31, 1000, 2048, 2049, 4097, 32000, 128256]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

# Relative to the lse. The kernel sums fp32 exponentials, each within 2 units in the last place.
LSE_TOLERANCE = 5e-7


def exact(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    values = logits.double()
    ordered = values.sort(dim=-1, descending=True, stable=True)
    lse = values.logsumexp(-1)
    return ordered.indices[:, :k], ordered.values[:, :k] - lse[:, None], lse


def check(logits: Tensor, k: int) -> None:
    ids, logprobs, lse = topk_logprobs(logits, k, backend="cpu")
    expected_ids, expected_logprobs, expected_lse = exact(logits, k)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=LSE_TOLERANCE, atol=LSE_TOLERANCE)
    torch.testing.assert_close(logprobs.double(), expected_logprobs, rtol=5e-7, atol=1e-6)
    assert (logprobs <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_equals_float64_for_every_variant_dtype_and_size(isa, dtype, size):
    generator = torch.Generator().manual_seed(size)
    logits = (torch.randn(3, size, generator=generator) * 4).to(dtype)
    for k in {1, min(10, size), min(100, size)}:
        check(logits, k)


@pytest.mark.parametrize("size", [1, 2, 17, 1000, 4097])
def test_k_may_be_the_whole_vocabulary(isa, num_threads, size):
    check(torch.randn(2, size, generator=torch.Generator().manual_seed(1)), size)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_values_everywhere_leave_the_lowest_ids(isa, dtype):
    # Values that tie across blocks, and inside one across its interleaved strands.
    logits = torch.zeros(3, 9000, dtype=dtype)
    logits[1, 4100:4300] = 2.0
    logits[2, torch.tensor([8999, 2047, 2048, 2112, 6000])] = 1.0
    for k in (1, 4, 70, 300):
        check(logits, k)
        check(-logits, k)


@pytest.mark.parametrize("rows", [1, 40])
def test_rows_chosen_to_hurt_the_queue(num_threads, rows):
    size = 40000
    ramp = torch.arange(size, dtype=torch.float32) / size
    for row in (ramp, ramp.flip(0), torch.zeros(size), (ramp * 50).floor()):
        check(row.repeat(rows, 1), 10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gap", [3.0, 7.9, 8.1, 60.0, 90.0, 3e4])
def test_a_block_whose_first_values_say_nothing_about_the_rest(isa, dtype, gap):
    # Exponentials are taken against the first values of a block: these lie far below what follows,
    # or hold no number, or lie far above it.
    logits = torch.randn(6, 6000, generator=torch.Generator().manual_seed(4))
    logits[0, 64:] += gap
    logits[1, 2000:2048] += gap
    logits[2, 2048:2112] -= gap
    logits[3, :64], logits[3, 2048:2112] = -torch.inf, torch.nan
    logits[4] = torch.arange(6000) * (gap / 6000)
    logits[5, :100] += gap
    logits = logits.to(dtype)
    for k in (1, 12):
        check(logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf), k)
    got = topk_logprobs(logits, 12, backend="cpu")
    expected = topk_logprobs(
        logits.nan_to_num(nan=-torch.inf, neginf=-torch.inf), 12, backend="cpu"
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_an_infinite_logit_is_loud_and_stays_in_its_row(isa):
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(6))
    logits[1, 4711] = torch.inf
    ids, _, lse = topk_logprobs(logits, 2, backend="cpu")
    assert ids[1, 0] == 4711
    assert not lse[1].isfinite()
    check(logits[[0, 2]], 2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_k_largest_may_all_lie_in_one_block_or_one_strand(isa, dtype):
    logits = torch.zeros(3, 20000, dtype=dtype)
    logits[0, 19000:19900] = torch.arange(900) / 4
    # Every 64th value belongs to the same strand.
    logits[1, 4096 + 5 : 6144 : 64] = torch.arange(1, 33).to(dtype)
    logits[2] = -torch.arange(20000) / 8
    for k in (5, 31, 33, 200):
        check(logits, k)


def test_nan_counts_as_minus_infinity_and_stays_in_its_row(isa):
    logits = torch.randn(3, 3000, generator=torch.Generator().manual_seed(2))
    clean = logits.clone()
    logits[0, ::7] = torch.nan
    clean[0, ::7] = -torch.inf
    logits[1] = torch.nan
    clean[1] = -torch.inf
    got, expected = (topk_logprobs(x, 5, backend="cpu") for x in (logits, clean))
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    assert got.ids[1].tolist() == [0, 1, 2, 3, 4]
    assert (got.logprobs[1] == -torch.inf).all() and got.lse[1] == -torch.inf


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e37])
def test_huge_and_tiny_magnitudes(isa, scale):
    logits = torch.randn(2, 3000, generator=torch.Generator().manual_seed(3)) * scale
    check(logits, 7)


def test_temperature_divides_for_each_row(isa):
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(5))
    heat = torch.tensor([0.5, 1.0, 3.0])
    got = topk_logprobs(logits, 6, temperature=heat, backend="cpu")
    for row in range(3):
        one = topk_logprobs(logits[row : row + 1], 6, temperature=heat[row].item(), backend="cpu")
        plain = topk_logprobs(logits[row : row + 1] / heat[row], 6, backend="cpu")
        for a, b, c in zip(got, one, plain, strict=True):
            assert torch.equal(a[row : row + 1], b) and torch.equal(b, c)


def test_no_rows_give_empty_outputs():
    ids, logprobs, lse = topk_logprobs(torch.empty(0, 50), 5, backend="cpu")
    assert ids.shape == (0, 5) and logprobs.shape == (0, 5) and lse.shape == (0,)


def test_a_row_does_not_depend_on_the_batch_or_the_threads():
    logits = torch.randn(33, 50257, generator=torch.Generator().manual_seed(7))
    whole = topk_logprobs(logits, 20, backend="cpu")
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for row in (0, 13, 32):
            alone = topk_logprobs(logits[row : row + 1], 20, backend="cpu")
            for a, b in zip(alone, whole, strict=True):
                assert torch.equal(a[0], b[row])
    torch.set_num_threads(before)


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="logits is float64"):
        topk_logprobs(torch.randn(2, 9, dtype=torch.float64), 3, backend="cpu")


def test_opcheck_passes():
    op = torch.ops.tq_fast.topk_logprobs.default
    logits = torch.randn(3, 100)
    torch.library.opcheck(op, (logits, 5, 1.0, None, 100))
    torch.library.opcheck(op, (logits, 5, 1.0, torch.ones(3), 90))
