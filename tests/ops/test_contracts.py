"""The promises of all ops: arguments, outputs, dtypes, strides, empty inputs, no host sync."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.ops.valid_calls import VALID, call, draw, tensors_of
from tq_fast import ops
from tq_fast.errors import BackendRefused

SAMPLING = "temperature top_k top_p vocab_size seed"
# Positional arguments, keyword-only ones (backend is everywhere), and the names of what comes back.
SIGNATURES = {
    "topk_logprobs": ("logits k", "temperature vocab_size", "ids logprobs lse"),
    "sample_tokens": ("logits keys step", SAMPLING, "ids logprobs proposal_logprobs valid"),
    "advance_rollouts_": (
        "logits keys step tokens lengths finished logprob_sums proposal_logprob_sums eos",
        SAMPLING,
        None,
    ),
    "value_sample_tokens": (
        "logits directions token_embeddings keys step",
        "alpha temperature top_k top_p greedy seed vocab_size",
        "ids prior_logprobs guided_logprobs kl valid",
    ),
    "trajectory_log_ratio": ("logits_p logits_q tokens lengths", "vocab_size", ""),
    "linear_trajectory_logprob": (
        "hidden weight tokens lengths",
        "bias scale softcap vocab_size",
        "",
    ),
    "reweight_sample": (
        "prior_logprobs token_ids rewards log_weights lengths",
        "alpha estimator greedy seed keys step",
        "choice final_logprobs q q_stderr ess",
    ),
    "shared_prefix_attention": (
        "q prefix_k prefix_v prefix_len branch_k branch_v branch_len",
        "scale softcap window tree",
        "out lse",
    ),
    "merge_attention_states": ("a b", "", "out lse"),
    "few_rows_linear": ("x weight bias scale", "", ""),
    "project_qkv": ("x norm_weight q_linear k_linear v_linear cos sin", "eps", "q k v"),
    "finish_decoder_layer": (
        "attended residual o_linear norm_weight gate_linear up_linear down_linear",
        "eps",
        "",
    ),
}
# Outputs that are not fp32; those of attention and of layers have the dtype of the inputs.
INTEGERS = {"ids", "choice"}
LIKE_INPUT = {"out", "q", "k", "v"}


def test_every_op_is_in_the_tables():
    assert set(SIGNATURES) == set(VALID) == set(ops.describe_backends())


@pytest.mark.parametrize("name", SIGNATURES)
def test_arguments_come_in_the_order_of_the_contract(name):
    positional, keyword_only, _ = SIGNATURES[name]
    for function, last in ((name, ["backend"]), (f"{name.rstrip('_')}_ref", [])):
        parameters = inspect.signature(getattr(ops, function)).parameters.values()
        kinds = {
            kind: [p.name for p in parameters if p.kind is kind] for kind in inspect._ParameterKind
        }
        assert kinds[inspect.Parameter.POSITIONAL_OR_KEYWORD] == positional.split()
        assert kinds[inspect.Parameter.KEYWORD_ONLY] == keyword_only.split() + last
        assert sum(map(len, kinds.values())) == len(parameters)


@pytest.mark.parametrize("backend", [None, "ref"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", SIGNATURES)
def test_outputs_have_the_names_and_dtypes_of_the_contract(name, dtype, backend):
    arguments = with_floats_as(dtype, name)
    answer = getattr(ops, name)(**arguments, backend=backend)
    fields = SIGNATURES[name][2]
    if fields is None:
        assert answer is None
    elif fields:
        assert " ".join(answer._fields) == fields
        for field, value in answer._asdict().items():
            is_layer = name in ("project_qkv", "shared_prefix_attention", "merge_attention_states")
            expected = torch.float32
            if field in INTEGERS:
                expected = torch.int64
            elif field == "valid":
                expected = torch.bool
            elif is_layer and field in LIKE_INPUT:
                expected = dtype
            assert value.dtype == expected, field
    else:
        is_layer = name in ("few_rows_linear", "finish_decoder_layer")
        assert answer.dtype == (dtype if is_layer else torch.float32)


def with_floats_as(dtype: torch.dtype, name: str) -> dict[str, Any]:
    def converted(key: str, value: Any) -> Any:
        if isinstance(value, tuple):
            # The lse of a state stays fp32, whatever its output.
            keep = key in ("a", "b")
            return converted("", value[0]), value[1] if keep else converted("", value[1])
        is_float = isinstance(value, Tensor) and value.is_floating_point()
        return value.to(dtype) if is_float and not key.endswith("_sums") else value

    return {key: converted(key, value) for key, value in VALID[name]().items()}


@pytest.mark.parametrize("name", SIGNATURES)
def test_float64_is_refused_by_a_pinned_kernel_and_served_otherwise(name):
    arguments = with_floats_as(torch.float64, name)
    expected = call(name, VALID[name](), backend="ref")
    for a, b in zip(call(name, arguments), expected, strict=True):
        torch.testing.assert_close(a.to(b.dtype), b, rtol=1e-4, atol=1e-4)
    if name == "reweight_sample":
        call(name, arguments, backend="cpu")
        return
    words = "no cpu kernel" if name == "merge_attention_states" else "float64"
    with pytest.raises(BackendRefused, match=f"^{name}: backend 'cpu' refused: .*{words}"):
        call(name, arguments, backend="cpu")


def same_bits(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, check_dtype=False)


@pytest.mark.parametrize("backend", [None, "ref"])
@pytest.mark.parametrize("name", SIGNATURES)
def test_int32_means_what_int64_means(name, backend):
    expected = call(name, VALID[name](), backend=backend)
    for idx, (_, tensor, _) in enumerate(tensors_of(name)):
        if tensor.dtype == torch.int64:
            replaced = list(tensors_of(name))[idx].replaced
            same_bits(call(name, replaced(tensor.int()), backend=backend), expected)


@pytest.mark.parametrize("backend", [None, "ref"])
@pytest.mark.parametrize("name", SIGNATURES)
def test_any_strides_give_the_same(name, backend):
    """Rows within a larger buffer, axes in another order, and a last axis of stride two."""

    def spread(tensor: Tensor) -> Tensor:
        return torch.stack((tensor, tensor), -1)[..., 0]

    def turned(tensor: Tensor) -> Tensor:
        return tensor.transpose(0, -1).contiguous().transpose(0, -1)

    def inside(tensor: Tensor) -> Tensor:
        return tensor.repeat_interleave(2, 0)[::2]

    expected = call(name, VALID[name](), backend=backend)
    for view in (spread, turned, inside):
        for idx, (_, tensor, _) in enumerate(tensors_of(name)):
            replaced = list(tensors_of(name))[idx].replaced
            got = call(name, replaced(view(tensor)), backend=backend)
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


@pytest.mark.parametrize("name", SIGNATURES)
def test_nothing_is_read_back_and_no_shape_depends_on_values(name):
    """On the device "meta" there are no values: `.item()` and what depends on them would raise."""

    def away(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(away, value))
        return value.to("meta") if isinstance(value, Tensor) else value

    arguments = VALID[name]()
    if name == "shared_prefix_attention":
        arguments["tree"] = None
    expected = call(name, dict(arguments), backend="ref")
    moved = {key: away(value) for key, value in arguments.items()}
    for parameter in ("seed", "step"):
        if parameter in SIGNATURES[name][0].split() + SIGNATURES[name][1].split():
            moved[parameter] = torch.zeros((), dtype=torch.int64, device="meta")
    for a, b in zip(call(name, moved), expected, strict=True):
        assert (a.device.type, a.shape, a.dtype) == ("meta", b.shape, b.dtype)


EMPTY: dict[str, list[dict[str, Any]]] = {
    "topk_logprobs": [{"logits": torch.zeros(0, 17)}],
    "sample_tokens": [{"logits": torch.zeros(0, 17), "keys": torch.zeros(0, dtype=torch.int64)}],
    "value_sample_tokens": [
        {
            "logits": torch.zeros(0, 17),
            "directions": torch.zeros(0, 8),
            "keys": torch.zeros(0, dtype=torch.int64),
        },
    ],
    "linear_trajectory_logprob": [{"hidden": torch.zeros(3, 4, 0), "weight": torch.zeros(17, 0)}],
    "reweight_sample": [
        {"rewards": torch.zeros(3, 5, 0), "log_weights": None, "lengths": None},
        {"rewards": torch.zeros(3, 5, 0), "log_weights": torch.zeros(3, 5, 0)},
        {"rewards": torch.zeros(3, 5, 0), "log_weights": None, "estimator": "soft"},
    ],
    "merge_attention_states": [
        {"a": (torch.zeros(0, 8), torch.zeros(0)), "b": (torch.zeros(0, 8), torch.zeros(0))},
        {"a": (torch.zeros(3, 0), torch.zeros(3)), "b": (torch.zeros(3, 0), torch.zeros(3))},
    ],
    "few_rows_linear": [{"x": torch.zeros(0, 8)}, {"x": torch.zeros(2, 0, 8)}],
    "project_qkv": [
        {"x": torch.zeros(2, 0, 16), "cos": torch.zeros(2, 0, 8), "sin": torch.zeros(2, 0, 8)},
    ],
    "finish_decoder_layer": [
        {"attended": torch.zeros(2, 0, 16), "residual": torch.zeros(2, 0, 24)},
    ],
}


@pytest.mark.parametrize(
    ("name", "changes"), [(name, changes) for name, cases in EMPTY.items() for changes in cases]
)
def test_empty_inputs_give_what_the_reference_gives(name, changes):
    expected = call(name, VALID[name]() | changes, backend="ref")
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            same_bits(call(name, VALID[name]() | changes), expected)


def test_a_candidate_without_roll_outs_has_no_value():
    got = ops.reweight_sample(
        draw(2, 3), torch.arange(6).view(2, 3), torch.zeros(2, 3, 0), alpha=1.0
    )
    assert got.q.isnan().all() and got.ess.isnan().all() and got.q_stderr.isnan().all()
    assert (got.final_logprobs == -torch.inf).all()
    assert got.choice.tolist() == [0, 0]


BATCHED: dict[str, set[str]] = {
    "topk_logprobs": {"logits"},
    "sample_tokens": {"logits", "keys"},
    "value_sample_tokens": {"logits", "directions", "keys"},
    "trajectory_log_ratio": {"logits_p", "logits_q", "tokens", "lengths"},
    "linear_trajectory_logprob": {"hidden", "tokens", "lengths"},
    "reweight_sample": {"prior_logprobs", "token_ids", "rewards", "log_weights", "lengths", "keys"},
    "merge_attention_states": {"a", "b"},
    "few_rows_linear": {"x"},
    "project_qkv": {"x", "cos", "sin"},
    "finish_decoder_layer": {"attended", "residual"},
    "advance_rollouts_": {
        "logits",
        "keys",
        "tokens",
        "lengths",
        "finished",
        "logprob_sums",
        "proposal_logprob_sums",
    },
    "shared_prefix_attention": {
        "q",
        "prefix_k",
        "prefix_v",
        "prefix_len",
        "branch_k",
        "branch_v",
        "branch_len",
    },
}


def repeated(name: str, times: int) -> dict[str, Any]:
    """The valid call with its rows, or trees, `times` over."""

    def over(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(over, value))
        return torch.cat([value] * times)

    arguments = VALID[name]()
    if name == "shared_prefix_attention":
        arguments["tree"] = None
    return {key: over(value) if key in BATCHED[name] else value for key, value in arguments.items()}


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_graph_serves_every_number_of_rows(name):
    """Nothing like a batch size is a constant of the graph: it is compiled once."""

    def run(arguments: dict[str, Any]) -> list[Tensor]:
        return call(name, arguments)

    # The first call of an op looks for its kernels, which is not to happen while it is compiled.
    run(repeated(name, 5))
    torch._dynamo.reset()
    graph = torch.compile(run, fullgraph=True, dynamic=True, backend="eager")
    # Five rows, because no other axis has this size: torch would take equal sizes for one.
    graph(repeated(name, 5))
    with torch._dynamo.config.patch(error_on_recompile=True):
        for times in (6, 7, 31):
            for a, b in zip(graph(repeated(name, times)), run(repeated(name, times)), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5, equal_nan=True)
