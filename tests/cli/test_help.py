"""The help of every command, as a newcomer reads it."""

from __future__ import annotations

import re
import typing

import pytest
from typer.testing import CliRunner

from tests.meta.pages import ROOT
from tq_fast import config as settings
from tq_fast.cli import app as cli
from tq_fast.cli.methods import METHOD_NAMES
from tq_fast.evaluation.config_file import recipe_files

COMMANDS = ("decode", "fit-value", "demo", "eval", "report", "info")


def help_of(*command: str, width: int, color: bool = False) -> str:
    env = {"COLUMNS": str(width), "TERMINAL_WIDTH": str(width)}
    env |= {"FORCE_COLOR": "1"} if color else {"NO_COLOR": "1"}
    result = CliRunner().invoke(cli.app, [*command, "--help"], env=env)
    assert result.exit_code == 0
    return result.output


def options_in(shown: str) -> dict[str, str]:
    """What the help says of each option, as one line."""
    found: dict[str, str] = {}
    name = ""
    for line in shown.splitlines():
        inner = line.strip().removeprefix("│").removesuffix("│")
        begins = re.match(r"(?: {1,4}| \*  )--([a-z-]+)", inner)
        if not line.strip().startswith("│"):
            name = ""
        elif begins:
            name = begins[1]
            found[name] = inner.strip()
        elif name:
            found[name] += f" {inner.strip()}"
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_an_example_of_itself_and_a_page(command: str) -> None:
    shown = help_of(command, width=80)
    examples = shown[shown.index("For example:") :]
    assert f"tq-fast {command}" in examples
    assert re.search(r"docs/[a-z/-]+\.md: ", examples)


def test_the_help_of_decode_leads_to_the_form_of_its_records() -> None:
    assert "docs/cli/decode.md: the form of prompts and records" in help_of("decode", width=80)
    assert "docs/cli/decode.md: the form of records" in help_of("eval", width=80)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_pages_that_a_help_names_exist(command: str) -> None:
    named = re.findall(r"docs/[\w/-]+\.md", help_of(command, width=80))
    assert named and all((ROOT / page).is_file() for page in named)


def test_the_help_of_eval_names_every_recipe() -> None:
    said = " ".join(help_of("eval", width=200).replace("│", " ").split())
    own = [file.stem for file in recipe_files() if not file.stem.startswith("paper-")]
    named = re.search(r"a shipped recipe: (.*), or one of paper-\*", said)
    assert named and sorted(named[1].split(", ")) == sorted(own)


CHOICES = {
    "strategy": settings.Strategy,
    "rollout": settings.Rollout,
    "prior": settings.Role,
    "candidates-from": settings.Role,
    "transfer": settings.Transfer,
    "weights": settings.Weights,
    "estimator": settings.Estimator,
    "backend": settings.Backend,
}
OTHER_CHOICES = {
    "method": METHOD_NAMES,
    "source": ("baseline", "sft", "value"),
    "judge": ("prefix", "rollout"),
    "cuts": ("even", "sentence"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "reward-truncate": ("left", "right"),
}


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("name", [*CHOICES, *OTHER_CHOICES])
def test_an_option_of_few_words_lists_them(name: str, width: int) -> None:
    said = options_in(help_of("decode", width=width))[name]
    for choice in OTHER_CHOICES.get(name) or typing.get_args(CHOICES[name]):
        assert re.search(rf"\b{choice}\b", said), said
    assert "WORD" not in said


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_sentences_of_their_own(command: str) -> None:
    shown = help_of(command, width=200)
    assert "[default" not in shown and "not given" not in shown.lower()


@pytest.mark.parametrize(
    ("name", "default"),
    [
        *[("k", "10"), ("alpha", "1"), ("num-rollouts", "1"), ("horizon", "20"), ("seed", "0")],
        *[("min-new-tokens", "0"), ("batch-size", "8"), ("n", "16"), ("strategy", "sample")],
        *[("branches", "8 in refine, 4 in blocks"), ("dtype", "auto")],
    ],
)
def test_the_help_says_what_an_option_is_without_being_given(name: str, default: str) -> None:
    assert f" Default: {default}." in options_in(help_of("decode", width=120))[name]


@pytest.mark.parametrize("command", COMMANDS)
def test_no_line_is_wider_than_the_terminal_and_prose_has_room(command: str) -> None:
    lines = help_of(command, width=80).splitlines()
    assert max(map(len, lines)) <= 80
    # The column of the help begins so early that 24 characters of it fit into a line.
    for line in lines:
        if re.match(r"│ [* ] *--|│ --", line) and "--no-" not in line:
            assert len(line.rstrip(" │")) > 24


@pytest.mark.parametrize(("name", "word"), [("horizon", "none"), ("eos-token-id", "never")])
def test_a_number_that_may_be_a_word_names_it(name: str, word: str) -> None:
    said = options_in(help_of("decode", width=120))[name]
    assert re.match(rf"--{name} +N\|{word} ", said), said


def test_the_help_says_what_skipping_special_tokens_does() -> None:
    said = options_in(help_of("decode", width=120))["skip-special-tokens"]
    assert "Leave special tokens out" in said and "Default: left out." in said


def test_special_tokens_in_examples_are_not_taken_for_markup() -> None:
    assert "<think>" in help_of("decode", width=120)


def test_colours_change_no_word() -> None:
    colored = re.sub(r"\x1b\[[0-9;]*m", "", help_of("decode", width=120, color=True))
    assert options_in(colored) == options_in(help_of("decode", width=120))
