"""`fit_value`: what it reads off models is exact, and what it fits are the values enumerated."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tests.naive import next_token_logprobs
from tests.presets.test_plain import END, START, small_law, small_model, worth
from tests.presets.test_presets import ATOL, tokens
from tests.presets.test_value_guided import prior_and_q
from tests.truncation import truncate
from tq_fast import presets
from tq_fast.errors import InvalidArgument
from tq_fast.presets import fitting
from tq_fast.values import fitting as values_fitting
from tq_fast.values.fitting import FitOptions, LoggedTokens
from tq_fast.values.head import ValueHead

PROMPTS = [[0, 1], [1, 2], [2, 3], [3, 0], [0, 2], [1, 3]]
BETA = 0.7
SHORT = {"max_new_tokens": 3, "eos_token_id": END, "num_texts": 5, "epochs": 1}


def score(prompts: Sequence[object], responses: Sequence[Sequence[int]]) -> list[float]:
    return [worth(response) / 10 for response in responses]


def small_models() -> dict[str, Any]:
    return {"sft": small_model(11), "baseline": small_model(10), "reward": score}


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[tuple[LoggedTokens, ValueHead]]:
    """What every fit of the test was given, and its head."""
    seen: list[tuple[LoggedTokens, ValueHead]] = []

    def fit(tokens: LoggedTokens, *arguments: Any) -> ValueHead:
        head = fit_head(tokens, *arguments)
        seen.append((tokens, head))
        return head

    fit_head = fitting.fit_head
    monkeypatch.setattr(fitting, "fit_head", fit)
    return seen


def states_before(model: PreTrainedModel, prompt: list[int], text: list[int]) -> torch.Tensor:
    """The plain model's states `[T, D]` from which the tokens of `text` are predicted."""
    ids = torch.tensor([[*prompt, *text]])
    with torch.no_grad():
        hidden = model.base_model(ids, use_cache=False).last_hidden_state[0]
    return hidden[len(prompt) - 1 : -1]


def drawn_texts(source: str, **options: Any) -> list[list[list[int]]]:
    """The texts of every prompt, as the best of n draws them."""
    given = {**SHORT, **options}
    num = given.pop("num_texts")
    del given["epochs"]
    result = presets.best_of_n(PROMPTS, **small_models(), n=num, source=source, **given)
    return [stages[0].sequences for stages in result.stages]


@pytest.mark.parametrize("source", ["sft", "baseline"])
@pytest.mark.parametrize("prior", [None, "baseline"])
def test_the_states_are_those_of_the_plain_prior_before_every_token(
    logged: list[tuple[LoggedTokens, ValueHead]], source: str, prior: str | None
) -> None:
    head = tq_fast.fit_value(PROMPTS, **small_models(), source=source, prior=prior, **SHORT)
    ((found, _),) = logged
    texts = drawn_texts(source)
    model = small_models()[prior or "sft"]
    states = [
        states_before(model, prompt, text)
        for prompt, own in zip(PROMPTS, texts, strict=True)
        for text in own
    ]
    flat = [text for own in texts for text in own]
    torch.testing.assert_close(found.hidden, torch.cat(states), rtol=0, atol=ATOL)
    assert found.token_ids.tolist() == [token for text in flat for token in text]
    rewards = [reward for text in flat for reward in score([], [text]) * len(text)]
    assert found.rewards.tolist() == pytest.approx(rewards)
    groups = [i for i, own in enumerate(texts) for text in own for _ in text]
    assert found.groups.tolist() == groups
    assert torch.equal(found.weights, torch.ones(len(groups)))
    assert head.config.fit["prior"] == (prior or "sft")
    assert head.config.hidden_size == model.config.hidden_size


