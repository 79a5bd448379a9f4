"""The synthetic language of the embedded world: short reviews of places to eat and to stay.

A review is a few sentences, and every sentence is one of the templates below with its slots filled.
The same templates make the training text (``scripts/tiny/corpus.py``) and read it back
(:func:`parse_review`), so what a review says is known exactly: no model judges it.

Slots of a template: ``{x}`` and ``{y}`` are aspects of a place ("soup"); ``{x_be}`` is "was" or
"were" in agreement with x; ``{x_is}`` and ``{x_too}`` are qualities of x ("fresh"); every other
slot is a word or phrase of :data:`PHRASES`.
"""

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

AspectClass = Literal["food", "people", "room"]
Kind = Literal["opener", "opinion", "detail", "tip", "thanks", "rude", "gush", "verdict"]

_ASPECTS_OF_CLASS: dict[AspectClass, str] = {
    "food": "soup noodles dumplings bread cake coffee tea pizza salad curry rice fish breakfast",
    "people": "staff waiter cook owner",
    "room": "room bed bathroom garden terrace balcony tables windows",
}
CLASS_OF: dict[str, AspectClass] = {
    aspect: name for name, aspects in _ASPECTS_OF_CLASS.items() for aspect in aspects.split()
}
PLURAL = frozenset({"noodles", "dumplings", "staff", "tables", "windows"})

# Each place has six aspects; a prompt asks for two of them.
PLACES: dict[str, tuple[str, ...]] = {
    place: tuple(aspects.split())
    for place, aspects in {
        "noodle bar": "soup noodles dumplings tea waiter tables",
        "bakery": "bread cake coffee owner staff terrace",
        "pizza place": "pizza salad waiter cook tables terrace",
        "coffee house": "coffee cake tea staff tables windows",
        "curry house": "curry rice bread waiter cook tables",
        "tea room": "tea cake garden owner tables windows",
        "fish restaurant": "fish soup salad waiter balcony terrace",
        "hotel": "room bed breakfast staff balcony garden",
        "guest house": "room bed breakfast owner garden bathroom",
        "inn": "room soup bread cook bathroom windows",
    }.items()
}
LOCATIONS = (
    "near the station", "by the river", "in the old town", "at the market", "on Mill Street",
    "next to the museum",
)  # fmt: skip
PROMPTS = (
    "Write a review of the {place} {location}. Mention the {x} and the {y}.",
    "Please review the {place} {location}, above all the {x} and the {y}.",
    "How was the {place} {location}? Tell us about the {x} and the {y}.",
)

Tone = Literal["good", "mild", "bad"]
QUALITIES: dict[AspectClass, dict[Tone, tuple[str, ...]]] = {
    "food": {
        "good": ("tasty", "fresh", "rich", "crisp", "warm", "lovely"),
        "mild": ("fine", "plain", "simple", "ordinary"),
        "bad": ("bland", "stale", "cold", "salty", "greasy", "bitter"),
    },
    "people": {
        "good": ("kind", "friendly", "helpful", "quick", "patient", "polite"),
        "mild": ("fine", "calm", "busy", "quiet"),
        "bad": ("rude", "slow", "careless", "moody", "sloppy", "grumpy"),
    },
    "room": {
        "good": ("clean", "bright", "cosy", "lovely", "tidy", "pretty"),
        "mild": ("fine", "plain", "simple", "small"),
        "bad": ("dirty", "gloomy", "dark", "cramped", "shabby", "dusty"),
    },
}
_VALUE_OF_TONE: dict[Tone, int] = {"good": 1, "mild": 0, "bad": -1}
_VALUE_OF: dict[AspectClass, dict[str, int]] = {
    name: {word: value for tone, value in _VALUE_OF_TONE.items() for word in tones[tone]}
    for name, tones in QUALITIES.items()
}

PHRASES: dict[str, tuple[str, ...]] = {
    "who": ("I", "We"),
    "visited": ("came here", "stopped by", "dropped in", "visited"),
    "weather": ("rainy", "sunny", "windy", "snowy", "busy"),
    "day": ("Monday", "Tuesday", "Thursday", "Friday", "Sunday"),
    "days": ("Mondays", "Tuesdays", "Thursdays", "Fridays", "Sundays"),
    "when": ("last week", "last month", "after work", "before noon", "late at night"),
    "company": ("my sister", "my parents", "two friends", "the children", "a colleague"),
    "degree": ("very", "really", "quite", "rather", "fairly"),
    "link": ("and", "but"),
    "number": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "seat": ("table", "seat", "chair"),
    "spot": ("by the window", "in the corner", "by the door", "at the back"),
    "thing": ("cash", "a coat", "an umbrella", "some time", "a map"),
    "people": ("whole team", "family", "people here"),
    "nice": ("lovely", "pleasant", "warm", "calm"),
    "time": ("morning", "afternoon", "evening", "weekend"),
    "mess": ("dump", "mess", "disgrace", "joke"),
    "useless": ("useless", "clueless", "hopeless"),
    "great": ("wonderful", "fantastic", "magical", "fabulous"),
    "gladly": ("gladly", "happily", "certainly"),
    "anyone": ("anyone", "families", "friends", "travellers"),
}


@dataclass(frozen=True)
class Template:
    """One sentence form: what it is for, which aspects fit it, and its polarity if fixed."""

    kind: Kind
    text: str
    classes: tuple[AspectClass, ...] = ("food", "people", "room")
    polarity: int | None = None


