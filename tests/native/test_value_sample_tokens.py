"""value_sample_tokens in C++: every vector variant, batches, threads, types, and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tq_fast.ops import sample_tokens, value_sample_tokens

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROWS = 33
CUTS = [{}, {"temperature": 0.7, "alpha": 1.3}, {"top_k": 40}, {"top_p": 0.8}, {"greedy": True}]


def make(size: int, rank: int = 24, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    logits = torch.randn(rows, size, generator=generator) * 2
    directions = torch.randn(rows, rank, generator=generator)
    return logits, directions, torch.randn(size, rank, generator=generator) * 1.5 / rank**0.5


def compare(got, expected) -> None:
    # A uniform within rounding of a boundary may fall on either side of it.
    same = got.ids == expected.ids
    assert (~same).sum() <= 1
    assert torch.equal(got.valid, expected.valid)
    for a, b in zip(got[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(a[same], b[same], rtol=2e-6, atol=1e-5)


@pytest.mark.parametrize("parameters", CUTS, ids=str)
@pytest.mark.parametrize("size", [1, 31, 511, 513, 2049, 9000])
def test_draws_the_tokens_of_the_reference(isa, size, parameters):
    keys = torch.arange(ROWS) * 7 - 100
    got, expected = (
        value_sample_tokens(*make(size), keys, 3, seed=9, backend=backend, **parameters)
        for backend in ("cpu", "ref")
    )
    assert got.valid.all()
    compare(got, expected)


@pytest.mark.parametrize("rank", [0, 1, 15, 16, 33, 64, 900])
def test_any_number_of_columns(isa, rank):
    inputs, keys = make(1300, max(rank, 1)), torch.arange(ROWS)
    cut = (inputs[0], *(x[:, :rank] for x in inputs[1:]))
    got, expected = (value_sample_tokens(*cut, keys, 3, backend=b) for b in ("cpu", "ref"))
    compare(got, expected)


@pytest.mark.parametrize("of_embeddings", [FP32, BF16, FP16])
@pytest.mark.parametrize("of_directions", [FP32, BF16, FP16])
@pytest.mark.parametrize("of_logits", [FP32, BF16, FP16])
def test_every_mixture_of_types(isa, of_logits, of_directions, of_embeddings):
    logits, directions, embeddings = make(1100, 40)
    inputs = (logits.to(of_logits), directions.to(of_directions), embeddings.to(of_embeddings))
    keys = torch.arange(ROWS)
    for parameters in ({}, {"top_k": 30}):
        got, expected = (
            value_sample_tokens(*inputs, keys, 0, backend=b, **parameters) for b in ("cpu", "ref")
        )
        compare(got, expected)


def test_directions_of_0_draw_what_sample_tokens_draws(isa):
    logits, directions, embeddings = make(5000, rows=1500)
    keys = torch.arange(1500)
    got = value_sample_tokens(logits, directions * 0, embeddings, keys, 5, backend="cpu")
    expected = sample_tokens(logits, keys, 5, backend="cpu")
    # The blocks are others, so that a uniform within rounding of a boundary may cross it.
    assert (got.ids != expected.ids).sum() <= 1
    assert got.kl.max() < 1e-6


@pytest.mark.parametrize("parameters", CUTS, ids=str)
@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_row_does_not_depend_on_the_batch_or_the_threads(num_threads, dtype, parameters):
    logits, directions, embeddings = (x.to(dtype) for x in make(7000, rows=260))
    keys = torch.arange(260)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    whole = value_sample_tokens(
        logits, directions, embeddings, keys, 5, backend="cpu", **parameters
    )
    torch.set_num_threads(before)
    for rows in (slice(0, 1), slice(17, 31), slice(17, 32), slice(200, 260), slice(0, 260)):
        part = value_sample_tokens(
            logits[rows], directions[rows], embeddings, keys[rows], 5, backend="cpu", **parameters
        )
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[rows])


def test_few_blocks_and_many_rows_are_split_over_the_threads_alike(num_threads):
    inputs = make(700, rows=300)
    keys = torch.arange(300)
    got, expected = (value_sample_tokens(*inputs, keys, 2, backend=b) for b in ("cpu", "ref"))
    compare(got, expected)


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.999])
def test_of_ties_at_a_cut_the_lower_ids_stay(isa, top_p):
    logits = torch.zeros(400, 3000)
    directions, embeddings = torch.ones(400, 1), torch.full((3000, 1), 0.25)
    keys = torch.arange(400)
    drawn = value_sample_tokens(logits, directions, embeddings, keys, 0, top_p=top_p, backend="cpu")
    num_kept = max(1, round(3000 * top_p))
    assert drawn.ids.max() < num_kept
    torch.testing.assert_close(drawn.guided_logprobs.exp(), torch.full((400,), 1 / num_kept))
    expected = torch.full((400,), 3000 / num_kept).log()
    torch.testing.assert_close(drawn.kl, expected, rtol=1e-5, atol=1e-6)
    drawn = value_sample_tokens(logits, directions, embeddings, keys, 0, top_k=1100, backend="cpu")
    assert 1000 < drawn.ids.max() < 1100
    torch.testing.assert_close(drawn.kl, torch.full((400,), 3000 / 1100).log())


@pytest.mark.parametrize("parameters", CUTS, ids=str)
def test_a_block_without_any_token_counts_for_nothing(isa, parameters):
    logits, directions, embeddings = make(4000)
    logits[:, 512:1536] = -torch.inf
    logits[:, 3000:] = torch.nan
    embeddings[512:700] = torch.nan
    keys = torch.arange(ROWS)
    got, expected = (
        value_sample_tokens(logits, directions, embeddings, keys, 0, backend=b, **parameters)
        for b in ("cpu", "ref")
    )
    assert got.valid.all() and logits.gather(-1, got.ids[:, None]).isfinite().all()
    compare(got, expected)


def test_nothing_beside_the_inputs_is_read_and_they_stay_as_they_were(isa):
    inputs, keys = make(700), torch.arange(ROWS)
    expected = value_sample_tokens(*inputs, keys, 0, backend="cpu")
    buffers = [torch.full((x.shape[0] + 2, x.shape[1] + 9), torch.nan) for x in inputs]
    views = [b[1:-1, 4:-5] for b in buffers]
    for view, tensor in zip(views, inputs, strict=True):
        view.copy_(tensor)
    copies = [b.clone() for b in buffers]
    got = value_sample_tokens(*views, keys, 0, backend="cpu")
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
    for buffer, copy in zip(buffers, copies, strict=True):
        assert torch.equal(buffer.nan_to_num(7.0), copy.nan_to_num(7.0))


def test_opcheck_passes():
    logits, directions, embeddings = make(50, rows=3)
    rest = (0, None, 0.7, None, 1.0, None, 0, None, 0.9, None, False, 50, 1, None)
    torch.library.opcheck(
        torch.ops.tq_fast.value_sample_tokens.default,
        (logits, directions, embeddings, torch.arange(3), *rest),
    )


def test_the_kernel_checks_what_the_package_checks():
    logits, directions, embeddings = make(50, rows=3)
    rest = (0, None, 0.7, None, 1.0, None, 0, None, 0.9, None, False, 50, 1, None)
    for tensors in (
        (logits, directions[:2], embeddings),
        (logits, directions[:, :5], embeddings),
        (logits, directions, embeddings[:49]),
        (logits[0], directions, embeddings),
    ):
        with pytest.raises(RuntimeError, match="value_sample_tokens: an argument breaks the"):
            torch.ops.tq_fast.value_sample_tokens.default(*tensors, torch.arange(3), *rest)
    with pytest.raises(RuntimeError, match="an argument breaks the contract"):
        torch.ops.tq_fast.value_sample_tokens.default(
            logits, directions, embeddings, torch.arange(3), 0, None, 0.0, *rest[3:]
        )
