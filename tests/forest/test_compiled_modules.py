"""Compiled norms, MLPs and rotary embeddings: the same numbers, and few compilations."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import tq_fast
from tests import zoo
from tests.fixed_addresses import fixed_addresses
from tq_fast.config import SpeedOptions
from tq_fast.errors import BackendRefused
from tq_fast.forest import compiled_modules
from tq_fast.forest.compiled_modules import CompiledModules, compile_modules
from tq_fast.forest.language import LanguageForest
from tq_fast.forest.view import view_of

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
ROWS = (1, 3, 8, 40)
# Two norms a layer and one at the end, and an MLP a layer.
LLAMA = (5 + 2, 2)
# Sums of fp32 may be added up in another order; 16-bit results are rounded where the modules round.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.0}


@pytest.fixture(autouse=True)
def without_gradient() -> Iterator[None]:
    with torch.no_grad():
        yield


def num_compilations() -> int:
    return counters["stats"]["unique_graphs"]


def forest_of(model: PreTrainedModel, **options: bool) -> LanguageForest:
    return LanguageForest(
        model,
        num_trees=1,
        num_rows=max(ROWS),
        prefix_capacity=len(PROMPT),
        branch_capacity=2,
        backend=None,
        **options,
    )


def prompt_logits(forest: LanguageForest) -> list[torch.Tensor]:
    """Logits after the first token of the prompt, and after all of it."""
    found = []
    for part in (PROMPT[:1], PROMPT[1:]):
        forest.prefill(0, part)
        found.append(forest.next_logits.clone())
    return found


def row_logits(forest: LanguageForest, rows: Sequence[int]) -> list[torch.Tensor]:
    """Logits after two tokens each of so many rows."""
    found = []
    for num_rows in rows:
        tree = torch.zeros(num_rows, dtype=torch.int64)
        tokens = (7 * torch.arange(num_rows)) % zoo.VOCAB_SIZE
        found += [forest.forward_rows(tokens, start=start, tree=tree) for start in range(2)]
    return found


def logits_of(forest: LanguageForest, rows: Sequence[int] = ROWS) -> list[torch.Tensor]:
    return [*prompt_logits(forest), *row_logits(forest, rows)]


def compiled(model: PreTrainedModel) -> tuple[PreTrainedModel, CompiledModules]:
    view = view_of(model)
    return view, compile_modules(view, model)


@pytest.mark.parametrize(
    ("name", "dtype", "expected"),
    [
        ("llama", torch.float32, LLAMA),
        # Norms that add 1 to their weights, and those of queries and keys.
        ("gemma3", torch.bfloat16, (3 * 7 + 1, 3)),
        # One matrix for both projections, of which queries and keys are cut.
        ("phi3", torch.bfloat16, LLAMA),
        # Its norms are those of PyTorch, and its positions are learned.
        ("gpt2", torch.float32, (2, 0)),
    ],
)
def test_logits_are_those_of_the_plain_modules_and_nothing_compiles_again(
    name: str, dtype: torch.dtype, expected: tuple[int, int]
) -> None:
    model = zoo.language_model(name, dtype=dtype)
    truth = logits_of(forest_of(model, cpu_layers=False))
    forest = forest_of(model, cpu_layers=False, compiled_modules=True)
    stand_ins = sum("forward" in module.__dict__ for module in forest.model.modules())
    assert stand_ins == sum(expected)
    ours = [*prompt_logits(forest), *row_logits(forest, (1, 3))]
    counted = num_compilations()
    ours += row_logits(forest, (8, 40))
    # Nor does a second forest over the same model compile anything.
    logits_of(forest_of(model, cpu_layers=False, compiled_modules=True))
    assert num_compilations() == counted
    for mine, plain in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=TOLERANCE[dtype])


def test_a_kind_of_module_is_compiled_once_for_one_row_and_once_for_several() -> None:
    # No other test has modules of this size.
    model = zoo.language_model("llama", hidden_size=24)
    before = num_compilations()
    forest = forest_of(model, cpu_layers=False, compiled_modules=True)
    assert num_compilations() == before + 4
    logits_of(forest)
    assert num_compilations() == before + 6


def test_the_users_model_is_left_as_it_was() -> None:
    model = zoo.language_model("llama")
    before = [dict(module.__dict__) for module in model.modules()]
    modeling = copy.copy(type(model.model.layers[0].self_attn).forward.__globals__)
    logits_of(forest_of(model, cpu_layers=False, compiled_modules=True), rows=(3,))
    assert [dict(module.__dict__) for module in model.modules()] == before
    assert type(model.model.layers[0].self_attn).forward.__globals__ == modeling


class _Branching(nn.Module):
    """A norm that looks at its numbers before it computes."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        if states.abs().max() > 1e6:
            states = states / 2
        return self.weight * states


