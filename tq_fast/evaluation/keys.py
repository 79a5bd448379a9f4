"""Keys of a table, and the nearest known one of a key that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import InvalidArgument


def check_keys(table: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    """Refuse a key that is not known.

    Raises:
        InvalidArgument: the message names the key, and the nearest known one.
    """
    known = list(known)
    for key in table:
        if key not in known:
            raise InvalidArgument(f"{where}: unknown key {key!r}; {nearest(key, known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """What to say about `word`, which is none of `known`."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"
