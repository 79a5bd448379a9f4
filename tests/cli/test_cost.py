"""What `tq-fast decode` says of the cost of a job before it begins, against what the job took."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from tests.cli.decode_job import Job
from tests.cli.trio import Trio
from tq_fast import DecodeConfig, presets
from tq_fast.cli.job import describe_count, describe_forecast
from tq_fast.jobs.forecast import Forecast, forecast
from tq_fast.models.tiny import load_tiny_world
from tq_fast.prompts import Prompt
from tq_fast.rewards.options import RewardOptions

# Prompts of several lengths, one of them twice.
NUM_PROMPTS = 4
SEARCH = {"k": 4, "num_rollouts": 3, "horizon": 5}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", {}),
    "baseline": ("baseline", {}),
    "dera": ("dera", {}),
    "best_of_n": ("best_of_n", {"n": 5}),
    "several responses": ("best_of_n", {"n": 2, "num_return_sequences": 3}),
    "args": ("args", {"k": 4}),
    "controlled_decoding": ("controlled_decoding", SEARCH),
    "transfer_q": ("transfer_q", SEARCH),
    "greedy roll-outs": ("transfer_q", {**SEARCH, "rollout": "greedy"}),
    "roll-outs to the end": ("transfer_q", {**SEARCH, "horizon": None}),
    "no roll-outs": ("transfer_q", {**SEARCH, "horizon": 0}),
    "direct_on_target": ("direct_on_target", SEARCH),
    "log-ratio": ("transfer_q_indirect", {**SEARCH, "beta": 1.0}),
    "reward gap": ("transfer_q_indirect", {**SEARCH, "beta": 1.0, "weights": "reward_gap"}),
    "refine": ("refine", {"first": 3, "branches": 3, "stages": 3, "cuts": 3}),
    "refine, even cuts": ("refine", {"first": 3, "branches": 3, "stages": 3}),
    "blocks": ("blocks", {"branches": 3, "block_len": 5}),
    "blocks, completed": ("blocks", {"branches": 3, "block_len": 5, "judge": "rollout"}),
    "collab": ("collab", SEARCH),
}
# Even cuts are known once there is a text: a text of full length is continued from its middle on
# average, where the bound has whole texts. Several responses share their prompt, which the bound
# counts for each. Everywhere else equal roll-outs and equal prompts alone are saved.
FACTORS = {"refine, even cuts": 2.0, "several responses": 2.0}
USUAL_FACTOR = 1.3


@pytest.fixture(scope="module")
def open_case() -> Callable[..., tuple[Any, list[Prompt]]]:
    world = load_tiny_world()

    def open_one(method: str, **options: Any) -> tuple[Any, list[Prompt]]:
        models: dict[str, Any] = {"baseline": world.baseline, "sft": world.sft}
        if method == "collab":
            models = {"baselines": [world.baseline, world.sft]}
        if method not in ("sft", "baseline", "dera"):
            models["reward"] = world.reward
        if method == "transfer_q_indirect":
            models["baseline_reward"] = world.baseline_reward
        if method == "sft":
            del models["baseline"]
        opened = presets.open_method(
            method, max_new_tokens=8, eos_token_id=(), **{**models, **options}
        )
        reader = opened.prompt_reader()
        texts = [*world.prompts[: NUM_PROMPTS - 1], world.prompts[0]]
        return opened, [reader.read(idx, text) for idx, text in enumerate(texts)]

    return open_one


@pytest.mark.filterwarnings("ignore:the standard error of Q exceeds alpha")
@pytest.mark.filterwarnings("ignore:the weights of indirect transfer")
@pytest.mark.parametrize("case", CASES)
def test_a_method_takes_no_more_than_was_foretold_and_not_much_less(
    open_case: Callable[..., Any], case: str
) -> None:
    method, options = CASES[case]
    opened, prompts = open_case(method, **options)
    said = forecast(opened, prompts)
    assert said.is_bound and said.num_prompts == NUM_PROMPTS
    worked = Counter[str]()
    taken = opened.decode(prompts, on_work=lambda num: worked.update(work=num)).stats
    assert {role for role, num in taken.token_forwards.items() if num} == set(said.token_forwards)
    for role, number in taken.token_forwards.items():
        at_most = said.token_forwards.get(role, 0)
        assert number <= at_most <= FACTORS.get(case, USUAL_FACTOR) * number, (case, role)
    assert worked["work"] == NUM_PROMPTS * said.tokens_per_prompt


def test_every_method_but_that_of_a_head_has_a_case() -> None:
    assert {method for method, _ in CASES.values()} == set(presets.METHODS) - {"value_guided"}


def test_value_guidance_takes_no_more_than_was_foretold(trio: Trio) -> None:
    opened = presets.open_method(
        "value_guided",
        sft=trio.sft,
        reward=trio.reward,
        value=trio.value_head(),
        max_new_tokens=8,
        eos_token_id=(),
    )
    prompts = [opened.prompt_reader().read(0, "a b c")]
    said = forecast(opened, prompts)
    taken = opened.decode(prompts).stats.token_forwards
    assert set(taken) == set(said.token_forwards) == {"sft", "reward"}
    assert all(taken[role] <= said.token_forwards[role] <= 1.3 * taken[role] for role in taken)


def test_bounds_on_the_reward_save_and_are_not_foretold(open_case: Callable[..., Any]) -> None:
    opened, prompts = open_case("transfer_q", **SEARCH, reward_bounds=(-50.0, 50.0), alpha=0.1)
    said = forecast(opened, prompts).token_forwards
    taken = opened.decode(prompts).stats.token_forwards
    assert all(taken[role] <= said[role] for role in taken)


def test_a_reward_with_its_own_reading_has_an_estimate(open_case: Callable[..., Any]) -> None:
    opened, prompts = open_case("best_of_n", n=2, reward_options=RewardOptions(pair=True))
    assert not forecast(opened, prompts).is_bound


def test_a_reward_that_is_a_function_takes_no_tokens(trio: Trio) -> None:
    opened = presets.open_method(
        "best_of_n", baseline=trio.baseline, reward=lambda prompts, responses: [0.0] * len(prompts)
    )
    said = forecast(opened, [opened.prompt_reader().read(0, "a b")])
    assert set(said.token_forwards) == {"baseline"}


def test_the_line_says_prompts_lengths_and_the_tokens_through_each_model() -> None:
    left = Forecast(200, 12, 48, {"baseline": 5_240_000, "reward": 87_400}, True, 128, False)
    said = describe_forecast(left, DecodeConfig())
    assert said == (
        "200 prompts of 12 to 48 tokens, a response of at most 128 tokens each: at most 5.24 M of "
        "baseline, 87.4 k of reward (token-forwards: tokens that go through each model)"
    )
    one = Forecast(1, 3, 3, {"sft": 900}, False, 4, True)
    assert describe_forecast(one, DecodeConfig(max_new_tokens=4, num_return_sequences=2)) == (
        "1 prompt of 3 tokens, 2 responses of at most 4 tokens each: about 900 of sft "
        "(token-forwards: tokens that go through each model)"
    )


@pytest.mark.parametrize(
    ("number", "words"),
    [
        *[(999, "999"), (1_000, "1 k"), (45_310, "45.3 k"), (1_204_000, "1.2 M")],
        *[(3_456_000_000, "3.46 G"), (7_000_000_000_000, "7,000 G")],
    ],
)
def test_counts_have_three_digits(number: int, words: str) -> None:
    assert describe_count(number) == words


def test_a_job_says_its_cost_before_it_begins_and_what_is_left_where_it_goes_on(job: Job) -> None:
    assert job.run() == 0
    lines = job.said.splitlines()
    cost = next(i for i, line in enumerate(lines) if "token-forwards" in line)
    assert lines[cost].startswith("6 prompts of 1 to 3 tokens, a response of at most 6 tokens each")
    assert re.search(r"at most [\d.]+( k)? of baseline, [\d.]+( k)? of sft, ", lines[cost])
    assert cost < next(i for i, line in enumerate(lines) if "have a response" in line)
    assert job.run() == 0
    assert "token-forwards" not in job.said
    job.write_prompts(["a b", "c", "a b", "d e f", "a b", "c", "z"])
    assert job.run() == 0
    assert "1 prompt of 1 token, a response of at most 6 tokens each" in job.said


def test_the_time_of_a_job_is_said_after_the_first_steps(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tq_fast.cli.progress._MEASURED_FOR", 0.0)
    monkeypatch.setattr("tq_fast.cli.progress._LINE_INTERVAL", 0.0)
    monkeypatch.setattr("tq_fast.cli.progress._LINE_SHARE", 0.0)
    assert job.run() == 0
    assert re.search(r"prompts an hour: at most about .* for 6 prompts; the first step", job.said)
    assert re.search(r"tokens/s, .* prompts/h, .* left", job.said)


def test_whole_texts_are_timed_without_their_scores(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tq_fast.cli.progress._MEASURED_FOR", 0.0)
    assert job.run(models={"method": "best_of_n", "own": {"n": 2}}) == 0
    assert "for 6 prompts, and the time to score them; the first step" in job.said


def test_texts_that_no_reward_scores_are_timed_as_a_whole(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tq_fast.cli.progress._MEASURED_FOR", 0.0)
    assert job.run(models={"method": "sft", "baseline": None, "reward": None}) == 0
    assert "for 6 prompts; the first step" in job.said


@pytest.mark.parametrize("field", ["batch_size", "memory_budget"])
def test_a_wrong_size_is_refused_before_a_model_is_loaded(job: Job, field: str) -> None:
    with pytest.raises(ValueError, match=f"^{field} must be "):
        job.run(**{field: 0}, models={"baseline": "/nowhere"})
    assert "loading" not in job.said
