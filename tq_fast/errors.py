"""The exceptions that tq_fast raises, all below `TqFastError`, and what messages share."""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class TqFastError(Exception):
    """Base of every error that the package raises on purpose."""


class InvalidArgument(TqFastError, ValueError):
    """A wrong argument; the message names it, its value and what was expected."""


class UnsupportedModel(TqFastError, ValueError):
    """A model with a feature that the forest cannot honour; the message names the feature."""


class BackendRefused(TqFastError, RuntimeError):
    """A backend, pinned by the caller, that cannot run the op on these inputs."""


class ServerUnavailable(TqFastError, RuntimeError):
    """A model server that stayed away; the message names the URL, what was tried and how long."""


class DecodingError(TqFastError, RuntimeError):
    """A failure to decode one prompt.

    Attributes:
        prompt_idx: position within the call of the prompt that failed. Where a reward raised or
            returned the wrong number of scores, it is the first prompt that it was asked about.
        step: index of the response token that was being chosen, from 0.
        reason: the message without prompt and step.
        finished: the responses that were already complete, as new token ids `[T]` by prompt
            position.
    """

    def __init__(self, message: str, *, prompt_idx: int, step: int) -> None:
        super().__init__(f"prompt {prompt_idx}, step {step}: {message}")
        self.prompt_idx = prompt_idx
        self.step = step
        self.reason = message
        self.finished: Mapping[int, torch.Tensor] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        # By default pickle makes an exception again from `args`, which here lack prompt and step.
        return _make_again, (type(self), self.reason, self.prompt_idx, self.step), self.__dict__


class RewardError(DecodingError):
    """A reward that raised, or returned NaN or the wrong number of scores."""


def _make_again(
    kind: type[DecodingError], message: str, prompt_idx: int, step: int
) -> DecodingError:
    return kind(message, prompt_idx=prompt_idx, step=step)


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which of `known` is meant by `word`, which is none of them; else name them all."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def warn_caller(message: str) -> None:
    """Warn at the line outside of the package that called it, where Python warns only once."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _is_inner(frame.f_globals.get("__name__", "")):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, stacklevel=level)


def _is_inner(module: str) -> bool:
    # Frames of torch and contextlib are skipped too: they wrap the functions that they decorate.
    return module.split(".")[0] in ("tq_fast", "torch", "contextlib")
