"""The report of an evaluation: every picture, every table, and the page that holds them."""

from __future__ import annotations

import dataclasses
import html
import io
import json
from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from ..results import Records, write_head
from . import frontier as frontiers
from . import methods as figures
from . import page
from . import sweeps as sweep_figures

# The page shows so many traces for each method.
_TRACES = 2


@dataclasses.dataclass(frozen=True)
class Report:
    """A page, and its pictures by file name."""

    page: str
    pictures: dict[str, bytes]


def build_report(
    summary: Mapping[str, Any],
    records: Mapping[tuple[str, str], Records],
    *,
    versions: Mapping[str, Any],
    config_text: str,
) -> Report:
    """Draw everything that the results allow; a picture without data is left out.

    Args:
        summary: of `summarise`.
        records: of each (set-up, method).
        versions: what the evaluation ran with.
        config_text: the configuration as it was given.
    """
    builder = _Builder(records)
    builder.add(page.heading(1, summary["title"]))
    if summary["description"]:
        builder.add(page.paragraph(summary["description"]))
    seeds = ", ".join(map(str, summary["seeds"]))
    builder.add(page.paragraph(f"Seeds {seeds}. Intervals: {summary['intervals']}.", "note"))
    for setup in summary["setups"]:
        if any(row["responses"] for row in setup["methods"]):
            builder.add_setup(setup)
    for head in summary.get("values", ()):
        builder.add(page.paragraph(write_head(head), "note"))
    builder.add(page.heading(2, "What it ran with"))
    facts = html.escape(json.dumps(versions, indent=2))
    builder.add(f"<pre>{facts}</pre><details><summary>Configuration</summary>")
    builder.add(f"<pre>{html.escape(config_text)}</pre></details>")
    return Report(page.make_page(summary["title"], builder.parts), builder.pictures)


