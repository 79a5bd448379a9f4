"""The records of a job: one JSON object for each prompt, a response or an error."""

from __future__ import annotations

import dataclasses
import math
import traceback
from collections.abc import Sequence
from typing import Any

import torch

from ..errors import (
    BackendRefused,
    DecodingError,
    ServerUnavailable,
    TqFastError,
    UnsupportedModel,
)
from ..results import PromptResult, StageTrace, StepTrace
from .prompt_file import PromptEntry
from .record_file import OutputRefused, Record

# Keys that a record has of its own; what the prompt file says under one of them goes into `extra`.
_OWN_KEYS = (
    *("index", "id", "prompt", "response", "token_ids", "steps", "certificate", "trace"),
    *("stages", "other_responses", "error", "settings", "tq_fast", "extra"),
)

# Errors that are of no prompt.
_OF_THE_JOB = (BackendRefused, UnsupportedModel, OutputRefused, ServerUnavailable)


def response_record(
    entry: PromptEntry, results: Sequence[PromptResult], *, traces: bool, texts: bool = False
) -> Record:
    """Return the record of a prompt that was decoded.

    Of several responses the first stands in the record itself, the rest in `other_responses`.
    Numbers are null where they are not finite or cannot be estimated (an error at n = 1).

    A method that chooses among whole texts, or blocks of them, adds `stages`, in order: `cut`
    (response tokens that all of them begin with), `rewards`, `choice` (null where the text that was
    there before stayed), and with `traces` or `texts` the token ids of all of them, `sequences`,
    where they are whole texts.

    Args:
        entry: the prompt.
        results: its responses.
        traces: whether the record holds every step, and the texts of every stage.
        texts: whether it holds the texts of every stage; a response that was drawn alone and scored
            is a stage too.
    """
    first, *others = [_response(result, traces=traces, texts=texts) for result in results]
    record = {**record_head(entry), **first}
    return {**record, "other_responses": others} if others else record


def _response(result: PromptResult, *, traces: bool, texts: bool) -> Record:
    record: Record = {
        "response": result.text,
        "token_ids": result.sequence.tolist(),
        "steps": len(result.trace),
        "certificate": finite(dataclasses.asdict(result.certificate)),
    }
    stages = result.stages
    if texts and not stages:
        rewards = result.trace[0].rewards[0]
        stages = [StageTrace(0, rewards, 0, [record["token_ids"]])]
    if stages:
        record["stages"] = [_stage(stage, texts=texts or traces) for stage in stages]
    if traces:
        record["trace"] = [_compact(step) for step in result.trace]
    return record


def _stage(stage: StageTrace, *, texts: bool) -> dict[str, Any]:
    described = {
        "cut": stage.cut,
        "rewards": finite(stage.rewards.tolist()),
        "choice": stage.choice,
    }
    if texts and stage.sequences is not None:
        described["sequences"] = stage.sequences
    return described


def error_record(entry: PromptEntry, error: Exception) -> Record:
    """Return the record of a prompt that failed; an error of no known kind keeps its traceback."""
    described: dict[str, Any] = {"type": type(error).__name__, "message": str(error)}
    if isinstance(error, DecodingError):
        described |= {"message": error.reason, "step": error.step}
    elif not isinstance(error, TqFastError):
        described["traceback"] = "".join(traceback.format_exception(error))
    return {**record_head(entry), "error": described}


def ends_the_job(error: Exception) -> bool:
    """Return whether every prompt would fail: by settings, output, a lost device or server."""
    return is_lost_device(error) or isinstance(error, _OF_THE_JOB)


def is_lost_device(error: BaseException) -> bool:
    """Return whether the device is lost to this process."""
    return isinstance(error.__cause__ or error, torch.AcceleratorError)


def record_head(entry: PromptEntry) -> Record:
    """Return what every record says of its prompt."""
    own = {"index": entry.index, "id": entry.id, "prompt": entry.prompt}
    extra = {key: value for key, value in entry.extra.items() if key not in _OWN_KEYS}
    taken = {key: value for key, value in entry.extra.items() if key in _OWN_KEYS}
    return {**own, **extra, **({"extra": taken} if taken else {})}


def _compact(step: StepTrace) -> dict[str, Any]:
    more: dict[str, Any] = {}
    if step.value is not None:
        more["value"] = finite(step.value)
    if step.agents is not None:
        more["agents"] = step.agents.tolist()
    return {
        "candidates": step.candidates.tolist(),
        "choice": step.choice,
        **{
            name: finite(getattr(step, name).tolist())
            for name in ("q", "q_stderr", "ess", "prior_logprobs", "final_logprobs")
        },
        "kl_to_sft": finite(step.kl_to_sft),
        "kl_to_baseline": finite(step.kl_to_baseline),
        "kl_baseline_to_sft": finite(step.kl_baseline_to_sft),
        **more,
    }


def finite(value: Any) -> Any:
    """Round every number in `value` to seven digits, all that fp32 holds; inf and NaN are None."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list):
        return [finite(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value
