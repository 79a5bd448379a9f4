"""The benches that are programs of their own fit the library, as tiny models show."""

from __future__ import annotations

import torch

from bench import account, decode_models, speculation
from bench.decode_models import Duo
from tests import zoo


def small_duo() -> Duo:
    small = {"vocab_size": 50, "max_position_embeddings": 128}
    return Duo(zoo.language_model("llama", **small), zoo.classifier("llama", **small))


def test_the_account_finds_every_phase(monkeypatch) -> None:
    monkeypatch.setattr(account, "prompt_of", lambda length: torch.arange(length) % 50)
    setting = account.Setting("fp32", prompt=9, k=3, num_rollouts=2, horizon=3, tokens=2)
    seconds, result, kernels = account.measure_phases(small_duo(), setting)
    assert {"rollout forward", "sampling", "reward", "commit", "prefill"} <= seconds.keys()
    assert seconds["rollout forward"] > 0 and seconds["sampling"] > 0
    assert len(result.sequences[0]) == 3
    assert sum(kernels.values()) > 0


def test_speculation_replays_what_a_decode_rolled_out() -> None:
    steps = speculation.record_steps(1, "greedy", 1)
    assert len(steps) > 1 and all(tree == 0 for step in steps for tree, _, _ in step)
    right, passes = speculation.replay(steps, 2)
    assert 0 < right < 1 and 0 < passes <= 1
    # Drafts that are always right: the tokens of one step, twice.
    again = [(0, 7, [1, 2, 3, 4, 5, 6])]
    assert speculation.replay([again, again], 5)[1] == (6 + 1) / 12


def test_the_models_of_the_benches_keep_their_weights_in_another_dtype() -> None:
    duo = small_duo()
    half = duo.to(decode_models.DTYPES["bf16"])
    for whole, rounded in zip(duo.baseline.parameters(), half.baseline.parameters(), strict=True):
        assert torch.equal(whole.bfloat16(), rounded)
