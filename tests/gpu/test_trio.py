"""Whole decodes on the device: a causal reward beside baseline and sft, in fp32 and in bf16.

In fp32 the tokens are those of the CPU. In bf16 a near tie falls either way, and a roll-out that
has parted has another reward: most values of the first step are those of fp32, up to rounding.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tq_fast
from tests.test_other_device import DECODES, PRESETS, SHORT, models, random_head, run_preset
from tests.test_speed_options import PROMPTS
from tq_fast.config import SpeedOptions

pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha"),
    pytest.mark.filterwarnings("ignore:the weights of indirect transfer"),
    # Neither launches in place of graphs nor references in place of kernels pass unseen.
    pytest.mark.filterwarnings("error:.*cannot be captured"),
    pytest.mark.filterwarnings("error:.*runs on the PyTorch reference for CUDA tensors"),
]

SPEEDS = {"graphs": SpeedOptions(), "launches": SpeedOptions(graph_rollouts=False)}
TRIO = ("baseline", "sft", "reward")
# The weights of indirect transfer are densities, so its roll-outs are drawn.
TRANSFERS: dict[str, dict[str, Any]] = {
    "direct": {"transfer": "direct"},
    "direct, greedy": {"transfer": "direct", "rollout": "greedy", "num_rollouts": 1},
    "indirect": {"transfer": "indirect", "beta": 1.0},
}
# Fp32 sums in another order, over the layers of a small model, in rewards of order 1.
FP32_ABS = 1e-4
# bf16 has three digits. On the CPU the median difference is 0.01, in values whose spread is 1, and
# seven of ten values or more are this close; of values that have nothing to do with each other it
# would be one of thirty.
BF16_ABS, BF16_SHARE = 0.05, 0.5


def on_device(made: dict[str, Any]) -> dict[str, Any]:
    return {name: model.cuda() for name, model in made.items()}


def in_dtype(made: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return the models with weights that bf16 can hold, computing in `dtype`."""
    return {name: model.to(torch.bfloat16).to(dtype) for name, model in made.items()}


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("name", DECODES)
def test_fp32_gives_the_tokens_of_the_cpu(name: str, speed: str) -> None:
    names, given = DECODES[name]
    options = {**SHORT, **given, "speed": SPEEDS[speed]}
    there = tq_fast.decode(PROMPTS, **on_device(models(*names)), **options)
    here = tq_fast.decode(PROMPTS, **models(*names), **options)
    assert [ids.tolist() for ids in there.sequences] == [ids.tolist() for ids in here.sequences]
    for trace, other in zip(there.traces, here.traces, strict=True):
        for step, truth in zip(trace, other, strict=True):
            assert step.candidates.tolist() == truth.candidates.tolist()
            torch.testing.assert_close(
                step.q, truth.q, rtol=1e-5, atol=FP32_ABS, equal_nan=True, check_device=False
            )


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_in_fp32_gives_the_tokens_of_the_cpu(name: str, speed: str) -> None:
    names, options = PRESETS[name]
    options = {"max_new_tokens": 6, "eos_token_id": (0, 11), "head": random_head(), **options}
    options["speed"] = SPEEDS[speed]
    there = run_preset(name, PROMPTS[:3], **on_device(models(*names)), **options)
    here = run_preset(name, PROMPTS[:3], **models(*names), **options)
    assert [ids.tolist() for ids in there.sequences] == [ids.tolist() for ids in here.sequences]


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("horizon", [1, 4])
@pytest.mark.parametrize("name", TRANSFERS)
def test_bf16_gives_the_values_of_fp32_up_to_rounding(name: str, horizon: int, speed: str) -> None:
    options = {"k": 10, "horizon": horizon, "max_new_tokens": 3, "eos_token_id": (0, 11)}
    options |= {"alpha": 0.3, "num_rollouts": 3, "speed": SPEEDS[speed], **TRANSFERS[name]}
    rounded = on_device(in_dtype(models(*TRIO), torch.bfloat16))
    there = tq_fast.decode(PROMPTS, **rounded, **options)
    here = tq_fast.decode(PROMPTS, **in_dtype(models(*TRIO), torch.float32), **options)
    differences = []
    for trace, other in zip(there.traces, here.traces, strict=True):
        # Later steps go on from tokens that rounding may have changed.
        step, truth = trace[0], other[0]
        values = dict(zip(truth.candidates.tolist(), truth.q.tolist(), strict=True))
        got = dict(zip(step.candidates.tolist(), step.q.tolist(), strict=True))
        shared = got.keys() & values.keys()
        assert len(shared) >= len(values) - 2
        differences += [abs(got[token] - values[token]) for token in shared]
        assert all(row.q.isfinite().all() for row in trace)
    close = sum(difference <= BF16_ABS for difference in differences)
    assert close >= BF16_SHARE * len(differences), sorted(differences)
