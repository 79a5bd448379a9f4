"""The exact rewards of the embedded world, which the reward models approximate.

There are two readers with a score each. The *helpful* reader (:func:`gold_reward`, the truth behind
the target reward) wants the two aspects that were asked for, concrete figures and a tip. The
*friendly* reader (:func:`baseline_gold_reward`, the truth behind r_BL) wants praise, thanks and
enthusiasm. Both want the question answered in whole, well-formed sentences, and both dislike
rudeness: the two scores agree in part.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import NamedTuple

from .grammar import PLACES, parse_prompt, parse_review

MAX_SENTENCES = 6


class ReviewMarks(NamedTuple):
    """Counts of what a review does. Sentences that the grammar cannot make count as ``broken``."""

    covered: int  # how many of the two aspects asked for an opinion or a detail speaks of
    details: int  # distinct aspects with a concrete figure: price, waiting time or rating
    tips: int
    thanks: int
    rude: int
    gush: int
    sentiment: float  # mean of the judgements made, in [-1, 1]; 0 without any
    broken: int
    repeated: int  # a sentence said twice, or an aspect judged or measured again
    off_topic: int  # aspects that this place does not have
    surplus: int  # sentences beyond MAX_SENTENCES
    unfinished: bool  # empty, or not ending with a full stop or exclamation mark


def mark_review(prompt: str, response: str) -> ReviewMarks:
    """Count what ``response`` does as an answer to ``prompt``.

    A prompt outside the grammar asks for nothing: no aspect is covered and none is off topic.
    """
    asked = parse_prompt(prompt)
    own = PLACES[asked[0]] if asked else None
    sentences, rest = parse_review(response)
    kinds = Counter(sentence.kind for sentence in sentences)
    opinions = [a for s in sentences if s.kind == "opinion" for a in s.aspects]
    details = [a for s in sentences if s.kind == "detail" for a in s.aspects]
    judgements = [value for sentence in sentences for value in sentence.polarities]
    texts = Counter(s.text for s in sentences if s.kind not in ("opinion", "detail"))
    repeated = len(opinions) - len(set(opinions)) + len(details) - len(set(details))
    repeated += sum(texts.values()) - len(texts)
    spoken_of = set(opinions) | set(details)
    return ReviewMarks(
        covered=len(spoken_of & set(asked[1])) if asked else 0,
        details=len(set(details)),
        tips=kinds["tip"],
        thanks=kinds["thanks"],
        rude=kinds["rude"],
        gush=kinds["gush"],
        sentiment=sum(judgements) / len(judgements) if judgements else 0.0,
        broken=kinds[None],
        repeated=repeated,
        off_topic=len(spoken_of - set(own)) if own else 0,
        surplus=max(0, len(sentences) - MAX_SENTENCES),
        unfinished=bool(rest) or not sentences,
    )


def _faults(marks: ReviewMarks) -> float:
    """Return what both readers subtract; each count is capped so that one fault cannot rule."""
    return (
        1.0 * min(marks.rude, 2)
        + 1.0 * min(marks.broken, 3)
        + 0.75 * min(marks.repeated, 3)
        + 0.5 * min(marks.off_topic, 2)
        + 0.5 * min(marks.surplus, 4)
        + 1.0 * marks.unfinished
    )


def helpful_score(marks: ReviewMarks) -> float:
    """Return the score of the helpful reader, between -11.25 and 4.75."""
    return (
        1.0 * marks.covered
        + 0.75 * min(marks.details, 2)
        + 0.75 * min(marks.tips, 1)
        + 0.5 * min(marks.thanks, 1)
        - _faults(marks)
    )


def friendly_score(marks: ReviewMarks) -> float:
    """Return the score of the friendly reader, between -12.75 and 4.5."""
    return (
        0.5 * marks.covered
        + 1.5 * marks.sentiment
        + 1.0 * min(marks.thanks, 1)
        + 0.5 * min(marks.gush, 2)
        - _faults(marks)
    )


# What a careful customer asks for, in the order in which conditions are added.
_CONDITIONS: tuple[Callable[[ReviewMarks], bool], ...] = (
    lambda marks: marks.covered >= 2,
    lambda marks: marks.details >= 1,
    lambda marks: marks.tips >= 1,
    lambda marks: _faults(marks) == 0,
    lambda marks: marks.thanks >= 1,
    lambda marks: marks.gush >= 1,
)


def count_conditions(marks: ReviewMarks, num: int) -> int:
    """Return how many of the first ``num`` conditions hold, of at most six.

    They are: both aspects covered, a concrete figure, a tip, no fault, thanks, an exclamation.
    """
    return sum(holds(marks) for holds in _CONDITIONS[:num])


def _check_pairs(prompts: Sequence[str], responses: Sequence[str]) -> None:
    if isinstance(prompts, str) or isinstance(responses, str):
        raise TypeError("prompts and responses must be lists of texts, not single texts")
    if len(prompts) != len(responses):
        raise ValueError(f"got {len(prompts)} prompts but {len(responses)} responses")


def gold_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return the exact target reward: how helpful each response is as an answer to its prompt.

    A response gets one point for each of the two aspects asked for, 0.75 for each of up to two
    concrete figures, 0.75 for a tip and 0.5 for thanks. It loses one point for a rude sentence (up
    to two), a broken one (up to three) and an unfinished end, 0.75 for a repetition, and 0.5 for an
    aspect that the place does not have and for each sentence beyond six. Praise by itself earns
    nothing.

    Args:
        prompts: texts of the prompts, one a response.
        responses: texts of the responses, special tokens removed.

    Returns:
        One score a response, at most 4.75.

    Raises:
        TypeError: a single text instead of a list.
        ValueError: lists of different lengths.
    """
    _check_pairs(prompts, responses)
    return [helpful_score(mark_review(p, r)) for p, r in zip(prompts, responses, strict=True)]


