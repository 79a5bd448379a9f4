"""Plain lines on a rich console, and no bars but our own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console

# Longer lines of prose are hard to read.
MAX_WIDTH = 96


def say(console: Console, text: str) -> None:
    """Print `text` as it is: no markup, no colours, no line breaks of ours."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def explain(console: Console, text: str) -> None:
    """Print `text` as prose, broken between words where the line ends."""
    width = min(MAX_WIDTH, console.width)
    console.print(text, markup=False, highlight=False, width=width)


def one_line(text: str) -> str:
    """`text` with every run of white space made one space."""
    return " ".join(text.split())


@contextlib.contextmanager
def loading_models(console: Console) -> Iterator[None]:
    """Say that models are being loaded, instead of transformers' bar for each of them.

    Bars of downloads stay, since those can take long.
    """
    # Imported here: it takes seconds, and this module serves error messages too.
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging

    say(console, "loading the models")
    were_shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    enable_progress_bars()
    try:
        yield
    finally:
        if were_shown:
            logging.enable_progress_bar()
