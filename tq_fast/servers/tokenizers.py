"""The tokenizer on this machine, and whether the server's reads texts the same way."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InvalidArgument, warn_caller
from .http import Connection, RequestRefused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Texts in which tokenizers of different models part: spaces, digits, case, scripts, code.
_PROBES = (
    "The quick brown fox, 1234567 times.",
    "  two spaces\n\n\tand a tab ",
    "don't 'quote' \"this\" -- it's 3.14 %",
    "def f(x):\n    return x ** 2  # ok\n",
    "Grüße, naïve café; 你好世界; Привет; مرحبا; 👩\u200d🚀",
)
# Ids of the vocabulary whose texts are tried, spread evenly.
_NUM_VOCABULARY_PROBES = 64


def load_server_tokenizer(given: Any, served: Mapping[str, Any]) -> PreTrainedTokenizerBase | None:
    """Return the tokenizer of a served model; None where there is none on this machine.

    Args:
        given: a hub id, a folder or a tokenizer; None: the one in the folder that the server says
            that the model comes from.
        served: what the server says of the model.
    """
    name = given
    if given is None:
        name = str(served.get("root") or served.get("id"))
        if not Path(name).is_dir():
            return None
    if not isinstance(name, (str, os.PathLike)):
        if not callable(name) or not hasattr(name, "decode"):
            raise InvalidArgument(
                "tokenizer must be a hub id, a folder or a tokenizer of transformers, got "
                f"{type(name).__name__}"
            )
        return name
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name)
    except Exception as error:
        # A file that holds something else can end in any error, and in a bare one of tokenizers.
        raise InvalidArgument(f"tokenizer: none in {str(name)!r}: {error}") from error


def check_same_tokenizer(
    connection: Connection, model: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Refuse a server whose tokenizer gives other ids than `tokenizer` to some text.

    Raises:
        InvalidArgument: the message shows a text and its ids from both.
    """
    texts = [*_PROBES, *_texts_of_vocabulary(tokenizer)]
    bodies = [{"model": model, "prompt": text, "add_special_tokens": False} for text in texts]
    try:
        answers = connection.post("/tokenize", bodies)
    except RequestRefused as error:
        if error.status not in (404, 405):
            raise
        warn_caller(
            f"{connection.server.root} has no /tokenize, so that nobody knows whether its model "
            "reads the ids of the tokenizer here; let whatever stands before it pass /tokenize"
        )
        return
    for text, answer in zip(texts, answers, strict=True):
        ours = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        if answer["tokens"] != ours:
            raise InvalidArgument(
                f"tokenizer differs from the server's: {text!r} is {ours[:16]} here and "
                f"{answer['tokens'][:16]} there; pass as tokenizer= what the server was started "
                "with (its model, or --tokenizer)"
            )


def _texts_of_vocabulary(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Texts of tokens all over the vocabulary, and of every added token."""
    ids = sorted(tokenizer.get_vocab().values())
    spread = ids[:: max(1, len(ids) // _NUM_VOCABULARY_PROBES)]
    added = [str(token) for token in tokenizer.get_added_vocab()][:_NUM_VOCABULARY_PROBES]
    texts = [str(tokenizer.decode([token])) for token in spread]
    # A text alone tells nothing where it is empty.
    return [text for text in [*texts, "".join(texts), *added] if text]
