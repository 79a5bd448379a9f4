"""What a causal reward keeps of texts that will be continued: scores stay those of whole texts."""

from __future__ import annotations

import random

import pytest
import torch

from tests import zoo
from tests.rewards.test_classifiers import Tokenizers
from tests.rewards.texts import ATOL, PROMPTS, plain_score, scorer, whole_text
from tq_fast.prompts import read_prompts
from tq_fast.rewards.base import Opening, RewardSession, Texts
from tq_fast.rewards.causal import CausalReward

GIVEN = [[5, 6, 7], list(range(3, 20)), [9]]
MAX_NEW = 14
NUM_ROWS = 9


@pytest.fixture(autouse=True)
def without_gradient_or_padding(monkeypatch: pytest.MonkeyPatch):
    """A pass costs nothing here, so that rows of different lengths are never padded."""
    monkeypatch.setattr("tq_fast.forest.logprobs._CPU_PASS", 0)
    with torch.no_grad():
        yield


def open_session(reward: CausalReward, given: list, tokenizer: object, size: int) -> RewardSession:
    prompts = read_prompts(given, tokenizer, vocab_size=size)
    return reward.open(Opening(prompts, NUM_ROWS, max_new=MAX_NEW, backend=None))


class Contest:
    """Contests as refinement and blocks hold them, with continuations of random tokens.

    Attributes:
        texts: what each tree holds.
        num_new: tokens that no text of the tree had before.
    """

    def __init__(self, num_trees: int, size: int, seed: int) -> None:
        self.source = random.Random(seed)
        self.size = size
        self.texts: list[list[int]] = [[] for _ in range(num_trees)]
        self.num_new = 0

    def draw(self, trees: list[int], num: int) -> tuple[list[int], list[list[int]]]:
        """Cut the texts of `trees` anywhere and continue each `num` times."""
        rows, owners = [], []
        for tree in trees:
            text = self.texts[tree]
            before = text[: self.source.randint(0, min(len(text), MAX_NEW - 1))]
            for _ in range(num):
                length = self.source.randint(1, MAX_NEW - len(before))
                new = self.source.choices(range(3, self.size), k=length)
                rows.append([*before, *new])
                owners.append(tree)
                self.num_new += length
        return owners, rows

    def choose(
        self, owners: list[int], rows: list[list[int]], trees: list[int]
    ) -> tuple[list[int], list[list[int]]]:
        """Let some trees hold one of their rows, and return what they are."""
        winners = [tree for tree in trees if not self.texts[tree] or self.source.random() < 0.6]
        kept = []
        for tree in winners:
            own = [row for row, owner in zip(rows, owners, strict=True) if owner == tree]
            kept.append(self.source.choice(own))
            self.texts[tree] = kept[-1]
        return winners, kept


@pytest.mark.parametrize("architecture", ["llama", "mistral-sliding", "gpt2", "gpt-oss"])
@pytest.mark.parametrize("num", [3, 1])
@pytest.mark.parametrize("seed", range(2))
def test_texts_that_are_kept_and_cut_are_scored_as_a_whole_and_encoded_once(
    architecture: str, num: int, seed: int
) -> None:
    model = zoo.classifier(architecture)
    reward = CausalReward(model, None, Texts(None), None)
    session = open_session(reward, GIVEN, None, zoo.VOCAB_SIZE)
    contest = Contest(len(GIVEN), zoo.VOCAB_SIZE, seed)
    for number in range(12):
        trees = [t for t in range(len(GIVEN)) if number == 0 or contest.source.random() < 0.8]
        if not trees:
            continue
        owners, rows = contest.draw(trees, num)
        scores = session.score(owners, rows)
        whole = [[*GIVEN[tree], *row] for tree, row in zip(owners, rows, strict=True)]
        assert scores == pytest.approx([plain_score(model, ids) for ids in whole], abs=ATOL)
        session.keep(*contest.choose(owners, rows, trees))
        assert session.num_token_forwards <= sum(map(len, GIVEN)) + contest.num_new


def test_nothing_of_a_kept_text_is_encoded_again_wherever_it_is_cut() -> None:
    model = zoo.classifier("llama")
    reward = CausalReward(model, None, Texts(None), None)
    session = open_session(reward, GIVEN[:1], None, zoo.VOCAB_SIZE)
    text = [20, 30, 40, 50, 60, 70]
    session.score([0, 0], [text, [21, 31, 41, 51, 61, 71]])
    session.keep([0], [text])
    for cut in (5, 2, 4, 0, 3):
        before = session.num_token_forwards
        rows = [[*text[:cut], 80 + cut, 90], [*text[:cut], 100 + cut, 110]]
        scores = session.score([0, 0], rows)
        whole = [[*GIVEN[0], *row] for row in rows]
        assert scores == pytest.approx([plain_score(model, ids) for ids in whole], abs=ATOL)
        assert session.num_token_forwards - before == 4
    # A text that was not scored last is not known, and nothing breaks.
    session.keep([0], [[1, 2, 3]])
    assert session.score([0], [text]) == pytest.approx(
        [plain_score(model, [*GIVEN[0], *text])], abs=ATOL
    )


def test_trees_that_are_dropped_or_replaced_take_what_was_kept_along() -> None:
    model = zoo.classifier("llama")
    reward = CausalReward(model, None, Texts(None), None)
    session = open_session(reward, GIVEN, None, zoo.VOCAB_SIZE)
    given = list(GIVEN)
    contest = Contest(3, zoo.VOCAB_SIZE, seed=7)
    for number in range(9):
        trees = list(range(len(given)))
        owners, rows = contest.draw(trees, 3)
        scores = session.score(owners, rows)
        whole = [[*given[tree], *row] for tree, row in zip(owners, rows, strict=True)]
        assert scores == pytest.approx([plain_score(model, ids) for ids in whole], abs=ATOL)
        session.keep(*contest.choose(owners, rows, trees))
        if number == 3:
            (prompt,) = read_prompts([[8, 9, 10, 11]], None, vocab_size=zoo.VOCAB_SIZE)
            session.replace_tree(1, prompt)
            given[1], contest.texts[1] = [8, 9, 10, 11], []
        if number == 5:
            session.drop_tree(0)
            for entries in (given, contest.texts):
                entries[0] = entries[-1]
                entries.pop()


@pytest.mark.parametrize(("language", "other"), [("bytes", "words"), ("words-ends", "bytes-large")])
def test_texts_of_another_tokenizer_are_kept_as_the_reward_reads_them(
    tokenizers: Tokenizers, language: str, other: str
) -> None:
    ours, theirs = tokenizers[language], tokenizers[other]
    model = scorer(theirs)
    reward = CausalReward(model, theirs, Texts(ours), None)
    session = open_session(reward, PROMPTS, ours, len(ours))
    prompts = read_prompts(PROMPTS, ours, vocab_size=len(ours))
    contest = Contest(len(PROMPTS), len(ours), seed=4)
    for _ in range(8):
        trees = list(range(len(PROMPTS)))
        owners, rows = contest.draw(trees, 3)
        scores = session.score(owners, rows)
        for score, tree, row in zip(scores, owners, rows, strict=True):
            ids = theirs(whole_text(ours, prompts[tree], row))["input_ids"]
            assert score == pytest.approx(plain_score(model, ids), abs=ATOL)
        session.keep(*contest.choose(owners, rows, trees))
