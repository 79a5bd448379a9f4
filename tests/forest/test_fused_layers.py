"""Fused decoder layers: the numbers of transformers' own, and only for layers of that formula."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaMLP,
)

from tests.forest.int8_weights import Int8Weight, WithInt8Rows, quantise, quantise_all
from tq_fast.forest import cpu_layers
from tq_fast.forest.attention import attending
from tq_fast.forest.cpu_layers import CpuLayers, describe_layers
from tq_fast.forest.fused_layers import fuse_layers
from tq_fast.forest.language import LanguageForest

# Sums in another order; in 16 bits an intermediate may round to a neighbour, two layers deep.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 6e-2, torch.float16: 8e-3}
FUSED = ["llama", "mistral", "qwen2"]


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fused layers whatever instruction set the kernels use here."""
    monkeypatch.setattr(cpu_layers, "most_rows", lambda dtype: 1000)

    yield


def model_of(kind: str, dtype: torch.dtype = torch.float32, **settings: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](
        vocab_size=50,
        hidden_size=48,
        intermediate_size=88,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=12,
        pad_token_id=0,
        **settings,
    )
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def rolled_out(model: PreTrainedModel, **options: object) -> torch.Tensor:
    """Logits of a prompt's next_logits and of three rows, three tokens deep."""
    forest = LanguageForest(
        model,
        num_trees=1,
        num_rows=3,
        prefix_capacity=9,
        branch_capacity=3,
        backend=None,
        **options,
    )
    forest.prefill(0, [3, 1, 4, 1, 5, 9, 2])
    logits = [forest.next_logits.clone()]
    tree = torch.zeros(3, dtype=torch.int64)
    for start in range(3):
        tokens = torch.tensor([start, 7, 40])
        logits.append(forest.forward_rows(tokens, start=start, tree=tree))
    return torch.cat(logits)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", FUSED)
