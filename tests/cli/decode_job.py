"""One `tq-fast decode` as a test runs it."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from tests.cli.trio import Trio
from tq_fast import DecodeConfig
from tq_fast.cli.decode import run_decode
from tq_fast.cli.job import JobOptions
from tq_fast.jobs.resume import ModelChoice

CONFIG = DecodeConfig(k=4, horizon=3, max_new_tokens=6, eos_token_id=())
# Some prompts are equal: their random streams differ only if numbered over the whole file.
TEXTS = ["a b", "c", "a b", "d e f", "a b", "c"]


class Job:
    """One command line, run as often as wanted; what it said is in `said`."""

    def __init__(self, folder: Path, trio: Trio, texts: Sequence[str] = TEXTS) -> None:
        self.prompts = folder / "prompts.jsonl"
        self.output = folder / "out.jsonl"
        self.models = ModelChoice(
            baseline=str(trio.baseline), sft=str(trio.sft), reward=str(trio.reward)
        )
        self.said = ""
        self.write_prompts(texts)

    def write_prompts(self, texts: Sequence[str]) -> None:
        lines = [json.dumps({"prompt": text, "id": f"p{i}"}) for i, text in enumerate(texts)]
        self.prompts.write_text("\n".join(lines) + "\n")

    def run(self, config: DecodeConfig = CONFIG, **options: Any) -> int:
        heard = io.StringIO()
        models = dataclasses.replace(self.models, **options.pop("models", {}))
        console = Console(file=heard, width=80)
        try:
            return run_decode(
                config, models, str(self.prompts), self.output, JobOptions(**options), console
            )
        finally:
            self.said = heard.getvalue()

    def records(self) -> dict[int, dict[str, Any]]:
        lines = self.output.read_bytes().split(b"\n")
        assert lines.pop() == b""
        records = [json.loads(line) for line in lines]
        by_index = {record["index"]: record for record in records}
        assert len(by_index) == len(records), "a prompt has two records"
        return by_index

    def responses(self) -> dict[int, list[int]]:
        return {index: record["token_ids"] for index, record in sorted(self.records().items())}
