"""The C++ reweight_sample against the reference; tests/ops holds the contract itself."""

from __future__ import annotations

import pytest
import torch

from tq_fast.ops import reweight_sample

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("estimator", ["mean", "soft"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 1), (4, 20, 8), (70, 7, 3), (0, 4, 2)])
def test_equals_the_reference_with_weights_lengths_and_bad_numbers(shape, estimator, dtype):
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


def test_opcheck_passes():
    op = torch.ops.tq_fast.reweight_sample.default
    ids = torch.arange(8).reshape(2, 4)
    arguments = (torch.randn(2, 4), ids, torch.randn(2, 4, 3), torch.randn(2, 4, 3), None)
    torch.library.opcheck(op, (*arguments, 0.5, True, False, 1, None, None, 2, None))
    step = torch.tensor(2)
    torch.library.opcheck(op, (*arguments, 0.5, False, False, 1, step, torch.arange(2), 2, step))
