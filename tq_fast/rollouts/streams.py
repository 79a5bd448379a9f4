"""The random streams of decoding: every draw has a key that follows from what it is for."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..ops.philox import philox4x32


def stream_keys(drawn_for: Sequence[tuple[int, int, int, int]]) -> torch.Tensor:
    """Return the key `[N]` (int64) of a random stream for each `(prompt key, step, token, number)`.

    A stream depends on these alone, never on where in the forest a prompt or a roll-out happens to
    stand.
    """
    columns = torch.tensor(drawn_for, dtype=torch.int64).reshape(-1, 4)
    prompt, step, token, number = columns.unbind(1)
    counter = (token, step, number, torch.zeros_like(step))
    words = philox4x32(counter, (prompt & 0xFFFFFFFF, (prompt >> 32) & 0xFFFFFFFF))
    return words[0] | (words[1] << 32)