class _Builder:
    def __init__(self, records: Mapping[tuple[str, str], Records]) -> None:
        self.records = records
        self.parts: list[str] = []
        self.pictures: dict[str, bytes] = {}

    def add(self, part: str) -> None:
        self.parts.append(part)

    def add_picture(self, name: str, figure: Figure, caption: str) -> None:
        png = to_png(figure)
        self.pictures[f"{name}.png"] = png
        self.add(page.picture(png, caption, round(figure.get_figwidth() * 96)))

    def add_setup(self, setup: Mapping[str, Any]) -> None:
        name = setup["name"]
        self.add(page.heading(2, setup["title"]))
        rows = figures.plain_rows(setup)
        failed = sum(row["failed"] for row in setup["methods"])
        self.add(
            page.paragraph(
                f"Target reward: {setup['target']}. "
                f"{setup['methods'][0]['responses']} responses a method, {failed} failed in all.",
                "note",
            )
        )
        self._add_methods(setup, name, len(rows))
        self._add_shift(setup, name)
        self._add_frontier(setup, name)
        self._add_sweeps(setup, name)
        self.add(page.heading(3, "Table"))
        self.add(page.results_table(setup))
        self._add_traces(setup, name)

    def _add_methods(self, setup: Mapping[str, Any], name: str, num_rows: int) -> None:
        if num_rows < 3:
            return
        self.add(page.heading(3, "Reward by method"))
        caption = (
            "Average reward and 95 % interval; the dotted line is the baseline. The gold reward is "
            "the truth that the reward model approximates. After figure 2 of the paper."
        )
        self.add_picture(f"{name}-reward", figures.reward_by_method(setup), caption)
        self.add(page.heading(3, "Diversity, coherence and divergence by method"))
        caption = (
            "Diversity counts repeated 2- to 4-grams; coherence is the cosine between the sentence "
            "embeddings of prompt and response (left out where no embedder was given); a hollow "
            "point is an upper bound. After figure 3 of the paper."
        )
        self.add_picture(f"{name}-quality", figures.quality_by_method(setup), caption)

    def _add_shift(self, setup: Mapping[str, Any], name: str) -> None:
        sources = {row["method"]: row["name"] for row in figures.plain_rows(setup)}
        own = {m: self.records.get((name, n), ()) for m, n in sources.items()}
        sampled = [m for m in ("sft", "baseline") if own.get(m)]
        is_known = any("baseline_reward" in r.get("measures", {}) for m in sampled for r in own[m])
        if not is_known or setup["baseline_reward"] == setup["target"]:
            return
        self.add(page.heading(3, "The shift between the two rewards"))
        caption = (
            "Left: the reward that the baseline was aligned to, against the target; the less they "
            "agree, the larger the shift. Middle and right: how far alignment moved either. Where "
            "the target moved less, indirect transfer has something to make up for. After figures "
            "4 and 7 of the paper."
        )
        by_name = {n: self.records[(name, n)] for n in sources.values()}
        self.add_picture(f"{name}-shift", figures.reward_shift(setup, by_name), caption)

    def _add_frontier(self, setup: Mapping[str, Any], name: str) -> None:
        if frontiers.has_frontier(setup):
            self.add(page.heading(3, "What pays: reward against divergence and cost"))
            caption = (
                "Best of n, thick and black or grey with its n, is the line to beat. Every other "
                "line is one method with a setting changed, as its name says. Further up is "
                "better; further left is closer to the SFT model, or cheaper. A hollow point is an "
                "upper bound on the divergence. Bars: 95 % intervals of the reward."
            )
            if setup["ceiling"] is not None:
                caption += (
                    " Shaded: what no decoder reaches at its divergence, from "
                    f"{setup['ceiling']['num_texts']} SFT samples a prompt; dashed where few of "
                    "them carry the weights."
                )
            self.add_picture(f"{name}-frontier", frontiers.frontier(setup), caption)
        if setup["equal_cost"]:
            self.add(page.heading(3, "Over best of n at equal token-forwards"))
            caption = (
                "The reward of a method minus that of best of n, read between the n that were run "
                "at the token-forwards of the method; pairs of the same prompts and seeds, 95 % "
                "intervals. A triangle to the right: the method costs less than the smallest n, "
                "and its advantage is at least this. To the left: it costs more than the largest "
                "n, and the advantage is at most this."
            )
            self.add_picture(f"{name}-equal-cost", frontiers.over_best_of_n(setup), caption)
            labels = {row["name"]: row["label"] for row in setup["methods"]}
            for comparison in setup["equal_cost"]:
                self.add(page.cost_table(comparison, labels))

    def _add_sweeps(self, setup: Mapping[str, Any], name: str) -> None:
        settings = sweep_figures.swept_settings(setup)
        for setting in settings:
            text = sweep_figures.describe(setting)
            self.add(page.heading(3, f"Ablation: {text}"))
            caption = f"Reward and divergence against {text}; bands: 95 % intervals."
            if setting in ("k", "alpha"):
                caption += " After figure 8 of the paper."
            picture = sweep_figures.ablation(setup, setting)
            self.add_picture(f"{name}-{setting}", picture, caption)
        if "num_rollouts" in settings:
            self.add(page.heading(3, "How good Q is"))
            caption = (
                "Left: how many of the n roll-outs of a candidate carry weight; with equal weights "
                "all n do. Right: the Monte-Carlo standard error of Q, to be held against alpha; "
                "where few roll-outs carry the weight it is itself estimated too low."
            )
            self.add_picture(f"{name}-estimates", sweep_figures.estimate_quality(setup), caption)

    def _add_traces(self, setup: Mapping[str, Any], name: str) -> None:
        shown = [
            (row["label"], record)
            for row in setup["methods"]
            if row["method"].startswith(("transfer_q", "direct"))
            for record in [r for r in self.records[(name, row["name"])] if "trace" in r][:_TRACES]
        ]
        if not shown:
            return
        self.add(page.heading(3, "Responses token by token"))
        self.add(
            page.paragraph(
                "Each box is one token of a response. Grey: what the prior gives the candidates; "
                "Q: the expected reward after the candidate, with its Monte-Carlo error; blue: the "
                "law that the token was drawn from; ▶: the token drawn."
            )
        )
        label, record = shown[0]
        caption = "Tokens at which Q changed the prior most."
        self.add_picture(f"{name}-trace", figures.trace_figure(record, label), caption)
        for i, (label, record) in enumerate(shown):
            self.add(page.trace_view(record, label, is_open=i == 0))


def to_png(figure: Figure) -> bytes:
    """Return the picture as PNG, without the versions and dates that would change it every time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
