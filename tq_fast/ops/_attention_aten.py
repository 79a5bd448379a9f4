"""shared_prefix_attention for CPU tensors, as two calls of ATen's flash-attention kernel.

ATen's kernel returns the log-sum-exp, so attention can be split: the prefix part runs once for
all rows of a tree, the rows (and the query heads that share a key-value head) folded into the
query axis, and the branch part runs once for all rows; the two are merged by log-sum-exp.

The kernel's habits, found by trying it on torch 2.13: lse is fp32 `[B, H, q]` whatever the
inputs; a mask is added and must be floating point; `is_causal` aligns at the top left; a row that
is masked out whole gets lse 0; and a call with any axis of size 0 kills the process.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._checks import KERNEL_FLOATS
from .merge_attention_states import merge_attention_states_ref

_State = tuple[Tensor, Tensor]


class _Run(NamedTuple):
    """Neighbouring trees of equally many rows and equally long prefixes: one call serves them."""

    first_tree: int
    end_tree: int
    first_row: int
    end_row: int
    prefix_len: int


def refuse_aten(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_len: Tensor,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_len: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    tree: Tensor | None,
) -> str | None:
    """None when ATen's kernel serves, else a sentence that says why it does not."""
    if softcap is not None:
        return "ATen's CPU flash attention has no soft-cap on the scores"
    if torch.compiler.is_compiling():
        return "the calls are laid out by the values of the lengths, which torch.compile hides"
    if q.dtype not in KERNEL_FLOATS:
        return f"q is {q.dtype}, and ATen's log-sum-exp would not be fp32"
    for tensor in (q, prefix_k, prefix_v, branch_k, branch_v):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            return "the last axis of an input is strided"
    return None


def shared_prefix_attention_aten(
    q: Tensor,
    prefix_k: Tensor,
    prefix_v: Tensor,
    prefix_len: Tensor,
    branch_k: Tensor,
    branch_v: Tensor,
    branch_len: Tensor,
    *,
    scale: float,
    softcap: float | None,
    window: int | None,
    tree: Tensor | None,
) -> _State:
    """(out, lse) of `shared_prefix_attention_ref`; see there for the arguments."""
    rows, num_heads, num_queries, head_size = q.shape
    shape = (rows, num_heads, num_queries)
    if q.numel() == 0:
        return q.new_zeros((*shape, head_size)), q.new_full(shape, -torch.inf, dtype=torch.float32)
    branch_lens = branch_len.tolist()
    longest, shortest = max(branch_lens), min(branch_lens)
    runs = _runs(prefix_len.tolist(), rows, tree)

    states: list[_State] = []
    if longest > 0:
        states.append(
            _branch_part(q, branch_k, branch_v, branch_len, longest, shortest, scale, window)
        )
    if any(run.prefix_len > 0 for run in runs):
        states.append(
            _prefix_part(q, prefix_k, prefix_v, branch_len, longest, shortest, scale, window, runs)
        )
    if not states:
        return q.new_zeros((*shape, head_size)), q.new_full(shape, -torch.inf, dtype=torch.float32)
    if len(states) == 1:
        out, lse = states[0]
    elif shortest < num_queries:
        # A query can see no key in either part, which only the reference takes.
        out, lse = merge_attention_states_ref(*states)
    else:
        out, lse = _merge(*states)
    return out.reshape(q.shape), lse.reshape(shape)


