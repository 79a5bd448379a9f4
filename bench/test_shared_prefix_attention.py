"""shared_prefix_attention beside SDPA over expanded keys and values, and beside two ATen calls.

SDPA gets its keys and values already expanded to every row, which a decoding loop would pay for in
memory; it reads them again for every row, which is what it costs in time. "After its copy" it makes
them from what ours is given.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from bench.side_by_side import time_provider
from tq_fast.ops import shared_prefix_attention
from tq_fast.ops._attention_aten import shared_prefix_attention_aten

# rows, query heads, key-value heads, head size, branch, prefix
SHAPES = [
    (40, 16, 4, 64, 32, 1024),
    (10, 12, 12, 64, 20, 128),
    (10, 12, 12, 64, 20, 512),
    (10, 12, 12, 64, 20, 2048),
    (160, 16, 4, 64, 20, 1024),
    # Prefixes too short to be worth sharing: here plain attention could win, and does not.
    (10, 12, 12, 64, 4, 16),
    (10, 12, 12, 64, 20, 1),
    (10, 16, 4, 64, 20, 16),
    (1, 12, 12, 64, 1, 16),
]


@pytest.mark.parametrize(
    "provider", ["sdpa", "sdpa, heads expanded", "sdpa after its copy", "two aten calls", "ours"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shared_prefix_attention(benchmark, figure, shape, dtype, provider) -> None:
    rows, heads, kv_heads, size, branch, prefix = shape
    generator = torch.Generator().manual_seed(0)

    def draw(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    q = draw(rows, heads, 1, size)
    prefix_k, prefix_v = (draw(1, kv_heads, prefix, size) for _ in range(2))
    branch_k, branch_v = (draw(rows, kv_heads, branch, size) for _ in range(2))
    lengths = torch.tensor([prefix]), torch.full((rows,), branch)

    def copy_to_rows() -> list[Tensor]:
        return [
            torch.cat((shared.expand(rows, -1, -1, -1), own), dim=2)
            for shared, own in ((prefix_k, branch_k), (prefix_v, branch_v))
        ]

    keys, values = copy_to_rows()
    wide_keys, wide_values = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (keys, values))
    arguments = (q, prefix_k, prefix_v, lengths[0], branch_k, branch_v, lengths[1])
    exact = functional.scaled_dot_product_attention(
        q.float(), wide_keys.float(), wide_values.float()
    )
    atol = 2e-2 if dtype == torch.bfloat16 else 5e-6
    got = shared_prefix_attention(*arguments).out.float()
    torch.testing.assert_close(got, exact, rtol=0, atol=atol)

    aten = {"scale": size**-0.5, "softcap": None, "window": None, "tree": None}
    functions = {
        "sdpa": lambda: functional.scaled_dot_product_attention(q, keys, values, enable_gqa=True),
        "sdpa, heads expanded": lambda: functional.scaled_dot_product_attention(
            q, wide_keys, wide_values
        ),
        "sdpa after its copy": lambda: functional.scaled_dot_product_attention(
            q, *copy_to_rows(), enable_gqa=True
        ),
        "two aten calls": lambda: shared_prefix_attention_aten(*arguments, **aten),
        "ours": lambda: shared_prefix_attention(*arguments),
    }
    group = f"shared_prefix_attention {shape} {dtype}"
    inputs = iter(tuple, None)
    time_provider(benchmark, figure, provider, group, functions[provider], inputs, rounds=40)
