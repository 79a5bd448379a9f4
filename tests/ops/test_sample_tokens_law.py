"""The law that sample_tokens draws from: bulk, far tail, edges, and independence."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tests.ops.statistics import chi_square_excess
from tq_fast.ops import philox

OP = "sample_tokens"
NUM_DRAWS = 20_000
NUM_TAIL_DRAWS = 3_000_000


def exact_proposal(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """The proposal's probabilities `[V]` in float64: temperature, then top-k, then top-p."""
    order = logits.double().sort(descending=True, stable=True).indices
    probabilities = (logits.double() / temperature).softmax(dim=-1)[order]
    if top_k:
        probabilities[top_k:] = 0
    probabilities /= probabilities.sum()
    before = probabilities.cumsum(dim=-1) - probabilities
    if top_p < 1:
        probabilities[before >= top_p - 1e-12] = 0
        probabilities[0] = max(probabilities[0], 1e-300)
    probabilities /= probabilities.sum()
    return torch.zeros_like(probabilities).scatter(0, order, probabilities)


def draw(op, logits: Tensor, num: int = NUM_DRAWS, **parameters):
    """`num` draws from one row of logits, keys 0 .. num-1."""
    return op(logits.expand(num, -1), torch.arange(num), 0, **parameters)


def targets() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = 257
    head_heavy = torch.full((size,), -6.0)
    head_heavy[200] = 3.0
    return {
        "flat": torch.zeros(size),
        "normal": torch.randn(size, generator=generator) * 2,
        "zipf": -1.1 * torch.arange(1, size + 1).log()[torch.randperm(size, generator=generator)],
        "head heavy": head_heavy,
    }


@pytest.mark.parametrize(
    "parameters",
    [
        {},
        {"temperature": 0.6},
        {"temperature": 2.5},
        {"top_k": 20},
        {"top_p": 0.8},
        {"temperature": 1.4, "top_k": 40, "top_p": 0.7},
    ],
    ids=str,
)
@pytest.mark.parametrize("target", list(targets()))
def test_draws_follow_the_target(op, target, parameters):
    logits = targets()[target]
    probabilities = exact_proposal(logits, **parameters)
    ids, logprobs, proposal, valid = draw(op, logits, seed=11, **parameters)
    assert valid.all()
    assert (probabilities[ids] > 0).all()
    assert chi_square_excess(ids, probabilities) <= 10
    torch.testing.assert_close(
        logprobs.double(),
        logits.double().log_softmax(-1)[ids],
        rtol=tolerances.LOGPROB_REL,
        atol=tolerances.LOGPROB_ABS,
    )
    torch.testing.assert_close(
        proposal.double(),
        probabilities.log()[ids],
        rtol=tolerances.LOGPROB_REL,
        atol=tolerances.LOGPROB_ABS,
    )


@functools.cache
def tail_uniforms() -> Tensor:
    return philox.uniform(99, philox.ROLLOUT, torch.arange(NUM_TAIL_DRAWS), 0)


@pytest.mark.parametrize(("gap", "tail"), [(10, 1), (14, 63), (18, 1023), (20, 4095)])
def test_the_far_tail_is_drawn_as_often_as_it_should_be(op, gap, tail):
    logits = torch.zeros(1 + tail)
    logits[1:] = -gap
    share = tail * math.exp(-gap) / (1 + tail * math.exp(-gap))
    num = NUM_TAIL_DRAWS
    # The head comes first, so only uniforms near 1 reach the tail: the rows below 1 - 4 * share
    # would all draw the head, and only a sample of them is run.
    uniform = tail_uniforms()
    near = (uniform > 1 - 4 * share).nonzero().squeeze(-1)
    far = (uniform <= 1 - 4 * share).nonzero().squeeze(-1)[:50]
    assert (op(logits.expand(50, -1), far, 0, seed=99).ids == 0).all()
    ids = op(logits.expand(near.numel(), -1), near, 0, seed=99).ids
    hits = (ids > 0).sum().item()
    expected = num * share
    assert expected > 20
    assert abs(hits - expected) < 5 * math.sqrt(expected)
    # Within the tail all tokens are alike: the mean id is that of a uniform draw.
    if tail > 1:
        mean = ids[ids > 0].double().mean().item()
        deviation = tail / math.sqrt(12 * hits)
        assert abs(mean - (1 + tail) / 2) < 5 * deviation


@pytest.mark.parametrize(("key", "head"), [(3913841302, 0), (307082356, 8191)])
def test_a_uniform_at_the_edge_reaches_tokens_that_24_bits_never_do(op, key, head):
    # Found by search: of the first 2^32 keys of seed 0, those closest to 1 and nearly so to 0.
    uniform = philox.uniform(0, philox.ROLLOUT, torch.tensor([key]), 0).item()
    edge = min(uniform, 1 - uniform)
    assert edge < 5e-10
    # Far from the head, so that no sum has to hold both: 64 equal tokens, which the edge splits.
    tail = range(8128, 8192) if head == 0 else range(64)
    share = 4 * edge
    logits = torch.full((1, 8192), -torch.inf)
    logits[0, head] = 0.0
    logits[0, list(tail)] = math.log(share / 64)
    ids = op(logits, torch.tensor([key]), 0, seed=0).ids
    # A quarter of the tail's mass lies outside the edge.
    assert abs(ids.item() - (tail[47] if head == 0 else tail[15])) <= 1


@pytest.mark.parametrize("top_p", [1.0, 0.7])
def test_relabelling_tokens_relabels_the_counts(op, generator, top_p):
    logits = torch.randn(60, generator=generator) * 2
    shuffle = torch.randperm(60, generator=generator)
    ids = draw(op, logits[shuffle], seed=5, top_p=top_p).ids
    assert chi_square_excess(shuffle[ids], exact_proposal(logits, top_p=top_p)) <= 10


def test_rows_and_steps_are_independent(op):
    # Two tokens of equal mass: a draw is a coin, and coins of neighbours must not agree.
    logits = torch.zeros(NUM_DRAWS, 2)
    keys = torch.arange(NUM_DRAWS)
    coins = torch.stack([op(logits, keys, step, seed=2).ids for step in range(4)]) * 2.0 - 1
    products = [coins[a] * coins[b] for a in range(4) for b in range(a)]
    products += [coins[step, 1:] * coins[step, :-1] for step in range(4)]
    for product in products:
        assert abs(product.mean().item()) < 5 / math.sqrt(product.numel())
