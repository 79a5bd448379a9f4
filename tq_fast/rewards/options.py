"""`RewardOptions`: how a reward reads prompts and responses, where its usual way is not meant."""

from __future__ import annotations

import dataclasses
from typing import Literal

from ..errors import InvalidArgument


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardOptions:
    """How the target reward reads prompts and responses.

    Attributes:
        pair: a classifier (or pipeline) reads prompt and response as a pair, which its tokenizer
            joins with its separators, instead of one text. The prompt's side is its text; of a chat
            it is the contents of the messages, an empty line between two.
        truncate: where a text has more tokens than the classifier has positions, cut what is too
            long at its "left" (the oldest) or "right" end; special tokens at both ends stay. Of a
            pair the prompt is cut first. None: such a text is refused. A pipeline cuts at the side
            that its own tokenizer says.
        keep_special_tokens: text of a response keeps tokens that are special and no part of the
            chat template, `<think>` for one; ends of turns and padding are left out in any case.

    Raises:
        InvalidArgument: a value is wrong; the message names the field, its value and what was
            expected.
    """

    pair: bool = False
    truncate: Literal["left", "right"] | None = None
    keep_special_tokens: bool = False

    def __post_init__(self) -> None:
        for name in ("pair", "keep_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(
                    f"reward_options: {name} must be True or False, got {getattr(self, name)!r}"
                )
        if self.truncate not in (None, "left", "right"):
            raise InvalidArgument(
                f"reward_options: truncate must be 'left', 'right' or None, got {self.truncate!r}"
            )
