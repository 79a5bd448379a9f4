"""Records as columns: the Arrow types of what a row is answered with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from ..jobs.record_file import Record
from ..results import Certificate

_IDS = pa.list_(pa.int64())
_NUMBERS = pa.list_(pa.float64())
_WORDS = ("prior", "kl_kind")
_CERTIFICATE = pa.struct(
    [
        (field.name, pa.string() if field.name in _WORDS else pa.float64())
        for field in dataclasses.fields(Certificate)
    ]
)
_STAGE = pa.struct(
    [
        ("cut", pa.int64()),
        ("rewards", _NUMBERS),
        ("choice", pa.int64()),
        ("sequences", pa.list_(_IDS)),
    ]
)
_STEP = pa.struct(
    [
        ("candidates", _IDS),
        ("choice", pa.int64()),
        *((name, _NUMBERS) for name in ("q", "q_stderr", "ess", "prior_logprobs")),
        ("final_logprobs", _NUMBERS),
        *((name, pa.float64()) for name in ("kl_to_sft", "kl_to_baseline", "kl_baseline_to_sft")),
        ("value", pa.float64()),
        ("agents", _IDS),
    ]
)
_ERROR = pa.struct(
    [
        ("type", pa.string()),
        ("message", pa.string()),
        ("step", pa.int64()),
        ("traceback", pa.string()),
    ]
)


def answer_schema(*, traces: bool) -> pa.Schema:
    """Return the columns that the answer adds to those of the row."""
    response = [
        ("response", pa.string()),
        ("token_ids", _IDS),
        ("steps", pa.int64()),
        ("certificate", _CERTIFICATE),
        ("stages", pa.list_(_STAGE)),
        *([("trace", pa.list_(_STEP))] if traces else []),
    ]
    others = pa.list_(pa.struct(response))
    return pa.schema([*response, ("other_responses", others), ("error", _ERROR)])


def make_columns(records: Sequence[Record], *, traces: bool) -> dict[str, Any]:
    """Return the columns of some records by name; what a record lacks is null."""
    table = pa.Table.from_pylist(list(records), schema=answer_schema(traces=traces))
    return {name: table.column(name) for name in table.column_names}