class _OverTokens(_Branching):
    """A norm of another axis than the last."""

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * (states - states.mean(-2, keepdim=True))


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(_Branching, "cannot be compiled as one graph"), (_OverTokens, "compute something else")],
)
def test_a_norm_that_is_something_else_stays_as_it_is_with_one_warning(
    kind: type[_Branching], reason: str
) -> None:
    model = zoo.language_model("llama")
    planted = kind(model.model.norm.weight)
    model.model.norm = planted
    with pytest.warns(UserWarning, match=f"6 of 7 norms and MLPs run compiled.*1 {reason}"):
        view, found = compiled(model)
    assert found.reasons.total() == 1
    assert "forward" not in view.model.norm.__dict__
    states = torch.randn(2, 3, 32)
    assert torch.equal(view.model.norm(states), planted(states))
    # The suite turns warnings into errors: the second forest says nothing.
    compiled(model)


class _Numbered(_Branching):
    """A norm whose code depends on a number of its own."""

    def __init__(self, weight: nn.Parameter, number: int) -> None:
        super().__init__(weight)
        self.number = number

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return self.weight * (states + self.number)


def test_modules_that_would_each_be_compiled_anew_stay_as_they_are() -> None:
    model = zoo.language_model("llama")
    layers = model.model.layers
    for number, layer in enumerate(layers):
        layer.input_layernorm = _Numbered(layer.input_layernorm.weight, number)
    # Two compilations are those of the first one.
    with (
        torch._dynamo.config.patch(recompile_limit=2),
        pytest.warns(UserWarning, match="1 would each be compiled anew"),
    ):
        view, _ = compiled(model)
    kept = ["forward" in layer.input_layernorm.__dict__ for layer in view.model.layers]
    assert kept == [True, False]


def test_modules_with_hooks_are_left_alone() -> None:
    model = zoo.language_model("llama")
    seen = []
    model.model.norm.register_forward_hook(lambda *args: seen.append(args))
    model.model.layers[0].mlp.down_proj.register_forward_hook(lambda *args: seen.append(args))
    with pytest.warns(UserWarning, match="2 have hooks, adapters or a forward of their own"):
        view, found = compiled(model)
    assert found.num_compiled == LLAMA[0] - 2
    view.model.norm(torch.ones(1, 32))
    view.model.layers[0].mlp(torch.ones(1, 32))
    assert len(seen) == 2


def test_fused_cpu_layers_come_first() -> None:
    model = zoo.language_model("llama")
    forest = forest_of(model, compiled_modules=True)
    if not forest.cpu_layers.taken:
        pytest.skip("this processor has no fused layers")
    forwards = {
        name
        for name, module in forest.model.named_modules()
        if "forward" in module.__dict__ and not name.startswith("lm_head")
    }
    layers = {f"model.layers.{idx}" for idx in range(model.config.num_hidden_layers)}
    assert forwards == {"model.norm", "model", *layers}
    truth = logits_of(forest_of(model))
    for mine, plain in zip(logits_of(forest), truth, strict=True):
        torch.testing.assert_close(mine, plain, rtol=0, atol=TOLERANCE[torch.float32])


