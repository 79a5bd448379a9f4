"""The states that a language model's head reads, for value heads that read them, too."""

from __future__ import annotations

import torch


class HeadInput:
    """A hook that keeps what the LM head read last.

    It knows nothing of the forest: one that did would be part of a circle, and would hold all KV
    until Python looks for circles.
    """

    def __init__(self) -> None:
        self.states: torch.Tensor | None = None

    def __call__(self, module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.states = inputs[0]
