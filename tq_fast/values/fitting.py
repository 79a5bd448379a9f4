"""The fit of a value head: weighted least squares of whole texts' rewards on every token taken.

    minimise sum_i w_i (Q_V(h_i, z_i) - r_i)^2

over all tokens i of the logged texts: h_i the state before the token z_i, r_i the reward of the
whole text. The minimum over all functions is E[r | x, z] under the law that drew the texts
(Transfer Q*'s direct Q for those of the baseline, arXiv 2405.20495, eq. 7), or under another one
where w_i is the density ratio of the rest of the text. Prompts that are held out say when to stop.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch

from ..errors import InvalidArgument
from .head import ValueHead, ValueHeadConfig

# Rows of the held-out tokens that are computed together.
_CHUNK = 8192
_NUM_BINS = 10


@dataclasses.dataclass(frozen=True)
class LoggedTokens:
    """Every token of the logged texts; N of them.

    Attributes:
        hidden: state before each token `[N, D]`, on the CPU, in the dtype of the model.
        token_ids: int64 `[N]`.
        rewards: of the whole text, fp32 `[N]`.
        groups: which prompt it belongs to, int64 `[N]`.
        weights: w, fp32 `[N]`, about 1 on average.
    """

    hidden: torch.Tensor
    token_ids: torch.Tensor
    rewards: torch.Tensor
    groups: torch.Tensor
    weights: torch.Tensor


@dataclasses.dataclass(frozen=True)
class FitOptions:
    """How a head is fitted; the defaults were found on the embedded models.

    Attributes:
        epochs: passes over the tokens; the one that held-out prompts like best is kept.
        batch_size: tokens a step.
        learning_rate: of AdamW at its greatest, after a warm-up and before a cosine.
        weight_decay: of all matrices.
        held_out: part of the prompts that is not fitted.
        seed: of the split, the start and the order.
    """

    epochs: int = 6
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    held_out: float = 0.125
    seed: int = 0


def fit_head(
    tokens: LoggedTokens,
    config: ValueHeadConfig,
    options: FitOptions,
    on_epoch: Callable[[int, float], None] = lambda epoch, r2: None,
) -> ValueHead:
    """Return the head that fits `tokens` best, with what held-out prompts say of it.

    Args:
        tokens: of two prompts at least, since some are held out.
        config: sizes and models of the head; `fit` is filled in.
        options: how to fit.
        on_epoch: called after each epoch with its number, from 1, and the held-out R2.

    Raises:
        InvalidArgument: there is nothing to learn from.
    """
    generator = torch.Generator().manual_seed(options.seed)
    train, held = _split(tokens.groups, options.held_out, generator)
    head = _start(tokens, config, train, generator)
    steps = options.epochs * -(-len(train) // options.batch_size)
    optimizer, schedule = _optimizer(head, options, steps)
    best, least, history = 0.0, math.inf, []
    kept: dict[str, torch.Tensor] = {}
    with torch.enable_grad():
        for epoch in range(1, options.epochs + 1):
            order = train[torch.randperm(len(train), generator=generator)]
            for rows in torch.split(order, options.batch_size):
                _descend(head, tokens, rows, optimizer)
                schedule.step()
            error, score = _fit_quality(head, tokens, held)
            history.append(score)
            on_epoch(epoch, score)
            if error < least or not kept:
                least, best = error, score
                kept = {name: weight.clone() for name, weight in head.state_dict().items()}
    head.load_state_dict(kept)
    described = {
        **config.fit,
        **dataclasses.asdict(options),
        "tokens": len(tokens.token_ids),
        "prompts": _count(tokens.groups),
        "held_out_prompts": _count(tokens.groups[held]),
        "r2": best,
        "r2_by_epoch": history,
        "r2_fitted": _fit_quality(head, tokens, train)[1],
        "calibration": _calibration(head, tokens, held),
    }
    fitted = ValueHead(dataclasses.replace(config, fit=described))
    fitted.load_state_dict(head.state_dict())
    return fitted.eval().requires_grad_(False)


def _split(
    groups: torch.Tensor, part: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the tokens that are fitted, and of those of held-out prompts."""
    names = torch.unique(groups)
    if len(names) < 2:
        raise InvalidArgument(
            f"prompts must be at least two different ones, since some are held out, got "
            f"{len(names)}"
        )
    order = names[torch.randperm(len(names), generator=generator)]
    held = order[: min(len(names) - 1, max(1, round(part * len(names))))]
    is_held = torch.isin(groups, held)
    return (~is_held).nonzero().squeeze(1), is_held.nonzero().squeeze(1)


