"""Fixtures that the tests of the commands share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.decode_job import Job
from tests.cli.trio import Trio, save_trio


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Folders of tiny random models, made once."""
    return save_trio(tmp_path_factory.mktemp("models"))


@pytest.fixture
def job(tmp_path: Path, trio: Trio) -> Job:
    return Job(tmp_path, trio)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory, trio: Trio) -> Job:
    """A job that nothing disturbed."""
    job = Job(tmp_path_factory.mktemp("whole"), trio)
    assert job.run(traces=True) == 0
    return job
