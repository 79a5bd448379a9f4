"""What passes between the host and the device in a step: few copies, and fewer waits.

The device is simulated (tests/simulated_device.py); every op of the package counts as one launch,
as its kernel is.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import tq_fast
from tests.simulated_device import (
    DEVICE,
    Traffic,
    counted_traffic,
    move,
    ops_count_once,
    simulated_device,
)
from tests.test_other_device import SHORT, models
from tests.test_speed_options import PROMPTS
from tq_fast import decoder as decoder_module
from tq_fast.copies import download, upload
from tq_fast.rollouts.graphs import RolloutGraphs
from tq_fast.transfer.roles import open_roles

pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha"),
    pytest.mark.filterwarnings("ignore:the weights of indirect transfer"),
]

DIRECT: tuple[tuple[str, ...], dict[str, Any]] = (("baseline", "reward"), {})
INDIRECT: tuple[tuple[str, ...], dict[str, Any]] = (
    ("baseline", "sft", "reward"),
    {"transfer": "indirect", "beta": 1.0},
)


def traffic_of_a_step(
    monkeypatch: pytest.MonkeyPatch,
    names: tuple[str, ...],
    options: dict[str, Any],
    num_prompts: int,
) -> Traffic:
    """Decode with roll-outs at fixed addresses and return the traffic of the third step."""

    def opened(*args: Any) -> Any:
        roles = open_roles(*args)
        graphs = RolloutGraphs(roles.roller, roles.sampler, captures=False)
        return dataclasses.replace(roles, graphs=graphs)

    monkeypatch.setattr(decoder_module, "open_roles", opened)
    ops_count_once(monkeypatch)
    steps: list[Traffic] = []
    with simulated_device(), counted_traffic() as traffic:

        def on_token(idx: int) -> None:
            if idx == 0:
                steps.append(traffic.take())

        decoder = tq_fast.TransferDecoder(**{name: move(m) for name, m in models(*names).items()})
        settings = {**SHORT, "max_new_tokens": 5, "num_rollouts": 2, "eos_token_id": ()}
        decoder.decode(
            (PROMPTS * 2)[:num_prompts],
            batch_size=num_prompts,
            on_token=on_token,
            **{**settings, **options},
        )
    return steps[2]


@pytest.mark.parametrize("num_prompts", [1, 8])
@pytest.mark.parametrize(
    ("decode", "most_waits", "most_uploads"), [(DIRECT, 3, 5), (INDIRECT, 4, 8)]
)
def test_the_host_waits_for_candidates_rollouts_and_scores_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
    num_prompts: int,
    decode: tuple[tuple[str, ...], dict[str, Any]],
    most_waits: int,
    most_uploads: int,
) -> None:
    """Indirect transfer waits for the log-probs under the SFT model, too."""
    step = traffic_of_a_step(monkeypatch, *decode, num_prompts)
    assert len(step.waits) == most_waits, step.waits
    assert len(step.uploads) <= most_uploads, step.uploads


def test_tensors_of_every_dtype_and_shape_arrive_in_one_copy_each_way() -> None:
    given = [
        torch.tensor([True, False, True]),
        torch.arange(6).view(2, 3).t(),
        torch.tensor(2.5, dtype=torch.float64),
        torch.zeros(0, 3),
        torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        torch.tensor([[0.1], [torch.nan]]),
    ]
    with simulated_device(), counted_traffic() as traffic:
        there = upload(DEVICE, *given)
        back = download(*there)
        assert (len(traffic.uploads), len(traffic.waits)) == (1, 1)
    assert all(tensor.device == DEVICE for tensor in there)
    for tensor, truth in zip(back, given, strict=True):
        assert tensor.dtype == truth.dtype
        torch.testing.assert_close(tensor, truth, rtol=0, atol=0, equal_nan=True)
    assert download() == ()


def test_nothing_is_copied_where_everything_is_on_the_cpu() -> None:
    tensor = torch.arange(3)
    assert upload(torch.device("cpu"), tensor)[0] is tensor and download(tensor)[0] is tensor


def test_what_the_host_waits_for_is_counted() -> None:
    with simulated_device(), counted_traffic() as traffic:
        numbers = torch.tensor([3, 1, 2], device=DEVICE)
        numbers.tolist()
        int(numbers[0])
        numbers[[0, 2]]
        numbers[numbers > 1]
        numbers.nonzero()
        numbers.cpu()
        numbers.copy_(torch.zeros(3, dtype=torch.int64))
        assert len(traffic.waits) == 8, traffic.waits
        numbers.copy_(torch.zeros(3, dtype=torch.int64), non_blocking=True)
        assert (len(traffic.waits), len(traffic.uploads)) == (8, 1)
