"""shared_prefix_attention beside SDPA over expanded keys and values, and its two parts alone.

SDPA gets its keys and values already expanded to every row, which a decoding loop would pay for in
memory; it reads them again for every row, which is what it costs in time. "After its copy" it makes
them from what ours is given. Ours is the C++ kernel; two calls of ATen serve where it is missing,
and are timed, too.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.ceilings import Work
from bench.side_by_side import time_provider, turns
from tq_fast.ops import shared_prefix_attention
from tq_fast.ops._attention_aten import shared_prefix_attention_aten
from tq_fast.ops._dispatch import unchecked_kernel

# Each shape: rows, query heads, key-value heads, head size, branch, prefix.
SHAPES = [
    (40, 16, 4, 64, 32, 1024),
    (10, 12, 12, 64, 20, 128),
    (10, 12, 12, 64, 20, 512),
    (10, 12, 12, 64, 20, 2048),
    (160, 16, 4, 64, 20, 1024),
    (20, 32, 8, 128, 20, 2048),
    # Prefixes too short to be worth sharing: here plain attention could win, and does not.
    (10, 12, 12, 64, 4, 16),
    (10, 12, 12, 64, 20, 1),
    (10, 16, 4, 64, 20, 16),
    (1, 12, 12, 64, 1, 16),
]


PROVIDERS = [
    "sdpa",
    "sdpa, heads expanded",
    "sdpa after its copy",
    "two aten calls",
    "c++ kernel",
    "ours",
]


def draw(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Return random arguments of the op."""
    rows, heads, kv_heads, size, branch, prefix = shape
    generator = torch.Generator().manual_seed(seed)
    sizes = [(rows, heads, 1, size)]
    sizes += 2 * [(1, kv_heads, prefix, size)] + 2 * [(rows, kv_heads, branch, size)]
    q, *keys_and_values = (torch.randn(x, generator=generator).to(dtype) for x in sizes)
    prefix_len, branch_len = torch.tensor([prefix]), torch.full((rows,), branch)
    return (q, *keys_and_values[:2], prefix_len, *keys_and_values[2:], branch_len)


def copy_to_rows(arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return query, keys and values of plain attention, a copy of the prefix in every row."""
    q, prefix_k, prefix_v, _, branch_k, branch_v, _ = arguments
    keys, values = (
        torch.cat((shared.expand(len(q), -1, -1, -1), own), dim=2)
        for shared, own in ((prefix_k, branch_k), (prefix_v, branch_v))
    )
    return q, keys, values


def expand_heads(q: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    groups = q.shape[1] // keys.shape[1]
    return q, keys.repeat_interleave(groups, dim=1), values.repeat_interleave(groups, dim=1)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shared_prefix_attention(benchmark, figure, shape, dtype, provider) -> None:
    arguments = draw(shape, dtype, 0)
    wide = [x.float() for x in expand_heads(*copy_to_rows(arguments))]
    exact = functional.scaled_dot_product_attention(*wide)
    atol = 2e-2 if dtype == torch.bfloat16 else 5e-6
    got = shared_prefix_attention(*arguments).out.float()
    torch.testing.assert_close(got, exact, rtol=0, atol=atol)

    rows, heads, _, size, branch, prefix = shape
    sdpa = partial(functional.scaled_dot_product_attention, enable_gqa=True)
    aten = {"scale": size**-0.5, "softcap": None, "window": None, "tree": None}
    kernel = unchecked_kernel("shared_prefix_attention")
    # For each provider: its function, and how the op's arguments are prepared before the clock.
    functions = {
        "sdpa": (sdpa, copy_to_rows),
        "sdpa, heads expanded": (sdpa, lambda given: expand_heads(*copy_to_rows(given))),
        "sdpa after its copy": (lambda *given: sdpa(*copy_to_rows(given)), tuple),
        "two aten calls": (partial(shared_prefix_attention_aten, **aten), tuple),
        "c++ kernel": (lambda *given: kernel(*given, **aten), tuple),
        "ours": (shared_prefix_attention, tuple),
    }
    function, prepare = functions[provider]
    time_provider(
        benchmark,
        figure,
        provider,
        f"shared_prefix_attention {shape} {dtype}",
        function,
        turns(lambda seed: prepare(draw(shape, dtype, seed))),
        rounds=40,
        work=Work(
            sum(x.nbytes for x in arguments) + got.nbytes,
            4 * rows * heads * size * (prefix + branch),
        ),
        dtype=dtype,
    )
