"""Blocks against a plain loop that keeps nothing, and their law and certificate written down."""

from __future__ import annotations

import math

import pytest
import torch

from tests.presets.naive_texts import decode_by_blocks
from tests.presets.small_world import divergence, hold_contest
from tests.presets.test_plain import BOUND, END, START, excess, small_model, worth
from tests.presets.test_presets import ATOL, ENDS, PROMPTS, run, tokens, value_head
from tests.presets.test_refining import (
    NUM_TEXTS,
    mean_and_error,
    naive,
    read,
    score_worth,
    small_source,
)
from tq_fast import presets
from tq_fast.errors import InvalidArgument

NUMBERS = {"branches": 3, "block_len": 2, "max_new_tokens": 9}


@pytest.mark.parametrize("ends", [(), ENDS], ids=["endless", "with-ends"])
@pytest.mark.parametrize("judge", ["prefix", "rollout"])
@pytest.mark.parametrize("source", ["baseline", "value"])
def test_blocks_are_the_plain_loop_token_for_token(
    source: str, judge: str, ends: tuple[int, ...]
) -> None:
    given = {"value": value_head(), "alpha": 2.0} if source == "value" else {}
    result = run("blocks", source=source, judge=judge, eos_token_id=ends, **given, **NUMBERS)
    how = naive(ends, source, alpha=2.0)
    with torch.no_grad():
        truth = [
            decode_by_blocks(prompt, how, branches=3, block_len=2, completes=judge == "rollout")
            for prompt in read()
        ]
    assert tokens(result) == [text for text, _ in truth]
    for stages, (_, record) in zip(result.stages, truth, strict=True):
        assert [stage.cut for stage in stages] == [stage.cut for stage in record]
        assert [stage.choice for stage in stages] == [stage.choice for stage in record]
        for ours, theirs in zip(stages, record, strict=True):
            assert ours.rewards.tolist() == pytest.approx(theirs.rewards, abs=ATOL)
            is_whole = judge == "rollout" and ours.cut == 0
            assert ours.sequences == (theirs.drawn if is_whole else None)


def test_one_block_is_the_best_of_n() -> None:
    options = {"eos_token_id": ENDS, "max_new_tokens": 7}
    best = run("best_of_n", n=3, **options)
    for block_len in (7, 20):
        for judge in ("prefix", "rollout"):
            ours = run("blocks", branches=3, block_len=block_len, judge=judge, **options)
            assert tokens(ours) == tokens(best)
            for one, other in zip(ours.certificates, best.certificates, strict=True):
                assert one.kl_to_sft == pytest.approx(other.kl_to_sft, abs=10 * ATOL)
                assert one.kl_to_baseline == pytest.approx(other.kl_to_baseline, abs=ATOL)


@pytest.mark.parametrize("judge", ["prefix", "rollout"])
def test_neither_batch_nor_waves_change_a_text(judge: str) -> None:
    options = {"branches": 5, "block_len": 3, "judge": judge, "eos_token_id": ENDS}
    options |= {"max_new_tokens": 8, "seed": 3}
    whole = run("blocks", **options)
    for changes in ({"batch_size": 1}, {"memory_budget": 50_000}):
        other = run("blocks", **changes, **options)
        assert tokens(other) == tokens(whole)
        for ours, theirs in zip(other.stages, whole.stages, strict=True):
            assert [s.choice for s in ours] == [s.choice for s in theirs]
    assert other.stats.rollout_steps > 2 * whole.stats.rollout_steps


def test_the_prefix_judge_encodes_every_token_once() -> None:
    result = run("blocks", PROMPTS[:2], sft=None, batch_size=1, **NUMBERS)
    how = naive(())
    with torch.no_grad():
        records = [
            decode_by_blocks(prompt, how, branches=3, block_len=2, completes=False)[1]
            for prompt in read(PROMPTS[:2])
        ]
    # The token before every block but the first is encoded again, and no last token of a draw.
    expected = sum(map(len, PROMPTS[:2])) + sum(len(record) - 1 for record in records)
    expected += sum(len(new) - 1 for record in records for s in record for new in s.drawn)
    assert result.stats.token_forwards["baseline"] == expected


@pytest.mark.parametrize("alpha", [None, 2.0], ids=["best", "soft"])
@pytest.mark.parametrize("judge", ["prefix", "rollout"])
def test_blocks_follow_their_law_and_the_certificate_bounds_its_divergence(
    judge: str, alpha: float | None
) -> None:
    law, texts, bound = small_source(), {(): 1.0}, 0.0
    while any(END not in text and len(text) < 3 for text in texts):
        contest = hold_contest(
            texts,
            law,
            lambda text: None if END in text or len(text) == 3 else len(text),
            worth,
            alpha=alpha,
            defends=False,
            limit=1 if judge == "prefix" else None,
            kept=1,
        )
        texts, bound = contest.law, bound + contest.choice_kl
    truth = divergence(texts, law)
    assert truth < bound
    result = presets.blocks(
        [torch.tensor(START)] * NUM_TEXTS,
        small_model(10),
        score_worth,
        branches=2,
        block_len=1,
        judge=judge,
        strategy="greedy" if alpha is None else "sample",
        alpha=alpha or 1.0,
        max_new_tokens=3,
        eos_token_id=END,
        batch_size=NUM_TEXTS,
    )
    drawn = [tuple(ids) for ids in tokens(result)]
    assert excess(drawn, texts) < BOUND
    assert excess(drawn, law) > BOUND
    assert [one.kl_kind for one in result.certificates] == ["at most"] * NUM_TEXTS
    mean, error = mean_and_error([one.kl_to_baseline for one in result.certificates])
    assert mean == pytest.approx(bound, abs=4 * error + 1e-6)


def test_a_single_branch_is_plain_sampling() -> None:
    result = presets.blocks(
        [torch.tensor(START)] * NUM_TEXTS,
        small_model(10),
        score_worth,
        sft=small_model(11),
        branches=1,
        block_len=2,
        max_new_tokens=3,
        eos_token_id=END,
        batch_size=NUM_TEXTS,
    )
    law = small_source()
    assert excess([tuple(ids) for ids in tokens(result)], law) < BOUND
    assert all(one.kl_to_baseline == pytest.approx(0.0, abs=1e-5) for one in result.certificates)
    mean, error = mean_and_error([one.kl_to_sft for one in result.certificates])
    other = small_source(11)
    assert mean == pytest.approx(divergence(law, other), abs=4 * error)


def test_a_soft_choice_among_equals_is_still_a_choice() -> None:
    """The divergence of a text that was chosen comes from its own log-ratio, ties or none."""
    result = run("blocks", strategy="sample", reward=lambda p, r: [1.0] * len(r), **NUMBERS)
    for one in result.certificates:
        assert one.kl_kind == "at most"
        assert one.kl_to_baseline == pytest.approx(0.0, abs=ATOL)
        assert math.isfinite(one.kl_to_sft)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"judge": "reward"}, "judge must be one of 'prefix', 'rollout', got 'reward'"),
        ({"branches": 0}, "branches must be an integer of at least 1, got 0"),
        ({"block_len": True}, "block_len must be an integer of at least 1, got True"),
        ({"strategy": None}, "strategy must be one of 'sample', 'greedy', got None"),
        ({"source": "value"}, "value is needed in 'blocks' with source='value'"),
        ({"reward": None}, "reward is needed by the method 'blocks'"),
    ],
)
def test_bad_options_of_blocks_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        run("blocks", **options)