def baseline_gold_reward(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return the exact r_BL: how friendly each response is as an answer to its prompt.

    A response gets half a point for each aspect asked for, 1.5 times the mean judgement, one point
    for thanks and half a point for each of up to two exclamations. It loses points for the same
    faults as in :func:`gold_reward`, which has the same arguments, result and errors.
    """
    _check_pairs(prompts, responses)
    return [friendly_score(mark_review(p, r)) for p, r in zip(prompts, responses, strict=True)]


def conditions_4(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return how many of the first four conditions each response meets, from 0 to 4.

    Arguments and errors are those of :func:`gold_reward`; the conditions are those of
    :func:`count_conditions`.
    """
    return _counts(prompts, responses, 4)


def conditions_5(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return how many of the first five conditions each response meets, from 0 to 5."""
    return _counts(prompts, responses, 5)


def all_of_4(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return 1 for each response that meets the first four conditions at once, else 0."""
    return [float(count == 4) for count in _counts(prompts, responses, 4)]


def all_of_5(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return 1 for each response that meets the first five conditions at once, else 0."""
    return [float(count == 5) for count in _counts(prompts, responses, 5)]


def distinct_sentences(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Return how many different whole sentences each response has, rude and broken ones left out.

    The score of a long text is a sum over its parts, and reads as well on a beginning of it.
    Arguments and errors are those of :func:`gold_reward`.
    """
    _check_pairs(prompts, responses)
    counts = []
    for response in responses:
        sentences, _ = parse_review(response)
        kept = {sentence.text for sentence in sentences if sentence.kind not in (None, "rude")}
        counts.append(float(len(kept)))
    return counts


def _counts(prompts: Sequence[str], responses: Sequence[str], num: int) -> list[float]:
    _check_pairs(prompts, responses)
    pairs = zip(prompts, responses, strict=True)
    return [float(count_conditions(mark_review(p, r), num)) for p, r in pairs]
