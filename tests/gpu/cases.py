"""One call of each op that has a CUDA or Triton kernel, on CUDA tensors, by name.

A case is a function of a seed and of a step, both one-element int64 tensors on the device; it makes
its inputs once, and returns the tensors that it has written.
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


def trajectories(seed: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 3000, (6, 5), generator=generator).cuda()
    return tokens, torch.tensor([5, 0, 3, 5, 1, 4]).cuda()


def trajectory_log_ratio(backend: str | None) -> Case:
    inputs = (random(6, 5, 3000), random(6, 5, 3000, seed=4), *trajectories())
    return lambda seed, step: (ops.trajectory_log_ratio(*inputs, backend=backend),)


def linear_trajectory_logprob(backend: str | None) -> Case:
    inputs = (random(6, 5, 64), random(3000, 64, seed=4) / 8, *trajectories())
    return lambda seed, step: (ops.linear_trajectory_logprob(*inputs, backend=backend),)


def shared_prefix_attention(backend: str | None, new: int) -> Case:
    q = random(6, 8, new, 64)
    prefix = [random(2, 2, 300, 64, seed=seed) for seed in (4, 5)]
    branch = [random(6, 2, 40, 64, seed=seed) for seed in (6, 7)]
    prefix_len, branch_len = torch.tensor([300, 17]).cuda(), torch.full((6,), 33).cuda()
    return lambda seed, step: tuple(
        ops.shared_prefix_attention(q, *prefix, prefix_len, *branch, branch_len, backend=backend)
    )


def prompt_attention(backend: str | None) -> Case:
    """A prompt after 40 known tokens, in views of one cache, as flash attention takes it."""
    q = random(1, 8, 300, 64).bfloat16()
    keys, values = random(2, 1, 2, 340, 64, seed=4).bfloat16()
    prefix_k, branch_k = keys.tensor_split((40,), dim=2)
    prefix_v, branch_v = values.tensor_split((40,), dim=2)
    inputs = (q, prefix_k, prefix_v, None, branch_k, branch_v, None)
    return lambda seed, step: tuple(ops.shared_prefix_attention(*inputs, backend=backend))


def value_sample_tokens(backend: str | None) -> Case:
    logits, directions = random(ROWS, VOCAB), random(ROWS, 64, seed=4)
    embeddings, keys = random(VOCAB, 64, seed=5) / 8, torch.arange(ROWS, device="cuda")
    return lambda seed, step: tuple(
        ops.value_sample_tokens(
            logits, directions, embeddings, keys, step, alpha=0.7, seed=seed, backend=backend
        )
    )


CUDA_CASES: dict[str, Callable[[str | None], Case]] = {
    "topk_logprobs": topk_logprobs,
    "sample_tokens": sample_tokens,
    "sample_tokens, truncated": lambda backend: sample_tokens(backend, top_k=300, top_p=0.9),
    "sample_tokens, top-p": lambda backend: sample_tokens(backend, top_p=0.95),
    "advance_rollouts_": advance_rollouts,
    "reweight_sample": reweight_sample,
    "shared_prefix_attention, a prompt": prompt_attention,
}
TRITON_CASES: dict[str, Callable[[str | None], Case]] = {
    "topk_logprobs, Triton": topk_logprobs,
    "value_sample_tokens": value_sample_tokens,
    "trajectory_log_ratio": trajectory_log_ratio,
    "linear_trajectory_logprob": linear_trajectory_logprob,
    "shared_prefix_attention": lambda backend: shared_prefix_attention(backend, 1),
    "shared_prefix_attention, Triton, a prompt": prompt_attention,
    "shared_prefix_attention, many queries": lambda backend: shared_prefix_attention(backend, 20),
}


def kernel(name: str) -> Case:
    """Return the case on the backend that has its kernel."""
    if name in TRITON_CASES:
        return TRITON_CASES[name]("triton")
    return CUDA_CASES[name]("cuda")


def reference(name: str) -> Case:
    return (CUDA_CASES | TRITON_CASES)[name]("ref")


# The results of these cases follow seed and step; the number is the index of the chosen tokens
# among the tensors that a case returns.
RANDOM_CASES = {
    "sample_tokens": 0,
    "sample_tokens, truncated": 0,
    "sample_tokens, top-p": 0,
    "advance_rollouts_": 0,
    "reweight_sample": 0,
    "value_sample_tokens": 0,
}


def device_int(value: int) -> Tensor:
    return torch.tensor([value], device="cuda")
