"""The C++ samplers in each of their vector variants; tests/ops holds the contract itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tq_fast.ops import advance_rollouts_, sample_tokens
from tq_fast.ops.sample_tokens import proposal_logprobs

ROWS = 48


def make_logits(size: int, scale: float, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(size)
    return (torch.randn(ROWS, size, generator=generator) * scale).to(dtype)


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.3])
@pytest.mark.parametrize("top_k", [0, 1, 40])
@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("size", [1, 31, 2049, 9000])
def test_draws_the_tokens_of_the_reference(isa, size, temperature, top_k, top_p):
    keys = torch.arange(ROWS) * 7 - 100
    same, total = 0, 0
    for scale in (0.0, 1.0, 5.0):
        logits = make_logits(size, scale)
        got, expected = (
            sample_tokens(
                logits,
                keys,
                3,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                seed=9,
                backend=b,
            )
            for b in ("cpu", "ref")
        )
        agree = got.ids == expected.ids
        same, total = same + int(agree.sum()), total + ROWS
        for name in ("logprobs", "proposal_logprobs"):
            a, b = getattr(got, name)[agree], getattr(expected, name)[agree]
            # A top-p cut that rounding moves by one token changes the density by its share.
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4 if top_p < 1 else 3e-6)
        assert got.valid.all()
    # A uniform within rounding of a boundary may fall on either side of it.
    assert same >= total - 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_draw_as_their_fp32_copies(isa, dtype):
    logits = make_logits(5000, 3.0, dtype)
    keys = torch.arange(ROWS)
    for parameters in ({}, {"temperature": 0.6}, {"top_k": 30}, {"top_p": 0.8}):
        got = sample_tokens(logits, keys, 0, backend="cpu", **parameters)
        expected = sample_tokens(logits.float(), keys, 0, backend="cpu", **parameters)
        assert torch.equal(got.ids, expected.ids) and torch.equal(got.valid, expected.valid)
        # bf16 logits are summed in another order inside a block: a few spacings of fp32.
        for a, b in zip(got[1:3], expected[1:3], strict=True):
            torch.testing.assert_close(a, b, rtol=5e-7, atol=5e-7)


@pytest.mark.parametrize("parameters", [{}, {"temperature": 0.5}, {"top_p": 0.9}, {"top_k": 9}])
def test_a_row_does_not_depend_on_the_batch_or_the_threads(num_threads, parameters):
    logits = make_logits(50257, 2.0)
    keys = torch.arange(ROWS)
    whole = sample_tokens(logits, keys, 5, backend="cpu", **parameters)
    for row in (0, 17, ROWS - 1):
        one = slice(row, row + 1)
        alone = sample_tokens(logits[one], keys[one], 5, backend="cpu", **parameters)
        for a, b in zip(alone, whole, strict=True):
            assert torch.equal(a, b[one])


def draws(row: Tensor, num: int, **parameters):
    """Draws of the C++ kernel and of the reference from one row `[V]`, keys 0 .. num-1."""
    logits, keys = row.expand(num, -1), torch.arange(num)
    got = sample_tokens(logits, keys, 0, backend="cpu", **parameters)
    expected = sample_tokens(logits, keys, 0, backend="ref", **parameters)
    assert got.valid.all()
    return got, expected


def scattered(values: Tensor, size: int) -> Tensor:
    """A row `[size]` that is -inf but for `values`, in order, at places all over its blocks."""
    places = torch.randperm(size, generator=torch.Generator().manual_seed(8))[: values.numel()]
    row = torch.full((size,), -torch.inf)
    row[places.sort().values] = values
    return row


def test_top_p_of_a_flat_law_keeps_exactly_its_share(isa):
    # All logits tie: the kept set is the first ceil(p V) ids.
    logits = torch.zeros(4000, 5000)
    drawn = sample_tokens(logits, torch.arange(4000), 0, top_p=0.3, backend="cpu")
    assert drawn.ids.max() < 1500
    assert drawn.ids.max() > 1450
    torch.testing.assert_close(drawn.proposal_logprobs.exp(), torch.full((4000,), 1 / 1500))


@pytest.mark.parametrize("num_kept", range(1, 9))
def test_mass_that_is_reached_exactly_needs_no_further_token(isa, num_kept):
    row = scattered(torch.zeros(8), 7000)
    drawn, _ = draws(row, 300, top_p=num_kept / 8)
    assert torch.equal(drawn.ids.unique(), row.isfinite().nonzero().squeeze(-1)[:num_kept])
    torch.testing.assert_close(drawn.proposal_logprobs.exp(), torch.full((300,), 1 / num_kept))
    # A slightly larger top_p needs one more id.
    drawn, _ = draws(row, 300, top_p=min(num_kept / 8 + 1e-9, 1.0))
    assert drawn.ids.unique().numel() == min(num_kept + 1, 8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_of_ties_across_the_boundary_the_lower_ids_stay(isa, dtype):
    # A head, 3000 equal tokens of which a part stays, and a tail that goes.
    row = torch.full((6000,), -3.0)
    row[1::2] = 0.0
    row[[77, 5000]] = 5.0
    row = row.to(dtype)
    for top_p in (0.3, 0.5, 0.8):
        law = proposal_logprobs(row[None], top_p=top_p)[0]
        drawn, expected = draws(row, 1000, top_p=top_p)
        # A uniform within rounding of a boundary may fall on either side of it.
        assert (drawn.ids != expected.ids).sum() <= 3
        assert law[drawn.ids].isfinite().all()
        # One tie more or less would move these by a 3000th.
        torch.testing.assert_close(drawn.proposal_logprobs, law[drawn.ids], rtol=0, atol=1e-5)
        ties = drawn.ids[row[drawn.ids] == 0]
        assert ties.max() > 0.9 * (law.isfinite() & (row == 0)).nonzero().max()


@pytest.mark.parametrize("top_p", [0.0, 1e-300, 1e-12, 1e-5])
def test_a_top_p_so_small_that_one_token_remains(isa, top_p):
    logits = make_logits(9000, 2.0)
    logits[3] = 1.0
    logits[4, 8000:] = 30.0
    drawn = sample_tokens(logits, torch.arange(ROWS), 0, top_p=top_p, backend="cpu")
    arg_max = sample_tokens(logits, torch.arange(ROWS), 0, temperature=0.0, backend="cpu")
    assert torch.equal(drawn.ids, arg_max.ids)
    assert (drawn.proposal_logprobs == 0).all()


def test_a_top_p_of_one_cuts_nothing(isa):
    logits = make_logits(9000, 2.0)
    uncut = sample_tokens(logits, torch.arange(ROWS), 0, backend="cpu")
    drawn = sample_tokens(logits, torch.arange(ROWS), 0, top_p=1.0, backend="cpu")
    per_row = torch.full((ROWS,), 1.0, dtype=torch.float64)
    by_row = sample_tokens(logits, torch.arange(ROWS), 0, top_p=per_row, backend="cpu")
    for a, b, c in zip(uncut, drawn, by_row, strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("bad", [-torch.inf, torch.nan])
def test_top_p_of_a_row_with_few_numbers(isa, bad):
    numbers = torch.randn(30, generator=torch.Generator().manual_seed(1))
    row = scattered(numbers, 5000)
    broken = torch.where(row.isfinite(), row, bad)
    drawn, expected = draws(broken, 2000, top_p=0.95)
    assert row[drawn.ids].isfinite().all()
    assert (drawn.ids != expected.ids).sum() <= 1
    torch.testing.assert_close(
        drawn.proposal_logprobs, proposal_logprobs(broken[None], top_p=0.95)[0][drawn.ids]
    )
    alone, _ = draws(scattered(numbers[:1], 5000), 5, top_p=0.95)
    assert (alone.proposal_logprobs == 0).all()


@pytest.mark.parametrize("unit", [2.0**-100, 2.0**-20, 2.0**-3])
def test_values_that_differ_late_are_told_apart(isa, unit):
    # Whole multiples of a unit, shuffled: the masses are all but equal, the order is not.
    size = 5000
    order = torch.randperm(size, generator=torch.Generator().manual_seed(2))
    row = order.float() * unit if unit < 1e-6 else order.float() * unit / 500
    law = proposal_logprobs(row[None], top_p=0.25)[0]
    drawn, expected = draws(row, 2000, top_p=0.25)
    assert (drawn.ids != expected.ids).sum() <= 1
    assert law[drawn.ids].isfinite().all()
    torch.testing.assert_close(drawn.proposal_logprobs, law[drawn.ids], rtol=0, atol=1e-5)


@pytest.mark.parametrize("top_p", [0.5, 0.999999, 1 - 1e-12, 1 - 2.0**-53])
def test_masses_below_the_smallest_normal_number_are_not_drawn(isa, top_p):
    # Masses of 1, 1e-35, the denormal 1e-40, and 0: the first alone reaches any share below 1.
    row = torch.full((5000,), -80.6)
    row[::3], row[1::3] = -92.1, -1e4
    row[4321] = 0.0
    drawn, expected = draws(row, 200, top_p=top_p)
    assert (drawn.ids == 4321).all() and (expected.ids == 4321).all()
    assert (drawn.proposal_logprobs == 0).all()
    # A temperature as low as this gives any logits such masses.
    drawn, expected = draws(make_logits(5000, 1.0)[0], 200, temperature=1e-3, top_p=top_p)
    assert torch.equal(drawn.ids, expected.ids)
    drawn, expected = draws(make_logits(5000, 1.0)[0], 200, temperature=1e-39, top_p=top_p)
    assert torch.equal(drawn.ids, expected.ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 3.0])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.9, 0.99, 0.999999])
def test_top_p_keeps_what_the_reference_keeps(isa, dtype, temperature, top_p):
    logits, keys = make_logits(20000, 2.0, dtype), torch.arange(ROWS)
    parameters = {"temperature": temperature, "top_p": top_p, "seed": 3}
    drawn = sample_tokens(logits, keys, 1, backend="cpu", **parameters)
    expected = sample_tokens(logits, keys, 1, backend="ref", **parameters)
    same = drawn.ids == expected.ids
    assert same.sum() >= ROWS - 1
    for a, b in zip(drawn[1:3], expected[1:3], strict=True):
        torch.testing.assert_close(a[same], b[same], rtol=1e-6, atol=1e-5)


def make_state(rows: int, capacity: int, dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "tokens": torch.full((rows, capacity), -1, dtype=dtype),
        "lengths": torch.zeros(rows, dtype=dtype),
        "finished": torch.zeros(rows, dtype=torch.bool),
        "logprob_sums": torch.zeros(rows),
        "proposal_logprob_sums": torch.zeros(rows),
    }


@pytest.mark.parametrize("cut", [{"top_k": 7}, {"top_p": 0.8}])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_advance_rollouts_equals_the_reference_over_several_depths(num_threads, dtype, cut):
    keys = torch.arange(ROWS)
    eos = torch.tensor([3, 4], dtype=dtype)
    states = {backend: make_state(ROWS, 4, dtype) for backend in ("cpu", "ref")}
    for step in range(5):
        logits = torch.randn(ROWS, 12, generator=torch.Generator().manual_seed(step))
        logits[5] = torch.nan
        for backend, state in states.items():
            advance_rollouts_(logits, keys, step, *state.values(), eos, **cut, backend=backend)
    got, expected = states["cpu"], states["ref"]
    assert got["logprob_sums"][5].isnan() and got["finished"][5] and got["lengths"][5] == 0
    assert got["finished"].sum() > 5
    for name in got:
        torch.testing.assert_close(
            got[name], expected[name], rtol=1e-6, atol=1e-6, equal_nan=True, msg=name
        )


def test_advance_rollouts_writes_through_strided_state():
    logits = make_logits(100, 2.0)
    keys = torch.arange(ROWS)
    eos = torch.empty(0, dtype=torch.int64)
    plain = make_state(ROWS, 3, torch.int64)
    wide = {name: value.repeat_interleave(2, dim=0).contiguous() for name, value in plain.items()}
    strided = {name: value[::2] for name, value in wide.items()}
    for state in (plain, strided):
        advance_rollouts_(logits, keys, 0, *state.values(), eos, backend="cpu")
    for name in plain:
        assert torch.equal(plain[name], strided[name])
        untouched = wide[name][1::2]
        assert torch.equal(untouched, make_state(ROWS, 3, torch.int64)[name])


def test_seed_and_step_may_be_tensors():
    logits, keys = make_logits(64, 1.0), torch.arange(ROWS)
    by_int = sample_tokens(logits, keys, 7, seed=-5, backend="cpu")
    for dtype in (torch.int64, torch.int32):
        step, seed = torch.tensor(7, dtype=dtype), torch.tensor([-5])
        by_tensor = sample_tokens(logits, keys, step, seed=seed, backend="cpu")
        assert torch.equal(by_int.ids, by_tensor.ids)


def test_opcheck_passes():
    logits, keys = torch.randn(3, 50), torch.arange(3)
    rest = (0, None, 1.0, None, 0, None, 0.9, None, 50, 1, None)
    torch.library.opcheck(torch.ops.tq_fast.sample_tokens.default, (logits, keys, *rest))
    state = make_state(3, 2, torch.int64).values()
    eos = torch.tensor([1])
    arguments = (logits, keys, *rest[:2], *state, eos, *rest[2:])
    torch.library.opcheck(torch.ops.tq_fast.advance_rollouts_.default, arguments)
