"""tq_fast: Transfer Q* decoding, fast (arXiv 2405.20495)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import read_version
from .config import DecodeConfig, DecodeOptions, SpeedOptions
from .errors import (
    BackendRefused,
    DecodingError,
    InvalidArgument,
    RewardError,
    ServerUnavailable,
    TqFastError,
    UnsupportedModel,
)

if TYPE_CHECKING:
    from . import ops, presets
    from .decoder import TransferDecoder, decode
    from .generation import generate
    from .presets.fitting import fit_value
    from .results import (
        Certificate,
        DecodeResult,
        DecodeStats,
        PromptResult,
        StageTrace,
        StepTrace,
    )
    from .rewards.options import RewardOptions
    from .servers.server import Server
    from .streaming import StreamedToken, TokenStream
    from .values.head import ValueHead

    __version__: str

__all__ = [
    "BackendRefused",
    "Certificate",
    "DecodeConfig",
    "DecodeOptions",
    "DecodeResult",
    "DecodeStats",
    "DecodingError",
    "InvalidArgument",
    "PromptResult",
    "RewardError",
    "RewardOptions",
    "Server",
    "ServerUnavailable",
    "SpeedOptions",
    "StageTrace",
    "StepTrace",
    "StreamedToken",
    "TokenStream",
    "TqFastError",
    "TransferDecoder",
    "UnsupportedModel",
    "ValueHead",
    "__version__",
    "decode",
    "fit_value",
    "generate",
    "ops",
    "presets",
]

# These names are imported at first use, because the ops need torch without transformers and the
# command line starts without either.
_HOMES = {
    "Certificate": "results",
    "DecodeResult": "results",
    "DecodeStats": "results",
    "PromptResult": "results",
    "RewardOptions": "rewards.options",
    "Server": "servers.server",
    "StageTrace": "results",
    "StepTrace": "results",
    "StreamedToken": "streaming",
    "TokenStream": "streaming",
    "TransferDecoder": "decoder",
    "ValueHead": "values.head",
    "decode": "decoder",
    "fit_value": "presets.fitting",
    "generate": "generation",
    "ops": "ops",
    "presets": "presets",
}


def __getattr__(name: str) -> Any:
    import importlib

    if name == "__version__":
        return read_version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(f".{_HOMES[name]}", __name__)
    value = home if _HOMES[name] == name else getattr(home, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
