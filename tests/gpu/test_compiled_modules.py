"""Compiled norms, MLPs and rotary embeddings on the device, inside and outside of CUDA graphs."""

from __future__ import annotations

import warnings

import pytest
import torch

from tests import zoo
from tests.test_speed_options import assert_same, language_model, run
from tq_fast.config import SpeedOptions
from tq_fast.forest.language import LanguageForest

pytestmark = pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")


@pytest.mark.parametrize("architecture", ["llama", "gemma3", "phi3"])
@pytest.mark.parametrize("has_graphs", [True, False])
def test_compiled_modules_give_the_tokens_of_plain_ones(
    architecture: str, has_graphs: bool
) -> None:
    baseline = language_model(architecture).cuda()
    options = {"num_rollouts": 4, "horizon": 5}
    with warnings.catch_warnings():
        # Modules that stay plain, or passes without graphs, would be compared with themselves.
        warnings.filterwarnings("error", message=".*(run compiled|run as they are|in a CUDA graph)")
        speed = SpeedOptions(graph_rollouts=has_graphs, compiled_modules=True)
        ours = run(baseline, speed, **options)
    assert_same(ours, run(baseline, SpeedOptions(), **options))


@torch.no_grad()
def test_bf16_is_rounded_where_the_modules_round() -> None:
    model = zoo.language_model("llama", dtype=torch.bfloat16).cuda()
    logits = []
    for is_compiled in (False, True):
        forest = LanguageForest(
            model,
            num_trees=1,
            num_rows=1,
            prefix_capacity=8,
            branch_capacity=1,
            backend=None,
            compiled_modules=is_compiled,
        )
        forest.prefill(0, list(range(8)))
        logits.append(forest.next_logits.float())
    # Logits reach 15, and a sum may be added up in another order: a few units in the last place.
    torch.testing.assert_close(*logits, rtol=0, atol=0.25)
