"""The kernels on the device: poisoned memory, no waiting, graphs whose randomness advances."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.gpu.cases import CUDA_CASES, RANDOM_CASES, TRITON_CASES, device_int, kernel, reference
from tests.ops.tolerances import ATTENTION_LSE, ATTENTION_OUT, assert_same_sums
from tq_fast import _native, ops


@pytest.fixture(scope="module", autouse=True)
def cuda_library() -> None:
    """Fail without the library, because these tests are about nothing else."""
    assert _native.cuda_refusal() is None, _native.cuda_refusal()


def same(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    is_half = any(tensor.dtype == torch.bfloat16 for tensor in expected)
    for a, b in zip(got, expected, strict=True):
        close = 2e-5
        if is_half:
            close = (ATTENTION_OUT if a.dtype == torch.bfloat16 else ATTENTION_LSE)[torch.bfloat16]
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=close, atol=close, equal_nan=True)


@pytest.mark.parametrize("name", [*CUDA_CASES, *TRITON_CASES])
def test_agrees_with_the_reference(name):
    seed, step = device_int(11), device_int(2)
    same(kernel(name)(seed, step), reference(name)(seed, step))


@pytest.mark.parametrize("name", [*CUDA_CASES, *TRITON_CASES])
def test_every_output_is_written_whatever_the_memory_held(name):
    expected = kernel(name)(device_int(1), device_int(0))
    torch.cuda.synchronize()
    # The allocator hands these blocks out again, so that an output that is not written differs.
    poison = [torch.full((1 << 20,), torch.nan, device="cuda") for _ in range(8)]
    sizes = [size for size in (16, 64, 128, 256, 1024, 4096) for _ in range(24)]
    poison += [torch.full((size,), torch.nan, device="cuda") for size in sizes]
    del poison
    case = kernel(name)
    for a, b in zip(case(device_int(1), device_int(0)), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", [*CUDA_CASES, *TRITON_CASES])
def test_nothing_waits_for_the_device(name, no_sync):
    case, seed, step = kernel(name), device_int(1), device_int(0)
    case(seed, step)
    with no_sync:
        case(seed, step)


@pytest.mark.parametrize("name", [*CUDA_CASES, *TRITON_CASES])
def test_a_captured_graph_replays_and_its_randomness_advances(name):
    seed, step = device_int(5), device_int(0)
    case = kernel(name)
    warm = torch.cuda.Stream()
    # The stream waits, because the inputs are still being made on the current one.
    warm.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm):
        case(seed, step)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = case(seed, step)
        step.add_(1)
    plain = kernel(name)
    if name == "advance_rollouts_":
        # The warm-up call has advanced the state, so advance the state of the other case too.
        plain(seed, device_int(0))
    chosen = []
    for depth in range(4):
        graph.replay()
        expected = plain(seed, device_int(depth))
        for a, b in zip(captured, expected, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))
        chosen.append(captured[RANDOM_CASES.get(name, 0)].clone())
    if name in RANDOM_CASES and name != "advance_rollouts_":
        assert any(not torch.equal(chosen[0], later) for later in chosen[1:])


@pytest.mark.parametrize("rows", [1, 2, 33, 700])
def test_a_row_does_not_depend_on_how_many_rows_there_are(rows):
    """The number of rows decides how many blocks share a row, but must not change its bits."""
    logits = torch.randn(rows, 70001, device="cuda").bfloat16()
    keys = torch.arange(rows, device="cuda")
    drawn = ops.sample_tokens(logits, keys, 3, backend="cuda")
    cut = ops.sample_tokens(logits, keys, 3, top_k=900, top_p=0.8, backend="cuda")
    last = slice(rows - 1, rows)
    # The order of Triton's sums follows the alignment of the row that comes first; that of CUDA C++
    # does not.
    for backend, alone in (("cuda", logits[last]), ("triton", logits[last].clone())):
        whole = ops.topk_logprobs(logits, 50, backend=backend)
        for a, b in zip(whole, ops.topk_logprobs(alone, 50, backend=backend), strict=True):
            assert torch.equal(a[last], b)
    alone = ops.sample_tokens(logits[last], keys[last], 3, backend="cuda")
    for a, b in zip(drawn, alone, strict=True):
        assert torch.equal(a[last], b)
    alone = ops.sample_tokens(logits[last], keys[last], 3, top_k=900, top_p=0.8, backend="cuda")
    for a, b in zip(cut, alone, strict=True):
        assert torch.equal(a[last], b)


def test_offsets_beyond_int32():
    """Rows are found with more than 2^31 elements between the first and the last."""
    rows, stride = 3, 1 << 30
    if torch.cuda.mem_get_info()[0] < 6 * stride:
        pytest.skip("needs 6 GB of free device memory")
    whole = torch.zeros(rows * stride, dtype=torch.bfloat16, device="cuda")
    logits = whole.as_strided((rows, 4096), (stride, 1))
    logits.copy_(torch.randn(rows, 4096, device="cuda"))
    expected = logits.contiguous()
    for backend in ("cuda", "triton"):
        assert_same_sums(
            backend,
            ops.topk_logprobs(logits, 9, backend=backend),
            ops.topk_logprobs(expected, 9, backend=backend),
        )
    keys = torch.arange(rows, device="cuda")
    assert torch.equal(
        ops.sample_tokens(logits, keys, 0, backend="cuda").ids,
        ops.sample_tokens(expected, keys, 0, backend="cuda").ids,
    )


def test_inf_rows_padding_and_nan_on_the_device():
    logits = torch.randn(5, 5000, device="cuda")
    logits[:, 4990:] = 1e30
    logits[1] = torch.nan
    logits[2, 7] = torch.inf
    logits[3, ::2] = -torch.inf
    keys = torch.arange(5, device="cuda")
    got = ops.sample_tokens(logits, keys, 0, vocab_size=4990, backend="cuda")
    assert got.valid.tolist() == [True, False, False, True, True]
    assert (got.ids < 4990).all()
    expected = ops.sample_tokens(logits, keys, 0, vocab_size=4990, backend="ref")
    assert torch.equal(got.ids, expected.ids)
