"""sample_tokens beside softmax and torch.multinomial, whole and cut off."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench.ceilings import Work
from bench.side_by_side import PROVIDERS, time_provider, turns
from tq_fast.ops import sample_tokens

SETTINGS = {
    "whole": {},
    "warm": {"temperature": 0.7},
    "top-k": {"top_k": 50},
    "top-p": {"top_p": 0.9},
    "top-k and top-p": {"top_k": 50, "top_p": 0.9},
}


def make_eager(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0):
    def eager(logits: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits.float()
        scaled = logits / temperature
        if top_k:
            least = scaled.topk(top_k).values[..., -1:]
            scaled = scaled.masked_fill(scaled < least, -torch.inf)
        if top_p < 1.0:
            ordered, order = scaled.sort(dim=-1, descending=True)
            masses = ordered.softmax(-1)
            dropped = masses.cumsum(-1) - masses >= top_p
            scaled = scaled.masked_fill(dropped.scatter(-1, order, dropped), -torch.inf)
        ids = torch.multinomial(scaled.softmax(-1), 1)
        return ids, logits.gather(-1, ids) - logits.logsumexp(-1, keepdim=True)

    return eager


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize(("rows", "size"), [(32, 128256), (40, 32000)])
def test_sample_tokens(benchmark, figure, rows, size, setting, provider) -> None:
    parameters = SETTINGS[setting]
    keys = torch.arange(rows)

    def make(seed: int) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return ((torch.randn(rows, size, generator=generator) * 2).to(torch.bfloat16),)

    inputs = turns(make)
    (logits,) = next(inputs)
    got = sample_tokens(logits, keys, 0, **parameters)
    expected = sample_tokens(logits, keys, 0, backend="ref", **parameters)
    assert (got.ids == expected.ids).float().mean() > 0.95

    def ours(logits: Tensor):
        return sample_tokens(logits, keys, 0, **parameters)

    function = ours if provider == "ours" else make_eager(**parameters)
    group = f"sample_tokens {rows}x{size} bf16, {setting}"
    work = Work(logits.nbytes, 0)
    time_provider(benchmark, figure, provider, group, function, inputs, rounds=10, work=work)
