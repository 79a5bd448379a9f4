"""The folder of results of an evaluation: records, their summary and tables, and what it ran with.

config.toml                          what was run
records/SETUP/METHOD.jsonl           a record a prompt and seed, with its measures
records/SETUP/METHOD.jsonl.settings.json
versions.json  summary.json  table.md
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
import transformers

from .. import _native
from .._version import read_version
from ..jobs.record_file import OutputRefused, Record, RecordFile
from ..results import KlKind, weakest_kl_kind
from .ceiling import ceiling_at, read_curve, summarise_ceiling, write_ceiling
from .config import POOL, EvalConfig, MethodSpec, SetupSpec
from .equal_cost import compare_setup, write_comparison
from .intervals import Bootstrap, Cells, Interval
from .measures import compare_scores
from .methods import measuring_roles

Records: TypeAlias = Sequence[Record]

# Measures of single responses; a summary leaves out those that no record of a method has.
MEASURES = (
    *("reward", "baseline_reward", "gold", "kl_to_sft", "diversity", "coherence"),
    *(
        "rep_2",
        "rep_3",
        "rep_4",
        "tokens",
        "ess",
        "q_stderr",
        "prior_mass",
        "seconds",
        "cpu_seconds",
    ),
)
_SHOWN = {
    "reward": "reward",
    "gain": "over baseline",
    "normalised": "normalised",
    "gold": "gold reward",
    "kl_to_sft": "KL to SFT, nats (≤ at most, ≲ roughly at most)",
    "ceiling": "highest reward at that KL",
    "diversity": "diversity",
    "coherence": "coherence",
    "token_forwards": "token-forwards",
    "cpu_seconds": "CPU s a response",
}
# What stands before a divergence that is a bound.
_KL_MARKS: Mapping[KlKind, str] = {"exact": "", "at most": "≤ ", "approximate": "≲ "}


def records_path(output: Path, setup: SetupSpec, method: MethodSpec) -> Path:
    """Return the file of the records of a method."""
    return output / "records" / setup.name / f"{method.name}.jsonl"


def read_records(output: Path, config: EvalConfig) -> dict[tuple[str, str], list[Record]]:
    """Return the records of every (set-up, method): one an index, without cut lines."""
    records: dict[tuple[str, str], list[Record]] = {}
    for setup in config.setups:
        for method in setup.jobs:
            file = RecordFile(records_path(output, setup, method))
            by_index: dict[int, Record] = {}
            for line in file.lines():
                record = line.record
                if record is None:
                    continue
                # A response wins over the error that the prompt met before.
                if "error" not in record or record["index"] not in by_index:
                    by_index[record["index"]] = record
            records[(setup.name, method.name)] = [by_index[index] for index in sorted(by_index)]
    return records


def write_summary(
    output: Path, config: EvalConfig, heads: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """Compute the summary of the records, write it with its tables, and return it.

    Args:
        output: the folder.
        config: what was run.
        heads: what the summary says of the value heads.
    """
    summary = summarise(config, read_records(output, config))
    summary["values"] = list(heads)
    write_text(output / "summary.json", json.dumps(summary, indent=2) + "\n")
    write_text(output / "table.md", write_table(summary))
    return summary


def summarise(config: EvalConfig, records: Mapping[tuple[str, str], Records]) -> dict[str, Any]:
    """Return the summary of all set-ups, ready for JSON.

    Args:
        config: what was run.
        records: of each (set-up, method); error records count as failed and enter no mean.
    """
    bootstrap = Bootstrap(config.resamples)
    return {
        "title": config.title,
        "description": config.description,
        "seeds": list(config.seeds),
        "intervals": f"95 %, percentile bootstrap, {config.resamples} resamples of the prompts, "
        "each with the responses of all its seeds",
        "setups": [_summarise_setup(setup, records, bootstrap) for setup in config.setups],
    }


def _summarise_setup(
    setup: SetupSpec, records: Mapping[tuple[str, str], Records], bootstrap: Bootstrap
) -> dict[str, Any]:
    by_method = {
        method.name: records.get((setup.name, method.name), ()) for method in setup.methods
    }
    judge = _judge(setup)
    plain = next((method.name for method in setup.methods if method.method == "baseline"), None)
    ceiling = summarise_ceiling(records.get((setup.name, POOL), ()))
    cells = {
        name: {measure: cells_of(own, measure) for measure in ("reward", "gold")}
        for name, own in by_method.items()
    }
    rows, lines = [], _best_of_n_lines(setup)
    for method in setup.methods:
        own = by_method[method.name]
        metrics = {name: bootstrap.mean(cells_of(own, name)) for name in MEASURES}
        if plain is not None:
            ours, theirs = (cells_of(r, "reward") for r in (own, by_method[plain]))
            metrics["gain"] = bootstrap.difference(ours, theirs)
            metrics["normalised"] = bootstrap.ratio(ours, theirs)
        for other in setup.compare_with:
            if other != method.name:
                ours, theirs = (cells_of(r, "reward") for r in (own, by_method[other]))
                metrics[f"gain:{other}"] = bootstrap.difference(ours, theirs)
                outcomes = _outcomes(own, by_method[other], judge)
                metrics[f"win_tie:{other}"] = bootstrap.mean(outcomes)
        metrics["token_forwards"] = bootstrap.mean(_costs(own, method))
        row = _row(method, own, metrics)
        row["ceiling"] = _ceilings(ceiling, metrics)
        row["is_to_beat"] = any(method.name in names for names in lines.values())
        rows.append(row)
    return {
        "name": setup.name,
        "title": setup.title,
        "target": str(setup.models["reward"]),
        "baseline_reward": str(setup.models.get("baseline_reward", "")) or None,
        "judge": judge,
        "compare_with": list(setup.compare_with),
        "ceiling": ceiling,
        "methods": rows,
        "equal_cost": compare_setup(rows, cells, lines, bootstrap),
    }


def _row(
    method: MethodSpec, records: Records, metrics: Mapping[str, Interval | None]
) -> dict[str, Any]:
    failed = sum("error" in record for record in records)
    return {
        "name": method.name,
        "label": method.label,
        "method": method.method,
        "group": method.group,
        "swept": method.swept,
        "responses": len(records) - failed,
        "failed": failed,
        "kl_kind": weakest_kl_kind(_kl_kinds(records)),
        "metrics": {name: found._asdict() for name, found in metrics.items() if found is not None},
    }


def _best_of_n_lines(setup: SetupSpec) -> dict[str, list[str]]:
    """Return the methods that are best of several n from one model, by what they are called."""
    lines: dict[str, list[str]] = {}
    for method in setup.methods:
        is_plain = method.own.get("source", "baseline") in ("sft", "baseline")
        if method.method == "best_of_n" and is_plain and method.swept is not None:
            lines.setdefault(method.group_label, []).append(method.name)
    return lines


def _ceilings(
    ceiling: Mapping[str, Any] | None, metrics: Mapping[str, Interval | None]
) -> dict[str, float | None]:
    """Return the ceiling of every measure at the method's divergence; None where it has none."""
    found = metrics["kl_to_sft"]
    if ceiling is None or found is None:
        return {}
    curves = {name: read_curve(curve) for name, curve in ceiling["curves"].items()}
    return {name: ceiling_at(curve, found.value) for name, curve in curves.items()}


