"""Stop strings: where a response's text ends before its tokens do."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

# Tokens that are decoded beside those that a stop string can be made of: some have no text.
_MARGIN = 8
# Stands in decoded text for bytes that make no character yet.
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclasses.dataclass(frozen=True)
class StopStrings:
    """Strings that end a response; false where there are none.

    They are looked for in the response's own text with its special tokens, so that a special token
    may be one, and the prompt does not count.

    Attributes:
        strings: none of them empty.
        tokenizer: decodes responses; None only where there are no strings.
    """

    strings: tuple[str, ...] = ()
    tokenizer: PreTrainedTokenizerBase | None = None

    def __bool__(self) -> bool:
        return bool(self.strings)

    def is_met(self, token_ids: Sequence[int]) -> bool:
        """Whether the last token of a response completes a stop string."""
        if not self.strings:
            return False
        # A token is a byte of text at least, so that no more of them can be part of the string.
        longest = max(len(string.encode()) for string in self.strings) + _MARGIN
        text = self._decode(token_ids[-longest:])
        return any(string in text for string in self.strings)

    def text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The text of a response before its first stop string."""
        assert self.tokenizer is not None, "text needs a tokenizer"
        text, start = self._find(token_ids)
        if start is None:
            return str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
        # Tokens that lie before the stop string as a whole, and what is left of the next one.
        num = self._num_tokens(token_ids, start)
        if len(self._decode(token_ids[:num])) > start:
            num -= 1
        before = token_ids[:num]
        whole = str(self.tokenizer.decode(before, skip_special_tokens=skip_special_tokens))
        return whole + text[len(self._decode(before)) : start]

    def settled_text(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The part of an unfinished response's text that no further token can change.

        A character of which bytes are missing is left out, and what may begin a stop string.
        """
        assert self.tokenizer is not None, "text needs a tokenizer"
        text = str(self.tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens))
        text = text.rstrip(_INCOMPLETE)
        if not self.strings:
            return text
        # Special tokens that are left out can only make what is kept back too long.
        whole = self._decode(token_ids).rstrip(_INCOMPLETE)
        starts = (string[:length] for string in self.strings for length in range(len(string)))
        num_held = max(len(start) for start in starts if whole.endswith(start))
        return text[: max(0, len(text) - num_held)]

    def cut(self, token_ids: Sequence[int]) -> list[int]:
        """Tokens that begin before the first stop string does; all where there is none."""
        start = self._find(token_ids)[1] if self.strings else None
        num = len(token_ids) if start is None else self._num_tokens(token_ids, start)
        return list(token_ids[:num])

    def _find(self, token_ids: Sequence[int]) -> tuple[str, int | None]:
        """The whole text, and where the first stop string begins in it."""
        if not self.strings:
            return "", None
        text = self._decode(token_ids)
        starts = [start for string in self.strings if (start := text.find(string)) >= 0]
        return text, min(starts, default=None)

    def _num_tokens(self, token_ids: Sequence[int], length: int) -> int:
        """The fewest first tokens whose text has `length` characters."""
        return bisect.bisect_left(
            range(len(token_ids)), length, key=lambda num: len(self._decode(token_ids[:num]))
        )

    def _decode(self, token_ids: Sequence[int]) -> str:
        assert self.tokenizer is not None, "stop strings need a tokenizer"
        return str(self.tokenizer.decode(list(token_ids), skip_special_tokens=False))
