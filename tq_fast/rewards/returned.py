"""Scores as functions and models return them, in any of their shapes, read as numbers."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from .base import WrongScores

# Where a model's output holds one score a row, the first that is there.
_OUTPUT_NAMES = ("end_scores", "end_score", "rewards", "reward", "scores", "score", "logits")


def read_scores(returned: Any) -> list[float]:
    """Return what a function gave back as one number a response.

    Lists, nested lists `[[x], ...]`, generators, NumPy arrays and tensors of any dtype on any
    device are read; a single number is the score of a single response.

    Raises:
        WrongScores: it is something else; the message says what came.
    """
    if isinstance(returned, torch.Tensor):
        returned = _as_array(returned)
    if isinstance(returned, np.ndarray):
        if returned.squeeze().ndim > 1:
            raise WrongScores(
                f"the reward returned an array of shape {tuple(returned.shape)}; one score a "
                "response is needed"
            )
        returned = returned.reshape(-1).tolist()
    if inspect.isawaitable(returned):
        if inspect.iscoroutine(returned):
            returned.close()
        raise WrongScores("the reward returned a coroutine, which is not awaited; return scores")
    if isinstance(returned, (str, bytes, Mapping)) or returned is None:
        raise WrongScores(f"the reward returned {_short(returned)} where scores are expected")
    if isinstance(returned, Iterable):
        return [_number(score, i) for i, score in enumerate(returned)]
    return [_number(returned, 0)]


def read_output(output: Any, num_rows: int) -> torch.Tensor:
    """Return a model's output as scores `[num_rows, labels]`, fp32 or wider.

    Args:
        output: a tensor, a tuple, a mapping or an object with one of the names that models give
            their scores: `end_scores`, `rewards`, `scores`, `score`, `logits`.
        num_rows: rows that went into the model.

    Raises:
        WrongScores: nothing in it is of shape `[B]`, `[B, 1]` or `[B, labels]`.
    """
    found: list[Any]
    if isinstance(output, torch.Tensor):
        found = [output]
    elif isinstance(output, Mapping):
        found = [output.get(name) for name in _OUTPUT_NAMES]
    else:
        found = [getattr(output, name, None) for name in _OUTPUT_NAMES]
        found += list(output) if isinstance(output, (tuple, list)) else []
    tensors = [part for part in found if isinstance(part, torch.Tensor)]
    for tensor in tensors:
        if tensor.ndim in (1, 2) and tensor.shape[0] == num_rows:
            scores = tensor.reshape(num_rows, -1)
            return scores if scores.dtype == torch.float64 else scores.float()
    shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors) or type(output).__name__
    raise WrongScores(
        f"its forward returns {shapes} for {num_rows} texts; scores [B], [B, 1] or [B, labels] are "
        "expected"
    )


def _as_array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    if tensor.is_complex():
        raise WrongScores(f"the reward returned a tensor of {tensor.dtype}")
    return tensor.detach().to("cpu", torch.float64).numpy()


def _number(score: Any, idx: int) -> float:
    while isinstance(score, (list, tuple)) and len(score) == 1:
        score = score[0]
    if isinstance(score, torch.Tensor):
        score = _as_array(score)
    if isinstance(score, np.ndarray) and score.size == 1:
        score = score.reshape(()).item()
    is_number = hasattr(score, "__float__") and not isinstance(score, np.ndarray)
    if not is_number:
        raise WrongScores(
            f"the reward returned {_short(score)} as score {idx} where a number is expected"
        )
    return float(score)


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 60 else f"{words[:57]}..."
