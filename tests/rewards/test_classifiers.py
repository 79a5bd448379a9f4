"""Rewards: what a session scores is what the model says of the whole text, encoded once."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from tests import zoo
from tests.rewards.texts import ATOL, CHATS, PROMPTS, encoder, plain_score, scorer, whole_text
from tq_fast.prompts import Prompt, read_prompts
from tq_fast.rewards.base import Opening, RewardSession, Texts
from tq_fast.rewards.causal import CausalReward
from tq_fast.rewards.classifier import ClassifierReward
from tq_fast.rewards.encoder import EncoderReward
from tq_fast.rewards.function import FunctionReward

ROWS_PER_TREE = 3
HORIZON = 4

Tokenizers = dict[str, PreTrainedTokenizerFast]


@dataclasses.dataclass(frozen=True)
class Step:
    """Responses of one step, `ROWS_PER_TREE` to each tree."""

    trees: list[int]
    responses: list[list[int]]


def walk(num_trees: int, num_steps: int, vocab_size: int, seed: int = 0) -> list[Step]:
    """Steps as decoding makes them: each goes on from a candidate of the one before.

    Any ids, so that single bytes of a longer character are among them: text that a later token
    changes.
    """
    source = random.Random(seed)
    emitted: list[list[int]] = [[] for _ in range(num_trees)]
    steps = []
    for _ in range(num_steps):
        trees, responses = [], []
        for tree in range(num_trees):
            candidates = source.sample(range(3, vocab_size), ROWS_PER_TREE)
            for token in candidates:
                tail = source.choices(range(3, vocab_size), k=source.randint(0, HORIZON))
                trees.append(tree)
                responses.append([*emitted[tree], token, *tail])
            emitted[tree] = [*emitted[tree], source.choice(candidates)]
        steps.append(Step(trees, responses))
    return steps


def open_reward(reward: ClassifierReward | FunctionReward, prompts: list[Prompt]) -> RewardSession:
    num_rows = len(prompts) * ROWS_PER_TREE
    return reward.open(Opening(prompts, num_rows, max_new=12 + HORIZON, backend=None))


def num_not_in_common(trees: Sequence[int], rows: Sequence[Sequence[int]]) -> int:
    """Tokens of a batch of what each row has beyond the start that all rows of its tree share."""
    width = 0
    for tree in set(trees):
        own = [row for at, row in zip(trees, rows, strict=True) if at == tree]
        common = 0
        while all(len(row) > common + 1 and row[common] == own[0][common] for row in own):
            common += 1
        width = max(width, max(map(len, own)) - common)
    return width * len(rows)


@torch.no_grad()
def scores_of(session: RewardSession, step: Step) -> tuple[list[float], int]:
    """Scores of one step, and how many tokens went through the model for it."""
    before = session.num_token_forwards
    scores = session.score(step.trees, step.responses)
    return scores, session.num_token_forwards - before


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "gpt2", "opt", "gpt-oss"])
@pytest.mark.parametrize("cost_of_a_pass", [0, 1000])
def test_token_ids_are_scored_as_a_whole_and_encoded_once(
    architecture: str, cost_of_a_pass: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tq_fast.forest.logprobs._CPU_PASS", cost_of_a_pass)
    model = zoo.classifier(architecture)
    given = [[5, 6, 7], list(range(3, 20)), [9]]
    prompts = read_prompts(given, None, vocab_size=zoo.VOCAB_SIZE)
    session = open_reward(CausalReward(model, None, Texts(None), None), prompts)
    for number, step in enumerate(walk(len(given), 8, zoo.VOCAB_SIZE)):
        scores, num_tokens = scores_of(session, step)
        rows = [given[tree] + ids for tree, ids in zip(step.trees, step.responses, strict=True)]
        assert scores == pytest.approx([plain_score(model, row) for row in rows], abs=ATOL)
        # Only the candidate and its roll-out of each row, padded to the longest that it goes with.
        new = [len(ids) - number for ids in step.responses]
        padded = sum(new) if cost_of_a_pass == 0 else max(new) * len(new)
        new_prompts = sum(map(len, given)) if number == 0 else 0
        assert num_tokens <= new_prompts + padded


@pytest.mark.parametrize(
    ("language", "other"),
    [
        ("bytes", "bytes-large"),
        ("bytes", "words"),
        ("bytes", "words-ends"),
        ("words", "bytes"),
        ("words", "words-ends"),
        ("words-ends", "bytes-large"),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_another_tokenizer_scores_the_whole_text_and_encodes_its_start_once(
    tokenizers: Tokenizers, language: str, other: str, seed: int
) -> None:
    ours, theirs = tokenizers[language], tokenizers[other]
    model = scorer(theirs)
    prompts = read_prompts(PROMPTS, ours, vocab_size=len(ours))
    session = open_reward(CausalReward(model, theirs, Texts(ours), None), prompts)
    num_tokens = num_new = 0
    for step in walk(len(prompts), 12, len(ours), seed):
        scores, count = scores_of(session, step)
        texts = [
            whole_text(ours, prompts[tree], ids)
            for tree, ids in zip(step.trees, step.responses, strict=True)
        ]
        rows = [theirs(text)["input_ids"] for text in texts]
        assert scores == pytest.approx([plain_score(model, row) for row in rows], abs=ATOL)
        num_tokens += count
        num_new += num_not_in_common(step.trees, rows)
    num_once = sum(len(theirs(prompt.given)["input_ids"]) for prompt in prompts)
    # A step encodes what is its own, and now and then a few tokens before a join that moved.
    assert num_tokens <= num_once + 1.15 * num_new


def test_a_character_that_is_completed_later_changes_the_text_before_it(
    tokenizers: Tokenizers,
) -> None:
    """The emoji is four tokens of one byte each: until the last, the text ends in a stand-in."""
    ours, theirs = tokenizers["bytes"], tokenizers["words"]
    emoji = ours("🙂")["input_ids"]
    assert len(emoji) > 1
    model = scorer(theirs)
    prompts = read_prompts(PROMPTS[:1], ours, vocab_size=len(ours))
    session = open_reward(CausalReward(model, theirs, Texts(ours), None), prompts)
    end = ours(" and")["input_ids"]
    for length in range(1, len(emoji) + 1):
        responses = [[*emoji[:length], *end], [*emoji[:length]], [*emoji[: length - 1], *end]]
        scores, _ = scores_of(session, Step([0, 0, 0], responses))
        for score, response in zip(scores, responses, strict=True):
            text = whole_text(ours, prompts[0], response)
            row = theirs(text)["input_ids"]
            assert score == pytest.approx(plain_score(model, row), abs=ATOL)


@pytest.mark.parametrize(
    ("language", "other"),
    [
        ("bytes-chat", "bytes-other-chat"),
        ("bytes-chat", "words-chat"),
        ("words-chat", "bytes-chat"),
    ],
)
def test_a_chat_is_scored_under_the_template_of_the_reward(
    tokenizers: Tokenizers, language: str, other: str
) -> None:
    ours, theirs = tokenizers[language], tokenizers[other]
    model = scorer(theirs)
    prompts = read_prompts(CHATS, ours, vocab_size=len(ours))
    session = open_reward(CausalReward(model, theirs, Texts(ours), None), prompts)
    num_tokens = num_new = 0
    for step in walk(len(prompts), 8, len(ours)):
        scores, count = scores_of(session, step)
        rows = []
        for score, tree, ids in zip(scores, step.trees, step.responses, strict=True):
            answer = {
                "role": "assistant",
                "content": ours.decode(ids, skip_special_tokens=True),
            }
            row = theirs.apply_chat_template([*CHATS[tree], answer], return_dict=True)["input_ids"]
            assert score == pytest.approx(plain_score(model, row), abs=ATOL)
            rows.append(row)
        num_tokens += count
        num_new += num_not_in_common(step.trees, rows)
    num_once = sum(
        len(theirs.apply_chat_template(chat, return_dict=True)["input_ids"]) for chat in CHATS
    )
    assert num_tokens <= num_once + 1.3 * num_new


def test_a_chat_under_the_template_of_both_is_scored_as_a_finished_conversation(
    tokenizers: Tokenizers,
) -> None:
    ours = tokenizers["bytes-chat"]
    model = scorer(ours)
    prompts = read_prompts(CHATS, ours, vocab_size=len(ours))
    session = open_reward(CausalReward(model, ours, Texts(ours), None), prompts)
    for step in walk(len(prompts), 3, len(ours)):
        scores, _ = scores_of(session, step)
        rows = []
        for tree, ids in zip(step.trees, step.responses, strict=True):
            answer = {"role": "assistant", "content": ours.decode(ids, skip_special_tokens=True)}
            chat = [*CHATS[tree], answer]
            rows.append(ours.apply_chat_template(chat, return_dict=True)["input_ids"])
        assert scores == pytest.approx([plain_score(model, row) for row in rows], abs=ATOL)


def test_a_chat_for_a_reward_without_a_template_is_scored_as_text(tokenizers: Tokenizers) -> None:
    ours, theirs = tokenizers["bytes-chat"], tokenizers["words"]
    model = scorer(theirs)
    prompts = read_prompts(CHATS, ours, vocab_size=len(ours))
    session = open_reward(CausalReward(model, theirs, Texts(ours), None), prompts)
    for step in walk(len(prompts), 3, len(ours)):
        scores, _ = scores_of(session, step)
        for score, tree, ids in zip(scores, step.trees, step.responses, strict=True):
            text = ours.decode([*prompts[tree].token_ids, *ids], skip_special_tokens=True)
            row = theirs(text)["input_ids"]
            assert score == pytest.approx(plain_score(model, row), abs=ATOL)


def test_a_tree_that_is_dropped_leaves_the_others_as_they_were(tokenizers: Tokenizers) -> None:
    ours, theirs = tokenizers["bytes"], tokenizers["words"]
    model = scorer(theirs)
    prompts = read_prompts(PROMPTS, ours, vocab_size=len(ours))
    session = open_reward(CausalReward(model, theirs, Texts(ours), None), prompts)
    first, second, third = walk(3, 3, len(ours))
    scores_of(session, first)
    session.drop_tree(0)
    # The last tree took the place of the first.
    slots = [2, 1]
    for step in (second, third):
        rows = [
            (slot, ids)
            for slot, tree in enumerate(slots)
            for at, ids in zip(step.trees, step.responses, strict=True)
            if at == tree
        ]
        moved = Step([slot for slot, _ in rows], [ids for _, ids in rows])
        scores, count = scores_of(session, moved)
        for score, (slot, ids) in zip(scores, rows, strict=True):
            row = theirs(whole_text(ours, prompts[slots[slot]], ids))["input_ids"]
            assert score == pytest.approx(plain_score(model, row), abs=ATOL)
        # Nothing of the prompts is encoded again.
        assert count < len(rows) * 25
    session.drop_tree(1)
    session.drop_tree(0)


def test_a_reward_that_reads_the_same_ids_needs_no_text(tokenizers: Tokenizers) -> None:
    ours = tokenizers["bytes"]
    reward = CausalReward(scorer(ours), ours, Texts(ours), None)
    (prompt,) = read_prompts(PROMPTS[:1], ours, vocab_size=len(ours))
    # Two bytes that are no character: as text they could not come back.
    broken = [*ours("é")["input_ids"][:1], *ours("🙂")["input_ids"][:1]]
    assert reward.encode(prompt, broken) == [*prompt.token_ids, *broken]


@pytest.mark.parametrize("label", [0, 2])
def test_of_several_labels_one_is_the_reward(tokenizers: Tokenizers, label: int) -> None:
    ours, theirs = tokenizers["bytes"], tokenizers["words"]
    model = scorer(theirs, num_labels=3)
    prompts = read_prompts(PROMPTS[:1], ours, vocab_size=len(ours))
    session = open_reward(CausalReward(model, theirs, Texts(ours), label), prompts)
    (step,) = walk(1, 1, len(ours))
    scores, _ = scores_of(session, step)
    rows = [theirs(whole_text(ours, prompts[0], ids))["input_ids"] for ids in step.responses]
    assert scores == pytest.approx([plain_score(model, row, label) for row in rows], abs=ATOL)


@pytest.mark.parametrize("architecture", ["gpt2", "opt", "llama"])
def test_padding_may_lie_beyond_the_last_position(architecture: str) -> None:
    model = zoo.classifier(architecture, max_position_embeddings=20)
    prompts = read_prompts([list(range(5, 20)), [5, 6]], None, vocab_size=zoo.VOCAB_SIZE)
    reward = CausalReward(model, None, Texts(None), None)
    session = reward.open(Opening(prompts, 4, max_new=12, backend=None))
    # The first prompt leaves room for five tokens; they are padded to the other's twelve.
    responses = [[7, 8, 9, 10, 11], [8, 7, 9], list(range(30, 42)), list(range(50, 62))]
    with torch.no_grad():
        scores = session.score([0, 0, 1, 1], responses)
    rows = [[*prompts[i // 2].token_ids, *ids] for i, ids in enumerate(responses)]
    assert scores == pytest.approx([plain_score(model, row) for row in rows], abs=ATOL)


@pytest.mark.parametrize("other", ["bytes", "words-ends"])
@pytest.mark.parametrize("label", [None, 1])
def test_an_encoder_scores_whole_texts_whatever_stands_beside_them(
    tokenizers: Tokenizers, other: str, label: int | None
) -> None:
    ours, theirs = tokenizers["bytes"], tokenizers[other]
    model = encoder(len(theirs), num_labels=1 if label is None else 2)
    prompts = read_prompts(PROMPTS, ours, vocab_size=len(ours))
    session = open_reward(EncoderReward(model, theirs, Texts(ours), label), prompts)
    for step in walk(len(prompts), 4, len(ours)):
        scores, _ = scores_of(session, step)
        for score, tree, ids in zip(scores, step.trees, step.responses, strict=True):
            if other == "bytes":
                row = [*prompts[tree].token_ids, *ids]
            else:
                row = theirs(whole_text(ours, prompts[tree], ids))["input_ids"]
            assert score == pytest.approx(plain_score(model, row, label or 0), abs=ATOL)


def test_an_encoder_reads_more_texts_than_one_batch_holds(
    tokenizers: Tokenizers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tq_fast.rewards.encoder._TEXT_BATCH", 4)
    ours = tokenizers["bytes"]
    model = encoder(len(ours))
    prompts = read_prompts(PROMPTS, ours, vocab_size=len(ours))
    session = open_reward(EncoderReward(model, ours, Texts(ours), None), prompts)
    (step,) = walk(3, 1, len(ours))
    scores, _ = scores_of(session, step)
    rows = [
        [*prompts[tree].token_ids, *ids]
        for tree, ids in zip(step.trees, step.responses, strict=True)
    ]
    assert scores == pytest.approx([plain_score(model, row) for row in rows], abs=ATOL)


@pytest.mark.parametrize("language", ["bytes", "words"])
def test_a_function_reads_prompts_as_given_and_responses_as_text(
    tokenizers: Tokenizers, language: str
) -> None:
    ours = tokenizers[language]
    seen: list[tuple[list, list]] = []

    def reward(prompts: list, responses: list) -> torch.Tensor:
        seen.append((prompts, responses))
        return torch.arange(len(responses)).float()[:, None]

    prompts = read_prompts([PROMPTS[0], [5, 6, 7]], ours, vocab_size=len(ours))
    session = open_reward(FunctionReward(reward, Texts(ours)), prompts)
    answer = ours("a short answer")["input_ids"]
    end = ours.eos_token_id
    scores, _ = scores_of(session, Step([0, 0, 1], [answer, [*answer, end], [*answer, 8]]))
    assert scores == [0.0, 1.0, 2.0]
    ((given, responses),) = seen
    assert given == [PROMPTS[0], PROMPTS[0], ours.decode([5, 6, 7], skip_special_tokens=True)]
    assert responses == ["a short answer", "a short answer", ours.decode([*answer, 8])]