def _kl_kinds(records: Records) -> list[KlKind]:
    """Return what each response's divergence is to that of its method's law.

    Records of versions that did not say so count as bounds: that much holds for all of them.
    """
    known = [record["certificate"] for record in records if "certificate" in record]
    return [certificate.get("kl_kind", "at most") for certificate in known]


def cells_of(records: Records, name: str) -> Cells:
    """Return the values of one measure by (prompt, seed), as far as they are known."""
    cells = {}
    for record in records:
        value = record.get("steps") if name == "tokens" else record.get("measures", {}).get(name)
        if value is not None:
            cells[(record["prompt_idx"], record["seed"])] = float(value)
    return cells


def _costs(records: Records, method: MethodSpec) -> Cells:
    """Return the token-forwards of all models but those that are only measured against."""
    left_out = measuring_roles(method)
    costs = {}
    for record in records:
        if "measures" in record:
            counts = record["measures"]["token_forwards"]
            cost = sum(count for role, count in counts.items() if role not in left_out)
            costs[(record["prompt_idx"], record["seed"])] = cost
    return costs


def _judge(setup: SetupSpec) -> str:
    """Return the role whose scores decide who wins: judge, else gold reward, else target."""
    return next(role for role in ("judge", "gold", "reward") if role in setup.models)


def _outcomes(ours: Records, theirs: Records, judge: str) -> Cells:
    first, second = cells_of(ours, judge), cells_of(theirs, judge)
    both = first.keys() & second.keys()
    return {cell: 100.0 * compare_scores(first[cell], second[cell]) for cell in both}


def write_table(summary: Mapping[str, Any]) -> str:
    """Return the tables of all set-ups in Markdown."""
    parts = [
        f"# {summary['title']}\n",
        f"{summary['description']}\n" if summary["description"] else "",
    ]
    parts.append(
        f"Seeds {', '.join(map(str, summary['seeds']))}. Intervals: {summary['intervals']}.\n"
    )
    for setup in summary["setups"]:
        parts.append(_setup_table(setup))
    parts += [write_head(head) for head in summary.get("values", ())]
    return "\n".join(part for part in parts if part)


