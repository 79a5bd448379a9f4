"""What the tests of the commands share."""

from __future__ import annotations

import pytest

from tests.commands.trio import Trio, save_trio


@pytest.fixture(scope="session")
def trio(tmp_path_factory: pytest.TempPathFactory) -> Trio:
    """Folders of tiny random models, made once."""
    return save_trio(tmp_path_factory.mktemp("models"))
