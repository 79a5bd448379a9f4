"""The law that value_sample_tokens draws from: bulk, far tail, relabelling, and independence."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.statistics import chi_square_excess
from tests.ops.test_sample_tokens_law import exact_proposal, targets
from tq_fast.ops import philox

OP = "value_sample_tokens"
NUM_DRAWS = 20_000
NUM_TAIL_DRAWS = 3_000_000
RANK = 3


def split_law(target: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """Logits `[V]`, directions `[r]` and embeddings `[V, r]` of which `target` is the sum."""
    generator = torch.Generator().manual_seed(target.numel())
    directions = torch.randn(RANK, generator=generator)
    embeddings = torch.randn(target.numel(), RANK, generator=generator)
    return target - embeddings @ directions / alpha, directions, embeddings


def num_draws(op) -> int:
    """Fewer draws for the interpreter of Triton, which takes milliseconds a row."""
    return 600 if op.backend == "triton" else NUM_DRAWS


def draw(op, target: Tensor, alpha: float = 0.7, **parameters: Any):
    """Draws from one row, keys 0, 1, ..."""
    logits, directions, embeddings = split_law(target, alpha)
    num = num_draws(op)
    rows = (logits.expand(num, -1), directions.expand(num, -1))
    return op.or_auto(*rows, embeddings, torch.arange(num), 0, alpha=alpha, **parameters)


@pytest.mark.parametrize(
    "parameters",
    [{}, {"temperature": 0.6}, {"top_k": 20}, {"temperature": 1.4, "top_k": 40, "top_p": 0.7}],
    ids=str,
)
@pytest.mark.parametrize("target", list(targets()))
def test_draws_follow_the_target(op, target, parameters):
    logits = targets()[target]
    if target in ("flat", "head heavy") and parameters:
        # Which of equal tokens are kept hangs on the rounding of their values.
        logits = logits + torch.arange(logits.numel()) * -1e-3
    probabilities = exact_proposal(logits, **parameters)
    got = draw(op, logits, seed=11, **parameters)
    assert got.valid.all()
    assert (probabilities[got.ids] > 0).all()
    assert chi_square_excess(got.ids, probabilities) <= 10


@functools.cache
def tail_uniforms() -> Tensor:
    return philox.uniform(99, philox.ROLLOUT, torch.arange(NUM_TAIL_DRAWS), 0)


@pytest.mark.parametrize(("gap", "tail"), [(10, 1), (14, 63), (18, 1023), (20, 4095)])
def test_the_far_tail_is_drawn_as_often_as_it_should_be(op, gap, tail):
    """The values alone make the tail: the prior is flat."""
    embeddings = torch.full((1 + tail, 1), -1.0)
    embeddings[0] = 0.0
    logits, directions = torch.zeros(1, 1 + tail), torch.full((1, 1), float(gap))
    share = tail * math.exp(-gap) / (1 + tail * math.exp(-gap))
    uniform = tail_uniforms()
    # Only uniforms near 1 reach the tail: the rows below 1 - 4 * share would all draw the head, and
    # only a sample of them is run.
    near = (uniform > 1 - 4 * share).nonzero().squeeze(-1)
    far = (uniform <= 1 - 4 * share).nonzero().squeeze(-1)[:50]

    def ids(keys: Tensor) -> Tensor:
        num = keys.numel()
        rows = (logits.expand(num, -1), directions.expand(num, -1))
        return op(*rows, embeddings, keys, 0, seed=99).ids

    assert (ids(far) == 0).all()
    drawn = ids(near)
    hits = int((drawn > 0).sum())
    expected = NUM_TAIL_DRAWS * share
    assert expected > 20
    assert abs(hits - expected) < 5 * math.sqrt(expected)
    if tail > 1:
        mean = drawn[drawn > 0].double().mean().item()
        assert abs(mean - (1 + tail) / 2) < 5 * tail / math.sqrt(12 * hits)


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_relabelling_tokens_relabels_the_counts(op, generator, top_p):
    logits, directions, embeddings = split_law(torch.randn(60, generator=generator) * 2, 1.0)
    shuffle = torch.randperm(60, generator=generator)
    keys = torch.arange(num_draws(op))
    rows = (logits[shuffle].expand(len(keys), -1), directions.expand(len(keys), -1))
    ids = op.or_auto(*rows, embeddings[shuffle], keys, 0, seed=5, top_p=top_p).ids
    target = logits + embeddings @ directions
    assert chi_square_excess(shuffle[ids], exact_proposal(target, top_p=top_p)) <= 10


def test_rows_and_steps_are_independent(op):
    # Two tokens of equal mass: a draw is a coin, and coins of neighbours must not agree.
    keys = torch.arange(num_draws(op))
    logits = torch.tensor([[0.0, 1.0]]).expand(len(keys), -1)
    directions, embeddings = torch.ones(len(keys), 1), torch.tensor([[1.0], [0.0]])
    coins = [op(logits, directions, embeddings, keys, step, seed=2).ids for step in range(4)]
    signs = torch.stack(coins) * 2.0 - 1
    products = [signs[a] * signs[b] for a in range(4) for b in range(a)]
    products += [signs[step, 1:] * signs[step, :-1] for step in range(4)]
    for product in products:
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel())
