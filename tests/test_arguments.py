"""Arguments that are no fields of the configuration: each wrong value is refused by its name."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tq_fast import presets
from tq_fast.config import SpeedOptions
from tq_fast.errors import InvalidArgument

WRONG: list[tuple[str, Any, str]] = [
    ("reward_bounds", "0, 1", "a pair"),
    ("reward_bounds", (False, True), "a pair"),
    ("reward_bounds", (0.0, math.inf), "finite"),
    ("reward_bounds", (math.nan, 1.0), "finite"),
    ("reward_bounds", (0, 10**400), "finite"),
    ("reward_index", "0", "an integer"),
    ("reward_index", 0.0, "an integer"),
    ("reward_index", True, "an integer"),
    ("dtype", "float99", "floating-point"),
    ("dtype", torch.int32, "floating-point"),
    ("dtype", [torch.float32], "floating-point"),
    ("device", "gpu", "cannot be used"),
    ("device", 3.5, "cannot be used"),
    ("device", ["cpu"], "cannot be used"),
    ("speed", 3, "SpeedOptions or None"),
    ("speed", False, "SpeedOptions or None"),
    ("speed", {"cpu_layers": False}, "SpeedOptions or None"),
    ("config", 3, "a DecodeConfig or None"),
    ("config", {"k": 3}, "a DecodeConfig or None"),
    ("config", tq_fast.DecodeConfig, "a DecodeConfig or None"),
    ("batch_size", 0, "at least 1"),
    ("batch_size", "8", "at least 1"),
    ("batch_size", True, "at least 1"),
    ("memory_budget", 0, "a number of bytes"),
    ("memory_budget", 1e9, "a number of bytes"),
    ("memory_budget", "1 GB", "a number of bytes"),
]


class _Models(dict[str, PreTrainedModel]):
    """Models that count their forward passes."""

    def __init__(self) -> None:
        super().__init__(
            baseline=zoo.language_model("llama"),
            sft=zoo.language_model("llama", seed=5),
            reward=zoo.classifier("llama"),
        )
        self.num_passes = 0
        for model in self.values():
            model.register_forward_pre_hook(self._count)

    def _count(self, *_: object) -> None:
        self.num_passes += 1


def _collab(prompts: Any, **options: Any) -> Any:
    """Collab has a list in the place of the baseline."""
    return presets.collab(prompts, baselines=[options.pop("baseline")], **options)


CALLS: dict[str, Callable[..., Any]] = {
    "decode": tq_fast.decode,
    "sft": presets.sft,
    "best_of_n": presets.best_of_n,
    "args": presets.args,
    "transfer_q": presets.transfer_q,
    "refine": presets.refine,
    "blocks": presets.blocks,
    "collab": _collab,
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(("name", "value", "expected"), WRONG)
def test_a_wrong_value_is_refused_by_name_before_any_forward_pass(
    call: str, name: str, value: Any, expected: str
) -> None:
    models = _Models()
    with pytest.raises(InvalidArgument) as caught:
        CALLS[call]([5, 6], **models, max_new_tokens=2, **{name: value})
    assert str(caught.value).startswith(name)
    assert expected in str(caught.value) and repr(value) in str(caught.value)
    assert models.num_passes == 0


@pytest.mark.parametrize(
    ("wrong", "near"),
    [
        ("reward_bound", "reward_bounds"),
        ("batchsize", "batch_size"),
        ("tokeniser", "tokenizer"),
        ("rolout_temperature", "rollout_temperature"),
    ],
)
@pytest.mark.parametrize("call", CALLS)
def test_an_unknown_argument_names_the_nearest_of_all_known_ones(
    call: str, wrong: str, near: str
) -> None:
    with pytest.raises(InvalidArgument, match=f"unknown option '{wrong}'; did you mean '{near}'"):
        CALLS[call]([5, 6], **_Models(), **{wrong: 1})


def test_callbacks_are_functions_and_known_by_name() -> None:
    models = _Models()
    decoder = tq_fast.TransferDecoder(**models)
    # Loading tries the reward on a few tokens.
    models.num_passes = 0
    for name in ("on_token", "on_finished"):
        with pytest.raises(InvalidArgument, match=f"^{name} must be a function or None, got 3"):
            decoder.decode([5, 6], **{name: 3})
        with pytest.raises(InvalidArgument, match=f"did you mean '{name}'"):
            decoder.decode([5, 6], **{name + "s": print})
    assert models.num_passes == 0


def test_a_tokenizer_that_is_none_is_refused_by_its_own_name() -> None:
    for name in ("tokenizer", "reward_tokenizer"):
        with pytest.raises(InvalidArgument, match=f"^{name} must be a hub id"):
            tq_fast.TransferDecoder(**_Models(), **{name: 3})


def test_right_values_are_taken() -> None:
    decoder = tq_fast.TransferDecoder(
        **_Models(),
        reward_bounds=[-9, 9.5],
        reward_index=0,
        dtype="float32",
        device="cpu",
        speed=SpeedOptions(cpu_layers=False),
    )
    assert decoder.session.reward_bounds == (-9.0, 9.5)
    assert not decoder.session.speed.cpu_layers


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("call", ["decode", "best_of_n", "args"])
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_prompt_too_long_for_the_reward_is_refused_before_any_forward_pass(
    architecture: str, call: str, batch_size: int
) -> None:
    models = _Models()
    models["reward"] = zoo.classifier(architecture, max_position_embeddings=24)
    prompts = [[5, 6, 7], list(range(5, 24))]
    options = {"max_new_tokens": 6, "batch_size": batch_size, "eos_token_id": ()}
    if call == "decode":
        options["horizon"] = None
    with pytest.raises(
        InvalidArgument, match=r"prompts\[1\] has 19 tokens.* 25, but the reward model allows 24"
    ):
        CALLS[call](prompts, **models, **options)
    assert models.num_passes == 0
    # A prompt of one token less is as long as the reward allows.
    options["k" if call != "best_of_n" else "n"] = 2
    assert len(CALLS[call]([prompts[0], prompts[1][1:]], **models, **options).sequences) == 2
