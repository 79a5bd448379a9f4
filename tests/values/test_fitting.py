"""The fit of a value head on tokens whose values are known."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from tq_fast.errors import InvalidArgument
from tq_fast.values.fitting import FitOptions, LoggedTokens, fit_head
from tq_fast.values.head import ValueHead, ValueHeadConfig

NUM_STATES, NUM_TOKENS, NUM_PROMPTS = 6, 5, 8
CONFIG = ValueHeadConfig(12, NUM_TOKENS + 1, width=32, rank=8, fit={"transfer": "direct"})
QUICK = FitOptions(epochs=12, batch_size=256, learning_rate=1e-2, weight_decay=0.0)
SHORT = FitOptions(epochs=1, batch_size=256)


@pytest.fixture
def states(generator: torch.Generator) -> torch.Tensor:
    return 3 * torch.randn(NUM_STATES, CONFIG.hidden_size, generator=generator) + 1


@pytest.fixture
def values(generator: torch.Generator) -> torch.Tensor:
    return 2 * torch.randn(NUM_STATES, NUM_TOKENS, generator=generator) + 5


def log(
    states: torch.Tensor, values: torch.Tensor, generator: torch.Generator, num: int = 1600
) -> tuple[LoggedTokens, torch.Tensor]:
    """Tokens whose reward is their value and a coin of 1 or -1; and where each is."""
    place = torch.randint(NUM_STATES, (num,), generator=generator)
    token = torch.randint(NUM_TOKENS, (num,), generator=generator)
    coin = torch.randint(2, (num,), generator=generator)
    tokens = LoggedTokens(
        hidden=states[place],
        token_ids=token,
        rewards=values[place, token] + 2.0 * coin - 1,
        groups=torch.arange(num) % NUM_PROMPTS,
        # What wins the coin weighs three times as much as what loses it.
        weights=0.5 + coin,
    )
    return tokens, place


def q_of(head: ValueHead, states: torch.Tensor) -> torch.Tensor:
    values, directions = head(states)
    return values[:, None] + directions @ head.token_embeddings[:NUM_TOKENS].t()


def weights_of(head: ValueHead) -> list[torch.Tensor]:
    return list(head.state_dict().values())


def is_same(one: ValueHead, other: ValueHead) -> bool:
    pairs = zip(weights_of(one), weights_of(other), strict=True)
    return all(torch.equal(mine, theirs) for mine, theirs in pairs)


@pytest.mark.parametrize("weighted", [False, True])
def test_the_fit_is_the_weighted_mean_of_the_rewards_at_every_state_and_token(
    states: torch.Tensor, values: torch.Tensor, generator: torch.Generator, weighted: bool
) -> None:
    tokens, place = log(states, values, generator, num=6400)
    if not weighted:
        tokens = dataclasses.replace(tokens, weights=torch.ones(len(place)))
    head = fit_head(tokens, CONFIG, QUICK)
    cell = place * NUM_TOKENS + tokens.token_ids
    sums = torch.zeros(2, NUM_STATES * NUM_TOKENS)
    sums[0].index_add_(0, cell, tokens.weights)
    sums[1].index_add_(0, cell, tokens.weights * tokens.rewards)
    means = (sums[1] / sums[0]).view(NUM_STATES, NUM_TOKENS)
    # Rewards scatter by 1; a cell has about 200 of them, an eighth of which are held out.
    torch.testing.assert_close(q_of(head, states), means, rtol=0, atol=0.3)
    expected = values + (0.5 if weighted else 0.0)
    assert float((q_of(head, states) - expected).abs().mean()) < 0.1
    assert head.config.fit["r2"] > 0.6
    # A token that no text has is neither liked nor not.
    assert not head.token_embeddings[NUM_TOKENS].any()


def test_prompts_that_are_held_out_are_not_fitted(
    states: torch.Tensor, values: torch.Tensor, generator: torch.Generator
) -> None:
    tokens, _ = log(states, values, generator, num=800)
    head = fit_head(tokens, CONFIG, SHORT)
    is_without = []
    for group in range(NUM_PROMPTS):
        rewards = torch.where(tokens.groups == group, 100.0, tokens.rewards)
        hidden = torch.where((tokens.groups == group)[:, None], 50.0, tokens.hidden)
        other = fit_head(dataclasses.replace(tokens, rewards=rewards, hidden=hidden), CONFIG, SHORT)
        is_without.append(is_same(head, other))
    assert sum(is_without) == head.config.fit["held_out_prompts"] == 1
    half = fit_head(tokens, CONFIG, dataclasses.replace(SHORT, held_out=0.5))
    assert half.config.fit["held_out_prompts"] == 4


def test_the_same_seed_gives_the_same_head(
    states: torch.Tensor, values: torch.Tensor, generator: torch.Generator
) -> None:
    tokens, _ = log(states, values, generator, num=400)
    torch.manual_seed(1)
    first = fit_head(tokens, CONFIG, SHORT)
    torch.manual_seed(2)
    assert is_same(first, fit_head(tokens, CONFIG, SHORT))
    assert not is_same(first, fit_head(tokens, CONFIG, dataclasses.replace(SHORT, seed=1)))


def test_the_head_says_how_it_was_fitted_and_how_well(
    states: torch.Tensor, values: torch.Tensor, generator: torch.Generator, tmp_path: Path
) -> None:
    tokens, _ = log(states, values, generator, num=800)
    seen: list[tuple[int, float]] = []
    options = dataclasses.replace(QUICK, epochs=5)
    head = fit_head(tokens, CONFIG, options, lambda epoch, r2: seen.append((epoch, r2)))
    fit = head.config.fit
    assert [epoch for epoch, _ in seen] == [1, 2, 3, 4, 5]
    assert fit["r2_by_epoch"] == [r2 for _, r2 in seen]
    assert fit["r2"] == max(fit["r2_by_epoch"])
    assert fit["tokens"] == 800 and fit["prompts"] == NUM_PROMPTS
    assert fit["transfer"] == "direct" and fit["epochs"] == 5
    assert {name: fit[name] for name in dataclasses.asdict(options)} == dataclasses.asdict(options)
    predicted = [part["predicted"] for part in fit["calibration"]]
    assert predicted == sorted(predicted) and len(predicted) == 10
    assert sum(part["tokens"] for part in fit["calibration"]) == 800 // NUM_PROMPTS
    head.save(tmp_path)
    loaded = ValueHead.load(tmp_path)
    assert is_same(head, loaded) and loaded.config == head.config


def test_held_out_prompts_of_one_reward_leave_nothing_to_foretell(
    states: torch.Tensor, values: torch.Tensor, generator: torch.Generator, tmp_path: Path
) -> None:
    tokens, _ = log(states, values, generator, num=800)
    for group in range(NUM_PROMPTS):
        rewards = torch.where(tokens.groups == group, 5.0, tokens.rewards)
        options = dataclasses.replace(SHORT, epochs=3)
        head = fit_head(dataclasses.replace(tokens, rewards=rewards), CONFIG, options)
        if head.config.fit["r2_by_epoch"] == [0.0] * 3:
            break
    else:
        pytest.fail("no prompt is held out")
    head.save(tmp_path)
    assert ValueHead.load(tmp_path).config.fit["r2"] == 0.0


def test_where_there_is_nothing_to_learn_the_fit_is_refused(
    states: torch.Tensor, values: torch.Tensor, generator: torch.Generator
) -> None:
    tokens, _ = log(states, values, generator, num=100)
    same = dataclasses.replace(tokens, rewards=torch.full((100,), 0.5))
    with pytest.raises(InvalidArgument, match=r"reward gives every text 0\.5, so that"):
        fit_head(same, CONFIG, SHORT)
    one = dataclasses.replace(tokens, groups=torch.zeros(100, dtype=torch.int64))
    with pytest.raises(InvalidArgument, match=r"at least two different ones.* got 1"):
        fit_head(one, CONFIG, SHORT)
