"""`tq_fast.decode` with a baseline of int8 weights, in turns with the same baseline in bf16.

The models are those of `test_decode.py`; torchao quantises the baseline's linear layers, the LM
head among them, and the reward stays in bf16. Needs torchao (`make real` installs it).
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import tq_fast
from bench.decode_models import prompt_of, random_duo
from tq_fast.forest.cpu_layers import describe_layers

ROUNDS = 3
TOKENS = 4
OPTIONS = {
    "k": 10,
    "horizon": 20,
    "rollout": "greedy",
    "strategy": "greedy",
    "eos_token_id": (),
    "max_new_tokens": TOKENS,
}


def test_int8_decode(benchmark: BenchmarkFixture, figure: Callable[[str], None]) -> None:
    quantization = pytest.importorskip("torchao.quantization")
    duo = random_duo().to(torch.bfloat16)
    int8 = copy.deepcopy(duo.baseline)
    quantization.quantize_(int8, quantization.Int8WeightOnlyConfig())
    assert describe_layers(int8).startswith("12 of 12 decoder layers run fused, 12 with int8")
    decoders = {
        "bf16": tq_fast.TransferDecoder(duo.baseline, duo.reward),
        "int8": tq_fast.TransferDecoder(int8, duo.reward),
    }
    prompt = prompt_of(512)
    seconds: dict[str, list[float]] = {name: [] for name in decoders}
    priors: dict[str, dict[int, float]] = {}

    def take_turns() -> None:
        for name, decoder in decoders.items():
            result = decoder.decode(prompt, **OPTIONS)
            seconds[name].append(result.stats.seconds["rollout"] / TOKENS)
            step = result.traces[0][0]
            tokens = step.candidates.tolist()
            priors[name] = dict(zip(tokens, step.prior_logprobs.tolist(), strict=True))

    benchmark.group = "decode, prompt 512, int8 weights"
    benchmark.pedantic(take_turns, rounds=ROUNDS, warmup_rounds=1)
    # Rounding to int8 may change which tokens are the last candidates, and each log-prob a little.
    both = priors["bf16"].keys() & priors["int8"].keys()
    assert len(both) >= 5
    assert all(abs(priors["bf16"][token] - priors["int8"][token]) < 0.2 for token in both)
    bf16, ours = (statistics.median(seconds[name][1:]) for name in ("bf16", "int8"))
    figure(
        f"roll-outs of a token, 10 rows 20 deep: bf16 {bf16:.3f} s, int8 {ours:.3f} s, "
        f"{bf16 / ours:.2f} times as fast"
    )
