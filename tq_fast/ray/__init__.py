"""Decoding in many processes, on one machine or many, by Ray (the extra `ray`).

`decode_dataset` is the call for a Ray data set (`dataset.py`, `rows.py`, and `columns.py`: records
as columns). `tq-fast decode --workers` is `job.py`; what it shares with `tq-fast eval --ray` is
`cluster.py` (what is asked of Ray) and `pool.py` (workers that may die).
"""

from __future__ import annotations

from .dataset import decode_dataset

__all__ = ["decode_dataset"]
