"""Prompts by flash attention of other libraries, of which stand-ins with the same layouts serve."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops import tolerances
from tests.ops.flash_stand_in import FLASH_ATTN, TORCH, FlashStandIns
from tq_fast.errors import BackendRefused
from tq_fast.ops import describe_backends, shared_prefix_attention, shared_prefix_attention_ref
from tq_fast.ops._attention_flash import _joined, describe_flash


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlashStandIns]:
    stand_ins = FlashStandIns(monkeypatch)
    yield stand_ins
    stand_ins.remove()


def prompt(
    generator: torch.Generator,
    *,
    new: int = 17,
    known: int = 0,
    heads: tuple[int, int] = (4, 2),
    size: int = 16,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Any, ...]:
    """The arguments of a prompt whose keys lie in a cache, as a forest has them."""
    q = torch.randn(1, new, heads[0], size, generator=generator).to(dtype).transpose(1, 2)
    cache = torch.randn(2, 3, heads[1], known + new + 5, size, generator=generator).to(dtype)
    keys, values = cache[:, 1:2, :, : known + new]
    prefix_k, branch_k = keys.tensor_split((known,), dim=2)
    prefix_v, branch_v = values.tensor_split((known,), dim=2)
    return q, prefix_k, prefix_v, None, branch_k, branch_v, None


def check(inputs: tuple[Any, ...], **parameters: Any) -> None:
    got = shared_prefix_attention(*inputs, **parameters)
    expected = shared_prefix_attention_ref(*inputs, **parameters)
    dtype = inputs[0].dtype
    for a, b in zip(got, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
    torch.testing.assert_close(got.out, expected.out, rtol=0, atol=tolerances.ATTENTION_OUT[dtype])
    torch.testing.assert_close(got.lse, expected.lse, rtol=0, atol=tolerances.ATTENTION_LSE[dtype])


@pytest.mark.parametrize("library", [FLASH_ATTN, TORCH])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("known", [0, 40])
@pytest.mark.parametrize("new", [1, 2, 17, 300])
def test_a_prompt_is_served_as_by_the_reference(flash, generator, library, heads, known, new):
    flash.install(library)
    for window in (None, 1, 9, 45, 1000):
        for dtype in (torch.bfloat16, torch.float16):
            inputs = prompt(generator, new=new, known=known, heads=heads, dtype=dtype)
            check(inputs, window=window)
            check(inputs, window=window, scale=0.7)
    # A single query is left to the kernels that decode.
    assert set(flash.calls) == ({library} if new > 1 else set())


@pytest.mark.parametrize("known", [0, 40])
@pytest.mark.parametrize("window", [None, 9])
def test_a_soft_cap_is_served_by_the_package_alone(flash, generator, known, window):
    inputs = prompt(generator, known=known)
    flash.install(TORCH)
    check(inputs, softcap=0.5, window=window)
    assert flash.calls == []
    flash.install(FLASH_ATTN)
    check(inputs, softcap=0.5, window=window)
    assert flash.calls == [FLASH_ATTN]


def test_the_package_comes_first_then_torch_then_the_others(flash, generator):
    inputs = prompt(generator)
    check(inputs)
    assert flash.calls == []
    flash.install(TORCH)
    check(inputs)
    flash.install(FLASH_ATTN)
    check(inputs)
    check(prompt(generator, size=20))
    assert flash.calls == [TORCH, FLASH_ATTN, FLASH_ATTN]


def test_what_it_does_not_take_goes_on_to_the_next_backend(flash, generator):
    flash.install(TORCH)
    flash.install(FLASH_ATTN)
    q, prefix_k, prefix_v, _, branch_k, branch_v, _ = inputs = prompt(generator, known=4)
    lengths = (torch.tensor([4]), torch.tensor([17]))
    two_rows = tuple(x if x is None else torch.cat((x, x)) for x in inputs)
    strided = torch.stack((branch_k, branch_k), dim=-1)[..., 0]
    refused: dict[str, tuple[Any, ...]] = {
        "full buffers, of which no lengths are given": (
            q, prefix_k, prefix_v, lengths[0], branch_k, branch_v, lengths[1]
        ),
        "there are 2 rows of 2 trees": two_rows,
        "there is 1 query a row": prompt(generator, new=1, known=4),
        "q is torch.float32": prompt(generator, dtype=torch.float32),
        "the head size is 264": prompt(generator, size=264),
        "the last axis of an input is strided": (
            q, prefix_k, prefix_v, None, strided, branch_v, None
        ),
    }  # fmt: skip
    for words, given in refused.items():
        check(given)
        with pytest.raises(BackendRefused, match=f"{words}.*; .*{words}"):
            pinned(given)
    check(inputs, scale=0.0)
    with pytest.raises(BackendRefused, match=r"the scale is 0.0; .*; the scale is 0.0"):
        pinned(inputs, scale=0.0)
    flash.monkeypatch.setattr("tq_fast.ops._attention_flash._capability", lambda device: (7, 5))
    check(inputs)
    with pytest.raises(BackendRefused, match=r"capability \(7, 5\)"):
        pinned(inputs)
    assert flash.calls == []


def pinned(inputs: tuple[Any, ...], **parameters: Any) -> Any:
    return shared_prefix_attention(*inputs, backend="cuda", **parameters)


@pytest.mark.parametrize(
    ("module", "words"),
    [(None, "cannot be imported"), (object(), "has no attribute 'flash_attn_func'")],
)
def test_a_package_that_is_missing_or_of_another_kind_is_named(flash, generator, module, words):
    flash.monkeypatch.setitem(sys.modules, "flash_attn", module)
    with pytest.raises(BackendRefused, match=f"{words}.*; this torch was built without flash"):
        pinned(prompt(generator))


def test_a_package_without_a_soft_cap_is_too_old(flash, generator):
    flash.install(FLASH_ATTN)
    old = types.SimpleNamespace(flash_attn_func=lambda q, k, v, causal=False: None)
    flash.monkeypatch.setitem(sys.modules, "flash_attn", old)
    with pytest.raises(BackendRefused, match=r"flash_attn is older than 2\.6"):
        pinned(prompt(generator))


def test_the_op_is_not_said_to_have_a_cuda_kernel_that_serves_everything(flash):
    flash.install(FLASH_ATTN)
    reason = describe_backends()["shared_prefix_attention"]["cuda"]
    assert reason == (
        "the cuda kernels of shared_prefix_attention serve the prompt of a single row only"
    )


def test_each_library_is_described_with_the_reason_why_it_does_not_serve(flash):
    reasons = describe_flash()
    assert list(reasons) == ["flash_attn", "PyTorch's flash op"]
    assert "cannot be imported" in reasons["flash_attn"]
    assert reasons["PyTorch's flash op"] == "this torch was built without flash attention"
    flash.install(FLASH_ATTN)
    assert describe_flash()["flash_attn"] is None
    flash.monkeypatch.setattr("tq_fast.ops._attention_flash._capability", lambda device: (7, 0))
    assert "compute capability (7, 0)" in describe_flash()["flash_attn"]


def test_keys_that_lie_behind_each_other_are_not_copied(generator):
    whole = torch.randn(3, 2, 20, 8, generator=generator)
    first, second = whole[1:2, :, :4], whole[1:2, :, 4:9]
    joined = _joined(first, second)
    assert torch.equal(joined, whole[1:2, :, :9])
    assert joined.data_ptr() == first.data_ptr()
    for apart in (whole[1:2, :, 5:9], whole[2:3, :, 4:9], second.clone()):
        joined = _joined(first, apart)
        assert torch.equal(joined, torch.cat((first, apart), dim=2))
        assert joined.data_ptr() != first.data_ptr()


def test_lengths_that_are_left_out_are_those_of_the_buffers(generator):
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, prefix, branch = normal(4, 4, 2, 8), normal(2, 2, 2, 6, 8), normal(2, 4, 2, 3, 8)
    lengths = (torch.full((2,), 6), torch.full((4,), 3))
    for backend in ("ref", None):
        expected = shared_prefix_attention(
            q, *prefix, lengths[0], *branch, lengths[1], backend=backend
        )
        for prefix_len in (None, lengths[0]):
            for branch_len in (None, lengths[1]):
                got = shared_prefix_attention(
                    q, *prefix, prefix_len, *branch, branch_len, backend=backend
                )
                for a, b in zip(got, expected, strict=True):
                    assert torch.equal(a, b)


def test_a_full_branch_shorter_than_the_queries_is_refused(rejects):
    kv = torch.zeros(1, 1, 3, 8)
    rejects(
        "branch_k has 3 tokens a row and branch_len is None, expected at least the 4 of q",
        lambda: shared_prefix_attention(torch.zeros(1, 1, 4, 8), kv, kv, None, kv, kv, None),
    )
