"""Draw how a step works: `python scripts/draw_step.py docs/pictures/step.svg`.

The figure has a light ground of its own, so that it reads in light and in dark mode, and text of at
least 12 pixels where it is 700 pixels wide.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

WIDTH, HEIGHT = 1000, 470
ALPHA = 0.5
PROMPT = [("How", 54), ("was", 50), ("the", 46), ("soup", 58), ("?", 30)]
# Candidate, its prior, and two roll-outs with their rewards; the last one is chosen.
CANDIDATES = [
    ("It", 0.40, [("was fine .", 0.4), ("was cold .", 0.0)]),
    ("We", 0.35, [("had to wait", 0.3), ("liked it .", 1.1)]),
    ("The", 0.25, [("soup was great", 1.6), ("soup was rich", 1.2)]),
]
ROWS = (140, 250, 360)
COLUMNS = {
    "prompt": (30, "prompt", "stored once"),
    "candidates": (342, "1", "candidates"),
    "rollouts": (508, "2", "roll-outs"),
    "reward": (656, "3", "rewards"),
    "law": (868, "4", "prior → new law"),
}
_STYLE = """
text { font: 18px system-ui, "DejaVu Sans", sans-serif; fill: #1e293b; text-anchor: middle }
.head { font-weight: 600; font-size: 20px }
.number { font-weight: 700; fill: #fff }
.left { text-anchor: start }
.note { font-size: 18px; fill: #334155 }
.line { fill: none; stroke: #94a3b8; stroke-width: 2 }
.prompt { fill: #dbeafe; stroke: #2563eb }
.candidate { fill: #fef3c7; stroke: #d97706 }
.chosen { fill: #bbf7d0; stroke: #15803d; stroke-width: 3 }
.rollout { fill: #fff; stroke: #d97706; stroke-dasharray: 4 3 }
.reward { fill: #ede9fe; stroke: #7c3aed }
.commit { fill: none; stroke: #15803d; stroke-width: 3 }
"""


def draw() -> str:
    """Return the figure as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>One step of Transfer Q*</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="8" refY="5" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0 0 10 5 0 10z" fill="#15803d"/></marker></defs>',
        f'<rect x="1" y="1" width="{WIDTH - 2}" height="{HEIGHT - 2}" rx="14" fill="#f8fafc" '
        'stroke="#cbd5e1"/>',
        *_heads(),
        *_prompt(),
    ]
    laws = _laws()
    for candidate, row, law in zip(CANDIDATES, ROWS, laws, strict=True):
        parts += _branch(candidate, row, law, is_chosen=candidate is CANDIDATES[-1])
    parts += _notes()
    return "\n".join([*parts, "</svg>"]) + "\n"


def _laws() -> list[float]:
    """Return what the priors become, by `prior * exp(Q / alpha)` over the candidates."""
    scores = [prior * math.exp(_q(texts) / ALPHA) for _, prior, texts in CANDIDATES]
    return [score / sum(scores) for score in scores]


def _q(texts: list[tuple[str, float]]) -> float:
    return sum(reward for _, reward in texts) / len(texts)


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"{f" class={kind!r}" if kind else ""}>{text}</text>'


def _box(x: float, y: float, width: float, text: str, kind: str) -> list[str]:
    box = f'<rect x="{x:g}" y="{y - 18:g}" width="{width:g}" height="36" rx="6" class="{kind}"/>'
    return [box, _text(x + width / 2, y + 6, text)]


def _heads() -> list[str]:
    parts = [_text(152, 38, "prompt", "head"), _text(152, 66, "stored once", "head")]
    for x, number, title in list(COLUMNS.values())[1:]:
        parts += [f'<circle cx="{x}" cy="32" r="15" fill="#334155"/>']
        parts += [_text(x, 38, number, "number"), _text(x, 72, title, "head")]
    return parts


def _prompt() -> list[str]:
    parts: list[str] = []
    x = 28.0
    for word, width in PROMPT:
        parts += _box(x, ROWS[1], width, word, "prompt")
        x += width + 4
    return parts


def _branch(
    candidate: tuple[str, float, list[tuple[str, float]]], row: int, law: float, *, is_chosen: bool
) -> list[str]:
    word, prior, texts = candidate
    end = ROWS[1]
    parts = [f'<path class="line" d="M282 {end} C300 {end} 292 {row} 312 {row}"/>']
    for idx, (text, reward) in enumerate(texts):
        y = row - 22 + 44 * idx
        parts += [f'<path class="line" d="M372 {row} C386 {row} 386 {y} 398 {y}"/>']
        x = 398.0
        for part in text.split():
            parts += _box(x, y, 70, part, "rollout")
            x += 74
        parts += [f'<path class="line" d="M616 {y} H630"/>']
        parts += _box(630, y, 52, f"{reward:.1f}", "reward")
        parts += [f'<path class="line" d="M682 {y} C694 {y} 692 {row} 704 {row}"/>']
    parts += _box(312, row, 60, word, "chosen" if is_chosen else "candidate")
    parts += [_text(708, row + 6, f"Q = {_q(texts):.1f}", "left")]
    parts += _bar(row - 24, prior, "#94a3b8") + _bar(row + 2, law, "#15803d")
    return parts


def _bar(y: float, share: float, colour: str) -> list[str]:
    width = 130 * share
    bar = f'<rect x="792" y="{y:g}" width="{width:.0f}" height="20" rx="3" fill="{colour}"/>'
    return [bar, _text(800 + width, y + 16, f"{share:.0%}", "left")]


def _notes() -> list[str]:
    return [
        '<path class="line" d="M312 408 v10 H616 v-10"/>',
        _text(464, 444, "k x n branches of all prompts: one forward pass a depth", "note"),
        _text(870, 444, "prior x exp(Q / alpha)", "note"),
        '<path class="commit" marker-end="url(#tip)" d="M312 366 C284 366 266 340 266 274"/>',
        '<circle cx="43" cy="330" r="15" fill="#15803d"/>',
        _text(43, 336, "5", "number"),
        _text(66, 337, "commit", "head left"),
        _text(28, 368, "its keys and values join the", "note left"),
        _text(28, 392, "prompt's: nothing is", "note left"),
        _text(28, 416, "encoded twice", "note left"),
    ]


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(draw(), encoding="utf-8")
