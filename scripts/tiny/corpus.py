"""Prompts and reviews drawn from the grammar, with the slips that real text has."""

import itertools
import random
import re
from dataclasses import dataclass

from tq_fast.models.tiny.grammar import (
    CLASS_OF,
    LOCATIONS,
    PHRASES,
    PLACES,
    PROMPTS,
    QUALITIES,
    TEMPLATES,
    AspectClass,
    Template,
    Tone,
    be_form,
    parse_prompt,
)


@dataclass(frozen=True)
class Prompts:
    """Disjoint lists of prompts: to train on, to evaluate on, to show."""

    train: list[str]
    evaluation: list[str]
    demo: list[str]


@dataclass(frozen=True)
class Style:
    """The way a reviewer writes: chances of each kind of sentence, and of slips."""

    asked: float  # chance that an aspect spoken of is one that was asked for
    foreign: float  # chance that an aspect spoken of is one that the place does not have
    opener: float
    statements: tuple[int, ...]  # how many opinions and details, drawn evenly
    detail: float  # chance that a statement is a detail rather than an opinion
    tip: float
    thanks: float
    rude: float
    gush: float
    verdict: float
    slip: float  # chance that the review has one slip


SFT_STYLE = Style(
    asked=0.55, foreign=0.05, opener=0.45, statements=(1, 1, 2, 2, 3), detail=0.25, tip=0.15,
    thanks=0.2, rude=0.12, gush=0.2, verdict=0.45, slip=0.08,
)  # fmt: skip
# Only the reward models see texts of these two styles. They learn from them to rank very good and
# very bad texts, which samples of the SFT model hardly contain.
CAREFUL_STYLE = Style(
    asked=0.9, foreign=0.0, opener=0.3, statements=(2, 2, 3), detail=0.5, tip=0.6,
    thanks=0.5, rude=0.03, gush=0.3, verdict=0.4, slip=0.0,
)  # fmt: skip
CARELESS_STYLE = Style(
    asked=0.3, foreign=0.25, opener=0.4, statements=(0, 1, 2, 4), detail=0.3, tip=0.15,
    thanks=0.2, rude=0.4, gush=0.4, verdict=0.4, slip=0.6,
)  # fmt: skip

# For each mood: how common it is, and the chances of a good, a mild and a bad judgement.
_MOODS: dict[str, tuple[float, tuple[float, float, float]]] = {
    "happy": (0.4, (0.75, 0.15, 0.1)),
    "torn": (0.35, (0.4, 0.25, 0.35)),
    "cross": (0.25, (0.1, 0.2, 0.7)),
}


def make_prompts(rng: random.Random, num_evaluation: int, num_demo: int) -> Prompts:
    """List every prompt of the grammar, shuffled, and deal them out."""
    prompts = [
        text.format(place=place, location=location, x=x, y=y)
        for text in PROMPTS
        for place, aspects in PLACES.items()
        for location in LOCATIONS
        for x, y in itertools.permutations(aspects, 2)
    ]
    rng.shuffle(prompts)
    held_out = num_evaluation + num_demo
    return Prompts(prompts[held_out:], prompts[:num_evaluation], prompts[num_evaluation:held_out])


def ask_differently(prompt: str, rng: random.Random) -> str:
    """Return a prompt that asks for at least one other aspect, mostly of the same place."""
    asked = parse_prompt(prompt)
    assert asked is not None, prompt
    place, aspects = asked
    if rng.random() < 0.25:
        place = rng.choice([other for other in PLACES if other != place])
    pairs = [
        pair
        for pair in itertools.permutations(PLACES[place], 2)
        if place != asked[0] or set(pair) != set(aspects)
    ]
    x, y = rng.choice(pairs)
    return rng.choice(PROMPTS).format(place=place, location=rng.choice(LOCATIONS), x=x, y=y)