def log_ratios(
    prompt: list[int], text: list[int], policy: Callable[[list[int]], torch.Tensor]
) -> torch.Tensor:
    """Log pi_sft - log q of every token of `text`, fp64, the policy q being log-probs."""
    found = []
    for step, token in enumerate(text):
        context = [*prompt, *text[:step]]
        sft = next_token_logprobs(small_models()["sft"], context)
        found.append(float(sft[token] - policy(context)[token]))
    return torch.tensor(found, dtype=torch.float64)


def naive_weights(
    prompt: list[int], texts: list[list[int]], policy: Callable[[list[int]], torch.Tensor]
) -> list[float]:
    """exp(r / beta) rho_sft / q of what follows each token, of mean 1 over texts at each place."""
    raw = []
    for text in texts:
        ratios = log_ratios(prompt, text, policy)
        (reward,) = score([], [text])
        raw.append(
            [math.exp(reward / BETA + float(ratios[i + 1 :].sum())) for i in range(len(text))]
        )
    means = [
        sum(row[place] for row in raw if len(row) > place) / sum(len(row) > place for row in raw)
        for place in range(3)
        if any(len(row) > place for row in raw)
    ]
    return [weight / means[place] for row in raw for place, weight in enumerate(row)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rollout_temperature": 1.5, "rollout_top_k": 4, "rollout_top_p": 0.9},
        {"min_new_tokens": 2},
    ],
    ids=["plain", "truncated", "min-new-tokens"],
)
def test_indirect_weights_are_those_of_the_rest_of_the_text(
    logged: list[tuple[LoggedTokens, ValueHead]], options: dict[str, Any]
) -> None:
    given = {**SHORT, **options}
    tq_fast.fit_value(
        PROMPTS, **small_models(), source="baseline", transfer="indirect", beta=BETA, **given
    )
    ((found, _),) = logged
    cuts = [
        options.get("rollout_temperature", 1.0),
        options.get("rollout_top_k", 5),
        options.get("rollout_top_p", 2.0),
    ]

    def policy(context: list[int]) -> torch.Tensor:
        law = next_token_logprobs(small_models()["baseline"], context)
        if len(context) - 2 < options.get("min_new_tokens", 0):
            law[END] = -math.inf
        return truncate(law.log_softmax(-1), *cuts)

    expected = [
        weight
        for prompt, texts in zip(PROMPTS, drawn_texts("baseline", **options), strict=True)
        for weight in naive_weights(prompt, texts, policy)
    ]
    assert found.weights.tolist() == pytest.approx(expected, rel=1e-3)
    assert found.weights.std() > 0.1


@pytest.mark.parametrize("transfer", ["direct", "indirect"])
def test_a_second_round_adds_texts_of_the_first_head_and_reads_old_ones_once(
    logged: list[tuple[LoggedTokens, ValueHead]],
    monkeypatch: pytest.MonkeyPatch,
    transfer: str,
) -> None:
    read: list[int] = []
    read_one = fitting._TokenReader._read_one

    def count(self: Any, entry: Any, *arguments: Any) -> LoggedTokens:
        read.append(entry.drawn_from)
        return read_one(self, entry, *arguments)

    monkeypatch.setattr(fitting._TokenReader, "_read_one", count)
    # Two prompts are equal, so that they are one where prompts are held out.
    prompts = [*PROMPTS, PROMPTS[0]]
    options = {**SHORT, "transfer": transfer, "beta": BETA, "rounds": 2, "alpha": 0.3}
    head = tq_fast.fit_value(prompts, **small_models(), source="baseline", **options)
    assert read == [0] * 7 + [1] * 7
    (first, first_head), (both, _) = logged
    old = len(first.token_ids)
    for name in ("hidden", "token_ids", "rewards", "groups", "weights"):
        assert torch.equal(getattr(both, name)[:old], getattr(first, name))
    assert first.groups.unique().tolist() == both.groups.unique().tolist() == list(range(6))
    assert head.config.fit["prompts"] == 6 and head.config.fit["rounds"] == 2

    again = presets.best_of_n(
        prompts,
        sft=small_model(11),
        reward=score,
        value=first_head,
        source="value",
        n=5,
        alpha=0.3,
        seed=1,
        max_new_tokens=3,
        eos_token_id=END,
    )
    texts = [stages[0].sequences for stages in again.stages]
    flat = [token for own in texts for text in own for token in text]
    assert both.token_ids[old:].tolist() == flat

    def policy(context: list[int]) -> torch.Tensor:
        logprobs, _, q = prior_and_q(small_model(11), first_head, context)
        return (logprobs + q / 0.3).log_softmax(-1)

    expected = [1.0] * len(flat)
    if transfer == "indirect":
        expected = [
            weight
            for prompt, own in zip(prompts, texts, strict=True)
            for weight in naive_weights(prompt, own, policy)
        ]
    assert both.weights[old:].tolist() == pytest.approx(expected, rel=1e-3)


