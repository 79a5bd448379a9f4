"""The synthetic reward shift: a reward whose last layer forgets part of its features.

Transfer Q* (arXiv 2405.20495) evaluates its indirect transfer, for one, on a pair of rewards of
which one is the other with its final linear layer made sparse. Which weights go is drawn here.
"""

from __future__ import annotations

import copy

import torch
from transformers import PreTrainedModel

from ..errors import InvalidArgument


def sparsify_reward(model: PreTrainedModel, keep: float = 0.5, seed: int = 0) -> PreTrainedModel:
    """Return a copy of a sequence classifier whose last linear layer keeps a share of its weights.

    Of each label's weights `round(keep * D)`, at least one, stay as they are, and the others become
    0; the bias stays. The copy shares no memory with `model`.

    Args:
        model: a sequence classifier of transformers.
        keep: share of the weights that stay, above 0 and at most 1.
        seed: of the draw; the same seed keeps the same weights.

    Raises:
        InvalidArgument: `keep` or `seed` is out of range, or the model has no last linear layer of
            one row a label.
    """
    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0.0 < keep <= 1.0:
        raise InvalidArgument(f"keep must be in (0, 1], got {keep!r}")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise InvalidArgument(f"seed must be an integer, got {seed!r}")
    name = _last_linear(model)
    sparse = copy.deepcopy(model)
    weight = sparse.get_submodule(name).weight
    num_kept = max(1, round(keep * weight.shape[1]))
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(weight.shape, generator=generator).argsort(1).argsort(1)
    with torch.no_grad():
        weight.masked_fill_((ranks >= num_kept).to(weight.device), 0.0)
    return sparse


def _last_linear(model: PreTrainedModel) -> str:
    """Return the name of the linear layer that ends in the labels."""
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    is_classifier = isinstance(model, PreTrainedModel) and model.get_output_embeddings() is None
    names = []
    if is_classifier and num_labels is not None:
        names = [
            name
            for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module.out_features == num_labels
        ]
    if not names:
        raise InvalidArgument(
            "model must be a sequence classifier that ends in a linear layer with a row for each "
            f"label, got {type(model).__name__}"
        )
    return names[-1]
