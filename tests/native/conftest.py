"""Fixtures of the tests of the C++ kernels."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tq_fast import _native, ops


@pytest.fixture(scope="session", autouse=True)
def cpu_library() -> None:
    """These tests are about the C++ kernels: without them they fail, they never skip."""
    assert _native.cpu_refusal() is None, _native.cpu_refusal()
    # Resolves every backend, which registers the fakes that opcheck needs.
    ops.describe_backends()


@pytest.fixture(params=["base", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test once for each vector variant that this processor has."""
    yield from _limited_to(request.param)


@pytest.fixture(params=["base", "avx2", "avx512", "amx"])
def isa_or_amx(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs a test of products once for each vector variant, and in the tiles of AMX."""
    yield from _limited_to(request.param)


def _limited_to(isa: str) -> Iterator[str]:
    torch.ops.tq_fast.limit_cpu_isa(isa)
    try:
        if not (_native.cpu_has("amx") if isa == "amx" else _native.cpu_isa() == isa):
            pytest.skip(f"this processor has no {isa}")
        yield isa
    finally:
        torch.ops.tq_fast.limit_cpu_isa("amx")


@pytest.fixture(params=[1, 2])
def num_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