def _count(groups: torch.Tensor) -> int:
    return len(torch.unique(groups))


def _start(
    tokens: LoggedTokens,
    config: ValueHeadConfig,
    train: torch.Tensor,
    generator: torch.Generator,
) -> ValueHead:
    """A head that says the mean reward of every token.

    The vectors of tokens begin at 0, so that a token which no text has is neither liked nor not.
    """
    head, weights = ValueHead(config), tokens.weights
    mean = (weights[train] * tokens.rewards[train]).sum() / weights[train].sum()
    scale = tokens.rewards[train].std()
    if not bool(scale > 0) or not bool(scale.isfinite()):
        raise InvalidArgument(
            f"reward gives every text {float(mean):g}, so that there is nothing to fit"
        )
    moments = [tokens.hidden[rows].double() for rows in torch.split(train, _CHUNK)]
    count = len(train)
    center = torch.stack([part.sum(0) for part in moments]).sum(0) / count
    spread = torch.stack([((part - center) ** 2).sum(0) for part in moments]).sum(0) / count
    with torch.no_grad():
        for module in head.modules():
            if isinstance(module, torch.nn.Linear):
                bound = 1 / math.sqrt(module.in_features)
                for weight in (module.weight, module.bias):
                    weight.uniform_(-bound, bound, generator=generator)
        head.value.bias.zero_()
        head.hidden_mean.copy_(center)
        head.hidden_scale.copy_(spread.sqrt().clamp(min=1e-3))
        head.reward_mean.copy_(mean)
        head.reward_scale.copy_(scale)
    return head


def _optimizer(
    head: ValueHead, options: FitOptions, steps: int
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    matrices = [weight for weight in head.parameters() if weight.dim() > 1]
    vectors = [weight for weight in head.parameters() if weight.dim() <= 1]
    optimizer = torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": options.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=options.learning_rate,
    )
    warm_up = max(1, min(100, steps // 10))

    def factor(step: int) -> float:
        return min(1.0, (step + 1) / warm_up) * 0.5 * (1 + math.cos(math.pi * step / steps))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _descend(
    head: ValueHead,
    tokens: LoggedTokens,
    rows: torch.Tensor,
    optimizer: torch.optim.Optimizer,
) -> None:
    """One step, in units of the rewards' deviation."""
    found = head.q(tokens.hidden[rows], tokens.token_ids[rows])
    errors = (found - tokens.rewards[rows]) / head.reward_scale
    loss = (tokens.weights[rows] * errors**2).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def _predict(head: ValueHead, tokens: LoggedTokens, rows: torch.Tensor) -> torch.Tensor:
    chunks = torch.split(rows, _CHUNK)
    return torch.cat([head.q(tokens.hidden[part], tokens.token_ids[part]) for part in chunks])


def _fit_quality(head: ValueHead, tokens: LoggedTokens, rows: torch.Tensor) -> tuple[float, float]:
    """The squared error over all tokens of all texts, and the part of the variance foretold, R2.

    R2 is 0 where all rewards are the same, which leaves nothing to foretell.
    """
    found, truth, w = _predict(head, tokens, rows), tokens.rewards[rows], tokens.weights[rows]
    mean = (w * truth).sum() / w.sum()
    error = float((w * (truth - found) ** 2).sum())
    variance = float((w * (truth - mean) ** 2).sum())
    return error, 1 - error / variance if variance > 0 else 0.0


def _calibration(head: ValueHead, tokens: LoggedTokens, rows: torch.Tensor) -> list[dict[str, Any]]:
    """Mean prediction and mean reward of tenths of the held-out tokens, by prediction."""
    found, truth, w = _predict(head, tokens, rows), tokens.rewards[rows], tokens.weights[rows]
    bins = []
    for part in found.argsort().tensor_split(_NUM_BINS):
        if len(part) and float(w[part].sum()) > 0:
            total = w[part].sum()
            bins.append(
                {
                    "predicted": float((w[part] * found[part]).sum() / total),
                    "observed": float((w[part] * truth[part]).sum() / total),
                    "tokens": len(part),
                }
            )
    return bins
