"""One valid call of every op, as keyword arguments, and ways to spoil one tensor of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tq_fast import ops

Arguments = dict[str, Any]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(3))


def linear(size_out: int, size_in: int) -> tuple[Tensor, Tensor]:
    return draw(size_out, size_in), draw(size_out)


def sampler() -> Arguments:
    return {"logits": draw(3, 17), "keys": torch.arange(3), "step": 1}


def state() -> Arguments:
    return {
        "tokens": torch.zeros(3, 4, dtype=torch.int64),
        "lengths": torch.tensor([0, 1, 2]),
        "finished": torch.zeros(3, dtype=torch.bool),
        "logprob_sums": torch.zeros(3),
        "proposal_logprob_sums": torch.zeros(3),
        "eos": torch.tensor([2]),
    }


def trajectories() -> Arguments:
    return {"tokens": torch.arange(12).view(3, 4), "lengths": torch.tensor([4, 0, 2])}


VALID: dict[str, Callable[[], Arguments]] = {
    "topk_logprobs": lambda: {"logits": draw(3, 17), "k": 4},
    "sample_tokens": sampler,
    "advance_rollouts_": lambda: sampler() | state(),
    "value_sample_tokens": lambda: {
        "logits": draw(3, 17),
        "directions": draw(3, 8),
        "token_embeddings": draw(17, 8),
        "keys": torch.arange(3),
        "step": 1,
        "alpha": 0.7,
    },
    "trajectory_log_ratio": lambda: {
        "logits_p": draw(3, 4, 17),
        "logits_q": draw(3, 4, 17) / 2,
        **trajectories(),
    },
    "linear_trajectory_logprob": lambda: {
        "hidden": draw(3, 4, 8),
        "weight": draw(17, 8),
        **trajectories(),
        "bias": draw(17),
    },
    "reweight_sample": lambda: {
        "prior_logprobs": draw(3, 5),
        "token_ids": torch.arange(15).view(3, 5),
        "rewards": draw(3, 5, 4),
        "log_weights": draw(3, 5, 4) / 3,
        "lengths": torch.full((3, 5), 4),
        "keys": torch.arange(3),
        "alpha": 0.7,
    },
    "shared_prefix_attention": lambda: {
        "q": draw(4, 4, 2, 8),
        "prefix_k": draw(2, 2, 6, 8),
        "prefix_v": draw(2, 2, 6, 8),
        "prefix_len": torch.tensor([6, 3]),
        "branch_k": draw(4, 2, 3, 8),
        "branch_v": draw(4, 2, 3, 8),
        "branch_len": torch.tensor([3, 2, 3, 2]),
        "tree": torch.tensor([0, 0, 0, 1]),
    },
    "merge_attention_states": lambda: {
        "a": (draw(2, 3, 8), draw(2, 3)),
        "b": (draw(2, 3, 8) / 2, draw(2, 3) / 2),
    },
    "few_rows_linear": lambda: {"x": draw(3, 8), "weight": draw(5, 8), "bias": draw(5)},
    "project_qkv": lambda: {
        "x": draw(2, 3, 16),
        "norm_weight": draw(16),
        "q_linear": linear(16, 16),
        "k_linear": linear(8, 16),
        "v_linear": linear(8, 16),
        "cos": draw(2, 3, 8),
        "sin": draw(2, 3, 8),
        "eps": 1e-5,
    },
    "finish_decoder_layer": lambda: {
        "attended": draw(2, 3, 16),
        "residual": draw(2, 3, 24),
        "o_linear": linear(24, 16),
        "norm_weight": draw(24),
        "gate_linear": linear(40, 24),
        "up_linear": linear(40, 24),
        "down_linear": linear(24, 40),
        "eps": 1e-5,
    },
}
# The names that these ops give to the two tensors of a pair.
PAIRS = {"a": ("out_a", "lse_a"), "b": ("out_b", "lse_b")}


class TensorOf(NamedTuple):
    """One tensor of a call: its name in messages, the tensor, and the call with another instead."""

    name: str
    tensor: Tensor
    replaced: Callable[[Any], Arguments]


def tensors_of(op: str) -> Iterator[TensorOf]:
    """Every tensor of the valid call of `op`, those within pairs too."""
    valid = VALID[op]()
    for name, value in valid.items():
        if isinstance(value, Tensor):
            yield TensorOf(name, value, lambda other, name=name: valid | {name: other})
        elif isinstance(value, tuple):
            role = name.removesuffix("_linear")
            names = PAIRS.get(name, (f"{role}_weight", f"{role}_bias"))
            first, second = value
            yield TensorOf(
                names[0], first, lambda x, name=name, other=second: valid | {name: (x, other)}
            )
            yield TensorOf(
                names[1], second, lambda x, name=name, other=first: valid | {name: (other, x)}
            )


def call(op: str, arguments: Arguments, **parameters: Any) -> list[Tensor]:
    """Return what the op answers, or the state that an op in place has written."""
    answer = getattr(ops, op)(**arguments, **parameters)
    if answer is None:
        return [arguments[name] for name in state()]
    return [answer] if isinstance(answer, Tensor) else list(answer)
