"""tq_fast._direct: the plain call of a small op without the dispatcher, and every other call."""

from __future__ import annotations

import gc
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tq_fast import _native
from tq_fast.ops import reweight_sample
from tq_fast.ops.reweight_sample import _OP, ReweightedSample

TREES, K, ROLLOUTS = 3, 5, 4


@pytest.fixture(autouse=True)
def without_autograd():
    with torch.no_grad():
        yield


def plain() -> dict[str, object]:
    """The arguments of a plain call, in the order of tq_fast._direct."""
    generator = torch.Generator().manual_seed(4)
    rewards, weights = torch.randn(2, TREES, K, ROLLOUTS, generator=generator).unbind()
    return {
        "prior_logprobs": torch.randn(TREES, K, generator=generator).log_softmax(-1),
        "token_ids": torch.arange(TREES * K).reshape(TREES, K),
        "rewards": rewards,
        "log_weights": weights,
        "lengths": torch.randint(1, ROLLOUTS, (TREES, K), generator=generator),
        "alpha": 0.4,
        "estimator": "mean",
        "greedy": False,
        "seed": -3,
        "keys": torch.arange(TREES) + 2**40,
        "step": 9,
    }


def call(arguments: dict[str, object]) -> object:
    return _native.load_direct().reweight_sample(ReweightedSample, *arguments.values())


def through_torch(arguments: dict[str, object]) -> tuple[Tensor, ...]:
    prior, ids, rewards, weights, lengths, alpha, estimator, greedy, seed, keys, step = (
        arguments.values()
    )
    return torch.ops.tq_fast.reweight_sample.default(
        *(prior, ids, rewards, weights, lengths, alpha, estimator == "soft", greedy),
        *(seed, None, keys, step, None),
    )


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"log_weights": None, "lengths": None, "keys": None},
        {"estimator": "soft", "alpha": 2},
        {"greedy": True, "seed": 2**63 - 1, "step": -(2**63)},
    ],
)
def test_a_plain_call_gives_the_bits_that_the_dispatcher_gives(changes):
    arguments = plain() | changes
    got = call(arguments)
    assert type(got) is ReweightedSample
    for a, b in zip(got, through_torch(arguments), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


class Subclass(Tensor):
    pass


NOT_PLAIN = {
    "bfloat16": {"rewards": torch.zeros(TREES, K, ROLLOUTS, dtype=torch.bfloat16)},
    "float64": {"prior_logprobs": torch.zeros(TREES, K, dtype=torch.float64)},
    "int32 ids": {"token_ids": torch.zeros(TREES, K, dtype=torch.int32)},
    "unsigned ids": {"token_ids": torch.zeros(TREES, K, dtype=torch.uint64)},
    "strided": {"rewards": torch.zeros(ROLLOUTS, K, TREES).permute(2, 1, 0)},
    "expanded": {"log_weights": torch.zeros(1, K, ROLLOUTS).expand(TREES, -1, -1)},
    "another shape": {"lengths": torch.ones(K, TREES, dtype=torch.int64)},
    "another number of axes": {"rewards": torch.zeros(TREES, K)},
    "no prompts": {"rewards": torch.zeros(0, K, ROLLOUTS)},
    "a parameter": {"prior_logprobs": torch.nn.Parameter(torch.zeros(TREES, K))},
    "a subclass": {"rewards": torch.zeros(TREES, K, ROLLOUTS).as_subclass(Subclass)},
    "on another device": {"rewards": torch.zeros(TREES, K, ROLLOUTS, device="meta")},
    "sparse": {"prior_logprobs": torch.eye(TREES, K).to_sparse()},
    "zeros without memory": {"prior_logprobs": torch._efficientzerotensor((TREES, K))},
    "not a tensor": {"rewards": [[[1.0]]]},
    "None where a tensor must be": {"token_ids": None},
    "alpha of 0": {"alpha": 0.0},
    "alpha without end": {"alpha": torch.inf},
    "alpha not a number": {"alpha": torch.nan},
    "alpha as a tensor": {"alpha": torch.tensor(1.0)},
    "alpha beyond any float": {"alpha": 10**400},
    "another estimator": {"estimator": "median"},
    "no estimator": {"estimator": None},
    "greedy as a number": {"greedy": 1},
    "seed as a tensor": {"seed": torch.tensor(3)},
    "seed beyond 64 bits": {"seed": 2**64 + 5},
    "step as a tensor": {"step": torch.tensor(3)},
    "int32 keys": {"keys": torch.arange(TREES, dtype=torch.int32)},
}


@pytest.mark.parametrize("changes", NOT_PLAIN.values(), ids=NOT_PLAIN.keys())
def test_what_is_not_plain_is_left_to_the_dispatcher(changes):
    assert call(plain() | changes) is NotImplemented


def test_a_lazily_negated_tensor_is_left_to_the_dispatcher():
    numbers = torch.zeros(1, 1, dtype=torch.complex64) + 2j
    prior = numbers.conj().imag
    assert prior.is_neg() and prior.is_contiguous()
    arguments = (prior, torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, 1))
    direct = _OP.direct(None)
    assert direct(ReweightedSample, *arguments, None, None, 1.0, "mean", True, 0, None, 0) is (
        NotImplemented
    )
    assert reweight_sample(*arguments, alpha=1.0).final_logprobs.item() == 0.0


