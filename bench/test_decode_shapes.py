"""Time and memory of a decode against its shape: prompt, k, n, L, and prompts together.

The models are those of bench/decode_models.py. One axis changes at a time, from prompt 128, k = 10,
n = 1, L = 20 and one prompt. Along the prompt, `generate` over copies of the prompt's KV
(bench/expanded.py) is measured too. bench/pictures.py draws the results.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import tq_fast
from bench.decode_models import DTYPES, Duo, prompt_of, random_duo
from bench.expanded import decode_expanded

BASE = {"prompt": 128, "k": 10, "n": 1, "L": 20, "prompts": 1}
AXES = {
    "prompt": (64, 128, 512, 1024, 2048, 4096),
    "k": (2, 5, 10, 20, 40),
    "n": (1, 2, 4, 8),
    "L": (5, 10, 20, 40, 80),
    "prompts": (1, 2, 4, 8),
}
# Both dtypes are measured along these axes, the others in fp32 only.
BOTH = ("prompt", "prompts")
TOKENS = 3
POINTS = [
    (dtype, axis, value)
    for dtype in DTYPES
    for axis, values in AXES.items()
    if dtype == "fp32" or axis in BOTH
    for value in values
]

_duos: dict[str, Duo] = {}
_tokens_per_second: dict[tuple[str, int], float] = {}
_seconds: dict[tuple[str, int], float] = {}
_responses: dict[tuple[str, int], list[int]] = {}


def duo_of(dtype: str) -> Duo:
    if not _duos:
        _duos["fp32"] = random_duo()
    if dtype not in _duos:
        _duos[dtype] = _duos["fp32"].to(DTYPES[dtype])
    return _duos[dtype]


def decode(duo: Duo, shape: dict[str, int]) -> tuple[tq_fast.DecodeResult, list[float]]:
    """Decode `TOKENS` tokens of every prompt; return the result and the seconds of each step."""
    prompts = [prompt_of(shape["prompt"] + i) for i in range(shape["prompts"])]
    decoder = tq_fast.TransferDecoder(duo.baseline, duo.reward)
    marks = [time.perf_counter()]
    result = decoder.decode(
        prompts,
        k=shape["k"],
        num_rollouts=shape["n"],
        horizon=shape["L"],
        rollout="greedy" if shape["n"] == 1 else "sample",
        strategy="greedy",
        max_new_tokens=TOKENS,
        eos_token_id=(),
        on_token=lambda idx: marks.append(time.perf_counter()) if idx == 0 else None,
    )
    return result, [after - before for before, after in itertools.pairwise(marks)]


@pytest.mark.parametrize(("dtype", "axis", "value"), POINTS)
def test_decode_shape(
    benchmark: BenchmarkFixture,
    figure: Callable[[str], None],
    dtype: str,
    axis: str,
    value: int,
) -> None:
    benchmark.group = f"decode against {axis}, {dtype}"
    shape = {**BASE, axis: value}
    duo = duo_of(dtype)
    steps: list[float] = []

    def run() -> tq_fast.DecodeResult:
        result, seconds = decode(duo, shape)
        steps.extend(seconds[1:])
        return result

    result = benchmark.pedantic(run, rounds=2, warmup_rounds=0)
    token = statistics.median(steps)
    config = duo.baseline.config
    per_token = 2 * config.num_hidden_layers * config.hidden_size * DTYPES[dtype].itemsize
    branches = shape["k"] * shape["n"] * (1 + shape["L"])
    least = per_token * shape["prompts"] * (shape["prompt"] + TOKENS + branches)
    peak = result.stats.peak_kv_bytes["baseline"]
    benchmark.extra_info.update(
        axis=axis,
        value=value,
        dtype=dtype,
        seconds_per_token=token,
        kv_bytes=peak,
        tokens_per_second=shape["prompts"] / token,
    )
    line = f"{dtype}, {axis} {value}: {1e3 * token:.0f} ms a step, KV {peak / 2**20:.1f} MiB"
    line += f" ({peak / least:.2f}x one prefix and {shape['k'] * shape['n']} branches a prompt)"
    if axis == "prompt":
        _seconds[dtype, value] = token
        _responses[dtype, value] = result.sequences[0].tolist()
        shortest = _seconds.get((dtype, 128))
        if value > 128 and shortest:
            line += f", {token / shortest:.2f}x of prompt 128"
    if axis == "prompts":
        _tokens_per_second[dtype, value] = value / token
        alone = _tokens_per_second.get((dtype, 1))
        if alone:
            line += f", {value / token:.2f} tokens/s, {value / token / alone:.2f}x of one prompt"
    figure(line)
    assert peak <= 1.1 * least


@pytest.mark.parametrize("value", [64, 128, 512, 1024, 2048])
@pytest.mark.parametrize("dtype", DTYPES)
def test_generate_over_copies(
    benchmark: BenchmarkFixture, figure: Callable[[str], None], dtype: str, value: int
) -> None:
    benchmark.group = f"decode against prompt, {dtype}"
    duo, prompt = duo_of(dtype), prompt_of(value)
    found: list[tuple[list[int], list[float], int]] = []

    def run() -> None:
        options = {"k": BASE["k"], "horizon": BASE["L"], "num_tokens": TOKENS}
        found.append(decode_expanded(duo, prompt, **options))

    benchmark.pedantic(run, rounds=2, warmup_rounds=0)
    token = statistics.median(s for _, seconds, _ in found for s in seconds[1:])
    if dtype == "fp32" and ("fp32", value) in _responses:
        assert found[0][0] == _responses["fp32", value]
    benchmark.extra_info.update(
        axis="prompt (generate over copies)",
        value=value,
        dtype=dtype,
        seconds_per_token=token,
        kv_bytes=found[0][2],
    )
    line = f"{dtype}, prompt {value}, generate over copied KV: {1e3 * token:.0f} ms a token"
    line += f", KV {found[0][2] / 2**20:.1f} MiB"
    if (dtype, value) in _seconds:
        line += f": {token / _seconds[dtype, value]:.1f}x ours"
    figure(line)


@pytest.fixture(scope="module", autouse=True)
def forget_models() -> object:
    yield
    _duos.clear()
