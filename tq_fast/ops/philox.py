"""Philox4x32-10 in plain PyTorch: the one random stream of the package.

It draws the same numbers as csrc/common/philox.h. Counter-based (Salmon, Moraes,
Dror, Shaw: "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011): a draw is a pure function of
(seed, purpose, key, step, index), so it never depends on batch order, tiles or slots.

    philox key      (seed low word, seed high word xor purpose)
    philox counter  (index, step, key low word, key high word)
    uniform         (((w0 | w1 << 32) >> 11) + 0.5) * 2^-53, float64 in the open interval (0, 1)

Known answer for counter 0, key 0: 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

# The purpose of a draw is part of the key, so that the two purposes never share a stream.
ROLLOUT = 1
CHOICE = 2

_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BELOW_ONE = 1.0 - 2.0**-53
# torch leaves this function without types.
_broadcast: Callable[..., Sequence[Tensor]] = torch.broadcast_tensors


def as_int64(value: int | Tensor) -> int | Tensor:
    """A Python int wrapped modulo 2^64 into int64; a tensor as int64."""
    if isinstance(value, Tensor):
        return value.to(torch.int64)
    # Convert a number of numpy first: it would overflow below.
    value = value if isinstance(value, (int, torch.SymInt)) else int(value)
    return (value + 2**63) % 2**64 - 2**63


def split_int64(value: int | Tensor) -> tuple[int, Tensor | None]:
    """A seed or step as the pair that a C++ schema takes: an int64, or a tensor beside 0."""
    if isinstance(value, Tensor):
        return 0, value
    return (value if -(2**63) <= value < 2**63 else int(as_int64(value))), None


def philox4x32(counter: Sequence[Tensor] | Tensor, key: Sequence[Tensor] | Tensor) -> Tensor:
    """Ten rounds of Philox4x32.

    Args:
        counter: four int64 words of one shape, each in [0, 2^32).
        key: two int64 words in [0, 2^32), of that shape or one that broadcasts to it.

    Returns:
        int64 `[4, ...]`, four random words in [0, 2^32).
    """
    shape, device = counter[0].shape, counter[0].device
    # Both lanes of a round share one multiplication: row 0 holds words 0 and 1, row 1 words 2, 3.
    even = torch.stack((counter[0], counter[2]))
    odd = torch.stack((counter[1], counter[3]))
    round_key = torch.stack((key[0].expand(shape), key[1].expand(shape)))
    column = (2,) + (1,) * len(shape)
    multipliers = torch.tensor(_MULTIPLIERS, device=device).reshape(column)
    weyl = torch.tensor(_WEYL, device=device).reshape(column)
    mask = torch.tensor(_WORD, device=device)
    for _ in range(_ROUNDS):
        # Products wrap modulo 2^64, and the high word survives the arithmetic shift below the
        # mask. `odd` and the key may pass 32 bits: they are only xored before the next mask.
        product = (even * multipliers).flip(0)
        even = ((product >> 32) ^ odd ^ round_key) & mask
        odd = product
        round_key = round_key + weyl
    return torch.stack((even, odd & mask), dim=1).flatten(0, 1)


def uniform(
    seed: int | Tensor,
    purpose: int,
    keys: Tensor,
    step: int | Tensor,
    index: int | Tensor = 0,
) -> Tensor:
    """One float64 uniform in (0, 1) for each element of the broadcast of `keys` and `index`.

    Args:
        seed: any int64, or a one-element int64 tensor.
        purpose: ROLLOUT or CHOICE.
        keys: integer tensor of any shape.
        step: int, or a one-element integer tensor.
        index: int, or an integer tensor that broadcasts against `keys`.
    """
    keys = keys.to(torch.int64)
    device = keys.device
    seed, step, index = (_on_device(value, device) for value in (seed, step, index))
    words = _broadcast(index & _WORD, step.reshape(()) & _WORD, keys & _WORD, (keys >> 32) & _WORD)
    seed = seed.reshape(())
    bits = philox4x32(words, (seed & _WORD, ((seed >> 32) & _WORD) ^ purpose))
    # 53 bits: the low word's top 21 below the whole high word.
    mantissa = (bits[1] << 21) | (bits[0] >> 11)
    # mantissa + 0.5 rounds to 2^53 for the largest mantissa, and the interval is open.
    return ((mantissa.to(torch.float64) + 0.5) * 2.0**-53).clamp_(max=_BELOW_ONE)


def gumbel(
    seed: int | Tensor, keys: Tensor, step: int | Tensor, index: Tensor, purpose: int = CHOICE
) -> Tensor:
    """Standard Gumbel noise -log(-log u) in float64, u as in `uniform`."""
    return -torch.log(-torch.log(uniform(seed, purpose, keys, step, index)))


def _on_device(value: int | Tensor, device: torch.device) -> Tensor:
    value = as_int64(value)
    if isinstance(value, Tensor):
        return value.to(device)
    return torch.tensor(value, dtype=torch.int64, device=device)
