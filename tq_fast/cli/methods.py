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

from .options import Command, replace_parameter

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
        help: which methods take it, what it means, and its default.
        parser: reads words that are no plain value.
    """

    kind: type
    metavar: str
    help: str
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
    "n": OwnOption(int, "N", "Responses of which the best is kept [best_of_n: 16]."),
    "source": OwnOption(
        str,
        "WORD",
        "What draws whole texts: baseline, sft, or value, the prior under the head --value "
        "[best_of_n, refine, blocks: baseline].",
    ),
    "value": OwnOption(
        str,
        "DIR",
        "A head of `tq-fast fit-value` [value_guided; best_of_n, refine, blocks with "
        "--source value].",
    ),
    "mix": OwnOption(
        float, "X", "Weight of the baseline: 0 is the SFT model, 1 the baseline [dera: 0.5]."
    ),
    "first": OwnOption(int, "N", "Whole texts of the first stage [refine: 8]."),
    "branches": OwnOption(
        int, "N", "Continuations of a stage [refine: 8], or of a block [blocks: 4]."
    ),
    "stages": OwnOption(int, "N", "Stages after the first one [refine: 6]."),
    "cuts": OwnOption(
        str,
        "WHERE",
        "Where texts are cut: even, sentence, a number of tokens, or one a stage with commas "
        "between [refine: even].",
        read_cuts,
    ),
    "block_len": OwnOption(int, "N", "Tokens of a block [blocks: 25]."),
    "judge": OwnOption(
        str,
        "WORD",
        "What is scored: the text so far, prefix, or completed first, rollout [blocks: prefix].",
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
    settings: dict[str, Any] = {"help": option.help, "metavar": option.metavar}
    if option.parser is not None:
        settings["parser"] = option.parser
    described = typer.Option(f"--{name.replace('_', '-')}", rich_help_panel="Method", **settings)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[option.kind | None, described],
    )
