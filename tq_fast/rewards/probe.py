"""Try a classifier's forward on a few rows of tokens when it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..forest.language import device_of
from ..forest.view import view_of
from .base import WrongScores
from .causal import is_causal_classifier
from .encoder import padding_of, score_rows
from .forms import Row

_TEXTS = ("Yes.", "That is a longer answer, of two lines.\nIt ends here.", "No, 3 of them.")
_NUM_TOKENS = (2, 9, 5)


class Probe(NamedTuple):
    """The findings about a classifier that was tried.

    Attributes:
        num_labels: scores that it gives a text.
        batches: whether a padded text in a batch scores as it does alone; False where `obstacle`
            is "".
        obstacle: why a causal model cannot be scored by its backbone and head over a forest; ""
            where it can, None where it is no causal model.
    """

    num_labels: int
    batches: bool
    obstacle: str | None


def probe_classifier(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    vocab_size: int,
    limit: int | None,
) -> Probe:
    """Compare a classifier's own forward alone, in a batch, and with its backbone and head.

    Args:
        model: the classifier.
        tokenizer: of its texts; None: token ids are made up.
        vocab_size: made-up ids lie below.
        limit: tokens that it reads, at most.

    Raises:
        WrongScores: its output is not one score a text and label.
    """
    # A view is in evaluation mode, whatever the user's model is in.
    model = view_of(model)
    rows = _probe_rows(tokenizer, vocab_size, padding_of(model), limit)
    alone = [score_rows(model, [row]) for row in rows]
    if len({scores.shape[1] for scores in alone}) > 1:
        widths = ", ".join(str(list(scores.shape)) for scores in alone)
        raise WrongScores(f"its forward returns {widths} for texts of different lengths")
    scores = torch.cat(alone)
    obstacle = _obstacle(model, rows, scores)
    batches = obstacle != "" and _scores_alike_in_a_batch(model, rows, scores)
    return Probe(scores.shape[1], batches, obstacle)


def _scores_alike_in_a_batch(
    model: torch.nn.Module, rows: Sequence[Row], scores: torch.Tensor
) -> bool:
    try:
        batched = score_rows(model, rows)
    except torch.OutOfMemoryError:
        raise
    except Exception:
        # Models without a padding token, for one, refuse a batch.
        return False
    return _is_close(batched, scores, _dtype_of(model), slack=8)


def _obstacle(model: Any, rows: Sequence[Row], scores: torch.Tensor) -> str | None:
    """Why a causal model is not what its backbone and head compute; None where it is not causal."""
    if not isinstance(model, PreTrainedModel):
        return None
    try:
        backbone = getattr(model, model.base_model_prefix)
        hidden = [_last_hidden(backbone, row.token_ids, device_of(model)) for row in rows]
        first = _last_hidden(backbone, rows[1].token_ids[:1], device_of(model))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None
    if not _is_close(first[0, 0], hidden[1][0, 0], model.dtype, slack=1):
        return None
    if not is_causal_classifier(model):
        return "it has no head named score"
    try:
        plain = torch.cat([model.score(states[:, -1]).float() for states in hidden])
        alike = _is_close(plain, scores, model.dtype, slack=1)
        alike = alike and _follows_its_head(model, rows[0], plain[:1])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        return f"its head does not read the backbone's states: {error}"
    return "" if alike else "its forward gives other scores than its backbone and head"


class _Amplified(torch.nn.Module):
    """A head whose output is multiplied by a constant."""

    def __init__(self, head: torch.nn.Module, gain: float) -> None:
        super().__init__()
        self.head = head
        self.gain = gain

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        amplified: torch.Tensor = self.head(states) * self.gain
        return amplified


def _follows_its_head(model: PreTrainedModel, row: Row, plain: torch.Tensor) -> bool:
    """Whether scores far from zero come through as they are: a clip shows only there.

    The head is amplified in a shallow copy, so that other threads see nothing of it.
    """
    if "forward" in vars(model):
        # A forward that was replaced on the object runs the original, not the copy.
        return True
    for gain in (1e3, -1e3):
        twin = copy.copy(model)
        twin._modules = {**model._modules, "score": _Amplified(model.score, gain)}
        if not _is_close(score_rows(twin, [row]), gain * plain, model.dtype, slack=1):
            return False
    return True


def _last_hidden(backbone: Any, token_ids: Sequence[int], device: torch.device) -> torch.Tensor:
    tokens = torch.tensor([list(token_ids)], device=device)
    states: torch.Tensor = backbone(input_ids=tokens, return_dict=True).last_hidden_state
    return states


def _probe_rows(
    tokenizer: PreTrainedTokenizerBase | None,
    vocab_size: int,
    pad: int | None,
    limit: int | None,
) -> list[Row]:
    if tokenizer is not None:
        rows = [list(tokenizer(text)["input_ids"]) for text in _TEXTS]
    else:
        ids = [token for token in range(vocab_size) if token != pad]
        rows = [
            [ids[(5 + 7 * i + length) % len(ids)] for i in range(length)] for length in _NUM_TOKENS
        ]
    cut = [row[:limit] for row in rows]
    for row in cut:
        # Causal classifiers read their score before the padding.
        while len(row) > 2 and row[-1] == pad:
            row.pop()
    return [Row(row) for row in cut]


def _is_close(
    found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype, *, slack: int
) -> bool:
    """Whether two results of one formula differ by no more than rounding to `dtype`."""
    if found.shape != expected.shape:
        return False
    tolerance = slack * max(4 * torch.finfo(dtype).eps, 1e-4)
    scale = float(expected.abs().max())
    return bool(((found - expected).abs() <= tolerance * scale + 1e-6).all())


def _dtype_of(model: torch.nn.Module) -> torch.dtype:
    for parameter in model.parameters():
        if parameter.is_floating_point():
            return parameter.dtype
    return torch.float32
