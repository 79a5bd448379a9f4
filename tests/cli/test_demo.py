"""`tq-fast demo`: what it compares, and what it shows."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from rich.console import Console

from tests.cli.trio import Trio
from tq_fast import DecodeConfig, TransferDecoder
from tq_fast.cli import demo
from tq_fast.cli.demo import (
    DemoOptions,
    DemoResult,
    MethodResult,
    choose_prompts,
    describe_outcome,
    pick_steps,
    run_demo,
)
from tq_fast.errors import InvalidArgument, TqFastError
from tq_fast.models.tiny import TinyWorld, gold_reward
from tq_fast.results import StepTrace

CONFIG = DecodeConfig(k=8, alpha=0.3, num_rollouts=2, horizon=3, max_new_tokens=12)


@pytest.fixture(scope="module")
def world(trio: Trio) -> TinyWorld:
    return TinyWorld(
        sft=trio.sft,
        baseline=trio.baseline,
        reward=trio.reward,
        baseline_reward=trio.other_reward,
        beta=0.1,
        prompts=("d e", "f g h", "a b c"),
        demo_prompts=("a b c", "c"),
    )


@pytest.fixture
def run(world: TinyWorld, monkeypatch: pytest.MonkeyPatch):
    """Runs the demo on the random trio; returns its result and what it printed."""
    monkeypatch.setattr(demo, "load_tiny_world", lambda: world)
    monkeypatch.setattr(DemoOptions, "config", lambda options: CONFIG)

    def run(width: int = 80, num_prompts: int = 3) -> tuple[DemoResult, str]:
        console = Console(file=io.StringIO(), width=width)
        result = run_demo(DemoOptions(num_prompts=num_prompts), console)
        return result, console.file.getvalue()

    return run


@pytest.mark.parametrize("width", [80, 100])
def test_a_demo_fits_its_terminal_and_shows_every_part(run, width: int) -> None:
    result, shown = run(width)
    assert max(map(len, shown.splitlines())) <= width
    assert [method.name for method in result.methods] == ["SFT", "baseline", "Transfer Q*"]
    flat = " ".join(shown.split())
    for method in result.methods:
        for text, reward, gold in zip(method.texts, method.rewards, method.golds, strict=True):
            # Only the first words are looked for: the others may stand on the next lines.
            assert " ".join(text.split()[:3]) in flat
            assert f"{reward:.2f}" in flat and f"{gold:.2f}" in flat
        assert f"{sum(method.rewards) / 3:.2f}" in flat
    assert "How response 1 was chosen" in flat
    for sentence in describe_outcome(result):
        assert sentence in flat


def test_the_trace_marks_the_tokens_that_were_chosen(run) -> None:
    result, shown = run(num_prompts=1)
    tokenizer = result.tokenizer
    marked = [line.split()[1] for line in shown.splitlines() if line.strip().startswith(">")]
    steps = pick_steps(result.traces[0])
    chosen = [tokenizer.decode([result.traces[0][step].token_id]) for step in steps]
    assert marked == [f'"{text}"' for text in chosen]
    assert len(steps) == 6 == shown.count("after:")


def test_scores_are_those_of_the_reward_model_and_of_the_exact_reward(
    run, world: TinyWorld, trio: Trio
) -> None:
    result, _ = run()
    model = TransferDecoder(trio.baseline, trio.reward).reward.model
    steered = result.methods[-1]
    for idx, prompt in enumerate(result.prompts):
        trace = result.traces[idx]
        ids = [*result.tokenizer(prompt)["input_ids"], *(step.token_id for step in trace)]
        # The classifiers of transformers read the last token that is not padding.
        while ids[-1] == model.config.pad_token_id:
            ids.pop()
        with torch.no_grad():
            expected = float(model(input_ids=torch.tensor([ids])).logits[0, 0])
        assert steered.rewards[idx] == pytest.approx(expected, abs=1e-4)
    assert steered.golds == gold_reward(result.prompts, steered.texts)


def test_the_same_seed_gives_the_same_demo_and_no_prompt_depends_on_the_others(run) -> None:
    torch.manual_seed(1)
    many, _ = run()
    torch.manual_seed(2)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    one, _ = run(num_prompts=1)
    for method, alone in zip(many.methods, one.methods, strict=True):
        assert method.texts[0] == alone.texts[0]
    # The demo leaves the caller's random state and threads as they were.
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_num_threads() == threads


def test_another_seed_gives_other_samples(run, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = run()
    other = dataclasses.replace(CONFIG, seed=1)
    monkeypatch.setattr(DemoOptions, "config", lambda options: other)
    second, _ = run()
    for before, after in zip(first.methods, second.methods, strict=True):
        assert before.texts != after.texts


def test_options_reach_the_settings() -> None:
    config = DemoOptions(seed=3, num_prompts=1, k=5, alpha=0.2, num_rollouts=7).config()
    assert (config.seed, config.k, config.alpha, config.num_rollouts) == (3, 5, 0.2, 7)


def test_prompts_beyond_the_demos_own_are_held_out_ones(world: TinyWorld) -> None:
    assert choose_prompts(world, 2) == ["a b c", "c"]
    assert choose_prompts(world, 4) == ["a b c", "c", "d e", "f g h"]
    for number in (0, 5):
        with pytest.raises(InvalidArgument, match=f"prompts must be between 1 and 4, got {number}"):
            choose_prompts(world, number)


def test_a_package_without_its_models_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> TinyWorld:
        raise FileNotFoundError("the embedded model is missing")

    monkeypatch.setattr(demo, "load_tiny_world", fail)
    with pytest.raises(TqFastError, match="the embedded model is missing"):
        run_demo(DemoOptions(), Console(file=io.StringIO()))


def outcome(sft: list[float], baseline: list[float], steered: list[float]) -> list[str]:
    golds = [0.0] * len(sft)
    methods = [
        MethodResult(name, [""] * len(sft), rewards, golds)
        for name, rewards in (("SFT", sft), ("baseline", baseline), ("Transfer Q*", steered))
    ]
    return describe_outcome(DemoResult([], methods, [], [], None, 1.0, None))


def test_losses_are_said() -> None:
    assert outcome([0.0, 3.0], [2.0, 3.0], [1.0, 2.0]) == [
        "By reward, Transfer Q* lost to SFT on prompt 2; "
        "to baseline on prompts 1, 2 and on the mean.",
        "By gold reward, Transfer Q* lost on no prompt.",
    ]
    assert outcome([0.0], [0.0], [0.0])[0] == "By reward, Transfer Q* lost on no prompt."


def step(prior: list[float], final: list[float]) -> StepTrace:
    zeros = torch.zeros(len(prior))
    return StepTrace(
        candidates=torch.arange(len(prior)),
        rewards=zeros[:, None],
        q=zeros,
        q_stderr=zeros,
        ess=zeros,
        prior_logprobs=torch.tensor(prior).log(),
        final_logprobs=torch.tensor(final).log(),
        kl_to_sft=0.0,
        kl_to_baseline=0.0,
        choice=0,
    )


def test_the_steps_shown_are_those_at_which_the_law_moved_most() -> None:
    still = step([0.1, 0.1], [0.5, 0.5])
    # The law is certain: the other candidate has probability 0, and its log is -inf.
    moved = step([0.4, 0.4], [1.0, 0.0])
    assert pick_steps([still, moved]) == [0, 1]
    trace = [still, moved, still, moved, moved, moved, still, moved, moved, still]
    assert pick_steps(trace) == [1, 3, 4, 5, 7, 8]


def test_the_embedded_models_follow_the_reward() -> None:
    console = Console(file=io.StringIO(), width=80)
    result = run_demo(DemoOptions(num_prompts=4, num_rollouts=2), console)
    means = {m.name: sum(m.rewards) / len(m.rewards) for m in result.methods}
    # One standard deviation of the reward is 1; over prompts and seeds the gain is about that.
    assert means["Transfer Q*"] > means["SFT"] + 0.3
    assert means["Transfer Q*"] > means["baseline"]
    said = console.file.getvalue()
    assert max(map(len, said.splitlines())) <= 80
    # The demo samples its roll-outs.
    assert "mean KL from SFT at most" in " ".join(said.split())
