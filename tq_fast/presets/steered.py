"""The methods that choose token by token among k candidates: Transfer Q* and its relatives."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import DecodeConfig, Role
from ..decoder import TransferMethod
from ..errors import InvalidArgument
from ..session import Session
from ..session.method import Method
from .call import OpenMethod, PresetCall

# The models that each method cannot do without; the first one rolls out.
_NEEDED: Mapping[str, tuple[str, ...]] = {
    "controlled_decoding": ("sft", "reward"),
    "transfer_q": ("baseline", "reward"),
    "direct_on_target": ("baseline", "reward"),
    "transfer_q_indirect": ("baseline", "reward"),
}


def open_steered(name: str, models: Mapping[str, Any], options: Mapping[str, Any]) -> OpenMethod:
    """Open a method that differs from `tq_fast.decode` in its fixed fields and models alone."""
    needed = _NEEDED[name]
    used = models if needed[0] == "baseline" else {**models, "baseline": None}
    call = PresetCall(name, options, used)
    call.require(*needed)
    if name == "transfer_q_indirect":
        call.require("sft" if call.config.needs_log_ratio else "baseline_reward")
    return call.open(_make(name))


def open_args(
    name: str, models: Mapping[str, Any], options: Mapping[str, Any], *, prior: Role
) -> OpenMethod:
    """Open ARGS with the policy `prior`."""
    check_role("prior", prior)
    used = models if prior == "baseline" else {**models, "baseline": None}
    call = PresetCall(name, options, used, {"prior": prior, "candidates_from": prior})
    call.require(prior, "reward")
    return call.open(_make(name))


def check_role(name: str, role: object) -> None:
    """Refuse what is neither "sft" nor "baseline"."""
    if role not in ("sft", "baseline"):
        raise InvalidArgument(f"{name} must be one of 'sft', 'baseline', got {role!r}")


def _make(name: str) -> Any:
    def make(session: Session, config: DecodeConfig) -> Method:
        roller: Role = "baseline" if "baseline" in session.languages else "sft"
        is_aligned = name != "direct_on_target"
        return TransferMethod(session, config, roller=roller, is_aligned=is_aligned)

    return make
