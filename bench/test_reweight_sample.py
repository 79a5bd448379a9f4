"""reweight_sample beside two eager versions, with torch's own noise and with keyed noise.

Only the second computes the same thing: a draw of torch.multinomial depends on the batch.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.side_by_side import time_provider, turns
from tq_fast.ops import reweight_sample

K, ROLLOUTS, ALPHA = 20, 8, 0.5


def eager(prior: Tensor, ids: Tensor, rewards: Tensor, log_weights: Tensor):
    weights = log_weights.softmax(-1)
    q = (weights * rewards).sum(-1)
    spread = (weights * (rewards - q.unsqueeze(-1))).square().sum(-1)
    q_stderr = (spread * (ROLLOUTS / (ROLLOUTS - 1))).sqrt()
    ess = weights.square().sum(-1).reciprocal()
    final = (prior + q / ALPHA).log_softmax(-1)
    return torch.multinomial(final.exp(), 1), final, q, q_stderr, ess


def with_backend(backend: str | None):
    def run(prior: Tensor, ids: Tensor, rewards: Tensor, log_weights: Tensor):
        return reweight_sample(prior, ids, rewards, log_weights, alpha=ALPHA, backend=backend)

    return run


FUNCTIONS = {
    "eager": eager,
    "compiled": eager,
    "eager with keyed noise": with_backend("ref"),
    "ours": with_backend(None),
}


@pytest.mark.parametrize("provider", FUNCTIONS)
@pytest.mark.parametrize("prompts", [1, 4, 8, 32, 64, 256])
def test_reweight_sample(benchmark, figure, prompts, provider) -> None:
    def make(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        prior = torch.randn(prompts, K, generator=generator).log_softmax(-1)
        ids = torch.randint(0, 32000, (prompts, K), generator=generator)
        rewards, weights = torch.randn(2, prompts, K, ROLLOUTS, generator=generator).unbind()
        return prior, ids, rewards, weights

    inputs = turns(make)
    example = next(inputs)
    got, expected = with_backend(None)(*example), with_backend("ref")(*example)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    group = f"reweight_sample G={prompts}, k={K}, n={ROLLOUTS}"
    time_provider(benchmark, figure, provider, group, FUNCTIONS[provider], inputs, rounds=200)
