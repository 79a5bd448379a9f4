"""Roll-outs in the making, and how they are drawn."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from .. import ops
from ..config import DecodeConfig


@dataclasses.dataclass
class RolloutState:
    """What is known of N roll-outs.

    Attributes:
        keys: int64 `[N]`, of the random streams.
        limits: int64 `[N]`, tokens at most.
        tokens: int64 `[N, L]`.
        lengths: int64 `[N]`.
        finished: bool `[N]`.
        logprob: fp32 `[N]`, sum of log pi_BL of the tokens, natural log.
        proposal_logprob: fp32 `[N]`, sum of the log density that they were drawn from.
        origin: int64 `[N]`, which roll-out this was at the beginning.
    """

    keys: torch.Tensor
    limits: torch.Tensor
    tokens: torch.Tensor
    lengths: torch.Tensor
    finished: torch.Tensor
    logprob: torch.Tensor
    proposal_logprob: torch.Tensor
    origin: torch.Tensor

    @staticmethod
    def resting(num: int, width: int, device: torch.device) -> RolloutState:
        """N roll-outs that are finished before they begin."""
        numbers = torch.zeros(4, num, dtype=torch.int64, device=device)
        sums = torch.zeros(2, num, dtype=torch.float32, device=device)
        return RolloutState(
            keys=numbers[0],
            limits=numbers[1],
            tokens=torch.zeros(num, width, dtype=torch.int64, device=device),
            lengths=numbers[2],
            finished=torch.ones(num, dtype=torch.bool, device=device),
            logprob=sums[0],
            proposal_logprob=sums[1],
            origin=torch.arange(num, out=numbers[3]),
        )

    @staticmethod
    def begin(keys: torch.Tensor, limits: Sequence[int]) -> RolloutState:
        """Roll-outs without a token yet, of at most `limits[i]` tokens, on the device of `keys`."""
        state = RolloutState.resting(len(limits), max(limits), keys.device)
        state.keys = keys
        state.limits = torch.tensor(limits, device=keys.device)
        state.finished.fill_(False)
        return state

    def permute(self, order: torch.Tensor) -> None:
        """Roll-out i of the first becomes roll-out `order[i]`."""
        num = order.shape[0]
        for field in vars(self).values():
            field[:num] = field[order]


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