def law_after(role: str, prompt: list[int]) -> dict[tuple[int, ...], float]:
    model = small_models()[role]
    # small_law puts its own prompt before every response.
    return small_law(lambda ids: next_token_logprobs(model, [*prompt, *ids[len(START) :]]))


@functools.cache
def exact_values(kind: str) -> dict[tuple[tuple[int, ...], int], dict[int, tuple[float, float]]]:
    """By (prompt and text, ...): probability of each next token, and its exact Q.

    "sft" and "baseline" are E r under these models; "indirect" under rho_sft exp(r / beta).
    """
    found: dict[Any, dict[int, tuple[float, float]]] = {}
    for prompt in PROMPTS:
        law = law_after("baseline" if kind == "baseline" else "sft", prompt)
        visits = law_after("sft" if kind == "sft" else "baseline", prompt)
        for length in range(3):
            for text in {whole[:length] for whole in law if END not in whole[:length]}:
                for token in range(5):
                    start = (*text, token)
                    rest = {w: m for w, m in law.items() if w[: length + 1] == start}
                    if not rest:
                        continue
                    tilt = {
                        w: m * (math.exp(worth(w) / 10 / BETA) if kind == "indirect" else 1.0)
                        for w, m in rest.items()
                    }
                    q = sum(m * worth(w) / 10 for w, m in tilt.items()) / sum(tilt.values())
                    mass = sum(m for w, m in visits.items() if w[: length + 1] == start)
                    found.setdefault((tuple(prompt), text), {})[token] = (mass, q)
    return found


def closeness(head: ValueHead, kind: str, prompts: Sequence[Sequence[int]]) -> float:
    """R2 of the head's Q against the exact one, at the states and tokens that texts visit."""
    rows = []
    for (prompt, text), by_token in exact_values(kind).items():
        if list(prompt) not in prompts:
            continue
        hidden = states_before(small_model(11), list(prompt), [*text, 0])[-1:]
        for token, (mass, q) in by_token.items():
            rows.append((mass, q, float(head.q(hidden, torch.tensor([token])))))
    mass, truth, found = torch.tensor(rows, dtype=torch.float64).unbind(1)
    mean = (mass * truth).sum() / mass.sum()
    return float(1 - (mass * (found - truth) ** 2).sum() / (mass * (truth - mean) ** 2).sum())


