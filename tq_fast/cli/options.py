"""Groups of command-line options: the fields of `DecodeConfig`, made from the dataclass itself."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeAlias

import typer

from ..config import DecodeConfig

# The panels of the help, and for every field a line: one that lacks its line fails at import, and
# cannot be forgotten. Defaults and choices are added to it.
_PANELS: dict[str, dict[str, str]] = {
    "Search": {
        "k": "Candidates per step.",
        "num_rollouts": "Roll-outs per candidate.",
        "horizon": "Tokens per roll-out; 0 scores the partial text, none rolls out to the end.",
        "alpha": "Decoding temperature, in units of the reward; small follows the reward.",
        "strategy": "How the next token is chosen.",
        "estimator": "Mean of the rewards, or soft: alpha log mean exp(reward / alpha).",
    },
    "Responses": {
        "max_new_tokens": "Response length, the EOS token included.",
        "min_new_tokens": "No EOS is chosen before the response has this many tokens.",
        "stop": "A string that ends the response; repeat for several. The text ends before it.",
        "eos_token_id": "A token that ends a response, or never; repeat for several. "
        "Default: the baseline's own.",
        "num_return_sequences": "Responses to each prompt.",
        "seed": "Seed of every random draw; the same seed gives the same responses.",
    },
    "How roll-outs and whole texts are drawn": {
        "rollout": "How roll-outs are drawn.",
        "rollout_temperature": "Temperature of what is sampled.",
        "rollout_top_k": "Keep this many tokens in what is sampled; 0 keeps all.",
        "rollout_top_p": "Keep the smallest set of this mass in what is sampled; 1 keeps all.",
    },
    "Policies and indirect transfer": {
        "prior": "The policy that is reweighted. Default: sft if there is one, else baseline.",
        "candidates_from": "The policy that proposes the candidates.",
        "transfer": "Whether the baseline was aligned to the target reward (direct) or to another.",
        "beta": "KL weight the baseline was trained with; needed for indirect transfer.",
        "weights": "How indirect transfer weighs its roll-outs.",
    },
    "Kernels": {
        "backend": "The one backend that every op must use. Default: the fastest that accepts.",
    },
    "Special tokens in texts": {
        "skip_special_tokens": "Leave special tokens out of the texts, or keep them. Default: "
        "left out.",
    },
}
_HELP = {name: (panel, line) for panel, lines in _PANELS.items() for name, line in lines.items()}
# Choices that are longer together stand in the help, beside which they would leave no room.
_MAX_METAVAR = 16


# A command as typer takes it.
Command: TypeAlias = Callable[..., Any]


def replace_parameter(
    command: Command,
    name: str,
    options: Sequence[inspect.Parameter],
    read: Callable[[dict[str, Any]], Any],
) -> Command:
    """Replace the parameter `name` of `command` by several options.

    Args:
        command: takes keyword arguments.
        name: one of its parameters.
        options: what stands in its place on the command line.
        read: returns the argument that these make, by the name of each.
    """
    signature = inspect.signature(command, eval_str=True)
    parameters: list[inspect.Parameter] = []
    for parameter in signature.parameters.values():
        parameters += options if parameter.name == name else [parameter]

    def wrapper(**given: Any) -> Any:
        values = {option.name: given.pop(option.name) for option in options}
        return command(**{name: read(values)}, **given)

    wrapper.__name__, wrapper.__doc__ = command.__name__, command.__doc__
    # typer takes parameters from the signature, and types from the annotations where there are any.
    wrapper.__annotations__ = {}
    described: Any = wrapper
    described.__signature__ = signature.replace(parameters=parameters)
    return wrapper


def takes_decode_options(*names: str, **defaults: Any) -> Callable[[Command], Command]:
    """Replace the parameter `config` of a command by one option for each field of `DecodeConfig`.

    Values that no field accepts are refused by `DecodeConfig` itself, in its own words.

    Args:
        names: the fields; not given: all of them.
        **defaults: other defaults than those of `DecodeConfig`.
    """
    hints = typing.get_type_hints(DecodeConfig)
    fields = {field.name: field for field in dataclasses.fields(DecodeConfig)}
    # In the order of the panels.
    options = [
        _option(field, hints[name], defaults.get(name, field.default))
        for name, field in sorted(fields.items(), key=lambda item: list(_HELP).index(item[0]))
        if not names or name in names
    ]

    def read(values: dict[str, Any]) -> DecodeConfig:
        if values.get("eos_token_id") is not None:
            values["eos_token_id"] = _end_tokens(values["eos_token_id"])
        return DecodeConfig(**values)

    return lambda command: replace_parameter(command, "config", options, read)


def read_devices(words: Sequence[str]) -> str | dict[str, str] | None:
    """Return what `--device` says: one device, or one by role where a word is `ROLE=NAME`."""
    if not words:
        return None
    if len(words) == 1 and "=" not in words[0]:
        return words[0]
    by_role = {}
    for word in words:
        role, _, name = word.partition("=")
        if not name or role in by_role:
            raise typer.BadParameter(
                f"expected one NAME, or ROLE=NAME once a role, got {word!r}.",
                param_hint="'--device'",
            )
        by_role[role] = name
    return by_role


def read_model_kwargs(words: Sequence[str]) -> dict[str, dict[str, Any]] | None:
    """Return what `--model-kwargs` says by role, every word `ROLE={"name": value, ...}`."""
    by_role: dict[str, dict[str, Any]] = {}
    for word in words:
        role, _, text = word.partition("=")
        try:
            value = json.loads(text)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise typer.BadParameter(
                f'expected ROLE={{"name": value}}, got {word!r}.', param_hint="'--model-kwargs'"
            )
        by_role.setdefault(role, {}).update(value)
    return by_role or None


def describe(help: str, default: Any = None, choices: Sequence[str] = ()) -> dict[str, Any]:
    """Return the settings of an option that say what it takes and what it is without being given.

    Args:
        help: what the option means, as sentences.
        default: where there is one to be named.
        choices: the only values, where there are few.
    """
    metavar = "|".join(choices)
    settings: dict[str, Any] = {"show_default": False}
    if choices and len(metavar) <= _MAX_METAVAR:
        settings["metavar"] = metavar
    elif choices:
        settings["metavar"] = "NAME"
        help += f" One of {', '.join(choices)}."
    if default is not None:
        help += f" Default: {f'{default:g}' if isinstance(default, float) else default}."
    return {**settings, "help": help}


def flag(*names: str, panel: str, help: str) -> Any:
    """Return an option that is given or not, without a value."""
    return typer.Option(*names, help=help, metavar="", show_default=False, rich_help_panel=panel)


def _option(field: dataclasses.Field[Any], hint: Any, default: Any) -> inspect.Parameter:
    """Return the option of one field as the parameter that typer expects."""
    panel, line = _HELP[field.name]
    choices, name = _choices(hint), "--" + field.name.replace("_", "-")
    settings: dict[str, Any] = {}
    if field.name == "horizon":
        kind: Any = str
        settings = {"parser": _horizon, "metavar": "N|none"}
        default = str(default)
    elif field.name == "eos_token_id":
        kind = list[str]
        settings["metavar"] = "N|never"
    elif field.name == "stop":
        kind, default = list[str], []
        settings["metavar"] = "TEXT"
    elif hint is bool:
        kind, name = bool, f"{name}/--no-{name.removeprefix('--')}"
        settings["metavar"] = ""
    elif choices:
        kind = str
    else:
        kind = next(part for part in (typing.get_args(hint) or (hint,)) if part is not type(None))
        settings["metavar"] = "N" if kind is int else "X"
    described = describe(line, None if isinstance(default, (bool, list)) else default, choices)
    if default is None:
        kind = kind | None
    return inspect.Parameter(
        field.name,
        inspect.Parameter.KEYWORD_ONLY,
        default=default,
        annotation=Annotated[
            kind, typer.Option(name, rich_help_panel=panel, **{**described, **settings})
        ],
    )


def _choices(hint: Any) -> tuple[str, ...]:
    """Return the words of `Literal[...]` or `Literal[...] | None`; empty for other types."""
    parts = (hint, *typing.get_args(hint))
    literal = next((part for part in parts if typing.get_origin(part) is typing.Literal), None)
    return typing.get_args(literal) if literal is not None else ()


def _horizon(value: str | int | None) -> int | None:
    if value is None or value == "none":
        return None
    try:
        return int(value)
    except ValueError:
        raise typer.BadParameter(f"{value!r} is neither an integer nor 'none'.") from None


def _end_tokens(words: list[str]) -> tuple[int, ...] | None:
    """Return the ids of `--eos-token-id`: None, the model's own, without words; () for 'never'."""
    if not words:
        return None
    if words == ["never"]:
        return ()
    try:
        return tuple(int(word) for word in words)
    except ValueError:
        raise typer.BadParameter(
            f"expected token ids or the one word 'never', got {' '.join(words)!r}.",
            param_hint="'--eos-token-id'",
        ) from None


def read_template_options(text: str | None) -> dict[str, Any] | None:
    """The object of `--template-options`; a word that is no JSON object is refused."""
    try:
        options = None if text is None else json.loads(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not JSON: {error}.", param_hint="'--template-options'"
        ) from None
    if not isinstance(options, (dict, type(None))):
        raise typer.BadParameter(
            f"expected a JSON object such as '{{\"enable_thinking\": false}}', got {text!r}.",
            param_hint="'--template-options'",
        )
    return options
