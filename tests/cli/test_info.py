"""`tq-fast info`: it says what is used, why not the rest, and what that costs."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from tq_fast import _native, env
from tq_fast.cli import info
from tq_fast.models.tiny import load_tiny_world
from tq_fast.ops._dispatch import describe_backends

MISSING = "the cpu library was not built"


def show() -> str:
    heard = io.StringIO()
    info.show_info(Console(file=heard, width=100))
    return heard.getvalue()


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch, environment: pytest.MonkeyPatch) -> None:
    environment.delenv("TQ_FAST_BACKEND", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def rows(shown: str) -> dict[str, list[str]]:
    """The cells after each op's name."""
    ops = describe_backends()
    lines = [line.split() for line in shown.splitlines()]
    return {words[0]: words[1:] for words in lines if words and words[0] in ops}


def test_every_op_is_shown_with_what_it_uses_and_why_not_the_others(on_cpu: None) -> None:
    shown = show()
    backends = describe_backends()
    assert set(rows(shown)) == set(backends)
    for op, cells in rows(shown).items():
        assert cells[0] == ("cpu" if backends[op]["cpu"] is None else "ref")
        for reason in filter(None, backends[op].values()):
            assert f") {reason.replace(op, 'the op')}\n" in shown
    assert "On their PyTorch references" not in shown


def test_versions_and_hardware_are_named(on_cpu: None) -> None:
    shown = show()
    assert torch.__version__ in shown
    assert f"({torch.get_num_threads()} used by torch)" in shown
    assert "No GPU: the models themselves run on the CPU" in shown


def test_a_missing_library_is_named_with_its_reason_and_its_cost(
    on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_native, "cpu_refusal", lambda: MISSING)
    monkeypatch.setattr(
        info,
        "describe_backends",
        lambda: {
            "one_op": {"cuda": "no device", "triton": "no device", "cpu": MISSING, "ref": None},
            "two_op": {"cuda": "two_op has none", "triton": None, "cpu": MISSING, "ref": None},
        },
    )
    shown = show()
    assert f"not loaded: {MISSING}" in shown
    assert "one_op  ref   no (1)  no (1)  no (2)" in shown
    assert "two_op  ref   no (3)  yes     no (2)" in shown
    assert "(1) no device" in shown and f"(2) {MISSING}" in shown and "(3) the op has none" in shown
    assert "No CPU library" in shown
    assert "with the same results: one_op, two_op." in " ".join(shown.split())


def test_a_pinned_backend_that_an_op_lacks_is_said_to_fail(
    on_cpu: None, environment: pytest.MonkeyPatch
) -> None:
    environment.setenv("TQ_FAST_BACKEND", "triton")
    shown = " ".join(show().split())
    assert "TQ_FAST_BACKEND=triton" in shown
    assert "pins a backend that these lack, so that they fail: topk_logprobs" in shown


def test_on_a_gpu_the_gpu_backends_count(monkeypatch: pytest.MonkeyPatch, on_cpu: None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_native, "cuda_refusal", lambda: "the cuda library was not built")
    backends = {"cuda": "not built", "triton": None, "cpu": None, "ref": None}
    monkeypatch.setattr(info, "describe_backends", lambda: {"one_op": backends})
    shown = show()
    assert "one_op  triton  no (1)  yes     yes" in shown
    assert "No CUDA library" in shown and "No GPU" not in shown


MISSING_FLASH = "flash_attn cannot be imported: No module named 'flash_attn'"
OLD_TORCH = "this torch was built without flash attention"


@pytest.mark.parametrize(
    ("reasons", "said"),
    [
        ({"flash_attn": None, "torch": None}, "flash_attn, in fp16 and bf16"),
        (
            {"flash_attn": MISSING_FLASH, "torch": None},
            f"torch, in fp16 and bf16; {MISSING_FLASH}",
        ),
        (
            {"flash_attn": MISSING_FLASH, "torch": OLD_TORCH},
            f"no flash attention: {MISSING_FLASH}; {OLD_TORCH}",
        ),
    ],
)
def test_it_is_said_which_library_attends_over_prompts(
    on_cpu: None,
    monkeypatch: pytest.MonkeyPatch,
    environment: pytest.MonkeyPatch,
    reasons: dict[str, str | None],
    said: str,
) -> None:
    assert "attention of prompts no flash attention: PyTorch sees no CUDA" in " ".join(
        show().split()
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(info, "describe_flash", lambda: reasons)
    assert f"attention of prompts {said} " in " ".join(show().split())
    environment.setenv("TQ_FAST_BACKEND", "triton")
    env.reload()
    assert "TQ_FAST_BACKEND=triton pins another kernel" in " ".join(show().split())


def test_a_model_is_told_of_its_layers_and_of_its_cache(on_cpu: None) -> None:
    heard = io.StringIO()
    info.show_info(Console(file=heard, width=100), str(load_tiny_world().baseline))
    shown = heard.getvalue()
    layers = "layers run fused" if _native.cpu_refusal() is None else "no decoder layer runs fused"
    assert "bytes of KV" in shown and layers in shown
