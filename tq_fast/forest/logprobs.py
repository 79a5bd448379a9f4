"""Log-probs of given tokens over a forest, the logits never whole where the head is a matrix."""

from __future__ import annotations

import dataclasses
import itertools
import math
import weakref
from collections import Counter
from collections.abc import Sequence

import torch
from torch import nn
from transformers import PreTrainedModel

from .. import ops
from ..copies import upload
from .language import LanguageForest
from .view import view_of

# Logits that one scoring pass may hold, in bytes.
_LOGITS_BYTES = 256 << 20
# The cost of a forward pass beside its tokens, in tokens. On a CPU it is about that of reading the
# weights; elsewhere, where a pass is hundreds of launches, it is not worth splitting one.
_CPU_PASS, _OTHER_PASS = 48, 4096
# Whether the formula below gives the logits of a model, for models that were tried.
_is_linear: weakref.WeakKeyDictionary[PreTrainedModel, bool] = weakref.WeakKeyDictionary()


def score_rows(
    forest: LanguageForest,
    rows: Sequence[Sequence[int]],
    trees: Sequence[int],
    *,
    vocab_size: int,
) -> list[float]:
    """Sum of log p of every token of `rows[i]` but its first, after the prefix of `trees[i]`.

    Natural log; ids from `vocab_size` on do not take part. Where the head is a matrix, the
    logits are never whole, and fp32 from the product onward; else they are the model's own.
    """
    lengths = [len(row) - 1 for row in rows]
    forest.cache.reserve(prefix_capacity=0, branch_capacity=max(lengths))
    head = linear_head(forest)
    per_pass = forest.cache.num_rows
    if head is None:
        fitting = _LOGITS_BYTES // (4 * forest.vocab_size * max(lengths))
        per_pass = min(per_pass, max(1, fitting))
    sums = [0.0] * len(rows)
    for chunk in split_by_length(lengths, device_type=forest.device.type, max_rows=per_pass):
        width = max(lengths[i] for i in chunk)
        padded = [[*rows[i], *[0] * (width - lengths[i])] for i in chunk]
        columns = (padded, [lengths[i] for i in chunk], [trees[i] for i in chunk])
        tokens, used, tree = upload(forest.device, *map(torch.tensor, columns))
        found = _score_pass(forest, head, tokens, used, tree, vocab_size)
        for i, logprob in zip(chunk, found.tolist(), strict=True):
            sums[i] = logprob
    return sums


def _score_pass(
    forest: LanguageForest,
    head: LinearHead | None,
    tokens: torch.Tensor,
    lengths: torch.Tensor,
    tree: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """The sums `[n]` of rows `[n, 1 + T]`, of which `lengths` `[n]` tokens count."""
    module = forest.model if head is None else head.backbone
    output = forest.run_branches(module, tokens[:, :-1], start=0, tree=tree)
    if head is not None:
        return ops.linear_trajectory_logprob(
            output.last_hidden_state,
            head.weight,
            tokens[:, 1:],
            lengths,
            bias=head.bias,
            scale=head.scale,
            softcap=head.softcap,
            vocab_size=vocab_size,
            backend=forest.backend,
        )
    logprobs = output.logits[..., :vocab_size].float().log_softmax(-1)
    picked = logprobs.gather(2, tokens[:, 1:, None]).squeeze(2)
    used = torch.arange(picked.shape[1], device=forest.device) < lengths[:, None]
    return torch.where(used, picked, 0.0).sum(1)


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


def linear_head(forest: LanguageForest) -> LinearHead | None:
    """Return the head of the forest's model; None where it is another formula.

    The configuration's formula is tried on three tokens, once for each model: some models do more
    to their logits than any field of their configuration tells, and a quantised or an offloaded
    head has no matrix to multiply with.
    """
    source = forest.source
    if source not in _is_linear:
        plain = view_of(source)
        head = _head_by_config(plain)
        _is_linear[source] = head is not None and _gives_logits(head, plain, forest.device)
    return _head_by_config(forest.model) if _is_linear[source] else None


def _head_by_config(model: PreTrainedModel) -> LinearHead | None:
    """The head as the configuration has it."""
    output = model.get_output_embeddings()
    backbone = model.base_model
    is_plain = type(output) is nn.Linear and type(output.weight) is nn.Parameter
    if not is_plain or output.weight.device.type == "meta" or backbone is model:
        return None
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None) or 1 / (
        getattr(config, "logits_scaling", None) or 1
    )
    softcap = getattr(config, "final_logit_softcapping", None)
    return LinearHead(backbone, output.weight, output.bias, scale, softcap)


@torch.no_grad()
def _gives_logits(head: LinearHead, model: PreTrainedModel, device: torch.device) -> bool:
    tokens = torch.tensor([[1, 2, 3]], device=device) % head.weight.shape[0]
    truth = model(input_ids=tokens, use_cache=False).logits.float()
    logits = head.logits(head.backbone(input_ids=tokens, use_cache=False).last_hidden_state)
    # The model rounds to its own dtype, a few times after the product.
    error = (logits - truth).abs().max()
    return bool(error <= 8 * torch.finfo(model.dtype).eps * truth.abs().max().clamp(min=1))


def split_by_length(lengths: Sequence[int], *, device_type: str, max_rows: int) -> list[list[int]]:
    """Return the rows of each pass, ascending: together they cost the least.

    A pass of n rows takes n times the longest of them.

    Args:
        lengths: tokens of each row.
        device_type: where the passes run.
        max_rows: rows of one pass, at most.
    """
    counts = Counter(lengths)
    distinct = sorted(counts, reverse=True)
    per_pass = _CPU_PASS if device_type == "cpu" else _OTHER_PASS
    # costs[i]: of the i greatest lengths; cuts[i]: where the last of their passes begins.
    costs: list[float] = [0]
    cuts = [0]
    for end in range(1, len(distinct) + 1):
        best, num_rows = (math.inf, 0), 0
        for begin in reversed(range(end)):
            num_rows += counts[distinct[begin]]
            cost = costs[begin] + per_pass + num_rows * distinct[begin]
            if cost < best[0]:
                best = (cost, begin)
        costs.append(best[0])
        cuts.append(best[1])
    bounds = [len(distinct)]
    while bounds[-1]:
        bounds.append(cuts[bounds[-1]])
    passes = []
    for end, begin in itertools.pairwise(bounds):
        wanted = set(distinct[begin:end])
        rows = [i for i, length in enumerate(lengths) if length in wanted]
        passes += [rows[i : i + max_rows] for i in range(0, len(rows), max_rows)]
    return passes
