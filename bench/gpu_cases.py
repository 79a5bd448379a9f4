"""The cases of bench/gpu_table.py: each op at its shapes, beside eager PyTorch and the reference.

All tensors are made on the device "cuda" when a bench is made, so importing this needs no GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tq_fast import ops

Inputs = tuple[Any, ...]
VOCAB = 128256


def close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise unless every tensor of ours is that of the reference, to fp32 rounding."""
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-5, atol=2e-5)


def sums_close(got: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raise unless ours equals the reference, for sums over a response, where rounding adds up."""
    torch.testing.assert_close(got[0], expected[0], rtol=1e-5, atol=2e-3)


def same_ids(got: Tensor, expected: Tensor) -> None:
    """Raise where more ids differ than rounding explains, which now and then moves a draw."""
    wrong = int((got != expected).sum())
    if wrong > 1 + got.numel() // 100:
        raise AssertionError(f"{wrong} of {got.numel()} ids differ from the reference")


class Bench(NamedTuple):
    """One shape of one op: how to make inputs, what runs, and the bytes that it has to move.

    `gate` compares an answer of ours with one of the reference and raises where they differ.
    `product` is the bare matrix product, the ceiling of an op made of one; None: a copy is the
    ceiling. `flops` counts the multiplications and additions of an op made of matrix products, 0
    for others.
    """

    op: str
    shape: str
    make: Callable[[], Inputs]
    ours: Callable[..., Any]
    eager: Callable[..., Any]
    reference: Callable[..., Any]
    nbytes: int
    gate: Callable[[Any, Any], None] = close
    product: Callable[..., Any] | None = None
    flops: int = 0


def draw(masses: Tensor) -> Tensor:
    """Draw ids `[N, 1]` by the masses `[N, V]`.

    `torch.multinomial` would wait for the device, and a graph cannot be captured around that.
    """
    return (masses / torch.empty_like(masses).exponential_()).argmax(-1, keepdim=True)


def random_logits(rows: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(rows, VOCAB, device="cuda") * 2).to(dtype)


def bench_topk(rows: int, dtype: torch.dtype, backend: str | None = None) -> Bench:
    def eager(logits: Tensor) -> tuple[Tensor, ...]:
        values, ids = torch.topk(logits, 10)
        lse = torch.logsumexp(logits.float(), -1)
        return ids, values.float() - lse.unsqueeze(-1), lse

    return Bench(
        "topk_logprobs",
        f"{rows} x {VOCAB} {dtype}, k = 10" + ("" if backend is None else f", {backend}"),
        lambda: (random_logits(rows, dtype),),
        lambda logits: ops.topk_logprobs(logits, 10, backend=backend),
        eager,
        lambda logits: ops.topk_logprobs(logits, 10, backend="ref"),
        rows * VOCAB * dtype.itemsize,
    )


def bench_sample(rows: int, dtype: torch.dtype, **cut: float) -> Bench:
    keys = torch.arange(rows, device="cuda")
    step = torch.zeros(1, dtype=torch.int64, device="cuda")

    def eager(logits: Tensor) -> tuple[Tensor, ...]:
        logprobs = logits.float().log_softmax(-1)
        masses = logprobs.exp()
        if "top_k" in cut:
            values, _ = logprobs.topk(int(cut["top_k"]))
            masses = masses.where(logprobs >= values[:, -1:], 0.0)
        if "top_p" in cut:
            ordered, order = masses.sort(dim=-1, descending=True)
            running = ordered.cumsum(-1)
            kept = running - ordered < cut["top_p"] * running[:, -1:]
            masses = torch.zeros_like(masses).scatter(-1, order, ordered * kept)
        ids = draw(masses)
        return ids, logprobs.gather(-1, ids)

    return Bench(
        "sample_tokens",
        f"{rows} x {VOCAB} {dtype}" + "".join(f", {name} = {x}" for name, x in cut.items()),
        lambda: (random_logits(rows, dtype),),
        lambda logits: ops.sample_tokens(logits, keys, step, **cut),
        eager,
        lambda logits: ops.sample_tokens(logits, keys, step, backend="ref", **cut),
        rows * VOCAB * dtype.itemsize,
        lambda got, expected: same_ids(got.ids, expected.ids),
    )


def bench_value_sample(rows: int, rank: int, dtype: torch.dtype) -> Bench:
    keys = torch.arange(rows, device="cuda")
    step = torch.zeros(1, dtype=torch.int64, device="cuda")

    def make() -> Inputs:
        directions = torch.randn(rows, rank, device="cuda").to(dtype)
        embeddings = (torch.randn(VOCAB, rank, device="cuda") / rank**0.5).to(dtype)
        return random_logits(rows, dtype), directions, embeddings

    def eager(logits: Tensor, directions: Tensor, embeddings: Tensor) -> tuple[Tensor, ...]:
        q = (directions @ embeddings.T).float()
        prior = logits.float().log_softmax(-1)
        law = (logits.float() + q).log_softmax(-1)
        ids = draw(law.exp())
        return ids, prior.gather(-1, ids), law.gather(-1, ids), (law.exp() * (law - prior)).sum(-1)

    def gate(got: Any, expected: Any) -> None:
        same_ids(got.ids, expected.ids)
        same = got.ids == expected.ids
        close([x[same] for x in got[1:4]], [x[same] for x in expected[1:4]])

    def run(backend: str | None) -> Callable[..., Any]:
        return lambda *inputs: ops.value_sample_tokens(*inputs, keys, step, backend=backend)

    return Bench(
        "value_sample_tokens",
        f"{rows} x {VOCAB}, r = {rank}, {dtype}",
        make,
        run(None),
        eager,
        run("ref"),
        (rows * VOCAB + VOCAB * rank) * dtype.itemsize,
        gate,
        flops=2 * rows * VOCAB * rank,
    )


def bench_reweight(prompts: int) -> Bench:
    ids = torch.arange(prompts * 20, device="cuda").reshape(prompts, 20)
    step = torch.zeros(1, dtype=torch.int64, device="cuda")

    def make() -> Inputs:
        prior = torch.randn(prompts, 20, device="cuda").log_softmax(-1)
        return (prior, *torch.randn(2, prompts, 20, 8, device="cuda").unbind())

    def eager(prior: Tensor, rewards: Tensor, log_weights: Tensor) -> tuple[Tensor, ...]:
        weights = log_weights.softmax(-1)
        q = (weights * rewards).sum(-1)
        spread = (weights * (rewards - q.unsqueeze(-1))).square().sum(-1)
        final = (prior + q / 0.7).log_softmax(-1)
        ess = weights.square().sum(-1).reciprocal()
        return draw(final.exp()), final, q, (spread * 8 / 7).sqrt(), ess

    def run(backend: str | None) -> Callable[..., Any]:
        return lambda prior, rewards, weights: ops.reweight_sample(
            prior, ids, rewards, weights, alpha=0.7, step=step, backend=backend
        )

    nbytes = prompts * 20 * (8 * 4 * 2 + 4 + 8 + 4 * 4)
    shape = f"G = {prompts}, k = 20, n = 8"

    def gate(got: Any, expected: Any) -> None:
        same_ids(got.choice, expected.choice)
        close(got[1:], expected[1:])

    return Bench("reweight_sample", shape, make, run(None), eager, run("ref"), nbytes, gate)


def bench_advance(rows: int) -> Bench:
    keys, eos = torch.arange(rows, device="cuda"), torch.tensor([-1], device="cuda")
    step = torch.zeros(1, dtype=torch.int64, device="cuda")

    def make() -> Inputs:
        counts = torch.zeros(rows, dtype=torch.int64, device="cuda")
        # Every call appends a token, so that this needs room for all replays.
        tokens = torch.zeros(rows, 4096, dtype=torch.int64, device="cuda")
        sums = torch.zeros(2, rows, device="cuda").unbind()
        return (random_logits(rows, torch.bfloat16), tokens, counts, counts.bool(), *sums)

    def run(backend: str | None) -> Callable[..., Any]:
        def advance(logits: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
            ops.advance_rollouts_(logits, keys, step, *state, eos, backend=backend)
            return state

        return advance

    def eager(logits: Tensor, tokens: Tensor, lengths: Tensor, finished: Tensor, *sums: Tensor):
        logprobs = logits.float().log_softmax(-1)
        ids = draw(logprobs.exp())
        live = ~finished
        slot = lengths.unsqueeze(-1)
        tokens.scatter_(-1, slot, torch.where(live.unsqueeze(-1), ids, tokens.gather(-1, slot)))
        lengths.add_(live)
        for total in sums:
            total.add_(torch.where(live, logprobs.gather(-1, ids).squeeze(-1), 0.0))
        finished.logical_or_(live & (ids == eos).any(-1))

    def gate(got: Any, expected: Any) -> None:
        same_ids(got[0][:, 0], expected[0][:, 0])
        close(got[1:3], expected[1:3])
        same = got[0][:, 0] == expected[0][:, 0]
        close([x[same] for x in got[3:]], [x[same] for x in expected[3:]])

    shape = f"{rows} x {VOCAB} bfloat16"
    nbytes = rows * VOCAB * 2
    return Bench("advance_rollouts_", shape, make, run(None), eager, run("ref"), nbytes, gate)


def bench_log_ratio(rows: int, length: int, vocab: int) -> Bench:
    lengths = torch.full((rows,), length, device="cuda")

    def make() -> Inputs:
        logits = (torch.randn(2, rows, length, vocab, device="cuda") * 2).bfloat16()
        return (*logits.unbind(), torch.randint(0, vocab, (rows, length), device="cuda"), lengths)

    def eager(p: Tensor, q: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        at = tokens.unsqueeze(-1)
        p, q = (x.float().log_softmax(-1).gather(-1, at) for x in (p, q))
        return (p - q).sum((1, 2))

    def run(backend: str | None) -> Callable[..., Any]:
        return lambda *inputs: (ops.trajectory_log_ratio(*inputs, backend=backend),)

    shape = f"{rows} x {length} x {vocab} bfloat16"
    nbytes = 2 * rows * length * vocab * 2
    return Bench(
        "trajectory_log_ratio", shape, make, run(None), eager, run("ref"), nbytes, sums_close
    )


def bench_linear_logprob(rows: int, length: int, size: int) -> Bench:
    lengths = torch.full((rows,), length, device="cuda")

    def make() -> Inputs:
        hidden = torch.randn(rows, length, size, device="cuda").bfloat16()
        weight = (torch.randn(VOCAB, size, device="cuda") * (3 / size**0.5)).bfloat16()
        return hidden, weight, torch.randint(0, VOCAB, (rows, length), device="cuda"), lengths

    def eager(hidden: Tensor, weight: Tensor, tokens: Tensor, lengths: Tensor) -> Tensor:
        logprobs = torch.nn.functional.linear(hidden, weight).float().log_softmax(-1)
        return logprobs.gather(-1, tokens.unsqueeze(-1)).sum((1, 2))

    def run(backend: str | None) -> Callable[..., Any]:
        return lambda *inputs: (ops.linear_trajectory_logprob(*inputs, backend=backend),)

    return Bench(
        "linear_trajectory_logprob",
        f"{rows} x {length}, {size} -> {VOCAB} bfloat16",
        make,
        run(None),
        eager,
        run("ref"),
        VOCAB * size * 2 + rows * length * size * 2,
        sums_close,
        lambda hidden, weight, tokens, lengths: hidden.flatten(0, 1) @ weight.T,
        2 * rows * length * VOCAB * size,
    )


def bench_attention(rows: int, heads: int, kv_heads: int, size: int, prefix: int) -> Bench:
    branch = 32
    lengths = (
        torch.full((1,), prefix, device="cuda"),
        torch.full((rows,), branch, device="cuda"),
    )

    def make() -> Inputs:
        shared = torch.randn(2, 1, kv_heads, prefix, size, device="cuda").bfloat16().unbind()
        own = torch.randn(2, rows, kv_heads, branch, size, device="cuda").bfloat16().unbind()
        q = torch.randn(rows, heads, 1, size, device="cuda").bfloat16()
        # Plain attention reads these: the prefix is copied to every row before the clock starts.
        whole = [
            torch.cat((a.expand(rows, -1, -1, -1), b), 2) for a, b in zip(shared, own, strict=True)
        ]
        return (q, *shared, *own, *whole)

    def run(backend: str | None) -> Callable[..., Any]:
        return lambda q, pk, pv, bk, bv, keys, values: ops.shared_prefix_attention(
            q, pk, pv, lengths[0], bk, bv, lengths[1], backend=backend
        )

    def eager(q: Tensor, pk: Tensor, pv: Tensor, bk: Tensor, bv: Tensor, *whole: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(q, *whole, enable_gqa=True)

    def gate(got: Any, expected: Any) -> None:
        torch.testing.assert_close(got.out, expected.out, rtol=0, atol=2e-2)
        torch.testing.assert_close(got.lse, expected.lse, rtol=0, atol=2e-3)

    return Bench(
        "shared_prefix_attention",
        f"{rows} rows, {heads}/{kv_heads} heads of {size}, prefix {prefix}, bfloat16",
        make,
        run(None),
        eager,
        run("ref"),
        2 * size * (2 * kv_heads * (prefix + rows * branch) + 2 * rows * heads),
        gate,
        flops=4 * rows * heads * (prefix + branch) * size,
    )


def bench_prompt(
    length: int, heads: int, kv_heads: int, size: int, backend: str | None = None
) -> Bench:
    """A prompt without a known prefix, which flash attention takes where it is there."""

    def make() -> Inputs:
        keys, values = torch.randn(2, 1, kv_heads, length, size, device="cuda").bfloat16().unbind()
        return torch.randn(1, heads, length, size, device="cuda").bfloat16(), keys, values

    def run(backend: str | None) -> Callable[..., Any]:
        return lambda q, keys, values: ops.shared_prefix_attention(
            q, keys[:, :, :0], values[:, :, :0], None, keys, values, None, backend=backend
        )

    def eager(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, keys, values, is_causal=True, enable_gqa=True
        )

    def gate(got: Any, expected: Any) -> None:
        torch.testing.assert_close(got.out, expected.out, rtol=0, atol=3e-2)
        torch.testing.assert_close(got.lse, expected.lse, rtol=0, atol=2e-3)

    kernel = "" if backend is None else f", {backend}"
    return Bench(
        "shared_prefix_attention",
        f"a prompt of {length}, {heads}/{kv_heads} heads of {size}, bfloat16{kernel}",
        make,
        run(backend),
        eager,
        run("ref"),
        2 * size * length * 2 * (heads + kv_heads),
        gate,
        # Half of the scores are above the diagonal.
        flops=2 * heads * length * length * size,
    )


def benches() -> list[Bench]:
    # Attention comes first, because a run may be cut off. Its last case of roll-outs shows what a
    # prefix that is hardly there costs.
    found = [bench_attention(rows, 16, 4, 64, 1024) for rows in (10, 40, 160)]
    found += [bench_attention(160, 32, 8, 128, 4096), bench_attention(40, 16, 4, 64, 16)]
    found += [
        bench_prompt(length, 32, 32, 128, backend)
        for length, backend in itertools.product((512, 4096), (None, "triton"))
    ]
    found += [
        bench_topk(rows, dtype)
        for rows, dtype in itertools.product((1, 32, 160, 512), (torch.bfloat16, torch.float32))
    ]
    found += [bench_topk(rows, torch.bfloat16, "triton") for rows in (1, 32, 160, 512)]
    found += [bench_sample(rows, torch.bfloat16) for rows in (1, 64, 160, 512)]
    found += [
        bench_sample(160, torch.bfloat16, top_k=50),
        bench_sample(160, torch.bfloat16, top_p=0.9),
    ]
    found += [bench_value_sample(rows, 64, torch.bfloat16) for rows in (1, 32, 160)]
    found += [bench_reweight(prompts) for prompts in (1, 32)]
    found += [bench_advance(rows) for rows in (10, 160)]
    found += [bench_log_ratio(40, 20, 32000), bench_log_ratio(8, 16, VOCAB)]
    return [*found, bench_linear_logprob(40, 20, 1024), bench_linear_logprob(160, 20, 2048)]
