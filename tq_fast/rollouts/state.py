"""Roll-outs in the making, and how they are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from .. import ops
from ..config import DecodeConfig


@dataclasses.dataclass
class RolloutState:
    """The state of N roll-outs of at most L tokens.

    Attributes:
        keys: int64 `[N]`, of the random streams.
        limits: int64 `[N]`, tokens at most.
        tree: int64 `[N]`, the tree that each belongs to.
        tokens: int64 `[N, L]`.
        lengths: int64 `[N]`.
        finished: bool `[N]`.
        logprob: fp32 `[N]`, sum of log pi_BL of the tokens, natural log.
        proposal_logprob: fp32 `[N]`, sum of the log density that they were drawn from.
        origin: int64 `[N]`, which roll-out this was at the beginning.
        columns: fp32 `[N, L]` each, what else is recorded of every token, by name.
    """

    keys: torch.Tensor
    limits: torch.Tensor
    tree: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor
    logprob: torch.Tensor
    proposal_logprob: torch.Tensor
    origin: torch.Tensor
    columns: dict[str, torch.Tensor]

    @staticmethod
    def begin(
        keys: torch.Tensor,
        limits: torch.Tensor,
        tree: torch.Tensor,
        *,
        num_tokens: int,
        columns: Sequence[str] = (),
    ) -> RolloutState:
        """Roll-outs without a token yet, of at most `num_tokens`, on the device of `keys`."""
        num, device = len(limits), keys.device
        tokens = keys.new_zeros(num, num_tokens)
        sums: dict[str, Any] = {"dtype": torch.float32, "device": device}
        return RolloutState(
            keys=keys,
            limits=limits,
            tree=tree,
            tokens=tokens,
            lengths=keys.new_zeros(num),
            finished=torch.zeros(num, dtype=torch.bool, device=device),
            logprob=torch.zeros(num, **sums),
            proposal_logprob=torch.zeros(num, **sums),
            origin=torch.arange(num, device=device),
            columns={name: torch.zeros(tokens.shape, **sums) for name in columns},
        )

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All fields and columns by name, each with a row for every roll-out."""
        fields = {name: field for name, field in vars(self).items() if name != "columns"}
        return fields | {f"columns[{name}]": column for name, column in self.columns.items()}

    @property
    def places(self) -> torch.Tensor:
        """Where each roll-out of the beginning is now, int64 `[N]`."""
        return self.origin.argsort()

    def count_running(self, num: int) -> int:
        """How many of the first `num` are not finished."""
        return int((~self.finished[:num]).sum())

    def running_first(self, by: torch.Tensor) -> torch.Tensor:
        """Order of the first roll-outs that puts those that run in front.

        They ascend in `by` (int64 `[n]`), equal ones as they were; behind them come the finished
        ones as they were. The host does not wait for the device.
        """
        last = torch.iinfo(torch.int64).max
        return by.masked_fill(self.finished[: by.shape[0]], last).argsort(stable=True)

    def permute(self, order: torch.Tensor) -> None:
        """Roll-out i of the first becomes roll-out `order[i]`."""
        num = order.shape[0]
        for field in self.tensors.values():
            field[:num] = field[order]

    def copy_to(self, other: RolloutState) -> None:
        """Overwrite the first roll-outs of `other`, as far as both reach."""
        for name, field in self.tensors.items():
            target = other.tensors[name]
            common = tuple(map(slice, map(min, field.shape, target.shape)))
            target[common] = field[common]


@dataclasses.dataclass(frozen=True)
class RolloutSampler:
    """How roll-outs are drawn.

    Attributes:
        eos: int64 `[E]`, ids that end a roll-out, on the device of the logits.
        vocab_size: ids from here on are padding and never drawn.
        config: temperature and truncation, seed and backend.
    """

    eos: torch.Tensor
    vocab_size: int
    config: DecodeConfig

    def advance(self, logits: torch.Tensor, state: RolloutState, depth: int | torch.Tensor) -> None:
        """Draw a token for each of the first roll-outs of `state` that is not finished.

        Args:
            logits: `[n, V]`.
            state: changed in place.
            depth: of the draw; a tensor (int64 `[1]`) where only the device knows it.
        """
        config, num = self.config, logits.shape[0]
        finished = state.finished[:num]
        ops.advance_rollouts_(
            logits,
            state.keys[:num],
            depth,
            state.tokens[:num],
            state.lengths[:num],
            finished,
            state.logprob[:num],
            state.proposal_logprob[:num],
            self.eos,
            temperature=0.0 if config.rollout == "greedy" else config.rollout_temperature,
            top_k=config.rollout_top_k,
            top_p=config.rollout_top_p,
            vocab_size=self.vocab_size,
            seed=config.seed,
            backend=config.backend,
        )
        finished |= state.lengths[:num] >= state.limits[:num]
