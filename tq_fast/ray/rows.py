"""The rows of a Ray data set: numbered, read by one worker, decoded by all."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from transformers.utils import logging

from ..config import DecodeConfig
from ..jobs.decoding import Decoding, EntryDecoder, Finished
from ..jobs.prompt_file import PromptEntry, read_entry
from ..jobs.records import error_record
from ..jobs.resume import ModelChoice
from ..prompts import Prompt
from .cluster import Cluster, connect, may_use_gpus
from .columns import make_columns
from .dataset import PROMPT_COLUMNS
from .job import MAX_BATCHES, DecodeWorker, Keyed
from .pool import WorkerPool, enter

# The key of a row's random stream, null where its prompt cannot be read; a column in between.
_KEY = "tq_fast_key"


def decode_rows(
    ds: ray.data.Dataset,
    cluster: Cluster,
    models: ModelChoice,
    config: DecodeConfig,
    decoding: Decoding,
    done: frozenset[int],
) -> ray.data.Dataset:
    """Return the answer of `decode_dataset`, whose arguments these are, checked.

    Raises:
        TqFastError: a setting, a model or the form of a prompt is wrong.
    """
    with _in_order(ds):
        blocks = ds.materialize().to_arrow_refs()
    with connect(cluster, may_use_gpus=may_use_gpus(models.device)) as settled:
        make = functools.partial(RowReader, models, config, decoding)
        pool: WorkerPool[Any, Any] = WorkerPool(make, settled.alone(), warnings.warn)
        try:
            keys = pool.ask("keys", blocks)
        finally:
            pool.close()
    number = ray.remote(_number)
    starts = np.cumsum([0, *map(len, keys)])
    numbered = [
        number.remote(block, int(start), of_block, done)
        for block, start, of_block in zip(blocks, starts, keys, strict=False)
    ]
    workers = settled.workers or 1
    share = math.ceil((int(starts[-1]) - len(done)) / (2 * workers))
    size = max(min(share, MAX_BATCHES * decoding.batch_size), decoding.batch_size)
    return (
        ray.data.from_arrow_refs(numbered)
        .repartition(target_num_rows_per_block=size)
        .map_batches(
            RowDecoder,
            fn_constructor_args=(models, config, decoding, os.getcwd(), settled.cpus_per_worker),
            batch_size=size,
            batch_format="pyarrow",
            compute=ray.data.ActorPoolStrategy(size=workers),
            num_cpus=settled.cpus_per_worker,
            num_gpus=settled.gpus_per_worker,
        )
    )


@contextlib.contextmanager
def _in_order(ds: ray.data.Dataset) -> Iterator[None]:
    """Let blocks of `ds` keep their order, so that positions mean the same in every run."""
    options = ds.context.execution_options
    before = options.preserve_order
    options.preserve_order = True
    try:
        yield
    finally:
        options.preserve_order = before


class RowReader:
    """Reads all prompts of a data set; its process is a worker's.

    Args:
        models: which method and which models; they are loaded.
        config: settings.
        decoding: how prompts are decoded.

    Raises:
        TqFastError: a setting or a model is wrong.
    """

    def __init__(self, models: ModelChoice, config: DecodeConfig, decoding: Decoding) -> None:
        logging.disable_progress_bar()
        self._decoder = EntryDecoder(models, config, decoding)

    def keys(self, blocks: Sequence[Any]) -> list[list[int | None]]:
        """Return the key of every row's random stream, None where its prompt cannot be read.

        Raises:
            InvalidArgument: the prompt of a row has a wrong form.
        """
        sizes: list[int] = []

        def entries() -> Iterator[PromptEntry]:
            for block in blocks:
                read = read_rows(ray.get(block), sum(sizes))
                sizes.append(len(read))
                yield from read

        found = [r.key if isinstance(r, Prompt) else None for r in self._decoder.read(entries())]
        starts = np.cumsum([0, *sizes])
        return [found[start : start + size] for start, size in zip(starts, sizes, strict=False)]


class RowDecoder:
    """Decodes blocks of numbered rows; its process is an actor of Ray Data.

    Args:
        models: which method and which models; they are loaded.
        config: settings.
        decoding: how prompts are decoded.
        folder: of the process that asked.
        num_threads: of torch.
    """

    def __init__(
        self,
        models: ModelChoice,
        config: DecodeConfig,
        decoding: Decoding,
        folder: str,
        num_threads: int,
    ) -> None:
        enter(folder, num_threads)
        self._worker = DecodeWorker(models, config, decoding)
        self._traces = decoding.traces

    def __call__(self, block: pa.Table) -> pa.Table:
        """Return the rows with their answers."""
        entries = read_rows(block, 0, block.column("index").to_pylist())
        keys = block.column(_KEY).to_pylist()
        found: dict[int, Finished] = {}
        keyed = [
            Keyed(entry, key) for entry, key in zip(entries, keys, strict=True) if key is not None
        ]
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the standard error of Q")
            self._worker.decode(keyed, lambda finished: found.update({finished.index: finished}))
        unread = [entry for entry, key in zip(entries, keys, strict=True) if key is None]
        for entry, error in zip(unread, self._worker.decoder.read(unread), strict=True):
            assert isinstance(error, Exception)
            found[entry.index] = Finished(error_record(entry, error))
        records = [found[entry.index].record for entry in entries]
        answer = block.drop_columns([_KEY])
        for name, column in make_columns(records, traces=self._traces).items():
            answer = answer.append_column(name, column)
        return answer


def read_rows(
    block: pa.Table, start: int, indices: Sequence[int] | None = None
) -> list[PromptEntry]:
    """Return the prompts in the rows of a block.

    Args:
        block: has the columns of prompts.
        start: position of its first row.
        indices: positions of its rows, where they do not follow each other.

    Raises:
        InvalidArgument: a prompt has a wrong form; the message names its row.
    """
    names = [name for name in PROMPT_COLUMNS if name in block.column_names]
    rows = block.select(names).to_pylist()
    if indices is None:
        indices = range(start, start + len(rows))
    return [
        read_entry(index, _without_nulls(row), f"ds, row {index}")
        for index, row in zip(indices, rows, strict=True)
    ]


def _without_nulls(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row without what Arrow has put where nothing was given."""
    given = {name: value for name, value in row.items() if value is not None}
    for name, value in given.items():
        if isinstance(value, list):
            given[name] = [
                {k: v for k, v in part.items() if v is not None} if isinstance(part, dict) else part
                for part in value
            ]
    return given


def _number(
    block: pa.Table, start: int, keys: Sequence[int | None], done: frozenset[int]
) -> pa.Table:
    """Return a block with the columns that say of each row its position and its key."""
    indices = np.arange(start, start + len(keys))
    numbered = block.append_column("index", pa.array(indices, pa.int64()))
    numbered = numbered.append_column(_KEY, pa.array(keys, pa.int64()))
    return numbered.filter(pa.array(~np.isin(indices, list(done))))
