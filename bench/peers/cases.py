"""The cases that tq_fast and its peer are timed on, and their prompts."""

from __future__ import annotations

import dataclasses
import random
from typing import ClassVar

VOCAB_SIZE = 32_000
DTYPES = ("fp32", "bf16")
PROMPT_LENGTHS = (512, 3_072)

# A step of Transfer Q*: k candidates, a greedy roll-out of L tokens each, the next token greedy.
K, HORIZON, ALPHA = 10, 20, 1.0
# A prompt of the sampling case, and the tokens of each of its responses.
SAMPLED_PROMPT, SAMPLED_TOKENS = 128, 64


@dataclasses.dataclass(frozen=True)
class TransferCase:
    """Steps of Transfer Q* on several prompts at once."""

    dtype: str
    prompt_len: int
    num_prompts: int
    kind: ClassVar[str] = "transfer"
    unit: ClassVar[str] = "tokens/s"

    def __str__(self) -> str:
        return f"Transfer Q*, {self.num_prompts} x {self.prompt_len}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class EncodeCase:
    """A prompt that no cache knows is encoded, up to the logits of its next token."""

    dtype: str
    prompt_len: int
    kind: ClassVar[str] = "encode"
    unit: ClassVar[str] = "tokens/s"

    def __str__(self) -> str:
        return f"encoding, {self.prompt_len}, {self.dtype}"


@dataclasses.dataclass(frozen=True)
class SampleCase:
    """Responses to one prompt are drawn at temperature 1."""

    dtype: str
    num_responses: int
    kind: ClassVar[str] = "sample"
    unit: ClassVar[str] = "tokens/s"

    def __str__(self) -> str:
        return f"sampling, {self.num_responses} responses, {self.dtype}"


Case = TransferCase | EncodeCase | SampleCase
KINDS = tuple(case.kind for case in (TransferCase, EncodeCase, SampleCase))


def all_cases() -> list[Case]:
    """Return every case, those of a kind together."""
    cases: list[Case] = [
        TransferCase(dtype, prompt_len, num_prompts)
        for dtype in DTYPES
        for prompt_len in PROMPT_LENGTHS
        for num_prompts in (1, 8)
    ]
    cases += [EncodeCase(dtype, length) for dtype in DTYPES for length in PROMPT_LENGTHS]
    cases += [SampleCase(dtype, number) for dtype in DTYPES for number in (1, 8, 64)]
    return cases


def prompt_of(length: int, *seed: object) -> list[int]:
    """Return random token ids, the same for the same length and seed."""
    generator = random.Random(f"{length} {seed}")
    return [generator.randrange(1, VOCAB_SIZE) for _ in range(length)]
