"""Roll-outs as CUDA graphs on the device: the same tokens, and nothing waits between depths."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from tests import zoo
from tests.test_speed_options import ENDS, assert_same, language_model, run
from tq_fast.config import SpeedOptions
from tq_fast.errors import UnsupportedModel
from tq_fast.forest.support import check_runs
from tq_fast.rollouts.graphs import RolloutGraphs

PLAIN = SpeedOptions(graph_rollouts=False)

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")


@pytest.mark.parametrize("architecture", sorted(zoo.LANGUAGE_MODELS))
@pytest.mark.parametrize("horizon", [5, None])
@pytest.mark.parametrize("ends", [ENDS, ()])
@pytest.mark.parametrize("rollout", [{"rollout": "greedy"}, {"num_rollouts": 4}])
def test_graphs_give_the_tokens_of_separate_launches(
    architecture: str, horizon: int | None, ends: tuple[int, ...], rollout: dict[str, Any]
) -> None:
    baseline = language_model(architecture).cuda()
    if architecture == "opt":
        try:
            check_runs(baseline)
        except UnsupportedModel as refusal:
            # transformers 5.17 hands OPT a padding mask of its own making. Any other architecture
            # that is refused is a failure.
            pytest.skip(str(refusal))
    options = {"horizon": horizon, "eos_token_id": ends, **rollout}
    with warnings.catch_warnings():
        # Falling back to separate launches would make this test compare them with themselves.
        warnings.filterwarnings("error", message=".*in a CUDA graph")
        ours = run(baseline, SpeedOptions(), **options)
    assert_same(ours, run(baseline, PLAIN, **options))


def test_rows_gather_in_smaller_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = []
    gather = RolloutGraphs._gather_running

    def note(graphs: RolloutGraphs, num_rows: int, smaller: int, depth: int) -> None:
        gathered.append(smaller)
        gather(graphs, num_rows, smaller, depth)

    monkeypatch.setattr(RolloutGraphs, "_gather_running", note)
    baseline = language_model().cuda()
    options = {"num_rollouts": 8, "horizon": None, "max_new_tokens": 40}
    ours = run(baseline, SpeedOptions(), **options)
    assert gathered
    assert_same(ours, run(baseline, PLAIN, **options))


def test_the_host_waits_for_nothing_between_depths(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = RolloutGraphs._replay
    depths = []

    def watched(graphs: RolloutGraphs, *args: Any) -> None:
        torch.cuda.set_sync_debug_mode("error")
        replay(graphs, *args)
        torch.cuda.set_sync_debug_mode("default")
        depths.append(args[-1])

    monkeypatch.setattr(RolloutGraphs, "_replay", watched)
    run(language_model().cuda(), SpeedOptions(), num_rollouts=4)
    assert len(depths) > 10
