"""The picture of a trace: candidates, their Q, and the law that each token was drawn from.

It needs matplotlib (the extra `plots`). Figures are made without pyplot, which would keep them.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

DPI = 110
_PRIOR, _FINAL = "#b9b9b9", "#1f5fa8"
_COLUMNS = 3
# The title of a step shows so many letters of the text before its token.
_CONTEXT = 26
# A candidate's text is cut behind so many letters.
_LONGEST = 16

Step = Mapping[str, Any]


class TraceFigure(Figure):
    """A figure that a notebook shows as a picture."""

    def _repr_png_(self) -> bytes:
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png")
        # Few colours take a third of the bytes, which notebooks hold.
        Image.open(drawn).convert("P", palette=Image.Palette.ADAPTIVE).save(small, "PNG")
        return small.getvalue()


def trace_figure(
    trace: Sequence[Step], title: str, shown: Sequence[int], before: Callable[[int], str]
) -> TraceFigure:
    """Draw a panel for each step that is shown: prior, Q and final law of every candidate.

    Args:
        trace: steps with the fields of a `StepTrace` as lists and numbers, in which None stands for
            a number that is not finite; `texts` has the candidates' texts, where they are known.
        title: of the whole figure.
        shown: indices of the steps, at least one.
        before: the text before the token of a step, by its index.
    """
    num_columns = min(_COLUMNS, len(shown))
    num_rows = -(-len(shown) // num_columns)
    most = max(len(trace[idx]["candidates"]) for idx in shown)
    height = 0.6 + num_rows * (0.9 + 0.265 * most)
    size = (3.67 * max(2, num_columns), height)
    figure = TraceFigure(figsize=size, dpi=DPI, layout="constrained")
    axes = figure.subplots(num_rows, num_columns, squeeze=False).ravel()
    for axis, idx in zip(axes, shown, strict=False):
        _draw_step(axis, trace[idx], idx, before(idx))
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    handles, names = axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return figure


def furthest_steps(trace: Sequence[Step], num: int = 6) -> list[int]:
    """Return the steps, in their order, whose laws moved furthest from the prior."""
    by_shift = sorted(range(len(trace)), key=lambda idx: -_moved(trace[idx]))
    return sorted(by_shift[:num])


def probability(logprob: float | None) -> float:
    """Return the probability of a log-prob of a record, where None stands for minus infinity."""
    return 0.0 if logprob is None else math.exp(logprob)


def _draw_step(axis: Axes, step: Step, idx: int, before: str) -> None:
    texts = step.get("texts") or [str(token) for token in step["candidates"]]
    places = np.arange(len(texts))
    prior, final = _laws(step)
    axis.barh(places - 0.2, prior, 0.38, color=_PRIOR, label="prior probability")
    axis.barh(places + 0.2, final, 0.38, color=_FINAL, label="final probability")
    names = []
    for place, text in enumerate(texts):
        mark = "▶ " if place == step["choice"] else ""
        q = step["q"][place]
        value = "  not needed" if q is None else f"  Q {q:+.2f}"
        names.append(f"{mark}{_shown(text)}{value}")
    axis.set_yticks(places, names, fontsize=8.5, parse_math=False)
    axis.get_yticklabels()[step["choice"]].set_fontweight("bold")
    axis.invert_yaxis()
    axis.set_xlim(0, 1)
    axis.tick_params(axis="x", labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    before = " ".join(before.split())[-_CONTEXT:]
    title = f"token {idx + 1}, after “…{before}”" if before else f"token {idx + 1}"
    # The title is aligned to the right, because it spans the names of the candidates too.
    axis.set_title(title, fontsize=9, loc="right", parse_math=False)


def _shown(text: str) -> str:
    """A candidate's text on one line; one that is white space alone as Python writes it."""
    text = text.strip() or repr(text)
    text = text.replace("\n", "\\n")
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def _laws(step: Step) -> tuple[np.ndarray, np.ndarray]:
    """Return prior and final probabilities of the candidates."""
    kinds = ("prior_logprobs", "final_logprobs")
    prior, final = (np.array([probability(value) for value in step[kind]]) for kind in kinds)
    return prior, final


def _moved(step: Step) -> float:
    """Return the total variation between the final law and the prior on the candidates.

    Zero where the final law is not known, because not every Q was needed.
    """
    prior, final = _laws(step)
    return float(np.abs(final - prior / prior.sum()).sum() / 2) if final.any() else 0.0
