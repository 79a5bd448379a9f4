"""`tq-fast eval --ray`: the records of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cli.test_evaluate import CONFIG, Results
from tq_fast.ray.cluster import Cluster

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(240)]

SHORT = CONFIG[: CONFIG.index("[[setup]]")] + (
    '[[setup]]\nname = "one"\nmethod = [{ method = "transfer_q" }, { method = "baseline" }]\n'
)


def test_an_evaluation_in_workers_of_ray_has_the_records_of_one_process(
    ray_here: Any, tmp_path: Path
) -> None:
    (tmp_path / "here").mkdir()
    here, there = Results(tmp_path / "here", SHORT), Results(tmp_path, SHORT)
    assert here.run() == 0
    assert there.run(workers=2, cluster=Cluster()) == 0
    assert there.responses() == here.responses()
    assert "4 responses" in there.said
