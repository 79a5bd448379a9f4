"""The cases that tq_fast and its peer are timed on, and their prompts."""

from __future__ import annotations

import dataclasses
import random
from typing import Literal, TypeAlias, get_args

from bench.decode_models import DTYPES, VOCAB_SIZE

Kind: TypeAlias = Literal["transfer", "encode", "sample"]
KINDS: tuple[Kind, ...] = get_args(Kind)
PROMPT_LENGTHS = (512, 3_072)

# A step of Transfer Q*: k candidates, a greedy roll-out of L tokens each, the next token greedy.
K, HORIZON, ALPHA = 10, 20, 1.0
# A prompt of the sampling case, and the tokens of each of its responses.
SAMPLED_PROMPT, SAMPLED_TOKENS = 128, 64


@dataclasses.dataclass(frozen=True)
class Case:
    """One thing that both sides are timed on.

    Attributes:
        kind: "transfer": steps of Transfer Q* on several prompts at once; "encode": a prompt that
            no cache knows is encoded, up to the logits of its next token; "sample": responses to
            one prompt are drawn at temperature 1.
        dtype: of the models.
        prompt_len: tokens of every prompt.
        number: prompts at once, or responses where they are drawn.
    """

    kind: Kind
    dtype: str
    prompt_len: int
    number: int

    def __str__(self) -> str:
        if self.kind == "transfer":
            return f"Transfer Q*, {self.number} x {self.prompt_len}, {self.dtype}"
        if self.kind == "encode":
            return f"encoding, {self.prompt_len}, {self.dtype}"
        return f"sampling, {self.number} responses, {self.dtype}"


def all_cases() -> list[Case]:
    """Return every case, those of a dtype together."""
    cases: list[Case] = []
    for dtype in DTYPES:
        for length in PROMPT_LENGTHS:
            cases += [Case("transfer", dtype, length, number) for number in (1, 8)]
        cases += [Case("encode", dtype, length, 1) for length in PROMPT_LENGTHS]
        cases += [Case("sample", dtype, SAMPLED_PROMPT, number) for number in (1, 8, 64)]
    return cases


def prompt_of(length: int, *seed: object) -> list[int]:
    """Return random token ids, the same for the same length and seed."""
    generator = random.Random(f"{length} {seed}")
    return [generator.randrange(1, VOCAB_SIZE) for _ in range(length)]