@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_rotary_function_that_mixes_tokens_is_called_itself(num_rows: int) -> None:
    def mixing(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return q + q.mean(2, keepdim=True) * cos[:, None], k * sin[:, None]

    rotary = compiled_modules._Rotary(mixing)
    q, k = torch.randn(num_rows, 4, 3, 8), torch.randn(num_rows, 2, 3, 8)
    args = q, k, *torch.randn(2, num_rows, 3, 8)
    with pytest.warns(UserWarning, match=r"mixing\) compute something else.*run as they are"):
        found = rotary(*args)
    assert all(map(torch.equal, found, mixing(*args)))


def test_a_rotary_function_with_other_arguments_is_called_itself() -> None:
    def other(q: torch.Tensor, angle: float, *, scale: float) -> tuple[torch.Tensor, float]:
        return q * scale, angle

    assert compiled_modules._Rotary(other)(torch.ones(1), 3.0, scale=2.0) == (2.0, 3.0)


def test_without_a_compiler_the_option_is_refused() -> None:
    # The configuration restores itself; monkeypatch would delete the field in the end.
    no_compiler: dict[str, Any] = {"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}
    model = zoo.language_model("llama", hidden_size=40)
    with (
        torch._inductor.config.patch(no_compiler),
        pytest.raises(
            BackendRefused, match=r"compiled_modules=True: torch.compile failed at Llama"
        ),
    ):
        compiled(model)


def test_nothing_of_a_forest_outlives_it() -> None:
    model = zoo.language_model("llama")
    gc.collect()
    gc.disable()
    try:
        forest = forest_of(model, cpu_layers=False, compiled_modules=True)
        logits_of(forest, rows=(3,))
        norm = weakref.ref(forest.model.model.norm)
        attention = weakref.ref(forest.model.model.layers[0].self_attn)
        mlp = weakref.ref(forest.model.model.layers[0].mlp)
        del forest
        assert norm() is attention() is mlp() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("has_graphs", [False, True])
def test_a_decode_gives_the_same_tokens(has_graphs: bool) -> None:
    baseline, reward = zoo.language_model("llama"), zoo.classifier("llama")

    def decode(**speed: bool) -> list[list[int]]:
        result = tq_fast.decode(
            [PROMPT, PROMPT[:3]],
            baseline,
            reward,
            k=3,
            horizon=2,
            max_new_tokens=4,
            speed=SpeedOptions(cpu_layers=False, **speed),
        )
        return [ids.tolist() for ids in result.sequences]

    plain = decode()
    with fixed_addresses() if has_graphs else contextlib.nullcontext():
        assert decode(compiled_modules=True) == plain


@pytest.mark.parametrize("method", ["transfer_q", "best_of_n", "plain"])
def test_every_forest_of_a_decode_is_asked_to_compile(
    method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = {
        "baseline": zoo.language_model("llama", seed=1),
        "sft": zoo.language_model("llama", seed=2),
        "reward": zoo.classifier("llama"),
    }
    asked = set()
    monkeypatch.setattr(
        compiled_modules, "compile_modules", lambda view, source, taken: asked.add(source)
    )
    options = {"max_new_tokens": 2, "speed": SpeedOptions(compiled_modules=True)}
    if method == "transfer_q":
        indirect = {"transfer": "indirect", "beta": 1.0, "num_rollouts": 2}
        tq_fast.decode([PROMPT], **models, k=2, horizon=1, **indirect, **options)
    elif method == "best_of_n":
        tq_fast.presets.best_of_n([PROMPT], **models, n=2, **options)
    else:
        tq_fast.presets.baseline([PROMPT], models["baseline"], **options)
        del models["sft"], models["reward"]
    assert asked == set(models.values())


def test_every_speed_option_is_documented_and_this_one_is_off() -> None:
    assert not SpeedOptions().compiled_modules
    for field in dataclasses.fields(SpeedOptions):
        assert f"        {field.name}: " in str(SpeedOptions.__doc__)
