"""Rewards over real text in which foresight pays, for the recipe `real` (extra `evidence`).

Both read prompts as `scripts/make_evidence_prompts.py` writes them, text or chat messages:

    Write a <form> about <topic>, in a <kind of> tone. Use ... these words: <word>, ... and <word>.

and both lie in [0, 1]:

    required_words   r = share(y) * fresh(x, y)
    topic_closeness  r = max(0, cos(e(y), e(topic and tone))) * fresh(x, y) * min(1, |y| / 40)

- share(y) is the part of the required words that y contains as whole words, in any case and any
  regular inflection (`inflections`). An occurrence counts only where at least two other words stand
  between it and the required word before it. A bare list of the words, the prompt's own copied for
  one, so earns a single word; a sentence that uses them earns them all.
- fresh(x, y) is the part of the word 4-grams of y that stand neither earlier in y nor in the prompt
  x. A text that repeats itself or its prompt loses in proportion; ordinary ones keep 0.99.
- e is the mean of all-MiniLM-L6-v2's last states.
- |y| is the number of words. A title alone, or a few key words, would be close to any topic that
  they name; the prompt asks for several sentences, so fewer than 40 words are worth less.

Both are functions of the texts alone, without randomness. `topic_closeness` keeps the embeddings
of the texts that it has seen.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import InvalidArgument
from .measures import cosine
from .models import MeanEmbedder, find_minilm, load_embedder

# A required word counts where so many other words stand before it, back to the last required one.
_GAP = 2
_NGRAM = 4
_FULL_LENGTH = 40
# Padding moves an embedding in its sixth decimal: rounded scores do not depend on the batch.
_DECIMALS = 4

_WORD = re.compile(r"[^\W\d_]+")
_LISTED = re.compile(r"\bwords: ([^.]+)\.")
_TOPIC = re.compile(r"\babout (.+?)\.")


def required_words(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """Return share(y) * fresh(x, y) for each response: required words used, without repetition.

    Args:
        prompts: texts or chats; the words stand after "words:", up to the next full stop.
        responses: one text a prompt.

    Raises:
        InvalidArgument: a prompt names no words.
    """
    scores = []
    for prompt, response in zip(prompts, responses, strict=True):
        text = text_of(prompt)
        required = _required(text)
        scores.append(share_of_words(required, response) * freshness(text, response))
    return scores


def topic_closeness(prompts: Sequence[Any], responses: Sequence[str]) -> list[float]:
    """Return max(0, cos(response, topic)) * fresh(x, y) * min(1, |y| / 40) for each response.

    Args:
        prompts: texts or chats; topic and tone stand after "about", up to the next full stop.
        responses: one text a prompt.

    Raises:
        InvalidArgument: a prompt names no topic, or all-MiniLM-L6-v2 is not installed.
    """
    texts = [text_of(prompt) for prompt in prompts]
    topics = [_topic(text) for text in texts]
    embed = _embedder()
    scores = []
    pairs = zip(texts, responses, embed(topics), embed(responses), strict=True)
    for text, response, wanted, given in pairs:
        closeness = max(0.0, cosine(wanted, given))
        length = min(1.0, len(words_of(response)) / _FULL_LENGTH)
        scores.append(round(closeness * freshness(text, response) * length, _DECIMALS))
    return scores


def share_of_words(required: Sequence[str], text: str) -> float:
    """Return the part of the words `required` that `text` uses; of a list only its first counts."""
    word_of = {form: word for word in required for form in inflections(word)}
    used = set()
    last = -_GAP - 1
    for place, form in enumerate(words_of(text)):
        if form in word_of:
            if place - last > _GAP:
                used.add(word_of[form])
            last = place
    return len(used) / len(required)


def freshness(prompt: str, text: str) -> float:
    """Return the part of the word 4-grams of `text` that are new, in it and beside `prompt`.

    A text of one to three words has none and keeps 1; a text without words has 0.
    """
    known = set(_ngrams(words_of(prompt)))
    words = words_of(text)
    ngrams = _ngrams(words)
    if not ngrams:
        return float(bool(words))
    return len(set(ngrams) - known) / len(ngrams)


def inflections(word: str) -> set[str]:
    """Return `word` with its regular plural, past tense and -ing form, as far as rules give them.

    The rules know no word class and make forms that do not exist; no text contains these.
    """
    forms = {word, f"{word}s", f"{word}es", f"{word}ed", f"{word}ing"}
    if word.endswith("e"):
        forms |= {f"{word}d", f"{word[:-1]}ing"}
    elif word.endswith("y"):
        forms |= {f"{word[:-1]}ies", f"{word[:-1]}ied"}
    else:
        forms |= {f"{word}{word[-1]}{ending}" for ending in ("ed", "ing")}
    return forms


def words_of(text: str) -> list[str]:
    """Return the words of `text` in lower case; a genitive's s is a word of its own."""
    return _WORD.findall(text.lower())


def text_of(prompt: Any) -> str:
    """Return a prompt's text: its own, or that of the last message of the user.

    Raises:
        InvalidArgument: it is neither text nor messages of text.
    """
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(isinstance(message, dict) for message in prompt):
        asked = [message.get("content") for message in prompt if message.get("role") == "user"]
        if asked and isinstance(asked[-1], str):
            return asked[-1]
    raise InvalidArgument(f"the reward reads prompts of text or chat messages, got {prompt!r:.80}")


def _required(text: str) -> list[str]:
    listed = _LISTED.search(text)
    words = [word for word in words_of(listed[1]) if word != "and"] if listed else []
    if not words:
        raise InvalidArgument(
            f"required_words reads prompts with 'words: one, two and three.', got {text!r:.80}"
        )
    return list(dict.fromkeys(words))


def _topic(text: str) -> str:
    topic = _TOPIC.search(text)
    if topic is None:
        raise InvalidArgument(
            f"topic_closeness reads prompts with 'about a topic, in a tone.', got {text!r:.80}"
        )
    return topic[1]


def _ngrams(words: list[str]) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + _NGRAM]) for i in range(len(words) - _NGRAM + 1)]


@functools.cache
def _embedder() -> MeanEmbedder:
    folder = find_minilm("topic_closeness", "evidence")
    embedder = load_embedder(folder, torch.device("cpu"))
    assert embedder is not None, "only 'auto' may be None"
    return embedder
