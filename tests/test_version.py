"""Two commits have two versions, in a checkout and in what is built from it."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import tq_fast
from tq_fast import _version
from tq_fast._version import NEXT_RELEASE, describe_checkout

ROOT = Path(__file__).resolve().parents[1]
BUILT_FROM = ("setup.py", "pyproject.toml", "README.md", "LICENSE", ".git_archival.txt")


class Checkout:
    """A git repository with the files that a version comes from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "tq_fast").mkdir(parents=True)
        for name in (*BUILT_FROM, ".gitattributes", "tq_fast/_version.py"):
            shutil.copy(ROOT / name, folder / name)
        self.git("init", "--quiet")
        self.commit()

    def git(self, *arguments: str) -> bytes:
        names = ("-c", "user.name=n", "-c", "user.email=e")
        command = ["git", *names, *arguments]
        return subprocess.run(command, cwd=self.folder, check=True, capture_output=True).stdout

    def commit(self) -> None:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--message", "m")

    @property
    def commit_name(self) -> str:
        return self.git("rev-parse", "--short=9", "HEAD").decode().strip()

    def version(self) -> str | None:
        """The version that the package says, which must be that of a build."""
        version = describe_checkout(self.folder)
        assert version == built_version(self.folder)
        return version

    def archive(self, folder: Path) -> Path:
        with tarfile.open(fileobj=io.BytesIO(self.git("archive", "HEAD"))) as opened:
            opened.extractall(folder, filter="data")
        return folder


def built_version(folder: Path) -> str:
    command = [sys.executable, "setup.py", "--quiet", "--version"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()[-1]


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path / "checkout")


def test_a_clone_without_tags_names_the_next_release_and_the_commit(checkout: Checkout) -> None:
    assert checkout.version() == f"{NEXT_RELEASE}.dev1+g{checkout.commit_name}"
    checkout.commit()
    assert checkout.version() == f"{NEXT_RELEASE}.dev2+g{checkout.commit_name}"


def test_changed_files_are_said(checkout: Checkout) -> None:
    (checkout.folder / "README.md").write_text("other")
    assert checkout.version() == f"{NEXT_RELEASE}.dev1+g{checkout.commit_name}.dirty"


def test_a_tagged_commit_is_the_release_and_the_next_one_is_not(checkout: Checkout) -> None:
    checkout.git("tag", "v0.1.7")
    assert checkout.version() == "0.1.7"
    checkout.commit()
    assert checkout.version() == f"{NEXT_RELEASE}.dev1+g{checkout.commit_name}"


def test_other_tags_are_no_releases(checkout: Checkout) -> None:
    checkout.git("tag", "nightly-3")
    assert checkout.version() == f"{NEXT_RELEASE}.dev1+g{checkout.commit_name}"


def test_a_hook_of_another_repository_changes_nothing(
    checkout: Checkout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = describe_checkout(checkout.folder)
    other = Checkout(tmp_path / "other")
    other.git("tag", "v9.9.9")
    monkeypatch.setenv("GIT_DIR", str(other.folder / ".git"))
    assert describe_checkout(checkout.folder) == before


def test_a_shallow_clone_names_its_commit(checkout: Checkout, tmp_path: Path) -> None:
    checkout.commit()
    url = checkout.folder.as_uri()
    checkout.git("clone", "--quiet", "--depth", "1", url, str(tmp_path / "shallow"))
    version = describe_checkout(tmp_path / "shallow")
    assert version == built_version(tmp_path / "shallow")
    assert version == f"{NEXT_RELEASE}.dev1+g{checkout.commit_name}"


def test_an_archive_is_built_as_its_tag_or_its_commit(checkout: Checkout, tmp_path: Path) -> None:
    archive = checkout.archive(tmp_path / "untagged")
    assert built_version(archive) == f"{NEXT_RELEASE}.dev0+g{checkout.commit_name}"
    checkout.git("tag", "v0.1.7")
    assert built_version(checkout.archive(tmp_path / "tagged")) == "0.1.7"
    checkout.commit()
    after = built_version(checkout.archive(tmp_path / "after"))
    assert after == f"{NEXT_RELEASE}.dev1+g{checkout.commit_name}"


def test_a_copy_that_nothing_describes_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_version, "_ROOT", tmp_path)
    assert _version.read_version.__wrapped__() == f"{NEXT_RELEASE}.dev0+unknown"
    # A folder that git does not take for a repository is described by nothing either.
    (tmp_path / ".git").write_text("gitdir: nowhere")
    assert _version.read_version.__wrapped__() == f"{NEXT_RELEASE}.dev0+unknown"


def test_an_installed_copy_has_the_version_that_lies_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another installation, earlier on the path, does not speak for it."""
    information = tmp_path / "tq_fast-0.1.3.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: tq-fast\nVersion: 0.1.3\n")
    monkeypatch.setattr(_version, "_ROOT", tmp_path)
    assert _version.read_version.__wrapped__() == "0.1.3"


def test_importing_the_package_asks_git_nothing() -> None:
    asked = (
        "import tq_fast.cli.app; from tq_fast import _version; "
        "print(_version.read_version.cache_info().misses)"
    )
    done = subprocess.run(
        [sys.executable, "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "0"
    assert tq_fast.__version__ == _version.read_version()


def test_the_changelog_begins_with_the_next_release() -> None:
    lines = (ROOT / "CHANGELOG.md").read_text().splitlines()
    first = next(line for line in lines if line.startswith("## "))
    assert first.startswith(f"## {NEXT_RELEASE} ")
