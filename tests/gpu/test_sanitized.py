"""A short run of every kernel, small enough for compute-sanitizer (`make gpu-sanitize`)."""

from __future__ import annotations

import pytest
import torch

from tests.gpu.cases import TRITON_CASES, device_int, kernel
from tq_fast import ops

# Rows of several blocks: a block takes eight tiles of 2,048 elements, so a cluster begins above
# 16,384. With k = 128 its leader wants more shared memory than the 48 KB that every launch has.
CLUSTER_SIZES = (40_000, 131_072)
MOST_K = 128


@pytest.mark.parametrize("size", [31, 2049, 9000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows(size, dtype):
    # The odd offset makes rows that are not aligned.
    logits = torch.randn(3, size + 1, device="cuda").to(dtype)[:, 1:]
    keys = torch.arange(3, device="cuda")
    k = min(size, 20)
    assert (ops.topk_logprobs(logits, k, backend="cuda").ids < size).all()
    for cut in ({}, {"top_k": 9, "top_p": 0.7}, {"temperature": 0.0}, {"temperature": 1.3}):
        drawn = ops.sample_tokens(logits, keys, 1, backend="cuda", **cut)
        assert drawn.valid.all() and (drawn.ids < size).all()


@pytest.mark.parametrize("size", CLUSTER_SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_a_cluster(size, dtype):
    logits = torch.randn(2, size + 1, device="cuda").to(dtype)[:, 1:]
    keys = torch.arange(2, device="cuda")
    assert (ops.topk_logprobs(logits, MOST_K, backend="cuda").ids < size).all()
    for cut in ({}, {"top_k": 300, "top_p": 0.7}, {"top_p": 0.9}):
        drawn = ops.sample_tokens(logits, keys, 1, backend="cuda", **cut)
        assert drawn.valid.all() and (drawn.ids < size).all()


@pytest.mark.parametrize("name", TRITON_CASES)
def test_triton(name):
    kernel(name)(device_int(1), device_int(0))
    torch.cuda.synchronize()


def test_rollouts():
    tokens = torch.zeros(3, 2, dtype=torch.int64, device="cuda")
    lengths = torch.zeros(3, dtype=torch.int64, device="cuda")
    finished = torch.zeros(3, dtype=torch.bool, device="cuda")
    sums, proposals = torch.zeros(2, 3, device="cuda").unbind()
    eos = torch.zeros(0, dtype=torch.int64, device="cuda")
    keys, logits = torch.arange(3, device="cuda"), torch.randn(3, 3000, device="cuda")
    for step in range(3):
        state = (tokens, lengths, finished, sums, proposals)
        ops.advance_rollouts_(logits, keys, step, *state, eos, backend="cuda")
    assert lengths.tolist() == [2, 2, 2]


def test_prompts():
    kernel("shared_prefix_attention, a prompt")(device_int(1), device_int(0))
    torch.cuda.synchronize()


def test_reweighting():
    ids = torch.arange(10, device="cuda").reshape(2, 5)
    prior, rewards = torch.randn(2, 5, device="cuda"), torch.randn(2, 5, 3, device="cuda")
    got = ops.reweight_sample(prior, ids, rewards, rewards, alpha=1.0, backend="cuda")
    assert (got.choice < 5).all()
