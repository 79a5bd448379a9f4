"""Every op refuses what it cannot mean, by op, argument, value and what was expected.

Each case runs with autograd, without, and pinned to the reference and to the C++ kernel: all four
must agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.ops.valid_calls import VALID, Arguments, call, tensors_of
from tq_fast import ops
from tq_fast.errors import BackendRefused, InvalidArgument

HOWS = [(True, None), (False, None), (False, "ref"), (False, "cpu")]
SAMPLERS = ["sample_tokens", "advance_rollouts_", "value_sample_tokens"]


def refused(op_name: str, words: str, arguments: Arguments) -> None:
    """InvalidArgument that begins with the op_name, in every mode and on every backend."""
    for grad, backend in HOWS:
        if backend == "cpu" and ops.describe_backends()[op_name]["cpu"] is not None:
            continue
        with (
            torch.set_grad_enabled(grad),
            pytest.raises(InvalidArgument, match=f"^{op_name}: .*{words}"),
        ):
            call(op_name, arguments, backend=backend)


@pytest.mark.parametrize("op_name", VALID)
def test_the_valid_call_is_valid_on_every_backend(op_name):
    expected = call(op_name, VALID[op_name](), backend="ref")
    for grad, backend in HOWS:
        try:
            with torch.set_grad_enabled(grad):
                got = call(op_name, VALID[op_name](), backend=backend)
        except BackendRefused as refusal:
            assert "has no cpu kernel" in str(refusal)
            continue
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("op_name", VALID)
def test_what_is_no_tensor_of_rows_is_refused(op_name):
    for name, tensor, replaced in tensors_of(op_name):
        spoiled = [3, 2.5, "x", tensor.tolist(), tensor.numpy(), tensor.to_sparse()]
        for value in spoiled:
            refused(op_name, rf"{name} is .*, expected a strided tensor", replaced(value))


@pytest.mark.parametrize("op_name", VALID)
def test_a_tensor_that_is_missing_is_refused(op_name):
    optional = (
        {"log_weights", "lengths", "keys"}
        if op_name == "reweight_sample"
        else {"bias", "tree", "prefix_len", "branch_len"}
    )
    for name, _, replaced in tensors_of(op_name):
        if name in optional or name.endswith("_bias"):
            continue
        refused(op_name, f"{name} is None, expected a strided tensor", replaced(None))


@pytest.mark.parametrize("op_name", VALID)
def test_a_tensor_on_another_device_is_refused(op_name):
    """The device "meta" holds no data: a kernel that took it would answer noise, or crash."""
    tensors = list(tensors_of(op_name))
    for name, tensor, replaced in tensors[1:]:
        # A pair's second tensor is compared with its first.
        words = f"{name} is on meta, expected cpu|is on cpu, expected meta, where {name} is"
        refused(op_name, words, replaced(tensor.to("meta")))


@pytest.mark.parametrize("op_name", VALID)
def test_a_dtype_without_meaning_is_refused(op_name):
    for _, tensor, replaced in tensors_of(op_name):
        if tensor.dtype == torch.bool:
            dtypes = [torch.uint8, torch.int64, torch.float32]
        elif tensor.is_floating_point():
            dtypes = [torch.bool, torch.int64, torch.complex64, torch.float8_e4m3fn]
        else:
            dtypes = [torch.bool, torch.uint8, torch.int16, torch.float32, torch.complex64]
        for dtype in dtypes:
            refused(
                op_name,
                f"is {dtype}, expected|expected {dtype}",
                replaced(tensor.to(dtype)),
            )


@pytest.mark.parametrize("op_name", VALID)
def test_one_axis_more_or_less_and_a_size_of_one_less_is_refused(op_name):
    free = {("topk_logprobs", "logits"), ("advance_rollouts_", "eos"), ("few_rows_linear", "x")}
    for name, tensor, replaced in tensors_of(op_name):
        refused(op_name, "has shape", replaced(torch.ones((), dtype=tensor.dtype)))
        if (op_name, name) not in {("few_rows_linear", "x"), ("merge_attention_states", "out_a")}:
            refused(op_name, "has shape", replaced(tensor[None]))
        if (op_name, name) not in free:
            refused(op_name, "has shape", replaced(tensor[:-1]))


BAD_NUMBERS: dict[str, list[Any]] = {
    "k": [0, -1, 18, 2**40, 2.0, 2.5, None, "x", [1], float("nan"), torch.ones(3)],
    "vocab_size": [0, -1, 18, 2**70, 2.5, "x", (1,), float("inf"), torch.ones(3)],
    "temperature": [-0.5, float("nan"), -float("inf"), "x", [1.0], None, 1j, np.ones(3)],
    "top_k": [-1, 2.5, 2**63, float("nan"), None, "x", [1]],
    "top_p": [-0.1, 1.5, float("nan"), float("inf"), None, "x"],
    "step": [1.5, None, "x", [1], float("inf"), 1j],
    "seed": [1.5, None, "x", [1], float("nan"), 1j],
    "alpha": [0, 0.0, -1.0, float("nan"), float("inf"), None, "x", [1.0], 1j, torch.ones(3)],
    "estimator": ["median", 1, None, ["mean"]],
    "greedy": ["x", [1], (1,)],
    "scale": [float("nan"), float("inf"), -float("inf"), 1e300, "x", [1.0], 1j, torch.ones(3)],
    "softcap": [0, 0.0, -1.0, 1e-300, 1e300, float("nan"), float("inf"), "x", torch.ones(3)],
    "window": [0, -1, 1.5, 2**63, float("inf"), "x", [1]],
    "eps": [-1.0, float("nan"), float("inf"), None, "x", 1j, torch.ones(3)],
}
PARAMETERS: dict[str, list[str]] = {
    "topk_logprobs": ["k", "vocab_size", "temperature"],
    "sample_tokens": ["vocab_size", "temperature", "top_k", "top_p", "step", "seed"],
    "advance_rollouts_": ["vocab_size", "temperature", "top_k", "top_p", "step", "seed"],
    "value_sample_tokens": [
        "vocab_size",
        "alpha",
        "temperature",
        "top_k",
        "top_p",
        "greedy",
        "step",
        "seed",
    ],
    "trajectory_log_ratio": ["vocab_size"],
    "linear_trajectory_logprob": ["vocab_size", "scale", "softcap"],
    "reweight_sample": ["alpha", "estimator", "greedy", "step", "seed"],
    "shared_prefix_attention": ["scale", "softcap", "window"],
    "project_qkv": ["eps"],
    "finish_decoder_layer": ["eps"],
}


@pytest.mark.parametrize(
    ("op_name", "parameter"),
    [(op_name, name) for op_name, names in PARAMETERS.items() for name in names],
)
def test_a_parameter_without_meaning_is_refused(op_name, parameter):
    for value in BAD_NUMBERS[parameter]:
        if (op_name, parameter) == ("value_sample_tokens", "alpha") and isinstance(value, Tensor):
            # This op takes an alpha of each row.
            continue
        refused(
            op_name,
            f"{parameter} (is|has) .*expected",
            VALID[op_name]() | {parameter: value},
        )


@pytest.mark.parametrize("parameter", ["seed", "step"])
@pytest.mark.parametrize("op_name", [*SAMPLERS, "reweight_sample"])
def test_a_seed_or_step_is_an_int_or_one_element_on_the_device(op_name, parameter):
    for value, words in (
        (torch.zeros(0, dtype=torch.int64), r"shape \[0\], expected .* one element"),
        (torch.zeros(3, dtype=torch.int64), r"shape \[3\], expected .* one element"),
        (torch.ones(1), "torch.float32, expected torch.int64"),
        (torch.ones((), dtype=torch.bool), "torch.bool, expected torch.int64"),
        (torch.ones((), dtype=torch.int64, device="meta"), "on meta, expected cpu"),
    ):
        refused(op_name, f"{parameter} is .*{words}", VALID[op_name]() | {parameter: value})
    for backend in ("ref", None):
        expected = call(op_name, VALID[op_name]() | {parameter: -7}, backend=backend)
        for same in (np.int64(-7), np.int32(-7), 2**64 - 7, torch.tensor(-7), torch.tensor([[-7]])):
            got = call(op_name, VALID[op_name]() | {parameter: same}, backend=backend)
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("parameter", ["temperature", "top_k", "top_p"])
@pytest.mark.parametrize("op_name", [*SAMPLERS, "topk_logprobs"])
def test_a_parameter_of_each_row_is_one_number_a_row(op_name, parameter):
    if op_name == "topk_logprobs" and parameter != "temperature":
        return
    right = torch.ones(3, dtype=torch.int64 if parameter == "top_k" else torch.float32)
    for value, words in (
        (right[:2], r"has shape \[2\], expected \[N\] = \[3\]"),
        (right[:, None], r"has shape \[3, 1\], expected"),
        (right[0], r"has shape \[\], expected"),
        (right.bool(), "is torch.bool, expected"),
        (right.to(torch.complex64), "is torch.complex64, expected"),
        (right.to("meta"), "is on meta, expected cpu"),
        (right.to_sparse(), "expected a strided tensor"),
    ):
        refused(op_name, f"{parameter} .*{words}", VALID[op_name]() | {parameter: value})
    if parameter == "top_k":
        words = "top_k is torch.float32, expected torch.int64 or torch.int32"
        refused(op_name, words, VALID[op_name]() | {parameter: right.float()})


@pytest.mark.parametrize("op_name", VALID)
def test_every_floating_input_that_requires_grad_is_refused_where_autograd_is_on(op_name):
    for name, tensor, replaced in tensors_of(op_name):
        if not tensor.is_floating_point():
            continue
        following = tensor.detach().clone().requires_grad_()
        for backend in (None, "ref"):
            with pytest.raises(
                InvalidArgument, match=f"^{op_name}: {name} requires grad and the op has"
            ):
                call(op_name, replaced(following), backend=backend)
            with torch.no_grad():
                answers = call(op_name, replaced(following), backend=backend)
            assert not any(x.requires_grad for x in answers if x is not following)
    heat = torch.ones(3, requires_grad=True)
    if op_name in (*SAMPLERS, "topk_logprobs"):
        with pytest.raises(InvalidArgument, match=f"^{op_name}: temperature requires grad"):
            call(op_name, VALID[op_name]() | {"temperature": heat})


@pytest.mark.parametrize("op_name", VALID)
def test_parameters_and_subclasses_of_tensors_are_tensors(op_name):
    class Named(Tensor):
        pass

    expected = call(op_name, VALID[op_name]())
    for idx, _ in enumerate(tensors_of(op_name)):
        for grad in (True, False):
            # A new call each time: an op in place writes to its state.
            _, tensor, replaced = list(tensors_of(op_name))[idx]
            with torch.set_grad_enabled(grad):
                named = call(op_name, replaced(tensor.as_subclass(Named)))
                _, tensor, replaced = list(tensors_of(op_name))[idx]
                parameter = call(op_name, replaced(torch.nn.Parameter(tensor, requires_grad=False)))
            for got in (named, parameter):
                for a, b in zip(got, expected, strict=True):
                    torch.testing.assert_close(a.as_subclass(Tensor), b, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["tokens", "lengths", "finished", "logprob_sums"])
def test_state_whose_elements_share_their_memory_is_refused(name):
    valid = VALID["advance_rollouts_"]()
    shared = valid[name][:1].expand(valid[name].shape)
    refused("advance_rollouts_", f"{name} .* strides .*0.*, expected", valid | {name: shared})


@pytest.mark.parametrize("name", ["a", "b", "q_linear", "down_linear"])
def test_a_pair_is_a_tuple_of_two(name):
    (op_name,) = (op_name for op_name, valid in VALID.items() if name in valid())
    for value in (None, torch.ones(2, 3), (torch.ones(2, 3),), 3):
        refused(op_name, f"{name} is .*expected \\(", VALID[op_name]() | {name: value})
