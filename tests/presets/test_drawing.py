"""Texts drawn over forests: stop strings across a cut, failures, progress and soft choices."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests import zoo
from tests.presets.naive_texts import NaiveStage, NaiveTexts, decode_by_blocks, refine_naively
from tests.presets.test_presets import ATOL, ENDS, PROMPTS, models, run, tokens, value_head
from tests.presets.test_refining import CUTS, NUMBERS, fixed_cut, naive, read, word_tokenizer
from tests.test_speed_options import share_of_low
from tq_fast import session
from tq_fast.config import DecodeConfig, Role, SpeedOptions
from tq_fast.errors import DecodingError, RewardError
from tq_fast.models.options import LoadingOptions
from tq_fast.presets.drawing import TextForest
from tq_fast.presets.laws import MixtureLaw
from tq_fast.results import Response
from tq_fast.session import Session

WHOLE_TEXTS: dict[str, dict[str, object]] = {
    "best_of_n": {"n": 5},
    "refine": {"first": 3, "branches": 4, "stages": 2},
    "blocks": {"branches": 4, "block_len": 3},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoppedTexts(NaiveTexts):
    """Texts that end with a pair of tokens, which the reward does not read."""

    pair: tuple[int, int]

    def is_complete(self, text: Sequence[int]) -> bool:
        return super().is_complete(text) or tuple(text[-2:]) == self.pair

    def score(self, prompt: object, texts: Sequence[Sequence[int]]) -> list[float]:
        cut = [text[:-2] if tuple(text[-2:]) == self.pair else text for text in texts]
        return super().score(prompt, cut)


@pytest.mark.parametrize("method", ["refine", "blocks"])
def test_a_stop_string_is_found_across_the_cut(method: str) -> None:
    def replay(how: NaiveTexts) -> list[tuple[list[int], list[NaiveStage]]]:
        with torch.no_grad():
            if method == "blocks":
                return [
                    decode_by_blocks(prompt, how, branches=3, block_len=2, completes=False)
                    for prompt in read()
                ]
            numbers = {"first": 3, "branches": 3, "stages": 2}
            cut_at = fixed_cut([2, 4])
            return [refine_naively(prompt, how, cut_at=cut_at, **numbers) for prompt in read()]

    # A token before the first cut and one that is drawn behind it, where the text had another.
    stage = replay(naive(()))[0][1][1]
    old = stage.before[stage.cut : stage.cut + 1]
    after = next(new[0] for new in stage.drawn if [new[0]] != old)
    pair = (stage.before[stage.cut - 1], after)
    stop = word_tokenizer().decode(list(pair))
    options = {"max_new_tokens": 9, "tokenizer": word_tokenizer(), "stop": stop}
    if method == "refine":
        options |= {"first": 3, "branches": 3, "stages": 2, "cuts": 2}
    else:
        options |= {"branches": 3, "block_len": 2}
    result = run(method, **options)
    base = {field.name: getattr(naive(()), field.name) for field in dataclasses.fields(NaiveTexts)}
    truth = replay(StoppedTexts(**base, pair=pair))
    assert tokens(result) == [text for text, _ in truth]
    assert all(stop not in text for text in result.texts)
    # Some draw completes the string with its first token, and so is one token long.
    assert any(
        stage.cut and (stage.before[stage.cut - 1], *new) == pair
        for _, record in truth
        for stage in record
        for new in stage.drawn
    )


@pytest.mark.parametrize("method", ["refine", "blocks"])
def test_no_text_ends_before_it_has_enough_tokens(method: str) -> None:
    result = run(
        method, eos_token_id=ENDS, min_new_tokens=5, max_new_tokens=9, **WHOLE_TEXTS[method]
    )
    for ids in tokens(result):
        assert not set(ids[:5]) & set(ENDS)
    free = run(method, eos_token_id=ENDS, max_new_tokens=9, **WHOLE_TEXTS[method])
    assert any(set(ids[:5]) & set(ENDS) for ids in tokens(free))


@pytest.mark.parametrize("method", WHOLE_TEXTS)
@pytest.mark.parametrize("changes", [{}, {"batch_size": 2}, {"memory_budget": 60_000}], ids=str)
def test_progress_comes_to_its_end(
    method: str, changes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars: list[tuple[int, list[int]]] = []

    class Bar(session.TokenBar):
        def __init__(self, num_tokens: int, *options: Any) -> None:
            super().__init__(num_tokens, *options)
            bars.append((num_tokens, []))

        def advance(self, num_tokens: int) -> None:
            super().advance(num_tokens)
            bars[-1][1].append(self.num_done)

    monkeypatch.setattr(session, "TokenBar", Bar)
    run(method, eos_token_id=ENDS, max_new_tokens=9, **WHOLE_TEXTS[method], **changes)
    ((total, done),) = bars
    assert done[-1] == total and done == sorted(done)


@pytest.mark.parametrize("method", ["refine", "blocks"])
def test_out_of_memory_goes_on_with_fewer_prompts_and_texts(method: str) -> None:
    numbers: list[int] = []

    def short(prompts: Sequence[object], responses: Sequence[Sequence[int]]) -> list[float]:
        numbers.append(len(responses))
        if len(responses) > 3:
            raise torch.OutOfMemoryError("no memory")
        return share_of_low(prompts, responses)

    options = {**WHOLE_TEXTS[method], "max_new_tokens": 6, "eos_token_id": ENDS}
    plain = run(method, reward=share_of_low, **options)
    with pytest.warns(UserWarning, match="out of memory with 4 prompts and 16 roll-outs"):
        ours = run(method, reward=short, **options)
    assert max(numbers) > 3 and numbers[-1] <= 3
    assert tokens(ours) == tokens(plain)
    assert [[s.choice for s in own] for own in ours.stages] == [
        [s.choice for s in own] for own in plain.stages
    ]


@pytest.mark.parametrize("method", ["refine", "blocks"])
def test_an_error_keeps_the_texts_that_are_finished(method: str) -> None:
    def fail(prompts: Sequence[object], responses: Sequence[Sequence[int]]) -> list[float]:
        if PROMPTS[2] in prompts:
            raise KeyError("no such key")
        return share_of_low(prompts, responses)

    options = {**WHOLE_TEXTS[method], "max_new_tokens": 6}
    whole = run(method, reward=share_of_low, **options)
    with pytest.raises(RewardError, match="prompt 2, step 0: the reward raised KeyError") as caught:
        run(method, reward=fail, batch_size=2, **options)
    assert {idx: ids.tolist() for idx, ids in caught.value.finished.items()} == dict(
        enumerate(tokens(whole)[:2])
    )


@pytest.mark.parametrize(
    ("method", "role"), [("sft", "sft"), ("value_guided", "sft"), ("best_of_n", "baseline")]
)
def test_equal_prompts_side_by_side_share_a_tree(method: str, role: Role) -> None:
    prompts = [PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    options: dict[str, Any] = {"num_return_sequences": 3, "batch_size": 9}
    options |= {"min_new_tokens": 2, "eos_token_id": ENDS}
    apart = run(method, prompts, speed=SpeedOptions(share_prefixes=False), **options)
    ours = run(method, prompts, **options)
    assert tokens(ours) == tokens(apart)
    assert len({tuple(text) for text in tokens(ours)}) > 3
    for one, other in zip(ours.certificates, apart.certificates, strict=True):
        assert one.kl_to_sft == pytest.approx(other.kl_to_sft, abs=ATOL)
    # One of three equal prompts is encoded, and the third prompt is a copy of the first.
    saved = apart.stats.token_forwards[role] - ours.stats.token_forwards[role]
    assert saved == 2 * (5 + 3 + 5) + 5
    assert ours.stats.peak_kv_bytes[role] < apart.stats.peak_kv_bytes[role]


def test_a_stop_string_ends_the_response_of_its_own_prompt_in_a_shared_tree() -> None:
    options: dict[str, Any] = {"num_return_sequences": 4, "stop": ["t7", "t3 "]}
    lm = {**models(), "tokenizer": word_tokenizer()}
    apart = run("sft", [PROMPTS[0]], speed=SpeedOptions(share_prefixes=False), **lm, **options)
    ours = run("sft", [PROMPTS[0]], **lm, **options)
    assert tokens(ours) == tokens(apart)


def open_forest(
    prompts: Sequence[Sequence[int]], **changes: object
) -> tuple[TextForest, Session, DecodeConfig]:
    languages = {"baseline": models()["baseline"], "sft": models()["sft"]}
    opened = Session(languages, {}, LoadingOptions())
    config = DecodeConfig(max_new_tokens=6, eos_token_id=(), **changes)
    law = MixtureLaw({"baseline": 1.0, "sft": 0.0}, (), zoo.VOCAB_SIZE, config, False)
    responses = [Response(i, prompt) for i, prompt in enumerate(read(prompts))]
    forest = TextForest(
        opened, law, responses, num_rows=3 * len(prompts), config=config, keeps_texts=True
    )
    forest.prefill()
    return forest, opened, config


@torch.no_grad()
def test_draws_do_not_depend_on_what_is_drawn_beside_them() -> None:
    forest, _, _ = open_forest(PROMPTS[:3])
    nothing: dict[int, list[int]] = {tree: [] for tree in range(3)}
    together = forest.draw(range(3), stage=0, before=nothing)
    alone = [
        forest.draw([2], stage=0, before={1: []})[0],
        forest.draw([0], stage=0, before={2: []})[0],
    ]
    for one, other in zip(alone, (together[5], together[6]), strict=True):
        assert one.tree == other.tree and one.token_ids == other.token_ids
        for name, column in one.columns.items():
            torch.testing.assert_close(column, other.columns[name], rtol=0, atol=ATOL)
    other_stage = forest.draw(range(3), stage=1, before=nothing)
    assert [one.token_ids for one in other_stage] != [one.token_ids for one in together]
    short = forest.draw(range(3), stage=0, before=nothing, limit=2)
    assert [one.token_ids for one in short] == [one.token_ids[:2] for one in together]


@torch.no_grad()
def test_a_kept_draw_is_continued_from_any_cut_in_all_models() -> None:
    forest, _, _ = open_forest(PROMPTS[:3])
    first = forest.draw(range(3), stage=0, before={tree: [] for tree in range(3)})
    kept = [first[1], first[5], first[6]]
    forest.keep(kept)
    for cut in (4, 1, 3):
        before = {one.tree: one.token_ids[:cut] for one in kept if one.tree != 1}
        forest.seek(before)
        found = forest.draw(range(2), stage=cut, before=before)
        assert [one.tree for one in found] == [0, 0, 2, 2]
        for one in found:
            assert len(one.token_ids) == 6 - cut
            for role in ("baseline", "sft"):
                context = [*PROMPTS[one.tree], *before[one.tree]]
                ids = torch.tensor([[*context, *one.token_ids]])
                logits = models()[role](ids, use_cache=False).logits[0, len(context) - 1 : -1]
                law = logits.double().log_softmax(-1)
                own = law.gather(1, torch.tensor(one.token_ids)[:, None]).squeeze(1)
                column = one.columns[f"logprob:{role}"].double()
                torch.testing.assert_close(column, own, rtol=0, atol=ATOL)


@torch.no_grad()
def test_logits_that_are_no_law_name_prompt_and_step_of_the_whole_response() -> None:
    forest, _, _ = open_forest(PROMPTS[:2])
    first = forest.draw([0], stage=0, before={0: [], 1: []})
    forest.keep(first)
    before = {1: first[1].token_ids[:3]}
    forest.seek(before)
    (language,) = [f for role, f in forest.forests.items() if role == "baseline"]
    language.next_logits[1] = math.nan
    with pytest.raises(DecodingError, match="prompt 1, step 3: the logits"):
        forest.draw([0], stage=1, before=before)


@pytest.mark.parametrize("method", ["refine", "blocks"])
def test_a_soft_choice_follows_the_softmax_of_the_rewards(method: str) -> None:
    options = {**WHOLE_TEXTS[method], "strategy": "sample", "alpha": 0.1, "max_new_tokens": 6}
    result = run(method, [[5, 6, 7]] * 60, reward=share_of_low, **options)
    gain, spread, num = 0.0, 0.0, 0
    for stages in result.stages:
        for stage in stages:
            if stage.choice is None or (method == "refine" and stage.cut):
                continue
            weights = (stage.rewards.double() / 0.1).softmax(0)
            mean = float((weights * stage.rewards).sum())
            gain += float(stage.rewards[stage.choice]) - mean
            spread += float((weights * (stage.rewards - mean) ** 2).sum())
            num += len(set(stage.rewards.tolist())) > 1
    assert num > 40
    assert abs(gain) < 4 * math.sqrt(spread)
    greedy = run(method, [[5, 6, 7]] * 60, reward=share_of_low, **{**options, "strategy": "greedy"})
    assert tokens(greedy) != tokens(result)
    # Nearly no temperature is left: the best one is drawn.
    cold = run(method, reward=share_of_low, **{**options, "alpha": 1e-6})
    best = run(method, reward=share_of_low, **{**options, "strategy": "greedy"})
    for ours, theirs in zip(cold.stages[0][:1], best.stages[0][:1], strict=True):
        assert ours.rewards[ours.choice] == theirs.rewards[theirs.choice]


def test_one_model_in_both_roles_is_run_once() -> None:
    base = models()["baseline"]
    once = run("refine", PROMPTS[:2], sft=None, **NUMBERS)
    twice = run("refine", PROMPTS[:2], sft=base, **NUMBERS)
    assert tokens(once) == tokens(twice)
    assert twice.stats.token_forwards["baseline"] == once.stats.token_forwards["baseline"]
    for one in twice.certificates:
        assert one.kl_to_sft == pytest.approx(one.kl_to_baseline, abs=10 * ATOL)


def test_every_cut_kind_draws_from_a_guided_source() -> None:
    for cuts, _ in CUTS.values():
        result = run(
            "refine",
            source="value",
            value=value_head(),
            cuts=cuts,
            tokenizer=word_tokenizer(),
            alpha=8.0,
            **NUMBERS,
        )
        assert all(step.value is not None for trace in result.traces for step in trace)
