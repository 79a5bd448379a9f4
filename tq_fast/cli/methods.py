"""The methods as the command line names them, and the options of their own.

Nothing here imports the presets, which takes seconds that help and usage errors need not wait for.
A test holds the two equal.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .options import Command, describe, replace_parameter

METHOD_NAMES = (
    *("sft", "baseline", "best_of_n", "args", "controlled_decoding", "transfer_q"),
    *("direct_on_target", "transfer_q_indirect", "dera", "value_guided", "refine", "blocks"),
    "collab",
)


@dataclasses.dataclass(frozen=True)
class OwnOption:
    """An option that some methods alone take.

    Attributes:
        kind: of its value; str where `parser` reads it.
        metavar: stands for the value in the help.
        help: which methods take it, and what it means.
        default: what it is in each of them without being given; None where it has to be.
        parser: reads words that are no plain value.
    """

    kind: type
    metavar: str
    help: str
    default: str | None = None
    parser: Callable[[str], Any] | None = None


def read_cuts(text: str) -> str | int | tuple[int, ...]:
    """Return what `--cuts` says: a word, one position, or several."""
    if text in ("even", "sentence"):
        return text
    try:
        positions = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise typer.BadParameter(
            f"{text!r} is neither 'even' nor 'sentence', an integer, or integers with commas "
            "between."
        ) from None
    return positions[0] if len(positions) == 1 else positions


# By the argument of the presets. A field of the configuration that a method has as a setting of its
# own, such as the prior of args, stands among the options of decoding; several baselines are
# several --baseline.
OWN_OPTIONS: dict[str, OwnOption] = {
    "n": OwnOption(
        int, "N", "Whole texts of which best_of_n keeps the one of the highest reward.", "16"
    ),
    "source": OwnOption(
        str,
        "NAME",
        "What draws the whole texts of best_of_n, refine and blocks: baseline, sft, or value, the "
        "prior under the head --value.",
        "baseline",
    ),
    "value": OwnOption(
        str,
        "DIR",
        "A head of `tq-fast fit-value`: for value_guided, and for best_of_n, refine and blocks "
        "with --source value.",
    ),
    "mix": OwnOption(
        float, "X", "Weight of the baseline in dera: 0 is the SFT model, 1 the baseline.", "0.5"
    ),
    "first": OwnOption(int, "N", "Whole texts of the first stage of refine.", "8"),
    "branches": OwnOption(
        int,
        "N",
        "Continuations among which a stage of refine, or a block of blocks, is chosen.",
        "8 in refine, 4 in blocks",
    ),
    "stages": OwnOption(int, "N", "Stages of refine after the first one.", "6"),
    "cuts": OwnOption(
        str,
        "WHERE",
        "Where refine cuts texts: even, sentence, a number of tokens (a stage cuts so many "
        "further), or one number a stage with commas between.",
        "even",
        read_cuts,
    ),
    "block_len": OwnOption(int, "N", "Tokens of a block of blocks.", "25"),
    "judge": OwnOption(
        str,
        "NAME",
        "What the reward reads in blocks: prefix, the text so far, or rollout, the text completed "
        "first.",
        "prefix",
    ),
}


def takes_own_settings(command: Command) -> Command:
    """Replace the parameter `own` of `command` by the methods' own options.

    `command` gets a dict of those that were given.
    """
    options = [_option(name, option) for name, option in OWN_OPTIONS.items()]

    def read(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if value is not None}

    return replace_parameter(command, "own", options, read)


def is_given(context: typer.Context, name: str) -> bool:
    """Whether the option `name` stands on the command line."""
    found = context.get_parameter_source(name)
    return found is not None and found.name == "COMMANDLINE"


def _option(name: str, option: OwnOption) -> inspect.Parameter:
    settings = {**describe(option.help, option.default), "metavar": option.metavar}
    if option.parser is not None:
        settings["parser"] = option.parser
    described = typer.Option(
        f"--{name.replace('_', '-')}", rich_help_panel="Settings of some methods alone", **settings
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[option.kind | None, described],
    )
