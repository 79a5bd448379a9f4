"""Decoding in many processes, on one machine or many, by Ray (the extra `ray`).

`decode_dataset` is the call for a Ray data set. `tq-fast decode --workers`, `tq-fast eval --ray` and
what they share stand in the other files: `cluster.py` (what is asked of Ray), `pool.py` (workers
that may die), `job.py` (the job of `tq-fast decode`), `columns.py` (records as columns).
"""

from __future__ import annotations

from .dataset import decode_dataset

__all__ = ["decode_dataset"]
