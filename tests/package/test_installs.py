"""The package installs from its source distribution and from its wheel, and runs its C++ there.

Each install goes into an environment of its own, which sees the libraries of this one but not its
tq_fast. The C++ is compiled once: pip keeps the wheel that it built from the source distribution.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# The steps of an install may compile, and then take longer than other tests.
pytestmark = pytest.mark.timeout(900)
ASK = """
import json, tq_fast
from tq_fast import _native
print(json.dumps([tq_fast.__file__, tq_fast.__version__, _native.cpu_refusal()]))
"""


def run(command: Sequence[str | Path], folder: Path) -> str:
    """Run a command outside of the checkout and return what it said; all of it where it fails."""
    hidden = ("PYTHONPATH", "PIP_CONFIG_FILE")
    env = {name: value for name, value in os.environ.items() if name not in hidden}
    env |= {"TQ_FAST_BUILD": "cpu", "HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(
        [str(word) for word in command], cwd=folder, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


class Workshop:
    """A folder with the source distribution, pip's cache, and the environments of the tests."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        build = [sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder]
        run([*build, ROOT], folder)
        (self.sdist,) = folder.glob("tq_fast-*.tar.gz")
        self.requirement = f"tq-fast @ {self.sdist.as_uri()}"
        self.pip(Path(sys.executable), "wheel", "--wheel-dir", folder, self.requirement)
        (self.wheel,) = folder.glob("tq_fast-*.whl")

    def pip(self, python: Path, command: str, *arguments: str | Path) -> None:
        options = ["--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check"]
        cache = ["--cache-dir", self.folder / "cache"]
        run([python, "-m", "pip", command, *options, *cache, *arguments], self.folder)

    def make_environment(self, name: str) -> Path:
        """Return the Python of a new environment; editable installs of this one are not in it."""
        run([sys.executable, "-m", "venv", "--without-pip", name], self.folder)
        python = self.folder / name / "bin" / "python"
        where = "import sysconfig; print(sysconfig.get_path('purelib'))"
        packages = Path(run([python, "-c", where], self.folder).strip())
        # A folder that a .pth file names is searched, but its own .pth files are not read.
        seen = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
        (packages / "libraries.pth").write_text("\n".join(seen) + "\n")
        return python


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    return Workshop(tmp_path_factory.mktemp("packages"))


@pytest.mark.parametrize("kind", ["sdist", "wheel"])
def test_an_install_in_an_empty_environment_loads_the_cpu_library(
    workshop: Workshop, kind: str
) -> None:
    python = workshop.make_environment(kind)
    what = workshop.requirement if kind == "sdist" else workshop.wheel
    workshop.pip(python, "install", what)
    file, version, refusal = json.loads(run([python, "-c", ASK], workshop.folder))
    assert Path(file).is_relative_to(workshop.folder / kind)
    assert refusal is None, "the CPU library is not loaded"
    assert workshop.sdist.name == f"tq_fast-{version}.tar.gz"
    said = run([python.with_name("tq-fast"), "--version"], workshop.folder)
    assert said == f"tq-fast {version}\n"


def test_one_wheel_serves_every_python_of_a_platform(workshop: Workshop) -> None:
    tag = workshop.wheel.stem.split("-", 2)[2]
    assert tag == f"py3-none-{sysconfig.get_platform().replace('-', '_').replace('.', '_')}"
    with zipfile.ZipFile(workshop.wheel) as wheel:
        libraries = [name for name in wheel.namelist() if name.endswith((".so", ".dylib"))]
    assert libraries == ["tq_fast/_tq_fast_cpu.so"]


@pytest.mark.skipif(platform.system() != "Linux", reason="reads an ELF file")
def test_the_library_needs_only_torch_and_what_every_linux_has(workshop: Workshop) -> None:
    with zipfile.ZipFile(workshop.wheel) as wheel:
        library = wheel.extract("tq_fast/_tq_fast_cpu.so", workshop.folder / "unpacked")
    needed = run(["readelf", "--dynamic", "--wide", library], workshop.folder)
    assert "RPATH" not in needed and "RUNPATH" not in needed
    names = set(re.findall(r"\(NEEDED\).*\[(.+)\]", needed))
    allowed = {"libtorch_cpu.so", "libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6"}
    assert {name for name in names if not name.startswith("ld-linux")} <= allowed
    assert not re.search(r"\bPy[A-Z_]\w+", run(["nm", "--dynamic", library], workshop.folder))