def write_head(head: Mapping[str, Any]) -> str:
    """Return a sentence about a value head that methods decode with."""
    return (
        f"Value head {head['setup']}/{head['name']}: fitted to {head['num_texts']:,} texts that "
        f"{head['source']} drew to {head['prompts']:,} other prompts, once for all "
        f"({head['token_forwards']:,.0f} token-forwards); held-out R2 {head['r2']:.2f}.\n"
    )


def shown_columns(setup: Mapping[str, Any]) -> dict[str, str]:
    """Return the measures that a table of the set-up shows, and their titles."""
    known = {name for row in setup["methods"] for name in row["metrics"]}
    known |= {"ceiling"} if setup["ceiling"] is not None else set()
    shown = {name: title for name, title in _SHOWN.items() if name in known}
    labels = {row["name"]: row["label"] for row in setup["methods"]}
    for other in setup["compare_with"]:
        shown[f"gain:{other}"] = f"reward over {labels[other]}"
        shown[f"win_tie:{other}"] = f"win-tie against {labels[other]}, %"
    return shown


def _setup_table(setup: Mapping[str, Any]) -> str:
    shown = shown_columns(setup)
    lines = [
        f"## {setup['title']}\n",
        f"Target reward: {setup['target']}; judge: {setup['judge']}.\n",
    ]
    lines.append("| method | " + " | ".join(shown.values()) + " | failed |")
    lines.append("|" + " --- |" * (len(shown) + 2))
    for row in setup["methods"]:
        cells = [format_metric(row, name) for name in shown]
        lines.append(f"| {row['label']} | " + " | ".join(cells) + f" | {row['failed']} |")
    if setup["ceiling"] is not None:
        lines += ["", write_ceiling(setup["ceiling"])]
    labels = {row["name"]: row["label"] for row in setup["methods"]}
    for comparison in setup["equal_cost"]:
        lines += ["", write_comparison(comparison, labels)]
    return "\n".join(lines) + "\n"


def kl_mark(row: Mapping[str, Any], name: str) -> str:
    """Return what stands before a measure of a method: a mark where it is a bounded divergence."""
    return _KL_MARKS[row["kl_kind"]] if name == "kl_to_sft" else ""


def format_metric(row: Mapping[str, Any], name: str) -> str:
    """Write a measure of a method as a cell of a table; empty where it is not known."""
    if name == "ceiling":
        highest = row["ceiling"].get("reward")
        return "" if highest is None else format_number(highest, 2)
    found = row["metrics"].get(name)
    return "" if found is None else kl_mark(row, name) + format_interval(found, name)


def format_interval(interval: Mapping[str, float], name: str) -> str:
    """Write an interval as a cell of a table: the estimate, and its ends in brackets."""
    value, low, high = interval["value"], interval["low"], interval["high"]
    if name == "token_forwards":
        return f"{value:,.0f}"
    if name == "cpu_seconds":
        return f"{value:.3f}"
    digits = 1 if name.startswith("win_tie") else 3 if name in ("diversity", "coherence") else 2
    shown = [format_number(number, digits) for number in (value, low, high)]
    return f"{shown[0]} [{shown[1]}, {shown[2]}]"


def format_number(number: float, digits: int) -> str:
    """Write `number` with `digits` decimals, and without a sign where it is rounded to 0."""
    # Adding 0.0 turns -0.0 into 0.0.
    return f"{round(number, digits) + 0.0:.{digits}f}"


def write_run(output: Path, workers: int, *, responses: int, seconds: float) -> None:
    """Write what this run was made with, and add it to the runs of the folder.

    Args:
        output: the folder.
        workers: processes.
        responses: that this run decoded.
        seconds: wall time.
    """
    path = output / "versions.json"
    runs = json.loads(path.read_text(encoding="utf-8"))["runs"] if path.exists() else []
    used = os.times()
    cpu = used.user + used.system + used.children_user + used.children_system
    runs.append(
        {
            "finished": time.strftime("%Y-%m-%d", time.gmtime()),
            "workers": workers,
            "responses": responses,
            "wall_seconds": round(seconds, 1),
            "cpu_seconds": round(cpu, 1),
        }
    )
    versions = {
        "tq_fast": read_version(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cpu": _native.cpu_name(),
        "cores": os.cpu_count(),
        "runs": runs,
    }
    write_text(path, json.dumps(versions, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file in one go.

    Raises:
        OutputRefused: it cannot be written.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise OutputRefused(f"output {str(path)!r} cannot be written: {error.strerror}") from error
