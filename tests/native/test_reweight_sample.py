"""The C++ reweight_sample against the reference; tests/ops holds the contract itself."""

from __future__ import annotations

import pytest
import torch

from tq_fast.ops import philox, reweight_sample

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["mean", "soft"])
@pytest.mark.parametrize(
    "shape", [(1, 1, 1), (3, 5, 1), (4, 20, 8), (70, 7, 3), (2, 9, 13), (2, 150, 2), (0, 4, 2)]
)
def test_equals_the_reference_with_weights_lengths_and_bad_numbers(isa, shape, estimator, dtype):
    generator = torch.Generator().manual_seed(shape[0])
    prior = torch.randn(shape[:2], generator=generator).to(dtype)
    ids = torch.randint(0, 50, shape[:2], generator=generator)
    rewards = torch.randn(shape, generator=generator).to(dtype)
    weights = (torch.randn(shape, generator=generator) * 3).to(dtype)
    weights[torch.rand(shape, generator=generator) < 0.2] = -torch.inf
    bad = rewards.clone()
    bad[torch.rand(shape, generator=generator) < 0.05] = torch.nan
    lengths = torch.randint(0, shape[2] + 1, shape[:2], generator=generator)
    for r, w, n in [(rewards, None, None), (bad, weights, None), (rewards, weights, lengths)]:
        for greedy in (False, True):
            got, expected = (
                reweight_sample(
                    prior,
                    ids,
                    r,
                    w,
                    n,
                    alpha=0.5,
                    estimator=estimator,
                    greedy=greedy,
                    seed=-7,
                    step=3,
                    backend=backend,
                )
                for backend in ("cpu", "ref")
            )
            for name, a, b in zip(got._fields, got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=2e-6, atol=1e-6, equal_nan=True, msg=name)


def test_keys_make_a_prompt_independent_of_its_place():
    prior = torch.zeros(1, 6).expand(40, 6)
    ids = torch.arange(6).expand(40, 6)
    rewards = torch.zeros(40, 6, 2)
    keys = torch.arange(40) * 1000
    parameters = {"alpha": 1.0, "seed": 2, "step": torch.tensor(5), "backend": "cpu"}
    whole = reweight_sample(prior, ids, rewards, keys=keys, **parameters)
    back = reweight_sample(prior, ids, rewards, keys=keys.flip(0), **parameters)
    assert torch.equal(whole.choice, back.choice.flip(0))
    assert len(whole.choice.unique()) > 1


@pytest.mark.parametrize("estimator", ["mean", "soft"])
def test_a_prompt_has_the_same_bits_alone_as_in_any_batch(isa, num_threads, estimator):
    trees, k, n = 90, 21, 5
    generator = torch.Generator().manual_seed(3)
    prior = torch.randn(trees, k, generator=generator)
    ids = torch.randint(0, 50, (trees, k), generator=generator)
    rewards, weights = torch.randn(2, trees, k, n, generator=generator).unbind()
    lengths = torch.randint(0, n + 1, (trees, k), generator=generator)
    # NaN and infinities in one prompt must not reach its neighbours.
    rewards[7], weights[8], prior[9] = torch.nan, -torch.inf, torch.inf
    tensors = (prior, ids, rewards, weights, lengths)
    keys = torch.arange(trees)
    parameters = {"alpha": 0.3, "estimator": estimator, "seed": 5, "backend": "cpu"}
    whole = reweight_sample(*tensors, keys=keys, **parameters)
    for rows in (slice(6, 7), slice(10, 11), slice(1, 88)):
        part = reweight_sample(*(x[rows] for x in tensors), keys=keys[rows], **parameters)
        for name, a, b in zip(whole._fields, part, whole, strict=True):
            torch.testing.assert_close(a, b[rows], rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("k", [2, 3, 9, 66])
def test_the_noise_is_that_of_the_reference_to_the_last_digits(isa, k):
    """Two candidates whose scores differ by just less than their noise, and by just more."""
    trees = 400
    generator = torch.Generator().manual_seed(k)
    ids = torch.randperm(150_000, generator=generator)[:k] + torch.arange(trees)[:, None] * 7
    keys = torch.randint(-(2**62), 2**62, (trees,), generator=generator)
    noise = philox.gumbel(-3, keys[:, None], 11, ids)
    last = k - 1
    for sign in (1, -1):
        prior = torch.full((trees, k), -torch.inf, dtype=torch.float64)
        prior[:, 0] = 0.0
        gap = noise[:, 0] - noise[:, last]
        prior[:, last] = gap + sign * 1e-13 * gap.abs().clamp(min=1)
        rewards = torch.zeros(trees, k, 1, dtype=torch.float64)
        got = reweight_sample(
            prior, ids, rewards, alpha=1.0, seed=-3, keys=keys, step=11, backend="cpu"
        )
        assert (got.choice == (last if sign > 0 else 0)).all()


def test_a_weight_is_dropped_only_where_it_rounds_to_zero(isa):
    """exp(-740) is 0 times a normal number, but not 0: a reward that is NaN still counts."""
    weights = torch.tensor([[[0.0, -740.0], [0.0, -750.0]]])
    rewards = torch.tensor([[[1.0, torch.nan], [1.0, torch.nan]]])
    prior, ids = torch.zeros(1, 2), torch.tensor([[4, 5]])
    for estimator in ("mean", "soft"):
        got = reweight_sample(
            prior, ids, rewards, weights, alpha=1.0, estimator=estimator, backend="cpu"
        )
        assert got.q[0, 0].isnan()
        assert got.q[0, 1] == 1.0


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
def test_infinite_rewards_and_priors_are_as_in_the_reference(isa, bad):
    generator = torch.Generator().manual_seed(1)
    prior = torch.randn(6, 10, generator=generator)
    rewards = torch.randn(6, 10, 3, generator=generator)
    ids = torch.arange(60).reshape(6, 10)
    prior[0, 3], rewards[1, 4, 2], rewards[2], prior[3] = bad, bad, bad, bad
    got, expected = (
        reweight_sample(prior, ids, rewards, alpha=0.5, backend=backend)
        for backend in ("cpu", "ref")
    )
    for name, a, b in zip(got._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6, equal_nan=True, msg=name)


def test_opcheck_passes():
    op = torch.ops.tq_fast.reweight_sample.default
    ids = torch.arange(8).reshape(2, 4)
    arguments = (torch.randn(2, 4), ids, torch.randn(2, 4, 3), torch.randn(2, 4, 3), None)
    torch.library.opcheck(op, (*arguments, 0.5, True, False, 1, None, None, 2, None))
    step = torch.tensor(2)
    torch.library.opcheck(op, (*arguments, 0.5, False, False, 1, step, torch.arange(2), 2, step))
