"""The choice of a backend: the order, refusals, pins, and what is said about it."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch

from tq_fast import env, ops
from tq_fast.errors import BackendRefused, InvalidArgument
from tq_fast.ops import _dispatch
from tq_fast.ops._dispatch import Backend, Op, python_function, unchecked_kernel

REAL_OPS = dict(_dispatch._OPS)
CPU = torch.zeros(2)
# Stands for a tensor on a GPU, so that the choice can be tested without one.
CUDA = SimpleNamespace(device=torch.device("cuda", 0))


@pytest.fixture(autouse=True)
def no_trace(monkeypatch, environment):
    """Ops made by a test, and warnings given once, stay within the test."""
    monkeypatch.setattr(_dispatch, "_OPS", {})
    monkeypatch.setattr(_dispatch, "_warned", set())
    environment.delenv("TQ_FAST_BACKEND", raising=False)
    environment.delenv("TRITON_INTERPRET", raising=False)


def answers(word):
    return lambda *args, **kwargs: word


def missing():
    raise BackendRefused("it was not built")


def test_the_fastest_backend_that_accepts_runs():
    entries = {
        name: Backend(name, lambda name=name: answers(name)) for name in ("cpu", "triton", "cuda")
    }
    # The order of declaration plays no part.
    op = Op("example", answers("ref"), *entries.values())
    assert op(None, CPU) == "cpu"
    assert op(None, CUDA) == "cuda"
    op = Op("example", answers("ref"), entries["triton"], entries["cpu"])
    assert op("auto", CUDA) == "triton"
    assert op("auto", SimpleNamespace(device=torch.device("meta"))) == "ref"


def test_a_refusal_passes_on_to_the_next_entry_and_then_to_the_reference():
    refuse = lambda first, size: None if size < 10 else "size is above 9"  # noqa: E731
    op = Op(
        "example",
        answers("ref"),
        Backend("cpu", lambda: answers("small"), refuse),
        Backend("cpu", lambda: answers("large"), lambda first, size: "odd" if size % 2 else None),
    )
    assert [op(None, CPU, size) for size in (3, 12, 13)] == ["small", "large", "ref"]
    assert [op("cpu", CPU, size) for size in (3, 12)] == ["small", "large"]
    with pytest.raises(BackendRefused, match=r"^example: backend 'cpu' refused: size is .* 9; odd"):
        op("cpu", CPU, 13)


def test_a_backend_that_cannot_be_made_is_tried_once_and_its_reason_is_kept():
    calls = []

    def resolve():
        calls.append(1)
        return missing()

    op = Op("example", answers("ref"), Backend("cpu", resolve))
    assert op(None, CPU) == op(None, CPU) == "ref"
    with pytest.raises(BackendRefused, match="it was not built"):
        op("cpu", CPU)
    assert len(calls) == 1
    assert op.why_not("cpu") == "it was not built"
    op.forget()
    op(None, CPU)
    assert len(calls) == 2


def test_nothing_is_resolved_before_the_first_call():
    Op("example", answers("ref"), Backend("cpu", lambda: pytest.fail("resolved too early")))


def test_a_pinned_backend_must_exist_and_fit_the_device():
    op = Op("example", answers("ref"), Backend("cpu", lambda: answers("cpu")))
    with pytest.raises(BackendRefused, match="example has no cuda kernel"):
        op("cuda", CUDA)
    with pytest.raises(BackendRefused, match="the tensors are on cuda"):
        op("cpu", CUDA)
    with pytest.raises(InvalidArgument, match="backend='gpu' is not one of auto, cuda"):
        op("gpu", CPU)
    assert op("ref", CPU) == "ref"


def test_triton_takes_cpu_tensors_in_its_interpreter_only(environment):
    op = Op("example", answers("ref"), Backend("triton", lambda: answers("triton")))
    with pytest.raises(BackendRefused, match="the tensors are on cpu"):
        op("triton", CPU)
    environment.setenv("TRITON_INTERPRET", "1")
    assert op("triton", CPU) == "triton"
    assert op(None, CPU) == "ref"


def test_the_environment_pins_every_op_and_the_keyword_overrules_it(environment):
    op = Op("example", answers("ref"), Backend("cpu", lambda: answers("cpu")))
    environment.setenv("TQ_FAST_BACKEND", "ref")
    env.reload()
    assert op(None, CPU) == "ref"
    assert op("cpu", CPU) == "cpu"
    assert op("auto", CPU) == "cpu"
    environment.setenv("TQ_FAST_BACKEND", "cuda")
    env.reload()
    with pytest.raises(BackendRefused):
        op(None, CPU)


@pytest.mark.parametrize("variable", ["TQ_FAST_BACKEND", "TQ_FAST_BUILD"])
def test_an_unknown_word_in_the_environment_is_an_error_that_lists_the_known(environment, variable):
    environment.setenv(variable, "fast")
    read = env.backend if variable == "TQ_FAST_BACKEND" else env.build
    with pytest.raises(InvalidArgument, match=rf"{variable}='fast' is not one of auto, "):
        read()
    environment.setenv(variable, " AUTO ")
    assert read() == "auto"
    environment.setenv(variable, "cuda")
    # The first value is kept until `reload`.
    assert read() == "auto"
    env.reload()
    assert read() == "cuda"


def test_the_reference_on_a_gpu_warns_once_and_says_why():
    op = Op(
        "example",
        answers("ref"),
        Backend("cuda", missing),
        Backend("triton", lambda: answers("triton"), answers("the last axis is strided")),
    )
    with pytest.warns(UserWarning, match=r"example .* reference .*cuda: it was not built; triton"):
        assert op(None, CUDA) == "ref"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert op(None, CUDA) == "ref"
        # A caller who asks for the reference knows what runs.
        assert Op("other", answers("ref"))("ref", CUDA) == "ref"


def test_describe_backends_names_a_reason_for_whatever_cannot_run(monkeypatch):
    Op(
        "example",
        answers("ref"),
        Backend("cuda", lambda: answers("cuda")),
        Backend("cpu", python_function("tq_fast.kernels.no_such_module", "f")),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    said = ops.describe_backends()["example"]
    assert list(said) == ["cuda", "triton", "cpu", "ref"]
    assert said["cuda"] == "PyTorch sees no CUDA device"
    assert said["triton"] == "example has no triton kernel"
    assert "tq_fast.kernels.no_such_module cannot be imported" in said["cpu"]
    assert said["ref"] is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert ops.describe_backends()["example"]["cuda"] is None


def test_an_unchecked_kernel_is_the_cpu_kernel_or_nothing(environment):
    Op("example", answers("ref"), Backend("cpu", missing), Backend("cpu", lambda: answers("cpu")))
    Op("another", answers("ref"), Backend("cpu", missing))
    assert [unchecked_kernel("example", pin)() for pin in (None, "auto", "cpu")] == ["cpu"] * 3
    assert unchecked_kernel("example", "ref") is unchecked_kernel("another") is None
    environment.setenv("TQ_FAST_BACKEND", "ref")
    env.reload()
    assert unchecked_kernel("example") is None
    assert unchecked_kernel("example", "cpu")() == "cpu"


def test_every_public_op_describes_itself(monkeypatch):
    monkeypatch.setattr(_dispatch, "_OPS", REAL_OPS)
    described = ops.describe_backends()
    for name, backends in described.items():
        assert backends["ref"] is None
        assert callable(getattr(ops, name))
        assert callable(getattr(ops, name.rstrip("_") + "_ref"))
