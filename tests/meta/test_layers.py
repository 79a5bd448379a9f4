"""The layers of the package: which module may import which, and one stem for each op."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import tq_fast

ROOT = Path(tq_fast.__file__).parent
REPOSITORY = ROOT.parent

# The floors of the house from the ground up: a module imports from floors below its own, or from
# its own folder. docs/develop/architecture.md says what lives where.
FLOORS = (
    {"_version", "errors"},
    {"config", "copies", "env", "kernels"},
    {"_native", "device_times", "prompts"},
    {"ops", "results", "servers", "values"},
    {"forest"},
    {"rollouts"},
    {"rewards"},
    {"models"},
    {"engines"},
    {"streaming", "transfer"},
    {"session"},
    {"decoder"},
    {"presets"},
    {"generation"},
    {"__init__"},
    {"jobs"},
    {"lm_eval", "ray"},
    {"evaluation"},
    {"cli"},
    {"__main__"},
)
RANKS = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
OPS = (
    "topk_logprobs",
    "sample_tokens",
    "value_sample_tokens",
    "advance_rollouts",
    "few_rows_linear",
    "project_qkv",
    "finish_decoder_layer",
    "trajectory_log_ratio",
    "linear_trajectory_logprob",
    "reweight_sample",
    "shared_prefix_attention",
    "merge_attention_states",
)
SOURCES = sorted(ROOT.rglob("*.py"))


def _unit(path: Path) -> str:
    """Return the file or folder directly below the package to which `path` belongs."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def _imported_units(path: Path) -> set[str]:
    """Return the units of the package that `path` imports, type-only imports included."""
    package = ("tq_fast", *path.relative_to(ROOT).parent.parts)
    units: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join([*base, *([node.module] if node.module else [])])
            targets = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            parts = target.split(".")
            if parts[0] == "tq_fast":
                units.add(parts[1] if len(parts) > 1 and parts[1] in RANKS else "__init__")
    return units


def _wrong_arrows(path: Path, imported: set[str]) -> list[str]:
    """Return a sentence for every import of `path` that does not go down."""
    unit, name = _unit(path), path.relative_to(ROOT)
    return [
        f"{name} imports tq_fast.{other}: an arrow up, from floor {RANKS[unit]} ({unit}) to floor "
        f"{RANKS[other]} ({other})"
        for other in sorted(imported - {unit})
        if RANKS[other] >= RANKS[unit]
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_module_imports_only_from_floors_below(path: Path) -> None:
    unit = _unit(path)
    assert unit in RANKS, f"{path.relative_to(ROOT)}: {unit} has no floor yet: give it one"
    assert _wrong_arrows(path, _imported_units(path)) == []


def test_a_wrong_arrow_is_named() -> None:
    (sentence,) = _wrong_arrows(ROOT / "transfer" / "step.py", {"ops", "session", "transfer"})
    assert sentence.startswith(
        "transfer/step.py imports tq_fast.session: an arrow up, from floor 9"
    )


def test_every_room_of_the_house_stands_in_its_picture() -> None:
    picture = (REPOSITORY / "docs" / "develop" / "architecture.md").read_text(encoding="utf-8")
    for room, floor in RANKS.items():
        (row,) = [line for line in picture.splitlines() if line.startswith(f"| {floor} |")]
        assert f"`{room}.py`" in row or f"`{room}/`" in row, f"floor {floor} lacks {room}"


def test_no_function_is_longer_than_eighty_lines() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{path.relative_to(ROOT)}: {node.name} has {length} lines"


def test_the_check_of_imports_sees_both_kinds_of_import(tmp_path: Path) -> None:
    source = ROOT / "transfer" / "roles.py"
    units = _imported_units(source)
    assert {"prompts", "config", "forest"} <= units
    assert "decoder" not in units


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_one_file_and_one_reference(op: str) -> None:
    assert (ROOT / "ops" / f"{op}.py").is_file()
    public = op + "_" if op == "advance_rollouts" else op
    assert callable(getattr(tq_fast.ops, public))
    assert callable(getattr(tq_fast.ops, f"{public.removesuffix('_')}_ref"))
    assert (REPOSITORY / "tests" / "ops" / f"test_{op}.py").is_file()


def test_kernels_are_named_after_their_op() -> None:
    stems = {path.stem for path in (ROOT / "kernels").glob("*.py")} - {"__init__"}
    for folder in ("cpu", "cuda"):
        for path in (REPOSITORY / "csrc" / folder).rglob("*.c*"):
            if "_LIBRARY_IMPL" in path.read_text():
                stems.add(path.stem)
    # run_decoder_layers is several ops in a row, for the forest alone.
    stems = {stem for stem in stems if not stem.startswith(("_", "isa", "run_decoder_layers"))}
    assert stems <= set(OPS), f"not named after an op: {stems - set(OPS)}"


def test_public_names() -> None:
    assert set(tq_fast.__all__) >= {
        "decode",
        "TransferDecoder",
        "DecodeConfig",
        "DecodeResult",
        "ops",
        "presets",
        "__version__",
    }
    for name in tq_fast.__all__:
        assert getattr(tq_fast, name) is not None


def test_the_package_reads_two_environment_variables_and_in_one_place() -> None:
    named = {
        path.name: set(re.findall(r"[\"'](TQ_FAST_[A-Z_]+)[\"']", path.read_text()))
        for path in SOURCES
        if "os.environ" in path.read_text()
    }
    assert named["env.py"] == {"TQ_FAST_BUILD", "TQ_FAST_BACKEND"}
    assert not any(names for name, names in named.items() if name != "env.py")


def test_nothing_prints_but_the_commands() -> None:
    for path in SOURCES:
        if _unit(path) == "cli":
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            is_print = isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
            assert not is_print, f"{path}:{node.lineno} prints"
