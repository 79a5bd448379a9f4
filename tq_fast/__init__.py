"""tq_fast: Transfer Q* decoding, fast (arXiv 2405.20495)."""

from . import ops, presets
from ._version import __version__
from .config import DecodeConfig
from .decoder import TransferDecoder, decode
from .results import DecodeResult, DecodeStats, StepTrace

__all__ = [
    "DecodeConfig",
    "DecodeResult",
    "DecodeStats",
    "StepTrace",
    "TransferDecoder",
    "__version__",
    "decode",
    "ops",
    "presets",
]