class Reviewer:
    """The writer of one review of one place, with a mood and a memory of what was said."""

    def __init__(self, prompt: str, style: Style, rng: random.Random) -> None:
        asked = parse_prompt(prompt)
        assert asked is not None, prompt
        self._place, self._asked = asked
        self._style = style
        self._rng = rng
        names = list(_MOODS)
        self._mood = rng.choices(names, [_MOODS[name][0] for name in names])[0]
        self._used: list[str] = []

    def write(self) -> str:
        """Return a review, without slips."""
        rng, style = self._rng, self._style
        sentences = [self._sentence("opener")] if rng.random() < style.opener else []
        for _ in range(rng.choice(style.statements)):
            kind = "detail" if rng.random() < style.detail else "opinion"
            sentences.append(self._sentence(kind))
        closing = [kind for kind in ("tip", "thanks") if rng.random() < getattr(style, kind)]
        if rng.random() < style.rude * (0.3 if self._mood == "happy" else 1.4):
            closing.append("rude")
        if rng.random() < style.gush * (1.8 if self._mood == "happy" else 0.4):
            closing.append("gush")
        if rng.random() < style.verdict:
            closing.append("verdict")
        rng.shuffle(closing)
        sentences += [self._sentence(kind) for kind in closing]
        return " ".join(sentences or [self._sentence("opinion")])

    def _sentence(self, kind: str) -> str:
        rng = self._rng
        templates = [template for template in TEMPLATES if template.kind == kind]
        if kind == "verdict":
            wanted = {"happy": (1, 1, 0), "torn": (1, 0, -1), "cross": (0, -1, -1)}[self._mood]
            polarity = rng.choice(wanted)
            templates = [template for template in templates if template.polarity == polarity]
        return self._fill(rng.choice(templates))

    def _fill(self, template: Template) -> str:
        rng = self._rng
        slots = {name: rng.choice(words) for name, words in PHRASES.items()}
        for name in ("x", "y"):
            if f"{{{name}}}" in template.text:
                aspect = self._aspect(template.classes, avoid=slots.get("x"))
                slots |= {
                    name: aspect,
                    f"{name}_be": be_form(aspect),
                    f"{name}_is": self._quality(CLASS_OF[aspect]),
                }
        if "{x_too}" in template.text:
            choices = QUALITIES[CLASS_OF[slots["x"]]]
            others = [w for words in choices.values() if slots["x_is"] in words for w in words]
            slots["x_too"] = rng.choice([word for word in others if word != slots["x_is"]])
        return template.text.format(**slots)

    def _aspect(self, classes: tuple[AspectClass, ...], avoid: str | None) -> str:
        rng, draw = self._rng, self._rng.random()
        own = PLACES[self._place]
        pool = list(own)
        if draw < self._style.asked:
            pool = list(self._asked)
        elif draw < self._style.asked + self._style.foreign:
            pool = [aspect for aspect in CLASS_OF if aspect not in own]
        fitting = [a for a in pool if CLASS_OF[a] in classes and a != avoid]
        fitting = fitting or [a for a in own if CLASS_OF[a] in classes and a != avoid]
        # Reviewers seldom come back to an aspect that they have spoken of.
        fresh = [a for a in fitting if a not in self._used]
        aspect = rng.choice(fresh if fresh and rng.random() < 0.8 else fitting)
        self._used.append(aspect)
        return aspect

    def _quality(self, aspect_class: AspectClass) -> str:
        tones: tuple[Tone, ...] = ("good", "mild", "bad")
        tone = self._rng.choices(tones, _MOODS[self._mood][1])[0]
        return self._rng.choice(QUALITIES[aspect_class][tone])


def add_slip(review: str, rng: random.Random) -> str:
    """Spoil a review: a word lost, doubled, swapped or out of place, or a sentence said again."""
    words = review.split(" ")
    spot = rng.randrange(len(words))
    slip = rng.choice(("lose", "double", "swap", "stray", "again"))
    if slip == "again":
        sentences = [text.strip() for text in re.findall(r"[^.!]+[.!]?", review)]
        said = rng.choice(sentences)
        return " ".join([*sentences, said])
    if slip == "lose" and len(words) > 1:
        del words[spot]
    elif slip == "double":
        words.insert(spot, words[spot])
    elif slip == "swap" and spot:
        words[spot - 1], words[spot] = words[spot], words[spot - 1]
    else:
        words[spot] = rng.choice(words).strip(".!,")
    return " ".join(words)


def write_review(prompt: str, style: Style, rng: random.Random) -> str:
    """Return a response to ``prompt``, with the space that separates it from the prompt."""
    review = Reviewer(prompt, style, rng).write()
    if rng.random() < style.slip:
        review = add_slip(review, rng)
    return " " + review