class CountCalls(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ops.append(function)
        return function(*args, **(kwargs or {}))


class LetThrough(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [torch.enable_grad, CountCalls, LetThrough, FakeTensorMode])
def test_nothing_goes_directly_where_someone_has_to_hear_of_it(mode):
    arguments = plain()
    with mode():
        assert call(arguments) is NotImplemented
    assert call(arguments) is not NotImplemented


def test_a_mode_sees_the_op():
    arguments = plain()
    arguments.pop("alpha")
    tensors = [arguments.pop(name) for name in list(arguments)[:5]]
    with CountCalls() as seen:
        within = reweight_sample(*tensors, alpha=0.4, **arguments)
    assert torch.ops.tq_fast.reweight_sample.default in seen.ops
    outside = reweight_sample(*tensors, alpha=0.4, **arguments)
    for a, b in zip(within, outside, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_transforms_and_traces_go_through_the_dispatcher():
    answers, arguments = [], plain()

    def run(rewards):
        answers.append(call(arguments | {"rewards": rewards}))
        return rewards * 2

    batched = torch.randn(2, TREES, K, ROLLOUTS)
    torch.vmap(run)(batched)
    torch.func.functionalize(run)(batched[0])
    torch.jit.trace(run, batched[0], check_trace=False)
    assert len(answers) >= 3 and all(answer is NotImplemented for answer in answers)


def test_outputs_are_tensors_of_their_own():
    got = call(plain())
    kept = [output.clone() for output in got]
    assert len({output.untyped_storage().data_ptr() for output in got}) == len(got)
    for idx, output in enumerate(got):
        output.fill_(7)
        for other, was in list(zip(got, kept, strict=True))[idx + 1 :]:
            torch.testing.assert_close(other, was, rtol=0, atol=0, equal_nan=True)
    assert all((output == 7).all() for output in got)


def test_an_output_outlives_the_others():
    arguments = plain()
    ess = call(arguments).ess
    expected = through_torch(arguments)[-1]
    gc.collect()
    for _ in range(200):
        call(arguments).q.fill_(torch.nan)
    torch.testing.assert_close(ess, expected, rtol=0, atol=0)


def test_references_are_given_back():
    arguments = plain()
    before = [sys.getrefcount(value) for value in arguments.values()]
    for changes in ({}, {"step": None}):
        for _ in range(50):
            call(arguments | changes)
    assert [sys.getrefcount(value) for value in arguments.values()] == before


def test_inference_mode_marks_the_outputs():
    with torch.inference_mode():
        assert all(output.is_inference() for output in call(plain()))
    assert not any(output.is_inference() for output in call(plain()))


def test_a_wrong_number_of_arguments_is_an_error():
    with pytest.raises(TypeError, match="takes 12 arguments, not 1"):
        _native.load_direct().reweight_sample(ReweightedSample)


def test_a_large_call_lets_other_threads_run_and_gives_the_same_bits(num_threads):
    trees = 500
    generator = torch.Generator().manual_seed(1)
    rewards, weights = torch.randn(2, trees, K, ROLLOUTS, generator=generator).unbind()
    arguments = plain() | {"rewards": rewards, "log_weights": weights, "lengths": None}
    arguments["prior_logprobs"] = torch.randn(trees, K, generator=generator)
    arguments["token_ids"] = torch.arange(trees * K).reshape(trees, K)
    arguments["keys"] = None
    for a, b in zip(call(arguments), through_torch(arguments), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_without_the_module_torch_ops_serve(monkeypatch):
    monkeypatch.setattr(_native, "load_direct", lambda: None)
    _OP.forget()
    try:
        assert _OP.direct(None) is None
        tensors = list(plain().values())[:5]
        assert reweight_sample(*tensors, alpha=0.4).choice.shape == (TREES,)
    finally:
        _OP.forget()
