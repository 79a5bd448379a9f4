"""topk_logprobs against float64: order, ties, values, padding, and rows that hold no number."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tq_fast.ops import topk_logprobs

OP = "topk_logprobs"
SIZES = [1, 2, 31, 1000, 1024, 4097, 32000, 50257, 128256, 151936]


def exact(logits: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """(ids, logprobs, lse) in float64; a stable sort keeps the lower of equal ids first."""
    values = logits.double() / temperature
    ordered = values.sort(dim=-1, descending=True, stable=True)
    lse = values.logsumexp(dim=-1)
    return ordered.indices[:, :k], ordered.values[:, :k] - lse[:, None], lse


def check(op, logits: Tensor, k: int, temperature: float = 1.0) -> None:
    ids, logprobs, lse = op(logits, k, temperature=temperature)
    expected_ids, expected_logprobs, expected_lse = exact(logits, k, temperature)
    assert ids.dtype == torch.int64
    assert logprobs.dtype == lse.dtype == torch.float32
    assert torch.equal(ids, expected_ids)
    assert (logprobs <= 0).all()
    torch.testing.assert_close(
        lse.double(), expected_lse, rtol=tolerances.LSE_REL, atol=tolerances.LSE_ABS
    )
    torch.testing.assert_close(
        logprobs.double(),
        expected_logprobs,
        rtol=tolerances.LOGPROB_REL,
        atol=tolerances.LOGPROB_ABS,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_matches_float64_at_every_size_and_dtype(op, generator, size, dtype):
    # 16-bit logits tie all the time, so the order of ties is tested with them.
    logits = (torch.randn(3, size, generator=generator) * 4).to(dtype)
    for k in {1, min(10, size), min(100, size)}:
        check(op, logits, k)


@pytest.mark.parametrize("size", SIZES)
def test_k_may_be_the_whole_vocabulary(op, generator, size):
    check(op.or_auto, torch.randn(2, size, generator=generator), size)


@pytest.mark.parametrize("rows", [1, 7])
def test_rows_that_hurt_a_threshold_queue(op, rows):
    ramp = torch.arange(9000, dtype=torch.float32) / 900
    for row in (ramp, ramp.flip(0), torch.full((9000,), 3.0), ramp.floor()):
        check(op, row.repeat(rows, 1), 10)


@pytest.mark.parametrize("scale", [1e-30, 1e4, 1e37])
def test_magnitudes_near_the_ends_of_fp32(op, generator, scale):
    logits = torch.randn(4, 300, generator=generator) * scale
    ids, logprobs, lse = op(logits, 5)
    expected_ids, expected_logprobs, expected_lse = exact(logits, 5)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=tolerances.LSE_REL, atol=1e-5)
    # A log-probability keeps fp32 relative digits even where the logits are huge.
    torch.testing.assert_close(logprobs.double(), expected_logprobs, rtol=1e-5, atol=1e-5)


def test_the_two_zeros_tie(op):
    assert op(torch.tensor([[-0.0, 0.0, -1.0, -0.0]]), 4).ids.tolist() == [[0, 1, 3, 2]]


def test_strided_and_offset_views(op, generator):
    whole = torch.randn(8, 700, generator=generator)
    check(op, whole[::2, 3:650], 9)
    check(op, whole.T[:600:7], 4)
    check(op, whole[:1].expand(5, -1), 6)


def test_padding_never_enters(op, generator):
    logits = torch.randn(3, 500, generator=generator)
    padded = logits.clone()
    padded[:, 400:] = torch.tensor([1e30, torch.inf, torch.nan, 0.0]).repeat(25)
    for k in (1, 400):
        got = op.or_auto(padded, k, vocab_size=400)
        expected = op.or_auto(logits[:, :400].contiguous(), k)
        tolerances.assert_same_sums(op.backend, got, expected)


def test_nan_counts_as_minus_infinity_and_leaves_other_rows_alone(op, generator):
    logits = torch.randn(4, 900, generator=generator)
    clean = logits.clone()
    logits[1, ::3], clean[1, ::3] = torch.nan, -torch.inf
    logits[2], clean[2] = torch.nan, -torch.inf
    got, expected = op(logits, 6), op(clean, 6)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    check(op, logits[[0, 3]], 6)


def test_a_row_without_a_number_has_the_first_ids_and_no_probability(op):
    ids, logprobs, lse = op(torch.full((2, 40), -torch.inf), 3)
    assert ids.tolist() == [[0, 1, 2]] * 2
    assert (logprobs == -torch.inf).all()
    assert (lse == -torch.inf).all()


def test_one_finite_logit_takes_all_the_mass(op):
    logits = torch.full((1, 3000), -torch.inf)
    logits[0, 2345] = -7.5
    ids, logprobs, lse = op(logits, 3)
    assert ids.tolist() == [[2345, 0, 1]]
    assert logprobs.tolist() == [[0.0, -torch.inf, -torch.inf]]
    assert lse.tolist() == [-7.5]


def test_an_infinite_logit_is_loud_and_stays_in_its_row(op, generator):
    logits = torch.randn(3, 60, generator=generator)
    logits[1, 17] = torch.inf
    ids, _, lse = op(logits, 2)
    assert ids[1, 0] == 17
    assert not lse[1].isfinite()
    check(op, logits[[0, 2]], 2)
    assert torch.equal(lse[[0, 2]], op(logits[[0, 2]], 2).lse)


def test_temperature_a_number_or_one_a_row(op, generator):
    logits = torch.randn(3, 200, generator=generator)
    check(op, logits, 7, temperature=0.3)
    heats = [0.25, 1.0, 8.0]
    got = op(logits, 7, temperature=torch.tensor(heats))
    for row, heat in enumerate(heats):
        one = op(logits[row : row + 1], 7, temperature=heat)
        for a, b in zip(got, one, strict=True):
            torch.testing.assert_close(a[row], b[0], rtol=1e-6, atol=1e-6)


def test_a_row_does_not_depend_on_the_other_rows(op, generator):
    logits = torch.randn(9, 5000, generator=generator)
    whole = op(logits, 10)
    for rows in (slice(4, 5), slice(2, 8)):
        part = op(logits[rows], 10)
        for a, b in zip(whole, part, strict=True):
            assert torch.equal(a[rows], b)


def test_no_rows(op):
    ids, logprobs, lse = op(torch.zeros(0, 12), 4)
    assert ids.shape == logprobs.shape == (0, 4)
    assert lse.shape == (0,)


def test_inputs_are_not_written(op):
    logits = torch.tensor([[torch.nan, 1.0, torch.inf, -torch.inf]])
    before = logits.clone()
    op(logits, 2)
    assert torch.equal(logits.nan_to_num(nan=7.0), before.nan_to_num(nan=7.0))


@pytest.mark.parametrize(
    ("logits", "k", "parameters", "words"),
    [
        (torch.zeros(5), 1, {}, r"topk_logprobs: logits .*\[5\].* 2 axes"),
        (torch.zeros(2, 5, dtype=torch.int64), 1, {}, "logits is torch.int64"),
        (torch.zeros(2, 5), 0, {}, "k is 0, expected 1 to 5"),
        (torch.zeros(2, 5), 6, {}, "k is 6, expected 1 to 5"),
        (torch.zeros(2, 5), 4, {"vocab_size": 3}, "k is 4, expected 1 to 3"),
        (torch.zeros(2, 5), 1, {"vocab_size": 6}, "vocab_size is 6, expected 1 to 5"),
        (torch.zeros(2, 5), 1, {"vocab_size": 0}, "vocab_size is 0, expected 1 to 5"),
        (torch.zeros(2, 5), 1, {"temperature": 0.0}, "temperature is 0.0, expected"),
        (torch.zeros(2, 5), 1, {"temperature": float("nan")}, "temperature is nan"),
        (torch.zeros(2, 5), 1, {"temperature": torch.ones(3)}, r"temperature .*\[3\].*= \[2\]"),
        (torch.zeros(2, 5, requires_grad=True), 1, {}, "logits requires grad"),
    ],
)
def test_rejects(rejects, logits, k, parameters, words):
    rejects(words, lambda: topk_logprobs(logits, k, **parameters))


def test_a_parameter_that_requires_grad_is_fine_without_grad_mode():
    with torch.no_grad():
        topk_logprobs(torch.zeros(2, 5, requires_grad=True), 1)


def test_compiles_as_one_graph(op, generator):
    compiled = torch.compile(lambda x: op(x, 5), fullgraph=True, dynamic=True, backend="aot_eager")
    for rows in (3, 6):
        logits = torch.randn(rows, 90, generator=generator)
        for a, b in zip(compiled(logits), op(logits, 5), strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("size", "k", "needed"),
    [
        (1, 1, 548),
        (5000, 128, 42592),
        (128256, 10, 22136),
        (131072, 128, 84232),
        (2**19, 128, 134920),
    ],
)
def test_the_cuda_kernel_is_refused_where_a_block_has_too_little_shared_memory(
    size, k, needed, monkeypatch
):
    """csrc/tests/test_topk_row.cpp holds the same numbers of bytes against the kernel's."""
    module = importlib.import_module("tq_fast.ops.topk_logprobs")
    assert module.shared_bytes(size, k) == needed
    assert module.refuse_shared_bytes(size, k, needed) is None
    assert f"takes {needed} bytes of shared" in module.refuse_shared_bytes(size, k, needed - 1)
    logits = torch.empty(1, 1).expand(1, size)
    asked = []
    # The smallest card that the kernels are compiled for has 99 KiB, an H100 227.
    for limit in (99 << 10, 227 << 10):
        monkeypatch.setattr(module, "_shared_bytes_of", lambda d, n=limit: asked.append(d) or n)
        refused = module._refuse_cuda(logits, k) is not None
        assert refused == (needed > limit)
    assert bool(asked) == (needed > 48 << 10)
