"""`tq-fast info`: what is installed and built, and which backend each op uses and why."""

from __future__ import annotations

import importlib.util
import os
import platform
import warnings

import torch
import transformers
from rich.console import Console
from rich.table import Table

from .. import _native, env
from .._version import read_version
from ..ops._attention_flash import describe_flash
from ..ops._dispatch import describe_backends
from .terminal import explain, say

# An op asks its backends in this order, by the device of its tensors.
_ORDER = {"cuda": ("cuda", "triton", "ref"), "cpu": ("cpu", "ref")}
_KERNELS = ("cuda", "triton", "cpu")


def show_info(console: Console, model: str | None = None) -> None:
    """Print versions, hardware, native libraries and the backends of every op.

    Args:
        console: where to print.
        model: a language model, a folder or a hub id, of which to say how its layers run.
    """
    facts = [*_versions(), *_hardware(), *_libraries(), ("attention of prompts", _prompts())]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    console.print(table, highlight=False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    say(console, f"\nBackend of each op for tensors on {device} (TQ_FAST_BACKEND={env.backend()}):")
    used = _show_ops(console, device)
    costs = _costs(device, used)
    if costs:
        say(console, "\nWhat is missing, and what that costs:")
        for cost in costs:
            explain(console, f"- {cost}")
    if model is not None:
        _show_model(console, model)


def _show_model(console: Console, name: str) -> None:
    """Print whether the forest takes a model, and how many of its layers run fused."""
    from ..forest.cpu_layers import describe_layers
    from ..forest.support import check_runs
    from ..models.loading import load_language_model

    model = load_language_model(name, "model", device=torch.device("cpu"), dtype="auto")
    num_bytes = check_runs(model)
    say(console, f"\n{name} ({type(model).__name__}):")
    explain(console, f"- it runs over shared prefixes; a token takes {num_bytes:,} bytes of KV")
    with warnings.catch_warnings():
        # The same sentence stands in the next line.
        warnings.simplefilter("ignore")
        explain(console, f"- on a CPU, {describe_layers(model)}")


def _versions() -> list[tuple[str, str]]:
    triton = "not installed"
    if importlib.util.find_spec("triton") is not None:
        triton = importlib.import_module("triton").__version__
    cuda = torch.version.cuda or "none: this torch was built without it"
    return [
        ("tq_fast", read_version()),
        ("python", platform.python_version()),
        ("torch", torch.__version__),
        ("transformers", transformers.__version__),
        ("triton", triton),
        ("CUDA of torch", cuda),
    ]


def _hardware() -> list[tuple[str, str]]:
    isa = _native.cpu_isa()
    tiles = " with amx" if _native.cpu_has("amx") else ""
    kernels = f", kernels for {isa}{tiles}" if isa else ""
    threads = torch.get_num_threads()
    cpu = f"{_native.cpu_name()}, {os.cpu_count()} cores ({threads} used by torch){kernels}"
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    names = [f"{gpu.name}, {gpu.total_memory >> 30} GiB" for gpu in gpus]
    return [("CPU", cpu), ("GPU", "; ".join(names) or "none that torch sees")]


def _libraries() -> list[tuple[str, str]]:
    refusals = {"CPU library": _native.cpu_refusal(), "CUDA library": _native.cuda_refusal()}
    return [
        (name, "loaded" if reason is None else f"not loaded: {reason}")
        for name, reason in refusals.items()
    ]


def _prompts() -> str:
    """Say which library attends over prompts on a GPU, before the kernels of the op, and why."""
    if not torch.cuda.is_available():
        return "no flash attention: PyTorch sees no CUDA device"
    if env.backend() not in ("auto", "cuda"):
        return f"no flash attention: TQ_FAST_BACKEND={env.backend()} pins another kernel"
    reasons: list[str] = []
    for name, reason in describe_flash().items():
        if reason is None:
            return "; ".join([f"{name}, in fp16 and bf16", *reasons])
        reasons.append(reason)
    return f"no flash attention: {'; '.join(reasons)}"


def _show_ops(console: Console, device: str) -> dict[str, str]:
    """Print the table of ops; return the backend that each uses."""
    pinned = env.backend()
    reasons: list[str] = []
    used: dict[str, str] = {}
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("op", "uses", *_KERNELS):
        table.add_column(title, no_wrap=True)
    for op, backends in describe_backends().items():
        order = _ORDER[device] if pinned == "auto" else (pinned,)
        used[op] = next((name for name in order if backends[name] is None), "an error")
        cells = []
        for name in _KERNELS:
            reason = backends[name]
            # Ops that lack the same thing share a footnote, which therefore names none of them.
            reason = reason if reason is None else reason.replace(op, "the op")
            if reason is not None and reason not in reasons:
                reasons.append(reason)
            cells.append("yes" if reason is None else f"no ({reasons.index(reason) + 1})")
        table.add_row(op, used[op], *cells)
    console.print(table, highlight=False)
    for number, reason in enumerate(reasons, start=1):
        say(console, f"({number}) {reason}")
    return used


def _has_kernel(op: str, backends: dict[str, str | None]) -> bool:
    return any(backends[name] != f"{op} has no {name} kernel" for name in _KERNELS)


def _costs(device: str, used: dict[str, str]) -> list[str]:
    """Return a sentence for each thing that would make this machine faster."""
    costs = []
    if device == "cpu":
        costs.append(
            "No GPU: the models themselves run on the CPU, which costs more than everything below."
        )
        if _native.cpu_refusal() is not None:
            costs.append(
                "No CPU library: its ops run on calls of PyTorch, with the same results and "
                "slower, most of all finding candidates, sampling roll-outs and attention over the "
                "shared prefix; docs/results/benchmarks.md says by how much. Installing again "
                "with a C++ compiler builds it."
            )
    elif _native.cuda_refusal() is not None:
        costs.append(
            "No CUDA library: ops run on Triton where they have a kernel there, otherwise on their "
            "PyTorch references, with more launches and more memory traffic. Installing again "
            "where nvcc is found, or with TQ_FAST_BUILD=cuda, builds it."
        )
    backends = describe_backends()
    slow = [op for op, name in used.items() if name == "ref" and _has_kernel(op, backends[op])]
    if slow:
        costs.append(
            f"On their PyTorch references, with the same results: {', '.join(slow)}. "
            "`make bench` measures what that costs."
        )
    refused = [op for op, name in used.items() if name == "an error"]
    if refused:
        costs.append(
            f"TQ_FAST_BACKEND={env.backend()} pins a backend that these lack, so that they fail: "
            f"{', '.join(refused)}."
        )
    return costs
