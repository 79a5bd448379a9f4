"""`decode_dataset`: the rows of a Ray data set decoded by many workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from .. import presets
from ..config import DecodeConfig
from ..errors import InvalidArgument, nearest
from ..jobs.decoding import Decoding
from ..jobs.resume import ModelChoice
from ..models.options import LOADED_ROLES
from ..transfer.budget import check_sizes
from .cluster import Cluster, require_ray

if TYPE_CHECKING:
    import ray.data

# Columns that a row may have its prompt in.
PROMPT_COLUMNS = ("prompt", "messages")
# Columns that the answer adds; a row must not have them already.
ANSWER_COLUMNS = (
    *("index", "response", "token_ids", "steps", "certificate", "stages", "trace"),
    *("other_responses", "error"),
)
_CHOICE = tuple(f.name for f in dataclasses.fields(ModelChoice) if f.name not in ("method", "own"))
_FIELDS = tuple(field.name for field in dataclasses.fields(DecodeConfig))


def decode_dataset(
    ds: ray.data.Dataset,
    *,
    method: str | None = None,
    config: DecodeConfig | None = None,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    cpus_per_worker: int = 1,
    batch_size: int = 8,
    memory_budget: int | None = None,
    traces: bool = False,
    template_options: Mapping[str, Any] | None = None,
    done: Collection[int] = (),
    **options: Any,
) -> ray.data.Dataset:
    """Decode every row of a Ray data set; each worker is an actor with models of its own.

    The rows are those that `tq_fast.presets.METHOD([row["prompt"] for row in ds], ...)` would give
    in one process, whichever worker decodes them and however the rows are cut into blocks: random
    streams are keyed by the prompt's token ids and the number of equal prompts above it. (Rounding
    may differ between batches: exact in fp32, up to near ties in bf16 and fp16.)

    `ds` is computed once, in its order, and kept in the object store. One worker then reads all
    prompts, and the answer is computed when it is consumed (`iter_rows`, `write_parquet`, ...). A
    worker that dies is started again, and its rows run again.

    Args:
        ds: rows with `prompt` (text, a list of token ids or a list of messages) or `messages`; of
            the fields of a message those that are null are left out. Where both are given, the
            prompt counts. The other columns come back as they are.
        method: a preset's name; None: Transfer Q*, direct or indirect as `transfer` says.
        config: settings; fields among `options` go before it.
        workers: number of actors; None: as many as the cluster has room for.
        gpus_per_worker: GPUs of a worker, or a share of one; None: one where the cluster has GPUs.
        cpus_per_worker: CPUs of a worker, and its threads.
        batch_size: as for `tq_fast.decode`; up to four batches make a block of the answer.
        memory_budget: as for `tq_fast.decode`.
        traces: whether the answer has the column `trace`.
        template_options: as for `tq_fast.decode`.
        done: indices of rows that an earlier run has answered, and that are left out of this one.
            They count among equal prompts: give the whole data set again.
        **options: the models by role (`baseline`, `reward`, `sft`, ...; folders or hub ids that
            every machine finds, or functions that can be pickled), fields of `ModelChoice`
            (`tq_fast.jobs.resume`) and of `DecodeConfig`, and settings of the method's own.

    Returns:
        A lazy data set, in no promised order, with the columns of `ds` and

        - `index`, int64: position of the row in `ds`, from 0;
        - `response`, string: null without a tokenizer, and where there is an error;
        - `token_ids`, list of int64; `steps`, int64;
        - `certificate`, struct: the fields of `tq_fast.Certificate`; nats, null where not finite;
        - `stages`, list of struct (`cut`, `rewards`, `choice`, `sequences`), for methods that
          choose between texts;
        - `trace`, list of struct, with `traces`: a step each, as in the records of
          `tq-fast decode --traces`;
        - `other_responses`, list of struct (`response`, `token_ids`, `steps`, `certificate`,
          `stages`, `trace`), where there are several responses;
        - `error`, struct (`type`, `message`, `step`, `traceback`) of a row that failed, else null.

    Raises:
        InvalidArgument: Ray is not installed; an argument is wrong, which is said before any worker
            starts; a model or a prompt has a wrong form, which one worker finds out before the
            others start.
    """
    require_ray("decode_dataset")
    from .rows import decode_rows

    cluster = Cluster(workers, gpus_per_worker=gpus_per_worker, cpus_per_worker=cpus_per_worker)
    check_sizes(batch_size, memory_budget)
    decoding = Decoding(batch_size, memory_budget, traces, template_options)
    models, settings = _read_options(method, config, options)
    _check_columns(ds)
    return decode_rows(ds, cluster, models, settings, decoding, frozenset(done))


def _read_options(
    method: str | None, config: DecodeConfig | None, options: Mapping[str, Any]
) -> tuple[ModelChoice, DecodeConfig]:
    """Return which models and which settings the options of a call name.

    Raises:
        InvalidArgument: one is unknown or wrong, or a model is loaded already.
    """
    choice = ModelChoice(**{k: v for k, v in options.items() if k in _CHOICE}, method=method)
    given = {name: value for name, value in options.items() if name not in _CHOICE}
    transfer = {"transfer": given["transfer"]} if "transfer" in given else {}
    name = choice.method_name(DecodeConfig.from_options(config, **transfer))
    known = presets.own_settings(name)
    for key in given:
        if key not in known and key not in _FIELDS:
            hint = nearest(key, [*_CHOICE, *known, *_FIELDS])
            raise InvalidArgument(f"{key} is no option of decode_dataset; {hint}")
    own = {key: value for key, value in given.items() if key in known}
    fields = {key: value for key, value in given.items() if key not in known}
    settings = DecodeConfig.from_options(config, **fields)
    choice = dataclasses.replace(choice, own=own)
    named = {role: getattr(choice, role) for role in LOADED_ROLES}
    named |= {f"baselines[{i}]": model for i, model in enumerate(own.get("baselines") or ())}
    for role, model in named.items():
        if hasattr(model, "state_dict"):
            raise InvalidArgument(
                f"{role} must be a folder, a hub id or a function, because every worker loads its "
                f"own; got a {type(model).__name__}"
            )
    choice.check(settings)
    return choice, settings


def _check_columns(ds: Any) -> None:
    """Refuse what is no data set of prompts.

    Raises:
        InvalidArgument: the message names the columns.
    """
    import ray.data

    if not isinstance(ds, ray.data.Dataset):
        raise InvalidArgument(f"ds must be a ray.data.Dataset, got {type(ds).__name__}")
    columns = ds.columns() or []
    if not any(name in columns for name in PROMPT_COLUMNS):
        raise InvalidArgument(
            f"ds must have a column {' or '.join(map(repr, PROMPT_COLUMNS))}; it has "
            f"{', '.join(map(repr, columns)) or 'none'}"
        )
    taken = [name for name in ANSWER_COLUMNS if name in columns]
    if taken:
        raise InvalidArgument(
            f"ds has the columns {', '.join(map(repr, taken))}, which the answer has, too; rename "
            "them, or leave them out"
        )
