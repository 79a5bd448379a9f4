"""Plain lines on a rich console, and what else the commands share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console

# Prose is broken here even on wider terminals, because longer lines are hard to read.
MAX_WIDTH = 96
# Exit code of a command that was interrupted: 128 plus the number of SIGINT, as in a shell.
INTERRUPTED = 130


def say(console: Console, text: str) -> None:
    """Print `text` as it is, without markup, colours or added line breaks."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def explain(console: Console, text: str) -> None:
    """Print `text` as prose, broken between words where the line ends."""
    width = min(MAX_WIDTH, console.width)
    console.print(text, markup=False, highlight=False, width=width)


def one_line(text: str) -> str:
    """Return `text` with every run of white space made one space."""
    return " ".join(text.split())


@contextlib.contextmanager
def loading_models(console: Console) -> Iterator[None]:
    """Say that models are being loaded, instead of transformers' bar for each of them.

    Bars of downloads stay, since those can take long.
    """
    # transformers takes seconds to import, which error messages by this module need not wait for.
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
