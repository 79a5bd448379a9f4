"""The methods as a model of lm-evaluation-harness (the extra `lm-eval`).

    python -m tq_fast.lm_eval run --model tq_fast --model_args baseline=...,reward=... --tasks ...

The harness finds models of its own package alone, so that this command registers "tq_fast" before
it starts; in Python, `import tq_fast.lm_eval` does.
"""

from __future__ import annotations

from ..errors import TqFastError

try:
    import lm_eval  # noqa: F401
except ModuleNotFoundError as error:
    raise TqFastError(
        "tq_fast.lm_eval needs lm-evaluation-harness: pip install 'tq-fast[lm-eval]'"
    ) from error

from .model import TransferModel

__all__ = ["TransferModel"]
