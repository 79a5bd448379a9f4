"""Mixtures of experts on a GPU, without the host waiting: a pass that waits cannot be captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from transformers import PreTrainedModel

# Bytes of expert weights that a pass may copy, a layer. Beyond it the copies take longer than the
# launches that a graph saves.
_MOST_COPIED = 1 << 28


class QuietExperts:
    """The experts of a view, and how they are run within a block.

    By default transformers sorts the tokens by their experts. PyTorch then reads on the host how
    many tokens each expert has, unless the weights are bfloat16 on a card that groups by itself.
    The implementation "batched_mm" reads nothing, but copies the weights of an expert for every
    token that chose it: a prompt would copy them thousands of times, a depth of roll-outs need not.

    Args:
        view: the forest's own view of a model, with a configuration of its own.
    """

    def __init__(self, view: PreTrainedModel) -> None:
        # transformers gives this method to every class of experts with several implementations.
        layers: list[Any] = list(view.modules())
        self._layers = [layer for layer in layers if hasattr(type(layer), "_apply_gate")]

    @contextlib.contextmanager
    def running(self, num_tokens: int) -> Iterator[None]:
        """Within the block, passes of `num_tokens` wait for no device, where that pays."""
        changed = [
            (layer.config, layer.config._experts_implementation)
            for layer in self._layers
            if _waits(layer) and num_tokens * _bytes_a_token(layer) <= _MOST_COPIED
        ]
        # Not by the property, which would change the configurations of other parts as well.
        for config, _ in changed:
            config._experts_implementation_internal = "batched_mm"
        try:
            yield
        finally:
            for config, before in changed:
                config._experts_implementation_internal = before


def _waits(layer: Any) -> bool:
    """Whether the host waits for a device in these experts."""
    weights = _weights(layer)
    implementation = layer.config._experts_implementation
    if not weights or weights[0].device.type == "cpu":
        return False
    if implementation == "grouped_mm" and weights[0].is_cuda:
        major, _ = torch.cuda.get_device_capability(weights[0].device)
        return not (weights[0].dtype == torch.bfloat16 and major in (9, 10))
    # Any other implementation is one that the user has asked for.
    return implementation in (None, "eager", "grouped_mm")


def _weights(layer: Any) -> list[torch.Tensor]:
    """The matrices of all experts, each a tensor `[E, ...]`."""
    return [weight for weight in layer.parameters(recurse=False) if weight.dim() == 3]


def _bytes_a_token(layer: Any) -> int:
    """Bytes of expert weights that "batched_mm" copies at a time for one token."""
    weights = _weights(layer)
    num_chosen = getattr(layer.config, "num_experts_per_tok", None) or len(weights[0])
    return int(num_chosen) * max(weight[0].nbytes for weight in weights)
