"""The report as one HTML page that needs no other file."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from typing import Any

from ...results.trace_figure import probability
from ..equal_cost import read_comparison
from ..results import format_metric, shown_columns

_STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.55 system-ui, sans-serif; color: #1d1d1d; background: #fff;
  max-width: 1080px; margin: 0 auto; padding: 24px 20px 80px; }
h1 { font-size: 1.7rem; margin: 0.4em 0; } h2 { font-size: 1.3rem; margin: 2.2em 0 0.4em;
  border-top: 1px solid #ddd; padding-top: 1em; } h3 { font-size: 1.05rem; margin: 1.6em 0 0.3em; }
p, li { max-width: 75ch; } .note { color: #555; font-size: 0.9rem; }
figure { margin: 1em 0 1.6em; } figure img { max-width: 100%; height: auto; }
figcaption { color: #444; font-size: 0.92rem; max-width: 80ch; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.86rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid #e6e6e6;
  white-space: nowrap; vertical-align: top; }
th { background: #f6f6f6; font-weight: 600; white-space: normal; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td small { display: block; color: #777; }
details { border: 1px solid #ddd; border-radius: 6px; margin: 10px 0; padding: 8px 14px; }
summary { cursor: pointer; font-weight: 600; }
.prompt { color: #555; } .response { background: #f6f8fb; padding: 8px 12px; border-radius: 6px; }
.steps { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 12px; }
.step { border: 1px solid #e2e2e2; border-radius: 6px; padding: 6px 10px; font-size: 0.82rem; }
.step h4 { margin: 0 0 4px; font-size: 0.82rem; font-weight: 500; color: #555; }
.step table { width: 100%; font-size: 0.8rem; } .step td, .step th { padding: 1px 4px; border: 0;
  background: none; vertical-align: middle; text-align: left; }
.step tr.chosen td { font-weight: 700; background: #eaf2fb; }
.token { max-width: 90px; overflow: hidden; text-overflow: ellipsis; }
.bar { position: relative; width: 78px; height: 15px; background: #f0f0f0; }
.bar i { position: absolute; inset: 0 auto 0 0; display: block; } .bar span { position: absolute;
  right: 2px; top: 0; font-size: 0.7rem; line-height: 15px; font-style: normal; color: #222; }
.prior i { background: #bdbdbd; } .final i { background: #8fb8e3; }
code, pre { font-family: ui-monospace, monospace; font-size: 0.85rem; }
pre { background: #f7f7f7; padding: 12px; overflow-x: auto; }
"""


def make_page(title: str, parts: Sequence[str]) -> str:
    """Return one HTML document of `parts`."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def heading(level: int, text: str) -> str:
    """Return a heading."""
    return f"<h{level}>{html.escape(text)}</h{level}>"


def paragraph(text: str, kind: str = "") -> str:
    """Return a paragraph; `kind` is its class."""
    shown = f' class="{kind}"' if kind else ""
    return f"<p{shown}>{html.escape(text)}</p>"


def picture(png: bytes, caption: str, width: int) -> str:
    """Return a picture inside the page, `width` CSS pixels wide."""
    data = base64.b64encode(png).decode()
    text = html.escape(caption)
    return (
        f'<figure><img width="{width}" alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )


def results_table(setup: Mapping[str, Any]) -> str:
    """Return the table of a set-up: estimates, and intervals below them."""
    columns = shown_columns(setup)
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ("method", *columns.values()))
    lines = []
    for row in setup["methods"]:
        cells = [f"<td>{html.escape(row['label'])}</td>"]
        for name in columns:
            value, _, ends = format_metric(row, name).partition(" [")
            cells.append(f"<td>{value}{f'<small>[{ends}</small>' if ends else ''}</td>")
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def cost_table(comparison: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    """Return the comparison with one line of best of n at equal cost as a table."""
    title, head, lines = read_comparison(comparison, labels)
    cells = "".join(f"<th>{html.escape(text)}</th>" for text in head)
    rows = ["".join(f"<td>{html.escape(cell)}</td>" for cell in line) for line in lines]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    note = paragraph(title, "note")
    return f'{note}<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'


def trace_view(record: Mapping[str, Any], label: str, *, is_open: bool) -> str:
    """Show a response token by token: every candidate with its prior, Q and final probability."""
    measures = record["measures"]
    facts = f"reward {measures['reward']:.2f}, {_describe_kl(record)}"
    steps = "".join(_step(record["trace"], idx) for idx in range(len(record["trace"])))
    return (
        f"<details{' open' if is_open else ''}><summary>{html.escape(label)}: {facts}</summary>"
        f'<p class="prompt">{html.escape(str(record["prompt"]))}</p>'
        f'<p class="response">{html.escape(str(record["response"]))}</p>'
        f'<div class="steps">{steps}</div></details>'
    )


def _describe_kl(record: Mapping[str, Any]) -> str:
    """Return the divergence of one response in words; its own law may be closer to SFT."""
    found = record["measures"]["kl_to_sft"]
    if found is None:
        return "KL to SFT not known"
    is_exact = record["certificate"].get("kl_kind") == "exact"
    return f"KL to SFT {'' if is_exact else 'at most '}{found:.1f} nats"


def _step(trace: Sequence[Mapping[str, Any]], idx: int) -> str:
    step = trace[idx]
    before = "".join(_chosen(earlier) for earlier in trace[max(0, idx - 4) : idx]).strip()
    title = f"token {idx + 1}, after “…{before}”" if before else f"token {idx + 1}"
    rows = []
    for place in range(len(step["candidates"])):
        is_chosen = place == step["choice"]
        q, error = step["q"][place], step["q_stderr"][place]
        # The error is not known for a candidate with one roll-out.
        value = f"{q:+.2f}" + ("" if error is None else f" ± {error:.2f}")
        rows.append(
            f'<tr{" class=chosen" if is_chosen else ""}><td class="token">'
            f"{'▶ ' if is_chosen else ''}{html.escape(_text(step, place))}</td>"
            f"<td>{_bar('prior', step['prior_logprobs'][place])}</td><td>{value}</td>"
            f"<td>{_bar('final', step['final_logprobs'][place])}</td></tr>"
        )
    head = "<tr><th>token</th><th>prior</th><th>Q</th><th>final</th></tr>"
    return (
        f'<div class="step"><h4>{html.escape(title)}</h4><table>{head}{"".join(rows)}</table></div>'
    )


def _bar(kind: str, logprob: float | None) -> str:
    share = probability(logprob)
    return (
        f'<div class="bar {kind}"><i style="width:{100 * share:.1f}%"></i>'
        f"<span>{share:.2f}</span></div>"
    )


def _text(step: Mapping[str, Any], place: int) -> str:
    texts = step.get("texts")
    return repr(step["candidates"][place]) if texts is None else texts[place].strip() or "␣"


def _chosen(step: Mapping[str, Any]) -> str:
    texts = step.get("texts")
    return " " + _text(step, step["choice"]) if texts is None else texts[step["choice"]]