TEMPLATES: tuple[Template, ...] = (
    Template("opener", "{who} {visited} on a {weather} {day}."),
    Template("opener", "{who} {visited} {when}."),
    Template("opener", "{who} {visited} with {company}."),
    Template("opinion", "The {x} {x_be} {x_is}."),
    Template("opinion", "The {x} {x_be} {degree} {x_is}."),
    Template("opinion", "The {x} {x_be} {x_is} and {x_too}."),
    Template("opinion", "{who} found the {x} {x_is}."),
    Template("opinion", "{who} found the {x} {degree} {x_is}."),
    Template("opinion", "The {x} {x_be} {x_is}, {link} the {y} {y_be} {y_is}."),
    Template("detail", "{who} would give the {x} {number} out of ten."),
    Template("detail", "The {x} cost {number} dollars.", ("food",)),
    Template("detail", "{who} waited {number} minutes for the {x}.", ("food", "people")),
    Template("tip", "Come early on {days}."),
    Template("tip", "Ask for a {seat} {spot}."),
    Template("tip", "Bring {thing}."),
    Template("tip", "Book {number} days ahead."),
    Template("thanks", "Thank you to the {people}."),
    Template("thanks", "Many thanks for a {nice} {time}."),
    Template("thanks", "Please keep up the good work."),
    Template("rude", "What a {mess}."),
    Template("rude", "Shame on the {people}."),
    Template("rude", "Only a fool would come here."),
    Template("rude", "These people are {useless}."),
    Template("gush", "What a {great} place!"),
    Template("gush", "Simply the best!"),
    Template("gush", "{who} loved every minute!"),
    Template("verdict", "{who} will {gladly} come back.", polarity=1),
    Template("verdict", "{who} would recommend it to {anyone}.", polarity=1),
    Template("verdict", "{who} may come back one day.", polarity=0),
    Template("verdict", "{who} will never come back.", polarity=-1),
    Template("verdict", "{who} would not recommend it to {anyone}.", polarity=-1),
)


@dataclass(frozen=True)
class Sentence:
    """The meaning of one sentence; ``kind`` is None when no template makes it.

    ``aspects`` are the aspects that it speaks of, ``polarities`` its judgements (-1, 0 or 1 each).
    """

    text: str
    kind: Kind | None
    aspects: tuple[str, ...] = ()
    polarities: tuple[int, ...] = ()


def be_form(aspect: str) -> str:
    """Return "was" or "were", whichever agrees with ``aspect``."""
    return "were" if aspect in PLURAL else "was"


@lru_cache(maxsize=1)
def _patterns() -> tuple[tuple[Template, re.Pattern[str]], ...]:
    qualities = sorted({word for values in _VALUE_OF.values() for word in values})
    choices = {
        **PHRASES,
        **dict.fromkeys(("x", "y"), tuple(CLASS_OF)),
        **dict.fromkeys(("x_be", "y_be"), ("was", "were")),
        **dict.fromkeys(("x_is", "x_too", "y_is"), tuple(qualities)),
    }

    def slot_pattern(slot: re.Match[str]) -> str:
        name = slot.group(1)
        return f"(?P<{name}>{'|'.join(choices[name])})"

    return tuple(
        (
            template,
            re.compile(re.sub(r"\\\{(\w+)\\\}", slot_pattern, re.escape(template.text))),
        )
        for template in TEMPLATES
    )


def _read_slots(template: Template, slots: dict[str, str]) -> Sentence | None:
    """Return the sentence; None where agreement or a quality does not fit its aspect."""
    aspects = tuple(slots[name] for name in ("x", "y") if name in slots)
    if len(set(aspects)) < len(aspects) or slots.get("x_is", 0) == slots.get("x_too", 1):
        return None
    if any(CLASS_OF[aspect] not in template.classes for aspect in aspects):
        return None
    for name in ("x", "y"):
        if f"{name}_be" in slots and slots[f"{name}_be"] != be_form(slots[name]):
            return None
    polarities = [] if template.polarity is None else [template.polarity]
    for name in ("x_is", "x_too", "y_is"):
        if name in slots:
            values = _VALUE_OF[CLASS_OF[slots[name[0]]]]
            if slots[name] not in values:
                return None
            polarities.append(values[slots[name]])
    return Sentence("", template.kind, aspects, tuple(polarities))


@lru_cache(maxsize=65536)
def parse_sentence(text: str) -> Sentence:
    """Read one sentence, its full stop or exclamation mark included."""
    for template, pattern in _patterns():
        match = pattern.fullmatch(text)
        if match is not None:
            read = _read_slots(template, match.groupdict())
            if read is not None:
                return Sentence(text, read.kind, read.aspects, read.polarities)
    return Sentence(text, None)


def parse_review(text: str) -> tuple[tuple[Sentence, ...], str]:
    """Split a review into its finished sentences and the unfinished rest ("" when it ends well)."""
    pieces = re.findall(r"[^.!]*[.!]+|[^.!]+$", text.strip())
    finished = [piece.strip() for piece in pieces if piece[-1] in ".!"]
    rest = pieces[-1].strip() if pieces and pieces[-1][-1] not in ".!" else ""
    return tuple(parse_sentence(sentence) for sentence in finished), rest


_PROMPT_PATTERN = re.compile(
    rf"\b(?P<place>{'|'.join(sorted(PLACES, key=len, reverse=True))})\b"
    rf".*\bthe (?P<x>{'|'.join(CLASS_OF)}) and the (?P<y>{'|'.join(CLASS_OF)})\b"
)


def parse_prompt(prompt: str) -> tuple[str, tuple[str, str]] | None:
    """Return the place and the two aspects that a prompt asks about; None for another text."""
    match = _PROMPT_PATTERN.search(prompt)
    if match is None:
        return None
    return match["place"], (match["x"], match["y"])
