"""The version, which tells two commits apart; it is looked up at first use, not at import.

An installed package says what it was built as. In a git checkout the commit can change after an
editable install, so that git is asked there; `setup.py` lets setuptools-scm name builds alike.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

# The release that the commits after the last one lead to.
NEXT_RELEASE = "0.2.0"
_NAMED_BY_HOOKS = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_COMMON_DIR")
_ROOT = Path(__file__).resolve().parents[1]
# What `git describe --long` answers: the last tag where there is one, and commits since it.
_DESCRIBED = re.compile(
    r"(?:v(?P<tag>.+)-(?P<distance>\d+)-g)?(?P<node>[0-9a-f]+)(?P<dirty>-dirty)?"
)


@functools.cache
def read_version() -> str:
    """Return the version of this copy of the package, as PEP 440 has it.

    It is "0.2.0" at the tag v0.2.0, else for example "0.2.0.dev37+g1a2b3c4d5": 37 commits after the
    last tag, or in all without one; ".dirty" follows where files differ from that commit. A copy
    that neither git nor an installation describes is "0.2.0.dev0+unknown".
    """
    # Imported late, because importing the package should take no time.
    import importlib.metadata

    version = None
    if (_ROOT / ".git").exists():
        version = describe_checkout(_ROOT)
    else:
        for installed in importlib.metadata.distributions(name="tq-fast", path=[str(_ROOT)]):
            version = installed.version
    return version or f"{NEXT_RELEASE}.dev0+unknown"


def describe_checkout(root: Path) -> str | None:
    """Return the version of the checkout in `root`, or None where git cannot tell it."""
    described = _ask_git(
        root,
        *("describe", "--tags", "--long", "--always", "--abbrev=9", "--dirty"),
        *("--match", "v[0-9]*"),
    )
    found = _DESCRIBED.fullmatch(described or "")
    if found is None:
        return None
    dirty = ".dirty" if found["dirty"] else ""
    if found["tag"] and found["distance"] == "0" and not dirty:
        return found["tag"]
    distance = found["distance"] or _ask_git(root, "rev-list", "--count", "HEAD")
    return f"{NEXT_RELEASE}.dev{distance}+g{found['node']}{dirty}"


def _ask_git(root: Path, *arguments: str) -> str | None:
    """Return what git answers; None where it is not installed or refuses this folder."""
    command = ["git", "--no-optional-locks", "-C", str(root), *arguments]
    # A hook of git runs under names that point to its own repository.
    env = {name: value for name, value in os.environ.items() if name not in _NAMED_BY_HOOKS}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
