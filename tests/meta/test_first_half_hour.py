"""scripts/gpu_first_half_hour.sh: what its stages would run exists, without a GPU."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "gpu_first_half_hour.sh"
STAGES = re.search(r"^STAGES=\((.*)\)$", SCRIPT.read_text(), re.MULTILINE).group(1).split()

pytestmark = pytest.mark.skipif(
    any(shutil.which(tool) is None for tool in ("bash", "make", "timeout")),
    reason="no bash, make or timeout on this machine",
)

# Stands for Python and make: it notes what it is asked for, and fails where FAILING is part of it.
STUB = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["CALLS"], "a") as calls:
    print(json.dumps([os.path.basename(sys.argv[0]), *sys.argv[1:]]), file=calls)
print("FAILED tests/gpu/test_x.py::test_y\\n1 failed, 2 passed in 0.1s")
failing = os.environ.get("FAILING")
sys.exit(int(os.environ["CODE"]) if failing and failing in " ".join(sys.argv) else 0)
"""


class Runner:
    """Runs stages with stubs in the place of Python and make."""

    def __init__(self, folder: Path) -> None:
        self.results, self.calls = folder / "results", folder / "calls"
        self.stubs = folder / "stubs"
        self.stubs.mkdir()
        for name in ("python-stub", "make"):
            (self.stubs / name).write_text(STUB)
            (self.stubs / name).chmod(0o755)

    def run(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        self.calls.write_text("")
        environment = {
            **os.environ,
            "PATH": f"{self.stubs}{os.pathsep}{os.environ['PATH']}",
            "GPU_PYTHON": str(self.stubs / "python-stub"),
            "RESULTS": str(self.results),
            "CALLS": str(self.calls),
            **changes,
        }
        return subprocess.run(
            [str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False
        )

    def commands(self) -> list[list[str]]:
        return [json.loads(line) for line in self.calls.read_text().splitlines()]


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_the_script_parses() -> None:
    for checker in (["bash", "-n"], ["shellcheck"]):
        if shutil.which(checker[0]) is not None:
            done = subprocess.run([*checker, str(SCRIPT)], capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr


# What pytest is asked for must find tests as it would on a machine that has a GPU.
COLLECT = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["--collect-only", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def check_pytest(arguments: list[str]) -> None:
    """Collect with the arguments of a stage; those that need a cache of failures are left out."""
    cache = arguments.index("-o")
    kept = [*arguments[:cache], *arguments[cache + 2 :]]
    if "--last-failed" in kept:
        at = kept.index("--last-failed")
        assert kept[at + 1 : at + 3] == ["--last-failed-no-failures", "none"]
        kept = [*kept[:at], *kept[at + 3 :]]
    paths = [argument for argument in kept if argument.startswith("tests/")]
    assert paths and all((ROOT / path).exists() for path in paths)
    done = subprocess.run(
        [sys.executable, "-c", COLLECT, *kept], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    collected = done.stdout.splitlines()
    for path in paths:
        assert any(line.startswith(path) for line in collected), f"nothing of {path} was collected"


def check_make(arguments: list[str]) -> None:
    done = subprocess.run(
        ["make", "--dry-run", *arguments],
        cwd=ROOT,
        env={**os.environ, "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_names_only_what_exists(runner: Runner, stage: str) -> None:
    done = runner.run(stage)
    assert done.returncode == 0, done.stdout + done.stderr
    commands = runner.commands()
    assert commands
    for program, *arguments in commands:
        if program == "make":
            check_make(arguments)
        elif arguments[:2] == ["-m", "pytest"]:
            check_pytest(arguments[2:])
        else:
            option, module, *rest = arguments
            assert option == "-m" and importlib.util.find_spec(module) is not None
            if module.startswith("bench."):
                assert rest == [str(runner.results)]
                assert callable(importlib.import_module(module).main)


def test_stages_lead_from_one_to_the_next_and_say_what_they_found(runner: Runner) -> None:
    for stage, following in zip(STAGES, [*STAGES[1:], None], strict=True):
        said = runner.run(stage).stdout
        assert f"== {stage}: passed after" in said
        last = said.splitlines()[-1]
        assert last.endswith(f"first_half_hour.sh {following}") or following is None
        assert following is not None or last.startswith("== that was the last stage")
        found = said[said.index(f"== {stage}: passed") :]
        assert "FAILED tests/gpu/test_x.py::test_y\n1 failed, 2 passed in 0.1s" in found
        assert (runner.results / f"first-half-hour-{stage}.log").stat().st_size > 0


def test_a_stage_that_fails_ends_with_its_code_and_says_how_to_go_on(runner: Runner) -> None:
    done = runner.run("smoke", FAILING="info", CODE="3")
    assert done.returncode == 3 and len(runner.commands()) == 1
    assert "== smoke: failed with exit code 3" in done.stdout
    assert "first_half_hour.sh smoke again, or go on with" in done.stdout
    done = runner.run("kernels", FAILING="test_kernels", CODE="1")
    assert done.returncode == 1 and len(runner.commands()) == 2
    assert "first_half_hour.sh graphs, and mend what failed before" in done.stdout


@pytest.mark.parametrize(("code", "passes"), [("5", True), ("1", False)])
def test_a_retry_without_failures_passes(runner: Runner, code: str, passes: bool) -> None:
    assert (runner.run("retry", FAILING="last-failed", CODE=code).returncode == 0) == passes


@pytest.mark.parametrize("arguments", [(), ("",), ("smok",), ("smoke kernels",)])
def test_an_unknown_stage_runs_nothing_and_the_stages_are_named(
    runner: Runner, arguments: tuple[str, ...]
) -> None:
    done = runner.run(*arguments)
    assert done.returncode == 2 and runner.commands() == []
    assert all(stage in done.stderr for stage in STAGES)
