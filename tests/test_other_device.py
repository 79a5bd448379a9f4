"""Whole decodes on a device that is not the CPU: every tensor is where it belongs.

The device is simulated (tests/simulated_device.py): it says "meta", holds numbers, and refuses what
a GPU refuses. The tokens are those of the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import tq_fast
from tests import zoo
from tests.fixed_addresses import fixed_addresses
from tests.simulated_device import Remote, move, simulated_device
from tests.test_speed_options import NONE, PROMPTS, VOCAB, assert_same, language_model, share_of_low
from tq_fast.config import SpeedOptions
from tq_fast.values.head import ValueHead, ValueHeadConfig

pytestmark = [
    pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha"),
    pytest.mark.filterwarnings("ignore:the weights of indirect transfer"),
]

SHORT = {"k": 4, "horizon": 4, "max_new_tokens": 4, "alpha": 0.3, "eos_token_id": (0, 11)}


def models(*names: str) -> dict[str, Any]:
    """Build new models, the same at every call, by their names in the API."""
    made: dict[str, Callable[[], Any]] = {
        "baseline": lambda: language_model(scale=2.0),
        "sft": lambda: language_model(seed=2, scale=2.0),
        "reward": lambda: zoo.classifier("llama", vocab_size=VOCAB),
        "baseline_reward": lambda: zoo.classifier("llama", seed=5, vocab_size=VOCAB),
    }
    return {name: made[name]() for name in names}


def decode_on_both(
    call: Callable[..., tq_fast.DecodeResult], names: tuple[str, ...], **options: Any
) -> tuple[tq_fast.DecodeResult, tq_fast.DecodeResult]:
    """Run `call` with models on the simulated device, and with the same models on the CPU."""
    with simulated_device():
        remote = call(PROMPTS[:3], **{n: move(m) for n, m in models(*names).items()}, **options)
    return remote, call(PROMPTS[:3], **models(*names), **options)


def assert_alike(remote: tq_fast.DecodeResult, local: tq_fast.DecodeResult) -> None:
    assert not any(isinstance(ids, Remote) for ids in remote.sequences)
    assert_same(remote, local)


DECODES: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sampled": (("baseline",), {"reward": share_of_low, "num_rollouts": 3}),
    "greedy": (("baseline",), {"reward": share_of_low, "rollout": "greedy", "strategy": "greedy"}),
    "to the end": (("baseline", "reward"), {"horizon": None, "num_rollouts": 2}),
    "truncated": (("baseline", "reward"), {"rollout_top_k": 9, "rollout_top_p": 0.8}),
    "lazy": (
        ("baseline",),
        {"reward": share_of_low, "reward_bounds": (0.0, 1.0), "num_rollouts": 3},
    ),
    "refilled": (("baseline", "reward"), {"batch_size": 2, "num_rollouts": 2}),
    "sft": (("baseline", "sft", "reward"), {"candidates_from": "sft", "estimator": "soft"}),
    "log ratio": (
        ("baseline", "sft", "reward"),
        {"transfer": "indirect", "beta": 1.0, "num_rollouts": 3},
    ),
    "reward gap": (
        ("baseline", "sft", "reward", "baseline_reward"),
        {"transfer": "indirect", "beta": 1.0, "weights": "reward_gap", "num_rollouts": 3},
    ),
}


@pytest.mark.parametrize("name", DECODES)
@pytest.mark.parametrize("speed", [SpeedOptions(), NONE], ids=["all options", "no option"])
def test_a_decode_on_another_device_gives_the_tokens_of_the_cpu(
    name: str, speed: SpeedOptions
) -> None:
    names, options = DECODES[name]
    assert_alike(*decode_on_both(tq_fast.decode, names, speed=speed, **{**SHORT, **options}))


@pytest.mark.parametrize("name", DECODES)
def test_a_decode_at_fixed_addresses_gives_the_tokens_of_the_cpu(name: str) -> None:
    names, options = DECODES[name]
    options = {**SHORT, **options}
    with simulated_device(), fixed_addresses() as made:
        there = {role: move(model) for role, model in models(*names).items()}
        remote = tq_fast.decode(PROMPTS[:3], **there, **options)
    assert_alike(remote, tq_fast.decode(PROMPTS[:3], **models(*names), **options))
    assert made


PRESETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "sft": (("sft",), {}),
    "baseline": (("baseline",), {}),
    "best_of_n": (("baseline", "reward"), {"n": 4}),
    "args": (("sft", "reward"), {"k": 4, "alpha": 0.3}),
    "controlled_decoding": (("sft", "reward"), {"k": 4, "alpha": 0.3, "horizon": 3}),
    "dera": (("baseline", "sft"), {"mix": 0.5}),
    "value_guided": (("sft", "reward"), {}),
    "refine": (("baseline", "sft", "reward"), {"first": 3, "branches": 2, "stages": 2}),
    "blocks": (("baseline", "reward"), {"branches": 3, "block_len": 2, "strategy": "sample"}),
    "collab": (("reward",), {"k": 3, "alpha": 0.3, "horizon": 2}),
}


def run_preset(
    name: str, prompts: Any, *, head: ValueHead | None = None, **options: Any
) -> tq_fast.DecodeResult:
    """Run a preset; a head, which the presets move themselves, and several baselines are added."""
    if name == "value_guided":
        options["value"] = head
    if name in ("sft", "baseline", "dera"):
        options.pop("reward", None)
    if name == "collab":
        others = models("baseline", "sft").values()
        weight = next(options["reward"].parameters())
        is_remote = isinstance(weight, Remote)
        options["baselines"] = [move(m) if is_remote else m.to(weight.device) for m in others]
    return getattr(tq_fast.presets, name)(prompts, **options)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_on_another_device_gives_the_tokens_of_the_cpu(name: str) -> None:
    names, options = PRESETS[name]
    options = {"max_new_tokens": 4, "eos_token_id": (0, 11), "head": random_head(), **options}
    assert_alike(*decode_on_both(functools.partial(run_preset, name), names, **options))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_at_fixed_addresses_gives_the_tokens_of_the_cpu(name: str) -> None:
    names, options = PRESETS[name]
    options = {"max_new_tokens": 6, "eos_token_id": (0, 11), "head": random_head(), **options}
    with simulated_device(), fixed_addresses() as made:
        there = {role: move(model) for role, model in models(*names).items()}
        remote = run_preset(name, PROMPTS[:3], **there, **options)
    assert_alike(remote, run_preset(name, PROMPTS[:3], **models(*names), **options))
    assert made


def random_head() -> ValueHead:
    """A head for the SFT model."""
    torch.manual_seed(0)
    hidden_size = models("sft")["sft"].config.hidden_size
    head = ValueHead(ValueHeadConfig(hidden_size, VOCAB, width=8, rank=4))
    torch.nn.init.normal_(head.token_embeddings)
    return head.requires_grad_(False)


def test_the_simulated_device_refuses_what_a_gpu_refuses() -> None:
    with simulated_device() as device:
        there, here = torch.arange(4, device=device), torch.arange(4)
        with pytest.raises(RuntimeError, match="are on the CPU"):
            there + here
        with pytest.raises(RuntimeError, match="are on the CPU"):
            there[:2] = here[:2] + there[2:]
        assert (there + 1).tolist() == [1, 2, 3, 4] and there[here[:2]].tolist() == [0, 1]
        there += torch.tensor(2)
        assert there.cpu().equal(here + 2)
        assert torch.tensor([3, 1], device=device).tolist() == [3, 1]
