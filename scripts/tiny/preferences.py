"""Preference pairs: what each reader would rather see, with the noise of real readers."""

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from .corpus import CAREFUL_STYLE, CARELESS_STYLE, add_slip, ask_differently, write_review

# A reader compares with the odds exp(score difference / READER_NOISE) (Bradley and Terry).
READER_NOISE = 0.25

Judge = Callable[[Sequence[str], Sequence[str]], list[float]]


class Text(NamedTuple):
    """A prompt and a response, finished or not."""

    prompt: str
    response: str
    has_eos: bool = True


@dataclass(frozen=True)
class TokenPairs:
    """Preference pairs as token ids of whole texts, with BOS and mostly with EOS."""

    chosen_ids: list[list[int]]
    rejected_ids: list[list[int]]


@dataclass(frozen=True)
class TextPairs:
    """Preference pairs as texts."""

    prompts: list[str]
    chosen: list[str]
    rejected: list[str]


def prefers_first(first: float, second: float, noise: float, rng: random.Random) -> bool:
    """Draw a reader's choice: the first with probability sigmoid((first - second) / noise)."""
    return rng.random() < 1 / (1 + math.exp((second - first) / noise))


def _two_answers(prompt: str, samples: list[str], rng: random.Random) -> tuple[Text, Text]:
    """Return two answers to one prompt, of any quality."""
    careful = write_review(prompt, CAREFUL_STYLE, rng)
    careless = write_review(prompt, CARELESS_STYLE, rng)
    first, second = rng.sample([*samples, careful, careless], 2)
    return Text(prompt, first), Text(prompt, second)


def _with_slip(prompt: str, samples: list[str], rng: random.Random) -> tuple[Text, Text]:
    """Return an answer and the same with a slip or a repetition in it."""
    answer = _any_answer(prompt, samples, rng)
    return Text(prompt, answer), Text(prompt, " " + add_slip(answer.strip(), rng))


def _to_another_question(prompt: str, samples: list[str], rng: random.Random) -> tuple[Text, Text]:
    """Return one answer below two questions: only the match of question and answer differs."""
    answer = _any_answer(prompt, samples, rng)
    return Text(prompt, answer), Text(ask_differently(prompt, rng), answer)


def _any_answer(prompt: str, samples: list[str], rng: random.Random) -> str:
    style = rng.choice((CAREFUL_STYLE, CARELESS_STYLE))
    # Empty samples are left out: the SFT model now and then says nothing.
    return rng.choice([*filter(str.strip, samples), write_review(prompt, style, rng)])


def _cut(text: str, rng: random.Random) -> str:
    words = text.split(" ")
    return " ".join(words[: rng.randrange(2, max(3, len(words)))])


def reward_pairs(
    prompts: Sequence[str],
    samples: Sequence[list[str]],
    judge: Judge,
    tokenizer: PreTrainedTokenizerFast,
    num_pairs: int,
    rng: random.Random,
) -> TokenPairs:
    """Draw pairs of texts and let a reader with scores ``judge`` choose.

    A third of the pairs are two free answers. The others differ in one respect only: without them a
    small model learns key words and misses how two places of a text relate. Some texts are cut
    short or lack EOS, as roll-outs that stop at a horizon do: the reward model must rank these too.
    """
    pairs = TokenPairs([], [])
    while len(pairs.chosen_ids) < num_pairs:
        index = rng.randrange(len(prompts))
        draw_pair = rng.choice((_two_answers, _with_slip, _to_another_question))
        texts = list(draw_pair(prompts[index], samples[index], rng))
        if draw_pair is _two_answers and rng.random() < 0.3:
            spot = rng.randrange(2)
            texts[spot] = texts[spot]._replace(
                response=_cut(texts[spot].response, rng), has_eos=False
            )
        elif rng.random() < 0.2:
            texts = [text._replace(has_eos=False) for text in texts]
        first, second = judge([t.prompt for t in texts], [t.response for t in texts])
        if first == second:
            continue
        ids = [
            tokenizer(t.prompt + t.response + tokenizer.eos_token * t.has_eos)["input_ids"]
            for t in texts
        ]
        if not prefers_first(first, second, READER_NOISE, rng):
            ids.reverse()
        pairs.chosen_ids.append(ids[0])
        pairs.rejected_ids.append(ids[1])
    return pairs


def policy_pairs(
    prompts: Sequence[str],
    samples: Sequence[list[str]],
    rewards: Sequence[list[float]],
    rng: random.Random,
) -> TextPairs:
    """Pair up samples of the SFT model and choose by r_BL itself.

    The choice is drawn with probability sigmoid(r_BL difference), noise 1: then the optimum of DPO
    with KL weight beta is exactly rho_sft exp(r_BL / beta), as Transfer Q* assumes of a baseline.
    """
    pairs = TextPairs([], [], [])
    for prompt, texts, scores in zip(prompts, samples, rewards, strict=True):
        for at in range(0, len(texts) - 1, 2):
            if texts[at] == texts[at + 1]:
                continue
            keep = prefers_first(scores[at], scores[at + 1], 1.0, rng)
            pairs.prompts.append(prompt)
            pairs.chosen.append(texts[at] if keep else texts[at + 1])
            pairs.rejected.append(texts[at + 1] if keep else texts[at])
    return pairs
