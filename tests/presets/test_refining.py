"""Refinement against a plain loop that keeps nothing, and its certificate against the truth."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from tests import zoo
from tests.naive import classifier_reward, next_token_logprobs
from tests.presets.naive_texts import (
    CutAt,
    NaiveStage,
    NaiveTexts,
    guided_logits_of,
    logits_of,
    refine_naively,
)
from tests.presets.small_world import divergence, entropy, hold_contest
from tests.presets.test_plain import (
    BOUND,
    END,
    START,
    excess,
    small_law,
    small_model,
    worth,
)
from tests.presets.test_presets import ATOL, ENDS, PROMPTS, models, run, tokens, value_head
from tq_fast import DecodeResult, presets
from tq_fast.errors import InvalidArgument
from tq_fast.prompts import Prompt, read_prompts

# Every fifth token is the end of a sentence.
PERIODS = set(range(0, zoo.VOCAB_SIZE, 5))
# Responses of which the law is looked at.
NUM_TEXTS = 600
NUMBERS = {"first": 3, "branches": 3, "stages": 2, "max_new_tokens": 9}


@functools.cache
def word_tokenizer() -> PreTrainedTokenizerFast:
    words = {("." + " " * i if i in PERIODS else f"w{i}"): i for i in range(zoo.VOCAB_SIZE)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(words, unk_token="w1")))


def sentence_cut(stage: int, text: list[int]) -> int | None:
    ends = [i + 1 for i in range(1, len(text)) if text[i] in PERIODS and text[i - 1] not in PERIODS]
    return ends[stage - 1] if len(ends) >= stage and ends[stage - 1] < len(text) else None


def fixed_cut(places: Sequence[int]) -> CutAt:
    return lambda stage, text: places[stage - 1] if places[stage - 1] < len(text) else None


def even_cut(stages: int) -> CutAt:
    return lambda stage, text: stage * len(text) // (stages + 1)


CUTS: dict[str, tuple[object, CutAt]] = {
    "even": ("even", even_cut(2)),
    "sentence": ("sentence", sentence_cut),
    "number": (3, fixed_cut([3, 6])),
    "list": ([4, 2], fixed_cut([4, 2])),
}


def read(prompts: Sequence[Sequence[int]] = PROMPTS) -> list[Prompt]:
    return read_prompts(prompts, None, vocab_size=zoo.VOCAB_SIZE)


def naive(ends: tuple[int, ...], source: str = "baseline", alpha: float = 1.0) -> NaiveTexts:
    if source == "value":
        law = guided_logits_of(models()["sft"], value_head(), alpha)
    else:
        law = logits_of(models()[source])
    return NaiveTexts(
        next_logits=law,
        reward=classifier_reward(models()["reward"]),
        max_new_tokens=NUMBERS["max_new_tokens"],
        eos=ends,
    )


def assert_stages(
    result: DecodeResult, truth: Sequence[tuple[list[int], list[NaiveStage]]]
) -> None:
    assert tokens(result) == [text for text, _ in truth]
    for stages, (_, record) in zip(result.stages, truth, strict=True):
        assert [stage.cut for stage in stages] == [stage.cut for stage in record]
        assert [stage.choice for stage in stages] == [stage.choice for stage in record]
        for ours, theirs in zip(stages, record, strict=True):
            assert ours.rewards.tolist() == pytest.approx(theirs.rewards, abs=ATOL)
            is_whole = ours.cut == 0
            assert ours.sequences == (theirs.drawn if is_whole else None)


@pytest.mark.parametrize("ends", [(), ENDS], ids=["endless", "with-ends"])
@pytest.mark.parametrize("cuts", CUTS)
def test_refinement_is_the_plain_loop_token_for_token(cuts: str, ends: tuple[int, ...]) -> None:
    given, cut_at = CUTS[cuts]
    with torch.no_grad():
        truth = [
            refine_naively(prompt, naive(ends), first=3, branches=3, stages=2, cut_at=cut_at)
            for prompt in read()
        ]
    result = run("refine", cuts=given, eos_token_id=ends, tokenizer=word_tokenizer(), **NUMBERS)
    assert_stages(result, truth)
    kind = "approximate" if cuts == "even" else "at most"
    assert [one.kl_kind for one in result.certificates] == [kind] * len(PROMPTS)


@pytest.mark.parametrize("source", ["sft", "value"])
def test_refinement_draws_from_its_source(source: str) -> None:
    given = {"value": value_head()} if source == "value" else {}
    result = run("refine", source=source, eos_token_id=ENDS, cuts=3, alpha=2.0, **given, **NUMBERS)
    with torch.no_grad():
        truth = [
            refine_naively(
                prompt,
                naive(ENDS, source, alpha=2.0),
                first=3,
                branches=3,
                stages=2,
                cut_at=CUTS["number"][1],
            )
            for prompt in read()
        ]
    assert_stages(result, truth)
    assert set(result.stats.token_forwards) == {"sft", "reward"}
    assert all(one.kl_to_baseline is None for one in result.certificates)


def test_the_reward_never_falls_and_belongs_to_the_text() -> None:
    score = classifier_reward(models()["reward"])
    for cuts in ("even", 2):
        result = run("refine", cuts=cuts, eos_token_id=ENDS, **NUMBERS)
        for prompt, ids, stages, trace in zip(
            PROMPTS, tokens(result), result.stages, result.traces, strict=True
        ):
            worth = -math.inf
            for stage in stages:
                best = float(stage.rewards.max())
                assert (stage.choice is not None) == (best > worth)
                worth = max(worth, best)
            (truth,) = score([[*prompt, *ids]])
            assert worth == pytest.approx(truth, abs=ATOL)
            assert trace[0].rewards.tolist() == [[worth]]


def test_on_a_tie_the_text_that_was_there_stays() -> None:
    result = run("refine", reward=lambda p, r: [1.0] * len(r), **NUMBERS)
    first = run("best_of_n", n=3, reward=lambda p, r: [1.0] * len(r), max_new_tokens=9)
    assert tokens(result) == tokens(first)
    for stages in result.stages:
        assert [stage.choice for stage in stages] == [0, None, None]


def test_a_text_that_ends_before_a_cut_is_left_alone() -> None:
    options = {**NUMBERS, "stages": 3, "eos_token_id": ENDS, "cuts": [1, 5, 8]}
    result = run("refine", **options)
    lengths = set()
    for ids, stages in zip(tokens(result), result.stages, strict=True):
        assert all(stage.cut < NUMBERS["max_new_tokens"] for stage in stages)
        assert len(stages) <= 4
        if len(ids) <= 5:
            assert 8 not in [stage.cut for stage in stages]
        lengths.add(len(stages))
    assert min(lengths) < 4
    # Where every text is shorter than the first cut, this is the best of n.
    short = {**options, "max_new_tokens": 4, "cuts": [4, 5, 6]}
    best = run("best_of_n", n=3, max_new_tokens=4, eos_token_id=ENDS)
    assert tokens(run("refine", **short)) == tokens(best)


def test_without_stages_it_is_the_best_of_n() -> None:
    for source in ("baseline", "sft"):
        options = {"eos_token_id": ENDS, "max_new_tokens": 9, "source": source}
        refined = run("refine", first=4, branches=2, stages=0, **options)
        best = run("best_of_n", n=4, **options)
        assert tokens(refined) == tokens(best)
        for ours, theirs in zip(refined.certificates, best.certificates, strict=True):
            assert ours.kl_kind == theirs.kl_kind == "at most"
            assert ours.kl_to_sft == pytest.approx(theirs.kl_to_sft, abs=10 * ATOL)
        for ours, theirs in zip(refined.stages, best.stages, strict=True):
            assert [s.sequences for s in ours] == [s.sequences for s in theirs]
            assert [s.choice for s in ours] == [s.choice for s in theirs]


def test_neither_batch_nor_waves_change_a_text() -> None:
    options = {**NUMBERS, "first": 6, "branches": 5, "eos_token_id": ENDS, "seed": 3}
    whole = run("refine", **options)
    for changes in ({"batch_size": 1}, {"batch_size": 3}, {"memory_budget": 60_000}):
        other = run("refine", **changes, **options)
        assert tokens(other) == tokens(whole)
        for ours, theirs in zip(other.stages, whole.stages, strict=True):
            assert [s.choice for s in ours] == [s.choice for s in theirs]
            for one, two in zip(ours, theirs, strict=True):
                torch.testing.assert_close(one.rewards, two.rewards, rtol=0, atol=ATOL)
        for ours, theirs in zip(other.certificates, whole.certificates, strict=True):
            assert ours.kl_to_sft == pytest.approx(theirs.kl_to_sft, abs=10 * ATOL)
    assert other.stats.rollout_steps > 2 * whole.stats.rollout_steps
    # All three stand at a time: the SFT model reads the texts before the others are let go.
    assert set(other.stats.peak_kv_bytes) == {"baseline", "sft", "reward"}
    assert sum(other.stats.peak_kv_bytes.values()) <= 60_000


def shared(rows: Sequence[Sequence[int]]) -> int:
    columns = zip(*rows, strict=False)
    return len(list(itertools.takewhile(lambda column: len(set(column)) == 1, columns)))


@pytest.mark.parametrize("cuts", ["even", "number", "list"])
def test_nothing_is_encoded_twice_but_the_token_before_a_cut(cuts: str) -> None:
    given, cut_at = CUTS[cuts]
    prompts = read(PROMPTS[:3])
    with torch.no_grad():
        truth = [
            refine_naively(prompt, naive(()), first=3, branches=3, stages=2, cut_at=cut_at)
            for prompt in prompts
        ]
    # One prompt at a time: in a pass, rows of different lengths would be padded.
    result = run("refine", PROMPTS[:3], cuts=given, sft=None, batch_size=1, **NUMBERS)
    assert tokens(result) == [text for text, _ in truth]
    drawn = sum(len(new) - 1 for _, record in truth for s in record for new in s.drawn)
    again = sum(len(record) - 1 for _, record in truth)
    encoded = sum(len(prompt.token_ids) for prompt in prompts)
    assert result.stats.token_forwards["baseline"] == encoded + drawn + again
    # A reward reads every token of every text once, less what all texts of a stage share.
    read_by_reward = 0
    for prompt, (_, record) in zip(prompts, truth, strict=True):
        for stage in record:
            start = [*prompt.token_ids, *stage.before[: stage.cut]]
            rows = [[*start, *new] for new in stage.drawn]
            if stage is record[0]:
                known = min(shared(rows), len(rows[0]) - 1)
                read_by_reward += known
            else:
                known = shared([*rows, [*prompt.token_ids, *stage.before]])
            read_by_reward += sum(len(row) - known for row in rows)
    assert result.stats.token_forwards["reward"] == read_by_reward


def test_the_divergence_to_another_model_is_that_of_the_text_that_was_kept() -> None:
    result = run("refine", cuts=3, **NUMBERS)
    for prompt, ids, stages, one, trace in zip(
        PROMPTS, tokens(result), result.stages, result.certificates, result.traces, strict=True
    ):
        extra, stayed = math.log(3) - 2 / 3, 0
        for number, stage in enumerate(stages[1:]):
            # Krichevsky and Trofimov's code for whether the text stayed.
            chance = (stayed + 0.5) / (number + 1)
            stays = stage.choice is None
            extra -= math.log(chance if stays else 1 - chance)
            extra += 0 if stays else math.log(3) - 2 / 3
            stayed += stays
        ratio = 0.0
        for step, token in enumerate(ids):
            context = [*prompt, *ids[:step]]
            laws = [next_token_logprobs(models()[role], context) for role in ("baseline", "sft")]
            ratio += float(laws[0][token] - laws[1][token])
            own = float(laws[0][token])
            assert float(trace[step].final_logprobs) == pytest.approx(own, abs=ATOL)
        assert one.kl_to_baseline == pytest.approx(extra, abs=ATOL)
        assert one.kl_to_sft == pytest.approx(extra + ratio, abs=10 * ATOL)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuts": "odd"}, "cuts must be 'even', 'sentence', a number of tokens"),
        ({"cuts": 0}, "cuts must be"),
        ({"cuts": True}, "cuts must be"),
        ({"cuts": [1, 0]}, "cuts must be"),
        ({"cuts": [1]}, r"cuts must be one number a stage, 2, got 1"),
        ({"cuts": "sentence"}, "cuts='sentence' are looked for in text"),
        ({"stages": -1}, "stages must be an integer of at least 0, got -1"),
        ({"first": 0}, "first must be an integer of at least 1, got 0"),
        ({"branches": 1.5}, "branches must be an integer of at least 1, got 1.5"),
        ({"strategy": "best"}, "strategy must be one of 'sample', 'greedy', got 'best'"),
        ({"source": "value"}, "value is needed in 'refine' with source='value'"),
        ({"value": "x"}, "value has no part in 'refine' with source='baseline'"),
    ],
)
def test_bad_options_of_refinement_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        run("refine", **options)


@functools.cache
def small_source(seed: int = 10) -> dict[tuple[int, ...], float]:
    return small_law(functools.partial(next_token_logprobs, small_model(seed)))


def score_worth(prompts: Sequence[object], responses: Sequence[Sequence[int]]) -> list[float]:
    return [worth(response) for response in responses]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    found = torch.tensor(values, dtype=torch.float64)
    return float(found.mean()), float(found.std()) / math.sqrt(len(found))


@pytest.mark.parametrize("alpha", [None, 2.0], ids=["best", "soft"])
@pytest.mark.parametrize("cuts", [[1, 2], [2, 1]], ids=str)
def test_refined_texts_follow_their_law_and_the_certificate_bounds_its_divergence(
    cuts: list[int], alpha: float | None
) -> None:
    law = small_source()
    contests = [hold_contest({(): 1.0}, law, lambda _: 0, worth, alpha=alpha, defends=False)]
    for place in cuts:
        contests.append(
            hold_contest(
                contests[-1].law,
                law,
                lambda text, place=place: place if place < len(text) else None,
                worth,
                alpha=alpha,
                defends=True,
            )
        )
    final = contests[-1].law
    truth = divergence(final, law)
    bound = sum(contest.choice_kl for contest in contests)
    bound += sum(one.held * entropy(one.stays / one.held) for one in contests[1:])
    assert truth < bound

    result = presets.refine(
        [torch.tensor(START)] * NUM_TEXTS,
        small_model(10),
        score_worth,
        first=2,
        branches=2,
        stages=2,
        cuts=cuts,
        strategy="greedy" if alpha is None else "sample",
        alpha=alpha or 1.0,
        max_new_tokens=3,
        eos_token_id=END,
        batch_size=NUM_TEXTS,
    )
    drawn = [tuple(ids) for ids in tokens(result)]
    assert excess(drawn, final) < BOUND
    assert excess(drawn, law) > BOUND
    assert [one.kl_kind for one in result.certificates] == ["at most"] * NUM_TEXTS
    mean, error = mean_and_error([one.kl_to_baseline for one in result.certificates])
    # The code for what happened is longer than the entropy of it, and so the bound holds.
    assert mean + 4 * error > bound
    assert mean - 4 * error > truth
    num_held = sum(len(stages) - 1 for stages in result.stages)
    expected = sum(contest.held for contest in contests[1:])
    assert num_held / NUM_TEXTS == pytest.approx(expected, abs=4 / math.sqrt(NUM_TEXTS))
