"""What both sides must agree on before a time is reported.

A step of Transfer Q* is recorded by either side as an object a prompt: `candidates` (token ids by
falling prior), `prior` (their log-probs, nats), `q` and `choice` (the chosen token id).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

Step = Mapping[str, Any]

# fp32 sums are in another order on either side.
Q_TOLERANCE = 1e-4
# bf16 logits of these models are multiples of up to 2^-6, through layers that round as well.
NEAR_TIE = 0.06


class Disagreement(AssertionError):
    """The two sides do not compute the same."""


def check_transfer(
    ours: Sequence[Sequence[Step]], theirs: Sequence[Sequence[Step]], *, dtype: str
) -> str:
    """Compare the steps of every prompt; `ours` and `theirs` are lists of steps by prompt.

    In fp32 candidates and choices must be the same and Q within `Q_TOLERANCE`. In bf16 a prompt is
    followed to the first step that chose another token; its candidates must be the same but for
    those that are within `NEAR_TIE` of the last one.

    Returns:
        a line that says what was compared.

    Raises:
        Disagreement: they differ.
    """
    is_exact = dtype == "fp32"
    errors: list[float] = []
    num_steps = num_same = num_parted = 0
    for prompt, (own, other) in enumerate(zip(ours, theirs, strict=True)):
        for step, (mine, peer) in enumerate(zip(own, other, strict=True)):
            where = f"prompt {prompt}, step {step}"
            _check_candidates(mine, peer, where, 0.0 if is_exact else NEAR_TIE)
            found = _q_errors(mine, peer)
            # Written so that a Q of NaN is refused, too.
            wrong = [error for error in found if not error <= Q_TOLERANCE]
            if is_exact and wrong:
                raise Disagreement(
                    f"{where}: Q differs by {wrong[0]:.2g}, at most {Q_TOLERANCE:g} was expected"
                )
            errors += found
            num_steps += 1
            if mine["choice"] == peer["choice"]:
                num_same += 1
                continue
            if is_exact:
                raise Disagreement(
                    f"{where}: tokens {mine['choice']} and {peer['choice']} were chosen"
                )
            num_parted += 1
            break
    errors.sort()
    said = f"{num_same} of {num_steps} choices the same, Q of the same candidates "
    said += f"differs by {errors[len(errors) // 2]:.1e} (median) and {errors[-1]:.1e} (most)"
    return said + (f"; {num_parted} responses parted" if num_parted else "")


def check_next_tokens(ours: Sequence[int], theirs: Sequence[int], *, dtype: str) -> str:
    """Compare the likeliest next token after every prompt that was encoded; bf16 may tie.

    Returns:
        a line that says what was compared.

    Raises:
        Disagreement: they differ in fp32.
    """
    pairs = list(zip(ours, theirs, strict=True))
    other = [(mine, peer) for mine, peer in pairs if mine != peer]
    if not other:
        return "the same next token"
    if dtype == "fp32":
        raise Disagreement(f"the next tokens are {other[0][0]} and {other[0][1]}")
    return f"another next token after {len(other)} of {len(pairs)} prompts (a tie in bf16)"


def check_lengths(lengths: Sequence[int], *, number: int, length: int) -> None:
    """Raise where a side drew other than `number` responses of `length` tokens.

    Raises:
        Disagreement: they differ.
    """
    if list(lengths) != [length] * number:
        raise Disagreement(f"{number} responses of {length} tokens were expected, got {lengths}")


def _check_candidates(mine: Step, peer: Step, where: str, tolerance: float) -> None:
    if mine["candidates"] == peer["candidates"]:
        return
    if not tolerance:
        raise Disagreement(
            f"{where}: candidates {mine['candidates']} and {peer['candidates']} differ"
        )
    for one, other in itertools.permutations((mine, peer)):
        for token, prior in zip(one["candidates"], one["prior"], strict=True):
            if token not in other["candidates"] and prior > other["prior"][-1] + tolerance:
                raise Disagreement(
                    f"{where}: candidate {token} ({prior:.3f}) is missing on one side, where the "
                    f"last one has {other['prior'][-1]:.3f}"
                )


def _q_errors(mine: Step, peer: Step) -> list[float]:
    """Return |Q - Q| of the candidates that both have."""
    theirs = dict(zip(peer["candidates"], peer["q"], strict=True))
    return [
        abs(q - theirs[token])
        for token, q in zip(mine["candidates"], mine["q"], strict=True)
        if token in theirs
    ]