def _runs(prefix_lens: list[int], rows: int, tree: Tensor | None) -> list[_Run]:
    """Cut the forest into runs; one tree, or trees of one length, make a single run."""
    trees = len(prefix_lens)
    if tree is None:
        counts = [rows // trees] * trees
    else:
        counts = torch.bincount(tree, minlength=trees).tolist()
    runs: list[_Run] = []
    row = 0
    for idx, (count, length) in enumerate(zip(counts, prefix_lens, strict=True)):
        if count == 0:
            continue
        last = runs[-1] if runs else None
        if (
            last is not None
            and last.end_tree == idx
            and last.prefix_len == length
            and (last.end_row - last.first_row) == count * (last.end_tree - last.first_tree)
        ):
            runs[-1] = last._replace(end_tree=idx + 1, end_row=row + count)
        else:
            runs.append(_Run(idx, idx + 1, row, row + count, length))
        row += count
    return runs


def _branch_part(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    longest: int,
    shortest: int,
    scale: float,
    window: int | None,
) -> _State:
    """Every row's queries over its own branch: out `[N, H_kv, group * T, d]`, lse without d."""
    rows, _, num_queries, head_size = q.shape
    num_kv_heads = keys.shape[1]
    if keys.shape[2] != longest:
        keys, values = keys.narrow(2, 0, longest), values.narrow(2, 0, longest)
    plain = shortest == longest and (window is None or longest <= window)
    if plain and num_queries == longest > 1:
        # The kernel reads grouped heads by itself, and skips what is above the diagonal.
        out, lse = _flash(q, keys, values, scale, causal=True)
        return out.reshape(rows, num_kv_heads, -1, head_size), lse.reshape(rows, num_kv_heads, -1)
    folded = q.reshape(rows, num_kv_heads, -1, head_size)
    if plain and num_queries == 1:
        return _flash(folded, keys, values, scale)

    position = torch.arange(longest)
    query = torch.arange(num_queries)[:, None] + (lengths[:, None, None] - num_queries)
    visible = position <= query
    if window is not None:
        visible &= position > query - window
    if shortest < longest:
        # Memory beyond a branch may hold NaN, which adding a mask does not remove.
        within = (position < lengths[:, None])[:, None, :, None]
        keys, values = torch.where(within, keys, 0), torch.where(within, values, 0)
    group = q.shape[1] // num_kv_heads
    return _masked_flash(folded, keys, values, scale, visible.repeat(1, group, 1).unsqueeze(1))


def _prefix_part(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    branch_len: Tensor,
    longest: int,
    shortest: int,
    scale: float,
    window: int | None,
    runs: list[_Run],
) -> _State:
    """All rows of a tree over its prefix, folded into its queries; shapes as `_branch_part`."""
    if len(runs) == 1 and runs[0].end_tree - runs[0].first_tree == keys.shape[0]:
        return _run_part(q, keys, values, branch_len, longest, shortest, scale, window, runs[0])
    states = [
        _run_part(
            q[run.first_row : run.end_row],
            keys[run.first_tree : run.end_tree],
            values[run.first_tree : run.end_tree],
            branch_len[run.first_row : run.end_row],
            longest,
            shortest,
            scale,
            window,
            run,
        )
        for run in runs
    ]
    return torch.cat([out for out, _ in states]), torch.cat([lse for _, lse in states])


def _run_part(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    branch_len: Tensor,
    longest: int,
    shortest: int,
    scale: float,
    window: int | None,
    run: _Run,
) -> _State:
    """The prefix part of the rows and trees of one run."""
    rows, num_heads, num_queries, head_size = q.shape
    trees, num_kv_heads = keys.shape[:2]
    width = num_heads // num_kv_heads * num_queries
    start, end, visible = 0, run.prefix_len, None
    if window is not None and end > 0 and end + longest > window:
        if num_queries == 1 and shortest == longest:
            # All queries stand at one position, so the window is a slice.
            start = end + longest - window
        else:
            visible = _window_mask(branch_len, run, num_queries, window, width // num_queries)
    if start >= end:
        shape = (rows, num_kv_heads, width)
        return q.new_zeros((*shape, head_size)), q.new_full(shape, -torch.inf, dtype=torch.float32)
    if end - start != keys.shape[2]:
        keys, values = keys.narrow(2, start, end - start), values.narrow(2, start, end - start)
    per_tree = rows // trees
    folded = q.reshape(trees, per_tree, num_kv_heads, width, head_size).transpose(1, 2)
    folded = folded.reshape(trees, num_kv_heads, per_tree * width, head_size)
    if visible is None:
        out, lse = _flash(folded, keys, values, scale)
    else:
        out, lse = _masked_flash(folded, keys, values, scale, visible)
    if per_tree == 1:
        return out, lse
    unfolded = (trees, num_kv_heads, per_tree, width)
    return (
        out.view(*unfolded, head_size).transpose(1, 2).flatten(0, 1),
        lse.view(unfolded).transpose(1, 2).flatten(0, 1),
    )


def _window_mask(
    branch_len: Tensor, run: _Run, num_queries: int, window: int, group: int
) -> Tensor:
    """Bool `[trees, 1, rows * group * T, prefix_len]`: which prefix keys the window leaves."""
    query = torch.arange(num_queries)[:, None] + (branch_len[:, None, None] - num_queries)
    position = run.prefix_len + query
    visible = torch.arange(run.prefix_len) > position - window
    visible = visible.unsqueeze(1).expand(-1, group, -1, -1)
    return visible.reshape(run.end_tree - run.first_tree, 1, -1, run.prefix_len)


def _flash(
    q: Tensor, keys: Tensor, values: Tensor, scale: float, *, causal: bool = False
) -> _State:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, keys, values, 0.0, causal, scale=scale
    )


def _masked_flash(q: Tensor, keys: Tensor, values: Tensor, scale: float, visible: Tensor) -> _State:
    bias = torch.zeros(visible.shape, dtype=q.dtype).masked_fill_(~visible, -torch.inf)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(
        q, keys, values, 0.0, False, attn_mask=bias, scale=scale
    )
    return out, lse.masked_fill(~visible.any(dim=-1), -torch.inf)


def _merge(a: _State, b: _State) -> _State:
    """`merge_attention_states_ref` for states that are not both empty, in a quarter of the time."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    share_b = torch.sigmoid(lse_b - lse_a).unsqueeze(-1)
    out = torch.lerp(out_a.to(torch.float32), out_b.to(torch.float32), share_b)
    return out.to(out_a.dtype), torch.logaddexp(lse_a, lse_b)
