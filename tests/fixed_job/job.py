"""The fixed job: every kind of decode on the embedded models, as records without settings.

    python -m tests.fixed_job.job FILE

writes the records, one JSON line each. Run it in two checkouts on one machine and compare the files
byte for byte: that is how a change shows that it changes no token. `test_same_tokens.py` compares
the stored records, which another machine made.
"""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tq_fast
from tq_fast import presets
from tq_fast.models.tiny import load_tiny_world

WORLD = load_tiny_world()
PROMPTS = [*WORLD.prompts[:3], WORLD.prompts[0]]
SMALL = {"k": 4, "horizon": 5, "max_new_tokens": 8, "seed": 7}
INDIRECT = {"transfer": "indirect", "beta": WORLD.beta, "num_rollouts": 3}

# Fields that came after the records were stored; these jobs leave all but the last at None.
_LATER = ("agents", "value", "kl_kind")

# Each is a call of `decode`: what it shows stands in its name.
DECODES: dict[str, dict[str, Any]] = {
    "direct sampled": {"num_rollouts": 2},
    "direct greedy": {"strategy": "greedy", "rollout": "greedy"},
    "direct to the end": {"horizon": None, "num_rollouts": 2},
    "direct bounded": {"num_rollouts": 3, "reward_bounds": (-20.0, 20.0), "beta": WORLD.beta},
    "direct soft, baseline prior": {"prior": "baseline", "estimator": "soft", "num_rollouts": 2},
    "direct truncated": {"rollout_top_k": 20, "rollout_top_p": 0.9, "rollout_temperature": 0.8},
    "indirect log_ratio": INDIRECT,
    "indirect reward_gap": {**INDIRECT, "weights": "reward_gap", "strategy": "greedy"},
    "indirect published": {**INDIRECT, "weights": "published"},
}
METHODS: dict[str, dict[str, Any]] = {
    "sft": {},
    "baseline": {"strategy": "greedy"},
    "dera": {"mix": 0.7},
    "best_of_n": {"n": 4},
    "args": {},
    "controlled_decoding": {"num_rollouts": 2},
    "direct_on_target": {"prior": "baseline"},
}


def _plain(value: Any) -> Any:
    """`value` as JSON has it."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {name: field for name, field in fields.items() if name not in _LATER}
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _record(name: str, result: tq_fast.DecodeResult) -> dict[str, Any]:
    certificates = getattr(result, "certificates", None) or result.certificate
    counts = {"num_steps", "rollout_steps", "rollouts_run", "rollouts_skipped", "token_forwards"}
    stats = {field: getattr(result.stats, field) for field in sorted(counts)}
    return {
        "job": name,
        "texts": result.texts,
        "sequences": _plain(result.sequences),
        "traces": _plain(result.traces),
        "certificates": _plain(certificates),
        "stats": stats,
    }


def _from_the_command_line(folder: Path) -> Iterator[dict[str, Any]]:
    prompts, output = folder / "prompts.jsonl", folder / "out.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in PROMPTS))
    options = ["--prompts", prompts, "--output", output, "--traces", "--device", "cpu"]
    for role in ("baseline", "reward", "sft"):
        options += ["--" + role, getattr(WORLD, role)]
    options += ["--k", 4, "--horizon", 5, "--max-new-tokens", 8, "--num-rollouts", 2, "--seed", 7]
    command = [sys.executable, "-m", "tq_fast", "decode", *map(str, options)]
    subprocess.run(command, check=True, capture_output=True)
    for line in sorted(output.read_text().splitlines(), key=lambda line: json.loads(line)["index"]):
        record = json.loads(line)
        # The fingerprint follows the settings' names, and the version the commit.
        record.pop("tq_fast", None)
        del record["settings"], record["certificate"]["kl_kind"]
        yield {"job": "command line", **record}


def run_job() -> Iterator[dict[str, Any]]:
    """Carry the whole job out."""
    models = {role: str(getattr(WORLD, role)) for role in ("baseline", "reward", "sft")}
    models["baseline_reward"] = str(WORLD.baseline_reward)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in DECODES.items():
            given = {**SMALL, **models, **options, "device": "cpu"}
            yield _record(name, tq_fast.decode(PROMPTS, batch_size=3, **given))
        for name, options in METHODS.items():
            given = {**SMALL, **models, **options, "device": "cpu"}
            if name == "args":
                del given["horizon"]
            if name in ("sft", "baseline", "dera"):
                del given["baseline_reward"]
            result = getattr(presets, name)(PROMPTS, batch_size=3, **given)
            yield _record(f"method {name}", result)
    with tempfile.TemporaryDirectory() as folder:
        yield from _from_the_command_line(Path(folder))


def write_records(path: Path) -> None:
    """Write a line for every record of the job."""
    path.write_text("".join(json.dumps(record, sort_keys=True) + "\n" for record in run_job()))


if __name__ == "__main__":
    write_records(Path(sys.argv[1]))
