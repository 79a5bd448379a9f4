"""The CUDA sources compile for every target without a GPU, and nothing spills."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("sm_80", "sm_90a", "sm_100")


def find_cmake() -> str:
    beside_python = Path(sys.executable).parent / "cmake"
    return str(beside_python) if beside_python.exists() else shutil.which("cmake") or "cmake"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no CUDA compiler on this machine")
def test_every_kernel_compiles_for_every_target_without_a_spill(tmp_path):
    cmake = find_cmake()
    configure = [cmake, "-S", str(ROOT), "-B", str(tmp_path), "-DTQ_FAST_CUDA=ON"]
    subprocess.run([*configure, f"-DPython3_EXECUTABLE={sys.executable}"], check=True)
    build = subprocess.run(
        [cmake, "--build", str(tmp_path), "--target", "tq_fast_cuda"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert build.returncode == 0, build.stdout
    for target in TARGETS:
        assert f"for '{target}'" in build.stdout
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", build.stdout)
    assert spills and set(spills) == {"0"}
    assert (tmp_path / "_tq_fast_cuda.so").is_file()
