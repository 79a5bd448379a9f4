"""The tests of tests/gpu: what they cover, and that their bodies run, without a GPU."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import cases, test_sanitized, test_trio
from tests.on_the_cpu import OnTheCpu, unpin_kernels
from tests.ops import test_topk_logprobs, tolerances
from tests.ops.conftest import OpUnderTest
from tq_fast import ops
from tq_fast.ops.topk_logprobs import shared_bytes

ROOT = Path(__file__).resolve().parents[2]


def ops_with(backend: str) -> set[str]:
    described = ops.describe_backends()
    return {
        n for n, reasons in described.items() if reasons[backend] != f"{n} has no {backend} kernel"
    }


def op_of(case: str) -> str:
    return case.split(",")[0]


def test_every_kernel_has_a_case():
    assert set(map(op_of, cases.TRITON_CASES)) == ops_with("triton")
    assert set(map(op_of, cases.CUDA_CASES)) == ops_with("cuda")


def test_the_sanitizer_sees_every_kernel(monkeypatch):
    calls = unpin_kernels(monkeypatch)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    with OnTheCpu():
        test_sanitized.test_rows(31, torch.bfloat16)
        for size in test_sanitized.CLUSTER_SIZES:
            test_sanitized.test_rows_of_a_cluster(size, torch.float32)
        for name in cases.TRITON_CASES:
            test_sanitized.test_triton(name)
        test_sanitized.test_rollouts()
        test_sanitized.test_prompts()
        test_sanitized.test_reweighting()
    for backend in ("cuda", "triton"):
        assert {name for name, pinned in calls if pinned == backend} == ops_with(backend)


def test_the_sanitizer_sees_clusters_and_more_shared_memory_than_every_launch_has():
    for size in test_sanitized.CLUSTER_SIZES:
        # One block of 8 warps takes 8 tiles of 2,048 (csrc/cuda/launch.h, csrc/cuda/tile.h).
        assert size > 8 * 2048
        assert shared_bytes(size, test_sanitized.MOST_K) > 48 << 10
    # The largest group has 8 blocks.
    assert max(test_sanitized.CLUSTER_SIZES) > 4 * 8 * 2048


def test_only_what_triton_adds_up_may_differ_where_strides_do():
    sums, ids = torch.tensor([6.5, -3.0]), torch.tensor([4, 5])
    reordered = sums.nextafter(torch.tensor(torch.inf))
    tolerances.assert_same_sums("triton", (ids, reordered), (ids, sums))
    for backend, got in (
        ("cuda", (ids, reordered)),
        ("cpu", (ids, reordered)),
        ("triton", (ids + 1, sums)),
        ("triton", (ids, sums + 1e-4)),
        ("triton", (ids, sums * torch.nan)),
    ):
        with pytest.raises(AssertionError):
            tolerances.assert_same_sums(backend, got, (ids, sums))


def test_a_topk_that_adds_up_rows_of_other_strides_in_another_order_passes(generator):
    """As Triton's kernel does on a device, where `vocab_size` cuts rows that are not aligned."""

    class Reordering(OpUnderTest):
        def __call__(self, logits, k, **kwargs):
            got = ops.topk_logprobs_ref(logits, k, **kwargs)
            if logits.stride(0) % 16 == 0:
                return got
            return got._replace(lse=got.lse * (1 + 1.2e-7), logprobs=got.logprobs - 4e-7)

        or_auto = __call__

    test_topk_logprobs.test_padding_never_enters(Reordering("topk_logprobs", "triton"), generator)


@pytest.mark.skipif(shutil.which("make") is None, reason="no make on this machine")
@pytest.mark.parametrize(
    ("failing", "fails", "runs"),
    [("none", False, 2), ("racecheck", False, 2), ("memcheck", True, 1)],
)
def test_what_racecheck_finds_is_no_failure_and_what_memcheck_finds_is(
    failing: str, fails: bool, runs: int, tmp_path: Path
) -> None:
    stub = tmp_path / "compute-sanitizer"
    log = tmp_path / "log"
    stub.write_text(f'#!/bin/sh\necho "$2" >> {log}\n[ "$2" != {failing} ]\n')
    stub.chmod(0o755)
    done = subprocess.run(
        ["make", "--old-file=gpu-build", "gpu-sanitize", f"GPU_PYTHON={sys.executable}"],
        cwd=ROOT,
        env={**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "MAKEFLAGS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stdout + done.stderr
    assert log.read_text().split() == ["memcheck", "racecheck"][:runs]
    assert (f"{failing}: failed" in done.stdout) == (failing != "none")


@pytest.mark.filterwarnings("ignore:the (standard error of Q exceeds alpha|weights of indirect)")
def test_the_decodes_of_three_models_pass_with_the_cpu_as_their_device():
    with OnTheCpu():
        for name in ("sft", "log ratio", "reward gap", "greedy"):
            test_trio.test_fp32_gives_the_tokens_of_the_cpu(name, "graphs")
        for name in ("sft", "value_guided", "refine", "collab"):
            test_trio.test_a_preset_in_fp32_gives_the_tokens_of_the_cpu(name, "graphs")
        for name in test_trio.TRANSFERS:
            for horizon in (1, 4):
                test_trio.test_bf16_gives_the_values_of_fp32_up_to_rounding(name, horizon, "graphs")


@pytest.mark.filterwarnings("ignore:the (standard error of Q exceeds alpha|weights of indirect)")
@pytest.mark.parametrize("role", ["baseline", "sft", "reward"])
def test_the_decodes_of_three_models_fail_where_the_device_computes_something_else(
    role, monkeypatch
):
    def spoiled(made):
        with torch.no_grad():
            for weight in made[role].parameters():
                if weight.dim() == 2:
                    weight.copy_(weight.flip(0))
        return made

    monkeypatch.setattr(test_trio, "on_device", spoiled)
    with OnTheCpu():
        with pytest.raises(AssertionError):
            test_trio.test_fp32_gives_the_tokens_of_the_cpu("log ratio", "graphs")
        if role != "sft":
            with pytest.raises(AssertionError):
                test_trio.test_bf16_gives_the_values_of_fp32_up_to_rounding("direct", 4, "graphs")
