"""`tq_fast.decode` against the naive loop, end to end, in one run.

Baseline and reward are random-weight Llama shapes of 134 M parameters; k = 10, every candidate has
one greedy roll-out of 20 tokens, the next token is greedy, and no token ends a sequence. The naive
loop (tests/naive.py) gets transformers' own KV cache within `generate`, SDPA, and all candidates in
one batch.

The time per token of decode is the time between two tokens, which leaves out the encoding of the
prompt. That is a figure of its own (`seconds_to_first_token`), and the ratio spreads it over a
response of 128 tokens, the paper's length. The naive loop encodes the prompt for every token.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import tq_fast
from bench.decode_models import DTYPES, Duo, prompt_of, random_duo
from tests.naive import NaiveResponse, NaiveSettings, classifier_reward, decode_naively

K = 10
HORIZON = 20
# TOKENS are decoded while the clock runs; they stand for a response of RESPONSE tokens.
TOKENS = 4
RESPONSE = 128
ROUNDS = 3
SETTINGS = {"k": K, "horizon": HORIZON, "strategy": "greedy", "rollout": "greedy"}


@dataclasses.dataclass
class Timing:
    """Seconds between two tokens, and until the first, of every round."""

    per_token: list[float] = dataclasses.field(default_factory=list)
    to_first: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds_per_token(self) -> float:
        """The seconds per token of a response of `RESPONSE` tokens."""
        token = statistics.median(self.per_token)
        if not self.to_first:
            return token
        return token + max(0.0, statistics.median(self.to_first) - token) / RESPONSE


@pytest.fixture(scope="module")
def fp32_duo() -> Duo:
    return random_duo()


@pytest.fixture(scope="module", params=list(DTYPES))
def dtype(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def duo(fp32_duo: Duo, dtype: str) -> Duo:
    return fp32_duo if dtype == "fp32" else fp32_duo.to(DTYPES[dtype])


@dataclasses.dataclass
class Runs:
    """The measurements of earlier tests of this run, by dtype and prompt length."""

    naive: dict[tuple[str, int], tuple[Timing, NaiveResponse]] = dataclasses.field(
        default_factory=dict
    )


@pytest.fixture(scope="module")
def runs() -> Runs:
    return Runs()


def timed_decode(
    duo: Duo, prompt: torch.Tensor, timing: Timing, *, max_new_tokens: int
) -> tq_fast.DecodeResult:
    """Decode, and note when each token came."""
    decoder = tq_fast.TransferDecoder(duo.baseline, duo.reward)
    marks = [time.perf_counter()]
    result = decoder.decode(
        prompt,
        max_new_tokens=max_new_tokens,
        eos_token_id=(),
        on_token=lambda idx: marks.append(time.perf_counter()),
        **SETTINGS,
    )
    timing.to_first.append(marks[1] - marks[0])
    timing.per_token += [after - before for before, after in itertools.pairwise(marks[1:])]
    return result


def check_against_naive(result: tq_fast.DecodeResult, naive: NaiveResponse, dtype: str) -> None:
    """Raise where a decode differs from the naive loop, so that nothing is reported of it."""
    if dtype != "fp32":
        # Half precision may roll out other tokens, but the priors before that must be near.
        step, truth = result.traces[0][0], naive.steps[0]
        ours = dict(zip(step.candidates.tolist(), step.prior_logprobs.tolist(), strict=True))
        theirs = dict(zip(truth.candidates, truth.prior_logprobs.tolist(), strict=True))
        both = ours.keys() & theirs.keys()
        assert len(both) >= K // 2
        assert all(abs(ours[token] - theirs[token]) < 0.1 for token in both)
        assert all(torch.isfinite(step.q).all() for step in result.traces[0])
        return
    assert result.sequences[0].tolist()[: len(naive.token_ids)] == naive.token_ids
    for step, truth in zip(result.traces[0], naive.steps, strict=False):
        assert step.candidates.tolist() == truth.candidates
        torch.testing.assert_close(step.q.double(), truth.q, rtol=0, atol=1e-4)


@pytest.mark.parametrize("length", [128, 512])
def test_the_naive_loop(
    benchmark: BenchmarkFixture, runs: Runs, duo: Duo, dtype: str, length: int
) -> None:
    """Measure the time to beat."""
    benchmark.group = f"decode, prompt {length}, {dtype}"
    # Decode two tokens where they are cheap, so that the gate sees a step after a commit.
    num_tokens = 2 if length == 128 else 1
    settings = NaiveSettings(max_new_tokens=num_tokens, **SETTINGS)
    reward = classifier_reward(duo.reward)
    timing = Timing()

    def run() -> NaiveResponse:
        start = time.perf_counter()
        prompt = prompt_of(length).tolist()
        response = decode_naively(prompt, duo.baseline, reward, settings=settings)
        timing.per_token.append((time.perf_counter() - start) / num_tokens)
        return response

    response = benchmark.pedantic(run, rounds=ROUNDS)
    benchmark.extra_info["seconds_per_token"] = timing.seconds_per_token
    runs.naive[dtype, length] = timing, response


@pytest.mark.parametrize("length", [128, 512, 2048])
def test_decode(
    benchmark: BenchmarkFixture,
    figure: Callable[[str], None],
    runs: Runs,
    duo: Duo,
    dtype: str,
    length: int,
) -> None:
    """Measure ours, and its ratio to the naive loop where that ran before."""
    benchmark.group = f"decode, prompt {length}, {dtype}"
    prompt = prompt_of(length)
    naive_timing, naive_response = runs.naive.get((dtype, length), (None, None))
    # This decode is the warm-up, and the gate compares it with the naive loop.
    result = timed_decode(duo, prompt, Timing(), max_new_tokens=2)
    if naive_response is not None:
        check_against_naive(result, naive_response, dtype)

    timing = Timing()
    result = benchmark.pedantic(
        lambda: timed_decode(duo, prompt, timing, max_new_tokens=TOKENS), rounds=ROUNDS
    )
    info = benchmark.extra_info
    info["seconds_per_token"] = timing.seconds_per_token
    info["seconds_to_first_token"] = statistics.median(timing.to_first)
    info["seconds_by_phase"] = dict(result.stats.seconds)
    if naive_timing is not None:
        info["ratio"] = naive_timing.seconds_per_token / timing.seconds_per_token
        figure(
            f"{dtype}, prompt {length}: {1e3 * naive_timing.seconds_per_token:.0f} ms a token by "
            f"the naive loop, {1e3 * timing.seconds_per_token:.0f} ms by decode, "
            f"{info['ratio']:.1f}x"
        )
        whole = sum(result.stats.seconds.values())
        shares = [
            f"{name} {100 * seconds / whole:.0f} %"
            for name, seconds in result.stats.seconds.items()
            if seconds > 0.01 * whole
        ]
        figure(f"{dtype}, prompt {length}: of {TOKENS} tokens' time {', '.join(shares)}")
    report_memory(info, figure, duo, result, dtype, length)


@pytest.mark.parametrize("longer", [2048])
def test_growth_with_the_prompt(
    benchmark: BenchmarkFixture, figure: Callable[[str], None], duo: Duo, dtype: str, longer: int
) -> None:
    """Time a long and a short prompt in turns, so that other work on the machine slows both."""
    benchmark.group = f"decode, prompt 128 and {longer} in turns, {dtype}"
    short, long = Timing(), Timing()

    def both() -> None:
        for length, timing in ((128, short), (longer, long)):
            timed_decode(duo, prompt_of(length), timing, max_new_tokens=TOKENS)

    benchmark.pedantic(both, rounds=ROUNDS)
    growth = long.seconds_per_token / short.seconds_per_token
    between = statistics.median(long.per_token) / statistics.median(short.per_token)
    benchmark.extra_info.update(growth=growth, growth_between_tokens=between)
    figure(
        f"{dtype}: a token at prompt {longer} costs {growth:.2f}x one at prompt 128 "
        f"({between:.2f}x without the share of encoding the prompt)"
    )


def report_memory(
    info: dict[str, object],
    figure: Callable[[str], None],
    duo: Duo,
    result: tq_fast.DecodeResult,
    dtype: str,
    length: int,
) -> None:
    """Report peak KV against one prefix and k branches, each a candidate and its roll-out."""
    config = duo.baseline.config
    per_token = 2 * config.num_hidden_layers * config.hidden_size * DTYPES[dtype].itemsize
    least = per_token * (length + TOKENS + K * (1 + HORIZON))
    for role, peak in result.stats.peak_kv_bytes.items():
        info[f"kv_{role}"] = peak / least
        figure(
            f"{dtype}, prompt {length}: peak KV of the {role} {peak / 2**20:.1f} MiB, "
            f"{peak / least:.2f}x one prefix and {K} branches"
        )
        assert peak <= 1.1 * least