@torch.inference_mode()
def test_logits_are_those_of_the_modules_which_are_not_called(kind, dtype, monkeypatch) -> None:
    model = model_of(kind, dtype)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    expected = rolled_out(model, cpu_layers=False)
    assert describe_layers(model) == "2 of 2 decoder layers run fused, all of them in one call"
    called: list[nn.Module] = []
    mlp = type(model.model.layers[0].mlp)
    forward = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: called.append(self) or forward(self, x))
    result = rolled_out(model)
    assert not called
    torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    assert all("forward" not in module.__dict__ for module in model.modules())


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", FUSED)
@torch.inference_mode()
def test_layers_with_int8_weights_run_fused_and_no_product_of_theirs_is_called(
    kind, dtype, monkeypatch
) -> None:
    model = model_of(kind, dtype)
    for parameter in model.parameters():
        parameter.data.mul_(3)
    quantise_all(model)
    expected = rolled_out(model, cpu_layers=False)
    assert describe_layers(model) == (
        "2 of 2 decoder layers run fused, 2 with int8 weights, all of them in one call; "
        "15 of 15 linear layers with int8 weights run in the kernel for few rows"
    )
    rolled_out(model)
    monkeypatch.setattr(Int8Weight, "multiply_rows", None)
    result = rolled_out(model)
    # A quantiser's product is rounded three times or four, ours once.
    tolerance = 2 * TOLERANCE[dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.filterwarnings("ignore:.*linear layers with int8 weights")
def test_a_layer_may_have_int8_weights_beside_others_but_no_other_product() -> None:
    model = model_of("llama")
    quantise(model.model.layers[0].mlp.up_proj)
    assert describe_layers(model).startswith("2 of 2 decoder layers run fused, 1 with int8 weights")
    quantise(model.model.layers[1].mlp.down_proj, WithInt8Rows)
    with pytest.warns(UserWarning, match="1 have int8 weights whose product is another"):
        assert fused(model) == [0]


@torch.inference_mode()
def test_a_window_and_rotary_scaling_are_kept() -> None:
    for kind, settings in (
        ("mistral", {"sliding_window": 3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ):
        model = model_of(kind, **settings)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        expected = rolled_out(model, cpu_layers=False)
        torch.testing.assert_close(rolled_out(model), expected, rtol=1e-4, atol=1e-4)
        plain = rolled_out(model_of(kind), cpu_layers=False)
        assert not torch.allclose(plain, expected, atol=1e-2)


def fused(model: PreTrainedModel) -> list[int]:
    """The numbers of the layers that may run fused."""
    view = attending(model)
    found = fuse_layers(view, model, None)
    return [layer.self_attn.layer_idx for layer, _ in found.forwards]


@pytest.mark.parametrize("kind", ["qwen3", "gemma", "olmo2", "phi3", "granite", "gpt2"])
@pytest.mark.filterwarnings("ignore:.*decoder layers run fused")
def test_other_formulas_are_left_to_their_own_code(kind) -> None:
    if kind == "gpt2":
        config = CONFIG_MAPPING[kind](vocab_size=50, n_embd=48, n_layer=2, n_head=4)
        model = AutoModelForCausalLM.from_config(config).eval()
    else:
        model = model_of(kind, **({"residual_multiplier": 0.3} if kind == "granite" else {}))
    assert fused(model) == []
    assert describe_layers(model).startswith("0 of 2 decoder layers run fused (2 ")


class DerivedLinear(nn.Linear):
    """As an adapter would put in place of a linear layer."""


class Packed(nn.Module):
    """A linear layer without a weight, as packed checkpoints have."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("packed", linear.weight.detach().clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed)


@pytest.mark.filterwarnings("ignore:.*decoder layers run fused")
def test_a_layer_that_somebody_changed_is_left_alone() -> None:
    def derive(layer: nn.Module) -> None:
        layer.mlp.up_proj = DerivedLinear(48, 88)

    def pack(layer: nn.Module) -> None:
        layer.self_attn.k_proj = Packed(layer.self_attn.k_proj)

    def activate(layer: nn.Module) -> None:
        layer.mlp.act_fn = nn.GELU()

    def widen(layer: nn.Module) -> None:
        layer.input_layernorm.double()

    def listen(layer: nn.Module) -> None:
        layer.self_attn.o_proj.register_forward_hook(lambda *_: None)

    def intercept(layer: nn.Module) -> None:
        layer.self_attn.register_forward_pre_hook(lambda *_: None)

    def patch(layer: nn.Module) -> None:
        layer.mlp.forward = lambda x: x

    def replace(layer: nn.Module) -> None:
        layer.mlp = nn.Identity()

    for change in (derive, pack, activate, widen, listen, intercept, patch, replace):
        model = model_of("llama")
        change(model.model.layers[0])
        assert fused(model) == [1], change
    assert "(Packed)" in describe_layers(_changed(pack))


def _changed(change: Callable[[nn.Module], None]) -> PreTrainedModel:
    model = model_of("llama")
    change(model.model.layers[0])
    return model


class _Scaled(LlamaDecoderLayer):
    """Adds a little less of its MLP than the formula does."""

    def forward(self, hidden_states, **kwargs):
        before = hidden_states
        after = super().forward(hidden_states, **kwargs)
        return before + 0.97 * (after - before)


class _Clipped(LlamaMLP):
    """Bounds its activations."""

    def forward(self, x):
        return super().forward(x).clamp(-0.02, 0.02)


class _Normed(LlamaAttention):
    """Normalises its keys."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(nn.functional.normalize(hidden_states, dim=-1), **kwargs)


class _Unrotated(LlamaAttention):
    """Ignores positions, as every fourth layer of some models does."""

    def forward(self, hidden_states, position_embeddings, **kwargs):
        cos, sin = position_embeddings
        still = torch.ones_like(cos), torch.zeros_like(sin)
        return super().forward(hidden_states, position_embeddings=still, **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("impostor", [_Scaled, _Clipped, _Normed, _Unrotated])
@torch.no_grad()
def test_an_impostor_with_all_the_parts_is_found_by_the_trial(impostor, dtype) -> None:
    model = model_of("llama", dtype)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    first = model.model.layers[0]
    part = next(m for m in first.modules() if type(m) in impostor.__mro__)
    part.__class__ = impostor
    with pytest.warns(UserWarning, match="1 of 2 decoder layers run fused .*by a trial"):
        assert fused(model) == [1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert fused(model) == [1], "what was said once is not said again"
    expected = rolled_out(model, cpu_layers=False)
    tolerance = 10 * TOLERANCE[dtype]
    torch.testing.assert_close(rolled_out(model), expected, rtol=tolerance, atol=tolerance)


def test_linear_layers_inside_a_fused_layer_keep_their_forward() -> None:
    model = model_of("llama")
    view = attending(model)
    layers = CpuLayers(view, model)
    layers.install(3)
    assert "forward" in view.model.layers[0].__dict__
    assert "forward" in view.lm_head.__dict__
    assert "forward" not in view.model.layers[0].mlp.up_proj.__dict__
    layers.install(1001)
    assert "forward" in view.model.layers[0].__dict__, "it takes the faster product itself"
    assert "forward" not in view.lm_head.__dict__
