"""What passes between the host and the device in a step: few copies, and fewer waits.

The device is simulated (tests/simulated_device.py); every op of the package counts as one launch,
as its kernel is.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import tq_fast
from tests.fixed_addresses import fixed_addresses
from tests.simulated_device import (
    DEVICE,
    Traffic,
    counted_traffic,
    move,
    ops_count_once,
    simulated_device,
)
from tests.test_other_device import SHORT, models, random_head, run_preset
from tests.test_speed_options import PROMPTS, share_of_low
from tq_fast.copies import download, upload
from tq_fast.presets.drawing import TextForest

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
    ops_count_once(monkeypatch)
    steps: list[Traffic] = []
    with fixed_addresses(), simulated_device(), counted_traffic() as traffic:

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
    ("decode", "num_waits", "num_uploads", "num_graphs"), [(DIRECT, 3, 5, 5), (INDIRECT, 4, 8, 7)]
)
def test_the_host_waits_for_candidates_rollouts_and_scores_and_for_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
    num_prompts: int,
    decode: tuple[tuple[str, ...], dict[str, Any]],
    num_waits: int,
    num_uploads: int,
    num_graphs: int,
) -> None:
    """Indirect transfer waits for the log-probs under the SFT model, too.

    Every forward pass is a graph: the four depths, the reward's, and two of the SFT model, which
    scores the roll-outs and reads the chosen token.
    """
    step = traffic_of_a_step(monkeypatch, *decode, num_prompts)
    assert len(step.waits) == num_waits, step.waits
    assert len(step.uploads) == num_uploads, step.uploads
    assert step.launches.count("graph") == num_graphs
    # A prompt takes one launch more: the reward's prefix grows by the token that was chosen.
    assert len(step.launches) - num_graphs <= {5: 66, 7: 101}[num_graphs] + num_prompts


@pytest.mark.parametrize("num_prompts", [1, 8])
@pytest.mark.parametrize("method", ["sft", "value_guided"])
def test_a_token_of_plain_and_of_guided_decoding_is_one_launch(
    monkeypatch: pytest.MonkeyPatch, method: str, num_prompts: int
) -> None:
    ops_count_once(monkeypatch)
    draw, tokens = TextForest.draw, []

    def noted(forest: TextForest, *args: Any, on_depth: Any, **options: Any) -> Any:
        def note(num: int) -> None:
            tokens.append(traffic.take())
            on_depth(num)

        return draw(forest, *args, on_depth=note, **options)

    monkeypatch.setattr(TextForest, "draw", noted)
    with fixed_addresses(), simulated_device(), counted_traffic() as traffic:
        run_preset(
            method,
            (PROMPTS * 2)[:num_prompts],
            sft=move(models("sft")["sft"]),
            reward=share_of_low,
            head=random_head(),
            max_new_tokens=6,
            eos_token_id=(),
            batch_size=8,
        )
    # The first is drawn from the prompt; before the second, everything goes to its fixed address.
    for token in tokens[2:]:
        assert (token.launches, token.waits, token.uploads) == (["graph"], [], [])
    assert len(tokens) == 6


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