@pytest.mark.parametrize("kind", ["sft", "baseline", "indirect"])
def test_the_fit_converges_to_the_exact_values(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fitted: list[list[int]] = []

    def split(groups: torch.Tensor, *arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        train, held = split_groups(groups, *arguments)
        fitted.extend(PROMPTS[group] for group in groups[train].unique())
        return train, held

    split_groups = values_fitting._split
    monkeypatch.setattr(values_fitting, "_split", split)
    quick = functools.partial(FitOptions, batch_size=256, learning_rate=3e-3)
    monkeypatch.setattr(fitting, "FitOptions", quick)
    options = {**SHORT, "num_texts": 500, "epochs": 14}
    if kind == "indirect":
        options |= {"transfer": "indirect", "beta": BETA}
    head = tq_fast.fit_value(
        PROMPTS,
        **small_models(),
        source="sft" if kind == "sft" else "baseline",
        **options,
    )
    own = closeness(head, kind, fitted)
    # A single held-out prompt says when to stop, and stops before the last of it is learnt.
    assert own > 0.8
    for other in {"sft", "baseline", "indirect"} - {kind}:
        assert closeness(head, other, fitted) < own


def test_the_head_guides_the_prior_that_it_was_fitted_on(tmp_path: Path) -> None:
    epochs: list[int] = []
    head = tq_fast.fit_value(
        PROMPTS,
        **small_models(),
        on_epoch=lambda epoch, r2: epochs.append(epoch),
        **{**SHORT, "epochs": 2},
    )
    assert epochs == [1, 2]
    assert head.config.fit["transfer"] == "direct" and head.config.fit["prior"] == "sft"
    assert head.config.models["reward"] == "score"
    same = tq_fast.fit_value(PROMPTS, **small_models(), **{**SHORT, "epochs": 2})
    pairs = zip(head.state_dict().values(), same.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    head.save(tmp_path)
    options = {"max_new_tokens": 3, "eos_token_id": END, "alpha": 0.2}
    ours = presets.value_guided(PROMPTS, sft=small_model(11), value=head, **options)
    theirs = presets.value_guided(PROMPTS, sft=small_model(11), value=tmp_path, **options)
    assert tokens(ours) == tokens(theirs)
    with pytest.raises(InvalidArgument, match="value belongs to another model than sft"):
        presets.value_guided(PROMPTS, sft=small_model(10), value=head, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": lambda p, r: [2.0] * len(r)}, "reward gives every text 2, so that"),
        ({"prompts": [[0, 1]]}, "prompts must be at least two different ones"),
        ({"prompts": [[0, 1], [0, 1]]}, "prompts must be at least two different ones"),
        ({"source": "value"}, "source must be one of 'sft', 'baseline', got 'value'"),
        ({"source": "baseline", "baseline": None}, "baseline is needed by the method 'fit_value'"),
        ({"reward": None}, "reward is needed by the method 'fit_value'"),
        ({"transfer": "indirect"}, "beta must be given for transfer='indirect'"),
        ({"transfer": "indirect", "beta": 1.0, "num_texts": 1}, "num_texts must be at least 2"),
        ({"transfer": "indirect", "beta": 1.0, "baseline": None}, "needs sft and baseline"),
        ({"transfer": "backward"}, "transfer must be one of 'direct', 'indirect'"),
        ({"rounds": 0}, "rounds must be an integer of at least 1, got 0"),
        ({"epochs": 0}, "epochs must be an integer of at least 1, got 0"),
        ({"num_texts": True}, "num_texts must be an integer of at least 1, got True"),
        ({"alpha": 0.0}, "alpha must be a finite number above 0"),
        ({"num_return_sequences": 2}, "num_return_sequences is 1 for 'fit_value'"),
        ({"num_text": 3}, "unknown option 'num_text'"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"sft": zoo.language_model("llama", vocab_size=99), "source": "baseline"}, "99"),
    ],
)
def test_bad_options_of_fit_value_are_refused(options: dict[str, Any], message: str) -> None:
    given = {**small_models(), **SHORT, **options}
    with pytest.raises(InvalidArgument, match=message):
        tq_fast.fit_value(given.pop("prompts", PROMPTS), **given)


def test_fitting_keeps_no_gradient_and_leaves_the_models_as_they_were() -> None:
    model = small_model(11)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.inference_mode():
        head = tq_fast.fit_value(PROMPTS, **small_models(), **SHORT)
    assert not any(weight.requires_grad for weight in head.parameters())
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not model.lm_head._forward_pre_hooks
