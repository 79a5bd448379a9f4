"""Faults of other libraries of this kind, looked for in every op; tests of each op look for more.

Each case makes inputs of one op on the CPU; the op runs on what a caller gets who pins nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tq_fast import ops

ROWS, VOCAB = 5, 300


def draw(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rollout_state() -> list[Tensor]:
    counts = torch.zeros(ROWS, dtype=torch.int64)
    sums = [torch.zeros(ROWS), torch.zeros(ROWS)]
    return [torch.zeros(ROWS, 4, dtype=torch.int64), counts, counts.bool(), *sums]


def trajectories() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randint(0, VOCAB, (ROWS, 3), generator=generator), torch.tensor([3, 0, 1, 2, 3])


def attention_inputs() -> list[Tensor]:
    prefix = [draw(1, 2, 70, 16, seed=seed) for seed in (2, 3)]
    branch = [draw(ROWS, 2, 9, 16, seed=seed) for seed in (4, 5)]
    lengths = torch.tensor([66]), torch.tensor([9, 1, 2, 3, 9])
    return [draw(ROWS, 4, 1, 16), *prefix, lengths[0], *branch, lengths[1]]


KEYS, IDS = torch.arange(ROWS), torch.arange(40).reshape(4, 10)
# The inputs of each op, and the call on them with a scalar parameter that may vary.
CASES: dict[str, tuple[Callable[[], list[Tensor]], Callable[..., Any]]] = {
    "topk_logprobs": (
        lambda: [draw(ROWS, VOCAB)],
        lambda x, heat: ops.topk_logprobs(x, 7, temperature=heat),
    ),
    "sample_tokens": (
        lambda: [draw(ROWS, VOCAB)],
        lambda x, heat: ops.sample_tokens(x, KEYS, 1, temperature=heat),
    ),
    "advance_rollouts_": (
        lambda: [draw(ROWS, VOCAB), *rollout_state()],
        lambda x, *state_and_heat: ops.advance_rollouts_(
            x, KEYS, 1, *state_and_heat[:-1], KEYS[:1], temperature=state_and_heat[-1]
        ),
    ),
    "value_sample_tokens": (
        lambda: [draw(ROWS, VOCAB), draw(ROWS, 9, seed=3), draw(VOCAB, 9, seed=4) / 3],
        lambda x, directions, embeddings, heat: ops.value_sample_tokens(
            x, directions, embeddings, KEYS, 1, alpha=heat
        ),
    ),
    "trajectory_log_ratio": (
        lambda: [draw(ROWS, 3, VOCAB), draw(ROWS, 3, VOCAB, seed=3), *trajectories()],
        lambda p, q, tokens, lengths, heat: (ops.trajectory_log_ratio(p, q, tokens, lengths),),
    ),
    "linear_trajectory_logprob": (
        lambda: [draw(ROWS, 3, 24), draw(VOCAB, 24, seed=3), *trajectories()],
        lambda hidden, weight, tokens, lengths, heat: (
            ops.linear_trajectory_logprob(hidden, weight, tokens, lengths, scale=heat),
        ),
    ),
    "reweight_sample": (
        lambda: [draw(4, 10), draw(4, 10, 3, seed=3), draw(4, 10, 3, seed=4)],
        lambda prior, rewards, weights, heat: ops.reweight_sample(
            prior, IDS, rewards, weights, alpha=heat
        ),
    ),
    "shared_prefix_attention": (
        attention_inputs,
        lambda *inputs: ops.shared_prefix_attention(*inputs[:-1], scale=inputs[-1]),
    ),
    "merge_attention_states": (
        lambda: [draw(2, 3, 8), draw(2, 3), draw(2, 3, 8, seed=3), draw(2, 3, seed=4)],
        lambda a, lse_a, b, lse_b, heat: ops.merge_attention_states((a, lse_a), (b, lse_b)),
    ),
}


def run(name: str, inputs: list[Tensor], heat: float = 0.7) -> list[Tensor]:
    """Return what the op answers, or what it has written."""
    answer = CASES[name][1](*inputs, heat)
    return list(inputs[1:] if answer is None else answer)


def same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_the_nine_ops_of_decoding_are_here():
    assert set(CASES) <= set(ops.describe_backends())
    assert len(CASES) == 9


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no_grad"])
@pytest.mark.parametrize("name", CASES)
def test_every_output_is_written_whatever_the_memory_held(name, grad):
    with torch.set_grad_enabled(grad):
        expected = run(name, CASES[name][0]())
        for _ in range(3):
            # The allocator hands these blocks out again: what is not written stays NaN.
            poison = [torch.full((size,), torch.nan) for size in range(1, 700, 3) for _ in "ab"]
            del poison
            same_bits(run(name, CASES[name][0]()), expected)


@pytest.mark.parametrize("name", CASES)
def test_nothing_beside_the_inputs_is_read_or_written(name):
    """Each input lies within a larger buffer, NaN or wrong around it, which stays as it was."""
    expected = run(name, CASES[name][0]())
    inputs, buffers = [], []
    for tensor in CASES[name][0]():
        poison = torch.nan if tensor.is_floating_point() else True
        shape = [size + 2 for size in tensor.shape]
        buffer = torch.full(shape, poison, dtype=tensor.dtype)
        inner = buffer[tuple(slice(1, -1) for _ in shape)]
        inner.copy_(tensor)
        inputs.append(inner)
        buffers.append(buffer)
    same_bits(run(name, inputs), expected)
    for buffer in buffers:
        around = torch.ones_like(buffer, dtype=torch.bool)
        around[tuple(slice(1, -1) for _ in buffer.shape)] = False
        outside = buffer[around]
        assert bool((outside.isnan() if buffer.is_floating_point() else outside == 1).all())


@pytest.mark.parametrize("name", CASES)
def test_a_float_parameter_stays_fp32_when_compiled_and_does_not_freeze(name):
    function = CASES[name][1]
    graph = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for heat in (0.7, 1.3, 0.2):
        expected = run(name, CASES[name][0](), heat)
        inputs = CASES[name][0]()
        answer = graph(*inputs, heat)
        got = list(inputs[1:] if answer is None else answer)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype != torch.float64
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6, equal_nan=True)


FAR = 1 << 30


def far_apart(near: Tensor) -> Tensor:
    """The same numbers in bf16, their first axis 2^30 elements apart: the third begins at 2^31.

    The memory between is reserved, not touched, and handed back before the next is asked for.
    """
    strides = (FAR, *near.stride()[1:])
    span = (near.shape[0] - 1) * FAR + near[0].numel()
    far = torch.empty(span, dtype=torch.bfloat16).as_strided(near.shape, strides)
    return far.copy_(near)


def advanced(logits: Tensor) -> list[Tensor]:
    state = [part[:3] for part in rollout_state()]
    ops.advance_rollouts_(logits, KEYS[:3], 1, *state, KEYS[:1])
    return state


TOKENS, LENGTHS = torch.tensor([[7], [0], [299]]), torch.tensor([1, 1, 1])
# The tensor whose rows are far apart in memory, and the call on it.
FAR_CASES: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Any]]] = {
    "topk_logprobs": (lambda: draw(3, VOCAB), lambda x: ops.topk_logprobs(x, 9)),
    "sample_tokens": (lambda: draw(3, VOCAB), lambda x: ops.sample_tokens(x, KEYS[:3], 0)),
    "advance_rollouts_": (
        lambda: draw(3, VOCAB),
        advanced,
    ),
    "value_sample_tokens, logits": (
        lambda: draw(3, VOCAB),
        lambda x: ops.value_sample_tokens(
            x, draw(3, 9, seed=2).bfloat16(), draw(VOCAB, 9, seed=3).bfloat16(), KEYS[:3], 0
        ),
    ),
    "value_sample_tokens, directions": (
        lambda: draw(3, 9),
        lambda x: ops.value_sample_tokens(
            draw(3, VOCAB, seed=2), x, draw(VOCAB, 9, seed=3).bfloat16(), KEYS[:3], 0
        ),
    ),
    "value_sample_tokens, embeddings": (
        lambda: draw(3, 9),
        lambda x: ops.value_sample_tokens(
            draw(2, 3, seed=2), draw(2, 9, seed=3).bfloat16(), x, KEYS[:2], 0
        ),
    ),
    "trajectory_log_ratio": (
        lambda: draw(3, 1, VOCAB),
        lambda x: (ops.trajectory_log_ratio(x, draw(3, 1, VOCAB, seed=2), TOKENS, LENGTHS),),
    ),
    "linear_trajectory_logprob, states": (
        lambda: draw(3, 1, 24),
        lambda x: (
            ops.linear_trajectory_logprob(x, draw(300, 24, seed=2).bfloat16(), TOKENS, LENGTHS),
        ),
    ),
    "linear_trajectory_logprob, weights": (
        lambda: draw(3, 24),
        lambda x: (
            ops.linear_trajectory_logprob(
                draw(3, 1, 24, seed=2).bfloat16(), x, TOKENS % 3, LENGTHS
            ),
        ),
    ),
    "few_rows_linear, rows": (
        lambda: draw(3, 24),
        lambda x: (ops.few_rows_linear(x, draw(5, 24, seed=2).bfloat16()),),
    ),
    "few_rows_linear, weights": (
        lambda: draw(3, 24),
        lambda x: (ops.few_rows_linear(draw(5, 24, seed=2).bfloat16(), x),),
    ),
    "shared_prefix_attention, prefixes": (
        lambda: draw(3, 2, 70, 32),
        lambda x: ops.shared_prefix_attention(
            draw(3, 4, 1, 32, seed=2).bfloat16(),
            x,
            x,
            torch.tensor([70, 9, 66]),
            *(draw(3, 2, 5, 32, seed=3).bfloat16(),) * 2,
            torch.tensor([5, 1, 2]),
        ),
    ),
    "shared_prefix_attention, branches": (
        lambda: draw(3, 2, 70, 32),
        lambda x: ops.shared_prefix_attention(
            draw(3, 4, 1, 32, seed=2).bfloat16(),
            *(draw(1, 2, 5, 32, seed=3).bfloat16(),) * 2,
            torch.tensor([5]),
            x,
            x,
            torch.tensor([70, 9, 66]),
        ),
    ),
    "merge_attention_states": (
        lambda: draw(3, 2, 8),
        lambda x: ops.merge_attention_states(
            (x, draw(3, 2, seed=2)), (draw(3, 2, 8, seed=3).bfloat16(), draw(3, 2, seed=4))
        ),
    ),
}


@pytest.mark.parametrize("grad", [True, False], ids=["autograd", "no_grad"])
@pytest.mark.parametrize("name", FAR_CASES)
def test_rows_more_than_2_to_the_31_elements_apart(name, grad):
    inputs, function = FAR_CASES[name]
    near = inputs().bfloat16()
    with torch.set_grad_enabled(grad):
        same_bits(list(function(far_apart(near))), list(function(near)))
