"""The table of a result that a notebook shows: plain HTML, without scripts."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import DecodeResult
    from .traces import StageTrace, StepTrace

_COLUMNS = ("prompt", "response", "tokens", "KL to sft", "KL to baseline", "last Q", "reward")
# What stands before a divergence that is not exact.
_KL_MARKS = {"exact": "", "at most": "≤ ", "approximate": "≈ "}
# The table has so many responses; its last line counts the others.
_MOST = 20
_NUMBER = "text-align:right;vertical-align:top"
_TEXT = "text-align:left;vertical-align:top;max-width:26em;white-space:pre-wrap"
_STYLES = (_TEXT, _TEXT, *[_NUMBER] * (len(_COLUMNS) - 2))


def table_of(result: DecodeResult) -> str:
    """Return the table: a line a response, with its divergences, in nats, and its values.

    "last Q" is Q of the last token, and "reward" that of a text which was scored as a whole.
    """
    rows = [_row("th", _COLUMNS)]
    rows += [_row("td", _cells(result, idx)) for idx in range(min(_MOST, len(result.sequences)))]
    num_left = len(result.sequences) - _MOST
    if num_left > 0:
        rows.append(f'<tr><td colspan="{len(_COLUMNS)}">and {num_left} more</td></tr>')
    # Notebooks would set text between two dollar signs as a formula.
    return f'<table class="tex2jax_ignore mathjax_ignore">{"".join(rows)}</table>'


def _row(kind: str, cells: Sequence[str]) -> str:
    pairs = zip(_STYLES, cells, strict=True)
    inner = (f'<{kind} style="{style}">{html.escape(cell)}</{kind}>' for style, cell in pairs)
    return f"<tr>{''.join(inner)}</tr>"


def _cells(result: DecodeResult, idx: int) -> list[str]:
    trace, certificate = result.traces[idx], result.certificates[idx]
    text = str(result.sequences[idx].tolist()) if result.texts is None else result.texts[idx]
    mark = _KL_MARKS[certificate.kl_kind]
    return [
        _prompt(result.prompts[idx]) if result.prompts else "",
        text,
        str(len(trace)),
        _number(certificate.kl_to_sft, f"{mark}{{:.2f}}"),
        _number(certificate.kl_to_baseline, f"{mark}{{:.2f}}"),
        _number(_last_q(trace), "{:+.2f}"),
        _number(_final_reward(trace, result.stages[idx] if result.stages else []), "{:+.2f}"),
    ]


def _prompt(given: Any) -> str:
    """A prompt as one text; the turns of a chat one below the other."""
    if isinstance(given, str):
        return given
    if given and isinstance(given[0], Mapping):
        return "\n".join(f"{turn['role']}: {turn['content']}" for turn in given)
    return str(given)


def _number(value: float | None, form: str) -> str:
    return "" if value is None or math.isnan(value) else form.format(value)


def _last_q(trace: Sequence[StepTrace]) -> float | None:
    return float(trace[-1].q[trace[-1].choice]) if trace else None


def _final_reward(trace: Sequence[StepTrace], stages: Sequence[StageTrace]) -> float | None:
    """The reward of a text that was scored as a whole; None of one that was not."""
    for stage in reversed(stages):
        if stage.choice is not None:
            return float(stage.rewards[stage.choice])
    if not trace or len(trace[0].candidates) != 1 or trace[0].rewards.numel() != 1:
        return None
    # A token that was drawn by itself has no Q, unless it is a value head's: the reward is that of
    # the text. The reward of a single candidate with a Q is that of a roll-out.
    is_drawn = bool(trace[0].q.isnan()) or trace[0].value is not None
    return float(trace[0].rewards) if is_drawn else None
