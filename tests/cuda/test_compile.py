"""The CUDA sources compile without a GPU, and no kernel spills registers.

Each file is compiled here for the targets below, together under 90 seconds of one core; between
them the files cover every target. `make gpu-compile` builds the whole library for all of them.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
EVERY_TARGET = ("sm_80", "sm_90a", "sm_100")
# sample_tokens and advance_rollouts share their kernel, so a target of each covers two targets.
TARGETS = {
    "advance_rollouts": ("sm_80",),
    "sample_tokens": ("sm_90a",),
    "topk_logprobs": ("sm_100",),
}
SOURCES = sorted(path.stem for path in (ROOT / "csrc" / "cuda").glob("*.cu"))

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="no CUDA compiler (nvcc) on this machine"
)


def find_cmake() -> str:
    beside_python = Path(sys.executable).parent / "cmake"
    return str(beside_python) if beside_python.exists() else shutil.which("cmake") or "cmake"


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """CMake's own command line for each CUDA source, by stem, for sm_90a."""
    folder = tmp_path_factory.mktemp("cuda")
    configure = [find_cmake(), "-S", str(ROOT), "-B", str(folder), "-DTQ_FAST_CUDA=ON"]
    architecture = "-DCMAKE_CUDA_ARCHITECTURES=90a-real"
    subprocess.run([*configure, architecture, f"-DPython3_EXECUTABLE={sys.executable}"], check=True)
    entries = json.loads((folder / "compile_commands.json").read_text())
    return {Path(e["file"]).stem: e for e in entries if e["file"].endswith(".cu")}


def test_every_source_is_in_the_one_list(commands):
    assert sorted(commands) == SOURCES


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("source", "target"),
    [(source, target) for source in SOURCES for target in TARGETS.get(source, EVERY_TARGET)],
)
def test_kernels_compile_without_a_spill(commands, source, target):
    entry = commands[source]
    architecture = target.replace("sm_", "compute_")
    command, replaced = re.subn(
        r"arch=compute_90a,code=\[?sm_90a\]?",
        f"arch={architecture},code={target}",
        entry["command"],
    )
    assert replaced == 1, command
    (Path(entry["directory"]) / entry["output"]).parent.mkdir(parents=True, exist_ok=True)
    run = subprocess.run(
        command, shell=True, cwd=entry["directory"], capture_output=True, text=True
    )
    report = run.stdout + run.stderr
    assert run.returncode == 0, report
    assert f"for '{target}'" in report
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", report)
    assert spills and set(spills) == {"0"}, report
