"""The source distribution: whole, or refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution."""
    folder = tmp_path_factory.mktemp("sdist")
    command = ["setup.py", "-q", "egg_info", "--egg-base", str(folder), "sdist", "-d", str(folder)]
    subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        opened.extractall(folder, filter="data")
    (unpacked,) = (path for path in folder.glob("tq_fast-*") if path.is_dir())
    return unpacked


def test_it_holds_every_file_that_the_package_is_made_of(source: Path) -> None:
    wanted = {"CMakeLists.txt", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    for folder in ("csrc", "tq_fast"):
        files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
        wanted |= {
            str(path.relative_to(ROOT))
            for path in files
            if path.suffix not in (".so", ".pyc") and "__pycache__" not in path.parts
        }
    missing = {name for name in wanted if not (source / name).is_file()}
    assert not missing
    assert not list(source.rglob("*.so"))


def test_it_holds_nothing_that_a_build_does_not_need(source: Path) -> None:
    """The list is the same whether git is there or not, which setuptools-scm would ask."""
    # Some releases of setuptools put the folder egg-info beside them.
    made = {"PKG-INFO", "setup.cfg"}
    wanted = {
        "CHANGELOG.md",
        "CITATION.cff",
        "CMakeLists.txt",
        "LICENSE",
        "MANIFEST.in",
        "README.md",
    }
    wanted |= {"constraints.txt", "csrc", "pyproject.toml", "setup.py", "tq_fast"}
    held = {path.name for path in source.iterdir()} - {"tq_fast.egg-info"}
    assert held == made | wanted


def test_a_tree_without_its_build_file_is_refused_and_not_built_as_pure_python(
    source: Path, tmp_path: Path
) -> None:
    tree = tmp_path / "tree"
    shutil.copytree(source, tree)
    (tree / "CMakeLists.txt").unlink()
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext"],
        cwd=tree,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "has no CMakeLists.txt" in done.stdout + done.stderr
