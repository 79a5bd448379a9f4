"""One call of each op that has a CUDA or Triton kernel, on CUDA tensors, by name.

A case is a function of a seed and of a step, both one-element int64 tensors on the device; it makes
its inputs once, and answers the tensors that it has written.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tq_fast import ops

Case = Callable[[Tensor, Tensor], tuple[Tensor, ...]]
VOCAB, ROWS = 32000, 12


def random(*shape: int, seed: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).cuda()


def topk_logprobs(backend: str | None) -> Case:
    logits = random(ROWS, VOCAB)
    return lambda seed, step: tuple(ops.topk_logprobs(logits, 20, backend=backend))


def sample_tokens(backend: str | None, **parameters: float) -> Case:
    logits, keys = random(ROWS, VOCAB), torch.arange(ROWS, device="cuda")

    def run(seed: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            ops.sample_tokens(logits, keys, step, seed=seed, backend=backend, **parameters)
        )

    return run


def advance_rollouts(backend: str | None) -> Case:
    logits, keys = random(ROWS, VOCAB), torch.arange(ROWS, device="cuda")
    tokens = torch.zeros(ROWS, 64, dtype=torch.int64, device="cuda")
    lengths = torch.zeros(ROWS, dtype=torch.int64, device="cuda")
    finished = torch.zeros(ROWS, dtype=torch.bool, device="cuda")
    sums, proposals = torch.zeros(2, ROWS, device="cuda").unbind()
    eos = torch.tensor([5], device="cuda")

    def run(seed: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        state = (tokens, lengths, finished, sums, proposals)
        ops.advance_rollouts_(logits, keys, step, *state, eos, seed=seed, backend=backend)
        return state

    return run


def reweight_sample(backend: str | None) -> Case:
    prior, rewards, weights = random(4, 20), random(4, 20, 8, seed=4), random(4, 20, 8, seed=5)
    ids = torch.arange(80, device="cuda").reshape(4, 20)

    def run(seed: Tensor, step: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            ops.reweight_sample(
                prior, ids, rewards, weights, alpha=0.7, seed=seed, step=step, backend=backend
            )
        )

    return run


CUDA_CASES: dict[str, Callable[[str | None], Case]] = {
    "topk_logprobs": topk_logprobs,
    "sample_tokens": sample_tokens,
    "sample_tokens, truncated": lambda backend: sample_tokens(backend, top_k=300, top_p=0.9),
    "advance_rollouts_": advance_rollouts,
    "reweight_sample": reweight_sample,
}
# Whose result follows seed and step: the place of a chosen token among the tensors it answers.
RANDOM_CASES = {
    "sample_tokens": 0,
    "sample_tokens, truncated": 0,
    "advance_rollouts_": 0,
    "reweight_sample": 0,
}


def device_int(value: int) -> Tensor:
    return torch.tensor([value], device="cuda")
