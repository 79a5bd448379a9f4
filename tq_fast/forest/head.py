"""The head of a language model as what `ops.linear_trajectory_logprob` takes, where it is that."""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import nn
from transformers import PreTrainedModel

# Whether the formula below gives the logits of a model, for models that were tried.
_is_linear: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


@dataclasses.dataclass(frozen=True)
class LinearHead:
    """`logits = scale * (hidden @ weight.T + bias)`, soft-capped where `softcap` says so.

    Attributes:
        backbone: the module whose last hidden states `[N, T, D]` are multiplied.
        weight: `[V, D]`.
        bias: `[V]`, or None.
        scale: factor on the product.
        softcap: bound of the logits, or None.
    """

    backbone: nn.Module
    weight: torch.Tensor
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits `[N, T, V]` in fp32."""
        bias = None if self.bias is None else self.bias.float()
        product = self.scale * nn.functional.linear(hidden.float(), self.weight.float(), bias)
        return product if self.softcap is None else self.softcap * (product / self.softcap).tanh()


def linear_head(model: PreTrainedModel) -> LinearHead | None:
    """Return the head of `model`; None where it is another formula.

    What the configuration says is tried on three tokens, once for each model: some models do more
    to their logits than any field of their configuration tells.
    """
    output = model.get_output_embeddings()
    backbone = model.base_model
    if type(output) is not nn.Linear or backbone is model:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (
        getattr(config, "logits_scaling", None) or 1
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    head = LinearHead(backbone, output.weight, output.bias, scale, softcap)
    if model not in _is_linear:
        _is_linear[model] = _gives_logits(head, model)
    return head if _is_linear[model] else None


@torch.no_grad()
def _gives_logits(head: LinearHead, model: PreTrainedModel) -> bool:
    size = head.weight.shape[0]
    tokens = torch.tensor([[1, 2, 3]], device=head.weight.device) % size
    truth = model(input_ids=tokens, use_cache=False).logits.float()
    logits = head.logits(head.backbone(input_ids=tokens, use_cache=False).last_hidden_state)
    # The model rounds to its own dtype, a few times after the product.
    error = (logits - truth).abs().max()
    return bool(error <= 8 * torch.finfo(model.dtype).eps * truth.abs().max().clamp(min=1))
