"""Attention of the branches of a forest: one shared prefix a tree, a few own tokens a row.

Row i belongs to tree g; its T queries are the last T of its branch_len[i] branch tokens.

    keys(i, t) = prefix[g, :prefix_len[g]]  then  branch[i, : branch_len[i] - T + t + 1]
    score = scale * q . k                   softcap: softcap * tanh(score / softcap)
    window w: only keys whose position is above (position of the query) - w
    out = softmax(scores) @ values,  lse = logsumexp(scores)

Bytes: every prefix key and value once a tree, not once a row: `2 * G * H_kv * P * d * itemsize`,
and each row's branch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import InvalidArgument
from . import _checks
from ._attention_aten import refuse_aten, shared_prefix_attention_aten
from ._attention_flash import (
    SERVES,
    load_flash_attn,
    load_torch_flash,
    refuse_flash_attn,
    refuse_torch_flash,
)
from ._dispatch import Backend, Implementation, Op, native_function, python_function
from .merge_attention_states import AttentionState


def shared_prefix_attention(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_len: Tensor | None,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_len: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    tree: Tensor | None = None,
    backend: str | None = None,
) -> AttentionState:
    """`F.scaled_dot_product_attention` over every row's prefix and branch, the prefix read once.

    Queries are causal among themselves. Grouped queries: head h reads key-value head
    `h // (H_q // H_kv)`. A prefix of any length is shared: on a CPU, attending plainly to a copy of
    it for every row is no faster at 1 and at 16 tokens either, except for a single row, where the
    checks of the arguments outlast the attention (`bench/test_shared_prefix_attention.py`).

    Args:
        q: `[N, H_q, T, d]`, floating point; the last T branch tokens of each row.
        prefix_k: `[G, H_kv, P, d]`, the dtype of q; views of larger buffers are fine.
        prefix_v: the same.
        prefix_len: int64 or int32 `[G]`, valid prefix tokens of each tree, 0 to P; None: all P.
        branch_k: `[N, H_kv, S, d]`, the dtype of q.
        branch_v: the same.
        branch_len: int64 or int32 `[N]`, valid branch tokens of each row, the T new ones among
            them, so T to S; None: all S. Without both lengths the host knows them, and kernels
            that take none may serve (flash attention, for the prompt of a single row).
        scale: factor on the scores; None: `d ** -0.5`.
        softcap: bounds the scores, above 0; None: not bounded.
        window: a query sees only the last `window` positions, its own among them; None: all.
        tree: int64 `[N]`, ascending, the tree of each row; None: row i is of tree i // (N // G).
        backend: pins one of cuda, triton, cpu, ref; None lets TQ_FAST_BACKEND decide.

    Returns:
        AttentionState: out `[N, H_q, T, d]` in the dtype of q, lse fp32 `[N, H_q, T]`. A query
        that sees no key has out 0 and lse -inf. The kernels lay out in memory as `[N, T, H_q, d]`.

    Raises:
        InvalidArgument: wrong shapes, dtypes or parameters, an input with grad, or, on a CPU, a
            length or a tree out of range; a GPU reads no key beyond its buffer, and tells nobody.
        BackendRefused: the pinned backend does not take these inputs.
    """
    inputs = (q, prefix_k, prefix_v, prefix_len, branch_k, branch_v, branch_len)
    _check(*inputs, scale=scale, softcap=softcap, window=window, tree=tree)
    if scale is None:
        scale = q.shape[-1] ** -0.5
    result = _OP(backend, *inputs, scale=scale, softcap=softcap, window=window, tree=tree)
    return AttentionState._make(result)


def shared_prefix_attention_ref(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_len: Tensor | None,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_len: Tensor | None,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    window: int | None = None,
    tree: Tensor | None = None,
) -> AttentionState:
    """The reference of `shared_prefix_attention`: prefixes expanded to rows, fp32 inside."""
    rows, num_heads, num_queries, head_size = q.shape
    trees, num_kv_heads = prefix_k.shape[:2]
    prefix_len, branch_len = _lengths(prefix_k, prefix_len), _lengths(branch_k, branch_len)
    if tree is None:
        tree = torch.arange(rows, device=q.device) // max(rows // max(trees, 1), 1)
    group = num_heads // num_kv_heads
    keys = torch.cat((prefix_k[tree], branch_k), dim=2).to(torch.float32)
    values = torch.cat((prefix_v[tree], branch_v), dim=2).to(torch.float32)
    keys = keys.repeat_interleave(group, dim=1)
    values = values.repeat_interleave(group, dim=1)

    scores = q.to(torch.float32) @ keys.transpose(-1, -2)
    scores = scores * (head_size**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    visible = _visible(
        prefix_len[tree], branch_len, prefix_k.shape[2], branch_k.shape[2], num_queries, window
    )
    scores = scores.masked_fill(~visible.unsqueeze(1), -torch.inf)
    lse = scores.logsumexp(dim=-1)
    shares = (scores - torch.where(lse == -torch.inf, 0.0, lse).unsqueeze(-1)).exp()
    # Values beyond a length may be NaN, and 0 times NaN is NaN: take 0 for them.
    seen = visible.any(dim=1)[:, None, :, None]
    out = shares @ torch.where(seen, values, 0.0)
    return AttentionState(out.to(q.dtype), lse)


def _lengths(buffer: Tensor, lengths: Tensor | None) -> Tensor:
    """The valid tokens of each row of `buffer` `[n, H_kv, S, d]`: all S where nothing is given."""
    if lengths is not None:
        return lengths
    return torch.full(buffer.shape[:1], buffer.shape[2], device=buffer.device)


def _visible(
    prefix_len: Tensor,
    branch_len: Tensor,
    num_prefix: int,
    num_branch: int,
    num_queries: int,
    window: int | None,
) -> Tensor:
    """Bool `[N, T, P + S]`: which key each query of each row sees. Lengths are `[N]`."""
    device = branch_len.device
    prefix_len, branch_len = prefix_len[:, None, None], branch_len[:, None, None]
    in_prefix = torch.arange(num_prefix, device=device)
    in_branch = torch.arange(num_branch, device=device)
    query = torch.arange(num_queries, device=device)[:, None] + branch_len - num_queries
    sees_prefix = (in_prefix < prefix_len) & torch.ones_like(query, dtype=torch.bool)
    sees_branch = in_branch <= query
    if window is not None:
        sees_prefix = sees_prefix & (in_prefix > prefix_len + query - window)
        sees_branch = sees_branch & (in_branch > query - window)
    return torch.cat((sees_prefix, sees_branch), dim=-1)


_NAME = "shared_prefix_attention"


def _check(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_len: Tensor | None,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_len: Tensor | None,
    *,
    scale: float | None,
    softcap: float | None,
    window: int | None,
    tree: Tensor | None,
) -> None:
    keys = {"prefix_k": prefix_k, "prefix_v": prefix_v}
    own = {"branch_k": branch_k, "branch_v": branch_v}
    optional = _checks.given(prefix_len=prefix_len, branch_len=branch_len, tree=tree)
    _checks.require_tensors(_NAME, q=q, **keys, **own, **optional)
    if scale is not None:
        _checks.require_number(_NAME, "scale", scale)
    _checks.require_softcap(_NAME, softcap)
    if window is not None:
        _checks.require_count(_NAME, "window", window, 1, _checks.LARGEST_COUNT)
    if not (q.dim() == prefix_k.dim() == branch_k.dim() == 4):
        _checks.require_dim(_NAME, "q", q, 4, "[N, H_q, T, d]")
        _checks.require_dim(_NAME, "prefix_k", prefix_k, 4, "[G, H_kv, P, d]")
        _checks.require_dim(_NAME, "branch_k", branch_k, 4, "[N, H_kv, S, d]")
    rows, num_heads, num_queries, head_size = q.shape
    _checks.require_count(_NAME, "d, the last axis of q,", head_size, 1, _checks.LARGEST_COUNT)
    trees, num_kv_heads, num_prefix, _ = prefix_k.shape
    shape = (trees, num_kv_heads, num_prefix, head_size)
    if prefix_k.shape != shape:
        _checks.require_shape(_NAME, "prefix_k", prefix_k, shape, "[G, H_kv, P, d of q]")
    if prefix_v.shape != shape:
        _checks.require_shape(_NAME, "prefix_v", prefix_v, shape, "the shape of prefix_k")
    shape = (rows, num_kv_heads, branch_k.shape[2], head_size)
    if branch_k.shape != shape:
        _checks.require_shape(_NAME, "branch_k", branch_k, shape, "[N of q, H_kv, S, d of q]")
    if branch_v.shape != shape:
        _checks.require_shape(_NAME, "branch_v", branch_v, shape, "the shape of branch_k")
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise InvalidArgument(
            f"{_NAME}: q has {num_heads} heads, expected a multiple of prefix_k's {num_kv_heads}"
        )
    if prefix_len is not None:
        _check_lengths("prefix_len", prefix_len, "[G]", trees, num_prefix)
    if branch_len is not None:
        _check_lengths("branch_len", branch_len, "[N]", rows, branch_k.shape[2])
    elif branch_k.shape[2] < num_queries:
        raise InvalidArgument(
            f"{_NAME}: branch_k has {branch_k.shape[2]} tokens a row and branch_len is None, "
            f"expected at least the {num_queries} of q"
        )
    if tree is not None:
        _check_lengths("tree", tree, "[N]", rows, trees - 1)
    elif rows % trees if trees else rows:
        raise InvalidArgument(
            f"{_NAME}: q has {rows} rows, expected a multiple of the {trees} trees of prefix_k "
            "unless tree= says which row is whose"
        )
    _checks.require_float(_NAME, "q", q)
    for name, tensor in (
        ("prefix_k", prefix_k),
        ("prefix_v", prefix_v),
        ("branch_k", branch_k),
        ("branch_v", branch_v),
    ):
        if tensor.dtype != q.dtype:
            _checks.require_dtype(_NAME, name, tensor, q.dtype)
    _checks.refuse_grad(
        _NAME, q=q, prefix_k=prefix_k, prefix_v=prefix_v, branch_k=branch_k, branch_v=branch_v
    )


def _check_lengths(name: str, lengths: Tensor, axes: str, size: int, most: int) -> None:
    if lengths.shape != (size,):
        _checks.require_shape(_NAME, name, lengths, (size,), axes)
    _checks.require_integer(_NAME, name, lengths)
    _checks.require_within(_NAME, name, lengths, 0, most)


def _fake(q: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    rows, num_heads, num_queries, head_size = q.shape
    # The kernels write an output whose heads lie side by side, as a layer reads it.
    out = q.new_empty((rows, num_queries, num_heads, head_size)).transpose(1, 2)
    return out, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _refuse_cpu(q: Tensor, *arguments: Any, **parameters: Any) -> str | None:
    return _checks.refuse_float64(q=q)


def refuse_triton(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_len: Tensor,
    branch_k: Tensor,
    branch_v: Tensor,
    *arguments: Any,
    **parameters: Any,
) -> str | None:
    """Say why the Triton kernel does not take these inputs; None when it does."""
    if q.shape[-1] > 256:
        return f"the head size is {q.shape[-1]}; the Triton kernel takes at most 256"
    keys = {"prefix_k": prefix_k, "prefix_v": prefix_v, "branch_k": branch_k, "branch_v": branch_v}
    for name, tensor in {"q": q, **keys}.items():
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return f"the last axis of {name} is strided; the Triton kernel takes one without gaps"
    return _checks.refuse_float64(q=q)


def _with_lengths(resolve: Callable[[], Implementation]) -> Callable[[], Implementation]:
    """A resolver of the same kernel, which needs lengths, for callers who give none."""

    def resolve_with_lengths() -> Implementation:
        kernel = resolve()

        def run(
            q: Tensor,
            prefix_k: Tensor,
            prefix_v: Tensor,
            prefix_len: Tensor | None,
            branch_k: Tensor,
            branch_v: Tensor,
            branch_len: Tensor | None,
            **parameters: Any,
        ) -> Any:
            prefix = (prefix_k, prefix_v, _lengths(prefix_k, prefix_len))
            branch = (branch_k, branch_v, _lengths(branch_k, branch_len))
            return kernel(q, *prefix, *branch, **parameters)

        return run

    return resolve_with_lengths


# The kernel computes in fp32. With AMX it multiplies bf16 heads as they are, with avx512_bf16 alone
# those of a multiple of 32, and rounds the weights of the values to bf16; every sum stays in fp32.
# Two calls of ATen serve where the kernel was not built; beside it they are slower, with AMX too
# (bench/test_shared_prefix_attention.py times both).
_native = _with_lengths(native_function(_NAME, None, _fake))

# Flash attention is compiled CUDA code of others for a special case, so it stands under "cuda",
# before Triton: who pins "triton" gets the tiles for prompts too.
_OP = Op(
    _NAME,
    shared_prefix_attention_ref,
    Backend("cuda", load_flash_attn, refuse_flash_attn, SERVES),
    Backend("cuda", load_torch_flash, refuse_torch_flash, SERVES),
    Backend(
        "triton",
        _with_lengths(
            python_function("tq_fast.kernels.shared_prefix_attention", f"{_NAME}_triton")
        ),
        refuse_triton,
    ),
    Backend("cpu", _native, _refuse_cpu),
    Backend("cpu", _with_lengths(lambda: shared_prefix_attention_aten), refuse_aten),
)
