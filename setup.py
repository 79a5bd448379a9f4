"""Thin entry of the build: runs CMake, whose CMakeLists.txt is the one list of sources and flags.

TQ_FAST_BUILD chooses what is built:
  auto  (default) the CPU library, and the CUDA one where torch is a CUDA build and nvcc is found;
        without torch's headers, CMake or a compiler the package installs as pure Python and says so
  none  nothing: pure Python
  cpu   the CPU library; anything missing is an error
  cuda  the CPU and the CUDA libraries, a GPU or a CUDA build of torch not needed

The libraries reach torch through its stable ABI and Python not at all, so that one wheel serves
every version of Python. tq_fast._common, which the tests use, is built only in place
(`pip install -e .`).
"""

from __future__ import annotations

import os
import runpy
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools_scm import get_version

ROOT = Path(__file__).resolve().parent
BUILD_FOLDER = ROOT / "build" / "native"
NEXT_RELEASE = runpy.run_path(str(ROOT / "tq_fast" / "_version.py"))["NEXT_RELEASE"]
BUILD_CHOICES = ("auto", "none", "cpu", "cuda")
# An isolated build hides the environment's packages behind PYTHONPATH; -I looks past it, at the
# torch that the package will run with. The build needs only its headers (stable ABI).
FIND_TORCH = (
    "import importlib.util as u; s = u.find_spec('torch'); "
    "print(s.submodule_search_locations[0] if s else '')"
)


def read_build_choice() -> str:
    choice = os.environ.get("TQ_FAST_BUILD", "auto").lower()
    if choice not in BUILD_CHOICES:
        raise SystemExit(f"TQ_FAST_BUILD is {choice!r}; expected one of {', '.join(BUILD_CHOICES)}")
    return choice


def find_torch() -> Path:
    for flags in ([], ["-I"]):
        found = subprocess.run(
            [sys.executable, *flags, "-c", FIND_TORCH], capture_output=True, text=True, cwd="/"
        ).stdout.strip()
        if found:
            return Path(found)
    raise FileNotFoundError(
        "torch is not installed in this environment, and its headers are needed: "
        "install torch first, then this package again"
    )


def search_path() -> str:
    """Return PATH with the environment's scripts first, since pip activates no environment."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])


def run_cmake(*arguments: str) -> None:
    cmake = shutil.which("cmake", path=search_path())
    if cmake is None:
        raise FileNotFoundError("cmake was not found")
    subprocess.run([cmake, *arguments], check=True, env={**os.environ, "PATH": search_path()})


class BuildNative(build_ext):
    """The command that builds the libraries and installs them beside the Python files."""

    def run(self) -> None:
        choice = read_build_choice()
        if not (ROOT / "CMakeLists.txt").is_file():
            raise SystemExit(
                f"{ROOT} has no CMakeLists.txt: this is no whole source tree of tq-fast, and the "
                "native code cannot be built from it. TQ_FAST_BUILD=none installs pure Python"
            )
        try:
            self.configure(choice)
        except (OSError, subprocess.CalledProcessError) as error:
            if choice != "auto":
                raise
            self.warn(
                f"no native library was built ({error}); tq-fast works on its PyTorch "
                "references, slower. `tq-fast info` says what is missing."
            )
            return
        jobs = os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL") or str(os.cpu_count() or 1)
        run_cmake("--build", str(BUILD_FOLDER), "--parallel", jobs)
        prefix = ROOT if self.is_in_source() else Path(self.build_lib).resolve()
        run_cmake("--install", str(BUILD_FOLDER), "--prefix", str(prefix))

    def is_in_source(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def configure(self, choice: str) -> None:
        has_ninja = shutil.which("ninja", path=search_path()) is not None
        # --fresh drops the cache of an earlier isolated build, which names tools that are gone.
        run_cmake(
            "--fresh",
            *("-S", str(ROOT), "-B", str(BUILD_FOLDER)),
            *(("-G", "Ninja") if has_ninja else ()),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython3_EXECUTABLE={sys.executable}",
            f"-DTQ_FAST_TORCH_ROOT={find_torch()}",
            f"-DTQ_FAST_CUDA={ {'auto': 'AUTO', 'cpu': 'OFF', 'cuda': 'ON'}[choice] }",
            f"-DTQ_FAST_COMMON={'ON' if self.is_in_source() else 'OFF'}",
        )

    def get_outputs(self) -> list[str]:
        return []

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class AnyPythonWheel(bdist_wheel):
    """The command that makes the wheel, which depends on the platform but not on CPython's ABI."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


def is_release(at: Any) -> bool:
    """Whether setuptools-scm found a tag on this commit; an archive without one says 0.0."""
    return at.exact and str(at.tag) != "0.0"


def name_version(at: Any) -> str:
    return str(at.tag) if is_release(at) else f"{NEXT_RELEASE}.dev{at.distance}"


def name_commit(at: Any) -> str:
    if is_release(at) or at.node is None:
        return ""
    return f"+g{at.node.removeprefix('g')[:9]}" + (".dirty" if at.dirty else "")


# The extension has no sources: it makes setuptools run BuildNative and tag the wheel binary.
extensions = [] if read_build_choice() == "none" else [Extension("tq_fast._cpu", sources=[])]

setup(
    # Builds are named as tq_fast._version names a checkout. A tree without git has its version in
    # PKG-INFO, or its commit in .git_archival.txt.
    version=get_version(
        str(ROOT),
        version_scheme=name_version,
        local_scheme=name_commit,
        git_describe_command="git describe --tags --long --abbrev=40 --dirty --match v[0-9]*",
        fallback_version=f"{NEXT_RELEASE}.dev0",
    ),
    ext_modules=extensions,
    cmdclass={"bdist_wheel": AnyPythonWheel, "build_ext": BuildNative},
)
