"""The blocks of code in the README and on the pages: Python runs, and options of commands exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.meta.pages import DOCS, ROOT, SITE_PAGES, Block, blocks, page_id, prose
from tq_fast.cli.app import app
from tq_fast.config import DecodeOptions
from tq_fast.evaluation.config_file import load_config
from tq_fast.session.method import MethodOptions

PAGES = [ROOT / "README.md", *SITE_PAGES]
COMMANDS: dict[str, Any] = getattr(typer.main.get_command(app), "commands", {})
# The comment above a block that cannot run: it is compiled, and its calls are checked.
NOT_RUN = "not run: "
_OPTIONS = {"DecodeOptions": DecodeOptions, "MethodOptions": MethodOptions}


def _python(page: Path) -> list[Block]:
    return [block for block in blocks(page) if block.language == "python"]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("page", [page for page in SITE_PAGES if _python(page)], ids=page_id)
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scope: dict[str, object] = {}
    for block in _python(page):
        # Lines of a failure are those of the page.
        code = compile("\n" * block.line + block.text, str(page), "exec")
        if not block.note.startswith(NOT_RUN):
            exec(code, scope)


def test_the_example_of_the_readme_prints_a_response_and_its_divergence(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (block,) = _python(ROOT / "README.md")
    scope: dict[str, Any] = {}
    exec(block.text, scope)
    response, divergence = capsys.readouterr().out.strip().split("\n")
    assert response and float(divergence.split()[0]) > 0
    assert len(scope["result"].sequences[0]) <= 12


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_calls_of_blocks_that_are_not_run_name_what_the_package_has(page: Path) -> None:
    for block in _python(page):
        if block.note.startswith(NOT_RUN):
            assert _wrong_names(block.text) == []


def test_a_wrong_name_in_a_block_is_found() -> None:
    wrong = "import tq_fast\ntq_fast.decode(a, num_rollout=3)\ntq_fast.decoded(a)\n"
    assert _wrong_names(wrong) == ["tq_fast.decode(num_rollout=)", "tq_fast.decoded"]


def _wrong_names(code: str) -> list[str]:
    """Return the names of tq_fast, and keyword arguments of its calls, that do not exist."""
    tree, known, wrong = ast.parse(code), {}, []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            known |= {name.name: name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            known |= {name.name: f"{node.module}.{name.name}" for name in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        root, dot, rest = ast.unparse(node.func).partition(".")
        name = known.get(root, "") + dot + rest
        if name.split(".")[0] != "tq_fast":
            continue
        try:
            arguments = _arguments(_resolve(name))
        except AttributeError:
            wrong.append(name)
            continue
        given = [keyword.arg for keyword in node.keywords if keyword.arg]
        wrong += [f"{name}({key}=)" for key in given if arguments and key not in arguments]
    return wrong


def _resolve(name: str) -> Any:
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for idx, part in enumerate(parts[1:], start=1):
        if not hasattr(found, part):
            try:
                importlib.import_module(".".join(parts[: idx + 1]))
            except ModuleNotFoundError:
                raise AttributeError(name) from None
        found = getattr(found, part)
    return found


def _arguments(function: Any) -> set[str]:
    """Return the keyword arguments of a function; an empty set where it takes any."""
    names: set[str] = set()
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            typed = re.search(r"Unpack\[(\w+)\]", str(parameter.annotation))
            if typed is None:
                return set()
            names |= set(_OPTIONS[typed[1]].__annotations__)
            for base in getattr(_OPTIONS[typed[1]], "__orig_bases__", ()):
                names |= set(getattr(base, "__annotations__", {}))
        else:
            names.add(parameter.name)
    return names


def _commands(text: str) -> Iterator[list[str]]:
    """Yield the words of every call of `tq-fast` in lines of a shell."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words = list(lexer)
        starts = [idx for idx, word in enumerate(words) if word == "tq-fast"]
        for start in starts:
            call = words[start + 1 :]
            ends = [idx for idx, word in enumerate(call) if set(word) <= set("();<>|&")]
            yield call[: ends[0]] if ends else call


def _unknown(words: list[str]) -> list[str]:
    """Return what the command line would not know of `tq-fast WORDS`."""
    if not words or words[0] in ("--help", "--version", "...", "*"):
        return []
    if words[0] not in COMMANDS:
        return [words[0]]
    command = COMMANDS[words[0]]
    options = {name for parameter in command.params for name in parameter.opts}
    options |= {name for parameter in command.params for name in parameter.secondary_opts}
    options |= {"--help", "-h"}
    given = [word.partition("=")[0] for word in words[1:] if re.match(r"--?[a-z]", word)]
    return [f"{words[0]} {name}" for name in given if name not in options]


def test_an_unknown_option_is_found() -> None:
    (words,) = _commands("cat x | tq-fast decode --bseline DIR \\\n  --output out.jsonl; echo $?")
    assert _unknown(words) == ["decode --bseline"]
    assert _unknown(["decod"]) == ["decod"]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_commands_and_options_of_tq_fast_exist(page: Path) -> None:
    shell = [block.text for block in blocks(page) if block.language in ("sh", "")]
    inline = re.findall(r"`(tq-fast [^`]+)`", prose(page).replace("\n", " "))
    calls = [words for text in [*shell, *inline] for words in _commands(text)]
    assert [wrong for words in calls for wrong in _unknown(words)] == []


@pytest.mark.parametrize("page", sorted((DOCS / "cli").glob("*.md")), ids=page_id)
def test_options_that_a_page_of_the_command_line_names_exist(page: Path) -> None:
    options = {
        name
        for command in COMMANDS.values()
        for parameter in command.params
        for name in (*parameter.opts, *parameter.secondary_opts, "--help")
    }
    named = re.findall(r"`(--[a-z][a-z-]*)", prose(page))
    assert [name for name in named if name not in options] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=page_id)
def test_targets_of_make_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?m)^([\w-]+):(?!=)", makefile))
    shell = "\n".join(block.text for block in blocks(page) if block.language in ("sh", ""))
    named = re.findall(r"(?m)^make ([\w-]+)", shell) + re.findall(r"`make ([\w-]+)", prose(page))
    assert [name for name in named if name not in targets and name != "gpu-"] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_configurations_of_an_evaluation_are_accepted(page: Path, tmp_path: Path) -> None:
    for block in blocks(page):
        if block.language == "toml":
            file = tmp_path / "config.toml"
            file.write_text(block.text, encoding="utf-8")
            assert load_config(file).setups
