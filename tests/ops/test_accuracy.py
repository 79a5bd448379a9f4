"""No op is further from float64 than the naive path of the same dtype, but for a small cap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tq_fast import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Two spacings of fp32 at 16, the size of what is compared: all that an op may lose where the naive
# path happens to lose nothing.
CAP = 4e-6
# An output of order 1 may lose one spacing of the scores, 1.9e-6 at 16, which is a relative error
# of its weights (seen with MKL on an Intel Xeon, whose products sum in another order), or one
# rounding to 16 bits.
OUTPUT_CAP = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
TOKENS = torch.randint(0, 3000, (4, 6), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.full((4,), 6)


def draw(*shape: int, scale: float = 3.0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(shape[-1])) * scale


def within(got: Tensor, naive: Tensor, exact: Tensor, cap: float) -> None:
    assert exact.dtype == torch.float64
    error, worst = ((x.double() - exact).abs().max() for x in (got, naive))
    assert error <= worst + cap, (error, worst)


def chosen(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, TOKENS[..., None]).squeeze(-1).sum(-1)


@pytest.mark.parametrize("backend", [None, "ref"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_logits(dtype, backend):
    logits = draw(5, 3000).to(dtype)
    got = ops.topk_logprobs(logits, 20, backend=backend)
    paths = [
        (x.log_softmax(-1).gather(-1, got.ids), x.logsumexp(-1)) for x in (logits, logits.double())
    ]
    within(got.logprobs, paths[0][0], paths[1][0], CAP)
    within(got.lse, paths[0][1], paths[1][1], CAP)
    drawn = ops.sample_tokens(logits, torch.arange(5), 0, temperature=0.7, backend=backend)
    for name, heat in (("logprobs", 1.0), ("proposal_logprobs", 0.7)):
        naive, exact = (
            (x / heat).log_softmax(-1).gather(-1, drawn.ids[:, None])[:, 0]
            for x in (logits, logits.double())
        )
        within(getattr(drawn, name), naive, exact, CAP)


@pytest.mark.parametrize("backend", [None, "ref"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype, backend):
    logits, directions = draw(5, 3000).to(dtype), draw(5, 64, scale=1.0).to(dtype)
    embeddings = (draw(3000, 64, scale=1.0) / 8).to(dtype)
    got = ops.value_sample_tokens(
        logits, directions, embeddings, torch.arange(5), 0, backend=backend
    )

    def path(logits: Tensor, directions: Tensor, embeddings: Tensor) -> list[Tensor]:
        prior = logits.log_softmax(-1)
        law = (logits + directions @ embeddings.T).log_softmax(-1)
        kl = (law.exp() * (law - prior)).sum(-1)
        return [*(x.gather(-1, got.ids[:, None])[:, 0] for x in (prior, law)), kl]

    naive = path(logits, directions, embeddings)
    exact = path(logits.double(), directions.double(), embeddings.double())
    for a, b, c in zip(got[1:4], naive, exact, strict=True):
        within(a, b, c, CAP)


@pytest.mark.parametrize("backend", [None, "ref"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_trajectories(dtype, backend):
    p, q = draw(4, 6, 3000).to(dtype), draw(4, 6, 3000, scale=2.0).flip(-1).to(dtype)
    got = ops.trajectory_log_ratio(p, q, TOKENS, LENGTHS, backend=backend)
    naive, exact = (chosen(a) - chosen(b) for a, b in ((p, q), (p.double(), q.double())))
    within(got, naive, exact, 6 * CAP)
    hidden, weight = draw(4, 6, 64, scale=1.0).to(dtype), (draw(3000, 64) / 8).to(dtype)
    got = ops.linear_trajectory_logprob(hidden, weight, TOKENS, LENGTHS, backend=backend)
    naive, exact = (
        chosen(h @ w.T) for h, w in ((hidden, weight), (hidden.double(), weight.double()))
    )
    within(got, naive, exact, 6 * CAP)


def attend(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ keys.transpose(-1, -2) * q.shape[-1] ** -0.5
    return scores.softmax(-1) @ values, scores.logsumexp(-1)


@pytest.mark.parametrize("backend", [None, "ref"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_attention(dtype, backend):
    q = draw(6, 4, 1, 64, scale=2.0).to(dtype)
    prefix, branch = draw(2, 1, 4, 300, 64, scale=1.0), draw(2, 6, 4, 9, 64, scale=1.0)
    prefix, branch = prefix.to(dtype), branch.to(dtype)
    got = ops.shared_prefix_attention(
        q, *prefix, torch.tensor([300]), *branch, torch.full((6,), 9), backend=backend
    )
    keys, values = torch.cat((prefix.expand(2, 6, 4, 300, 64), branch), dim=3)
    naive = attend(q, keys, values)
    exact = attend(q.double(), keys.double(), values.double())
    within(got.out, naive[0], exact[0], OUTPUT_CAP[dtype])
    within(got.lse, naive[1], exact[1], CAP)
    halves = [
        attend(q.double(), keys[..., cut, :].double(), values[..., cut, :].double())
        for cut in (slice(0, 100), slice(100, None))
    ]
    states = [(out.to(dtype), lse.float()) for out, lse in halves]
    merged = ops.merge_attention_states(*states, backend=backend)
    within(merged.out, naive[0], exact[0], OUTPUT_CAP[dtype])
    within(merged.lse, naive[1], exact[1], CAP)
