"""value_sample_tokens beside the lines that it replaces: a product, two lses, and multinomial."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.ceilings import Work
from bench.side_by_side import PROVIDERS, time_provider, turns
from tq_fast.ops import value_sample_tokens

RANK = 64
SETTINGS = {"whole": {}, "top-k": {"top_k": 50}, "top-p": {"top_p": 0.9}}


def make_eager(top_k: int = 0, top_p: float = 1.0):
    def eager(logits: Tensor, directions: Tensor, embeddings: Tensor) -> tuple[Tensor, ...]:
        logits = logits.float()
        q = (directions @ embeddings.T).float()
        guided = logits + q
        if top_k:
            least = guided.topk(top_k).values[..., -1:]
            guided = guided.masked_fill(guided < least, -torch.inf)
        if top_p < 1.0:
            ordered, order = guided.sort(dim=-1, descending=True)
            masses = ordered.softmax(-1)
            dropped = masses.cumsum(-1) - masses >= top_p
            guided = guided.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
        prior_lse = logits.logsumexp(-1, keepdim=True)
        guided_lse = guided.logsumexp(-1, keepdim=True)
        law = guided.softmax(-1)
        ids = torch.multinomial(law, 1)
        kl = (law * q).sum(-1, keepdim=True) - guided_lse + prior_lse
        return ids, logits.gather(-1, ids) - prior_lse, guided.gather(-1, ids) - guided_lse, kl

    return eager


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize(
    ("setting", "rows", "size", "dtype"),
    [
        ("whole", rows, size, dtype)
        for dtype in (torch.float32, torch.bfloat16)
        for size in (32000, 128256)
        for rows in (1, 8, 32)
    ]
    + [(setting, 8, 128256, torch.bfloat16) for setting in ("top-k", "top-p")],
)
def test_value_sample_tokens(benchmark, figure, rows, size, dtype, setting, provider) -> None:
    parameters = SETTINGS[setting]
    keys = torch.arange(rows)

    def make(seed: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        logits = (torch.randn(rows, size, generator=generator) * 2).to(dtype)
        directions = torch.randn(rows, RANK, generator=generator).to(dtype)
        embeddings = (torch.randn(size, RANK, generator=generator) / RANK**0.5).to(dtype)
        return logits, directions, embeddings

    inputs = turns(make)
    first = next(inputs)
    got = value_sample_tokens(*first, keys, 0, **parameters)
    expected = value_sample_tokens(*first, keys, 0, backend="ref", **parameters)
    same = got.ids == expected.ids
    assert same.float().mean() >= 0.95
    for a, b in zip(got[1:4], expected[1:4], strict=True):
        torch.testing.assert_close(a[same], b[same], rtol=1e-5, atol=1e-4)

    def ours(logits: Tensor, directions: Tensor, embeddings: Tensor):
        return value_sample_tokens(logits, directions, embeddings, keys, 0, **parameters)

    function = ours if provider == "ours" else make_eager(**parameters)
    name = str(dtype).removeprefix("torch.")
    group = f"value_sample_tokens {rows}x{size}, r={RANK}, {name}, {setting}"
    work = Work(sum(x.nbytes for x in first), 2 * rows * size * RANK)
    time_provider(
        benchmark, figure, provider, group, function, inputs, rounds=10, work=work, dtype=dtype
    )
