"""All layers in one call: the numbers of the layers one by one, and only where nobody looks."""

from __future__ import annotations

import logging
from concurrent import futures

import pytest
import torch
import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaModel

from tests.forest.test_fused_layers import FUSED, TOLERANCE, any_processor, model_of, rolled_out
from tq_fast import _native
from tq_fast.forest.cpu_layers import describe_layers
from tq_fast.forest.language import LanguageForest, StateForest

__all__ = ["any_processor"]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of layers of every call of the op."""
    made: list[int] = []
    assert _native.cpu_refusal() is None, "loads the library, or says why not"
    op = torch.ops.tq_fast.run_decoder_layers

    class Counted:
        @staticmethod
        def default(*args: object) -> torch.Tensor:
            made.append(len(args[9]))  # type: ignore[arg-type]
            return op.default(*args)

    monkeypatch.setattr(torch.ops.tq_fast, "run_decoder_layers", Counted)
    return made


def state_forest(model: PreTrainedModel, *, num_trees: int, **options: object) -> StateForest:
    return StateForest(
        model,
        num_trees=num_trees,
        num_rows=5,
        prefix_capacity=6,
        branch_capacity=4,
        backend=None,
        **options,
    )


def scrambled(model: PreTrainedModel) -> PreTrainedModel:
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("kind", FUSED)
@torch.inference_mode()
def test_each_pass_over_branches_is_one_call_with_the_numbers_of_the_modules(kind, dtype, calls):
    model = scrambled(model_of(kind, dtype))
    expected = rolled_out(model, cpu_layers=False)
    assert not calls
    result = rolled_out(model)
    # The trial, and three depths.
    assert calls == [2] * 4
    # Scrambled weights make errors of rounding larger than weights as they are trained.
    tolerance = 10 * TOLERANCE[dtype]
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_any_number_of_threads_gives_the_same_bits(dtype, calls) -> None:
    # Large enough for any number of threads, also for more than the processor runs at a time.
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)

    @torch.inference_mode()
    def run(num_threads: int) -> torch.Tensor:
        before = torch.get_num_threads()
        torch.set_num_threads(num_threads)
        try:
            return rolled_out(model)
        finally:
            torch.set_num_threads(before)

    alone = run(1)
    for num_threads in (2, 3, 7):
        assert torch.equal(run(num_threads), alone)
    with futures.ThreadPoolExecutor(3) as callers:
        assert all(torch.equal(found, alone) for found in callers.map(run, [3] * 6))
    assert len(calls) >= 3 * 10


@torch.inference_mode()
def test_transformers_warns_of_nothing(calls) -> None:
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())  # type: ignore[method-assign]
    # What was said once in this process would not be said again.
    transformers.utils.logging.warning_once.cache_clear()
    logging.getLogger("transformers").addHandler(handler)
    try:
        rolled_out(scrambled(model_of("llama")))
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert calls and not said


@torch.inference_mode()
def test_windows_biases_and_scaled_angles_are_kept(calls) -> None:
    for kind, settings in (
        ("mistral", {"sliding_window": 3}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 50.0, "factor": 3.0}}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
    ):
        model = scrambled(model_of(kind, **settings))
        expected = rolled_out(model, cpu_layers=False)
        before = len(calls)
        torch.testing.assert_close(rolled_out(model), expected, rtol=1e-4, atol=1e-4)
        assert len(calls) > before


@torch.inference_mode()
def test_several_tokens_a_row_and_several_trees_over_a_backbone(calls) -> None:
    model = scrambled(model_of("llama"))

    def states(**options: object) -> torch.Tensor:
        forest = state_forest(model, num_trees=2, **options)
        forest.prefill(0, [3, 1, 4])
        forest.prefill(1, [2, 7, 1, 8, 2, 8])
        tree = torch.tensor([0, 0, 1])
        tokens = torch.arange(9).view(3, 3)
        first = forest.run_branches(model_base(forest), tokens, start=0, tree=tree, first_row=2)
        last = forest.run_branches(
            model_base(forest), tokens[:, :1], start=3, tree=tree, first_row=2
        )
        return torch.cat([first.last_hidden_state, last.last_hidden_state], 1)

    def model_base(forest: StateForest) -> nn.Module:
        return forest.model.base_model

    expected = states(cpu_layers=False)
    torch.testing.assert_close(states(), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == 3


@torch.inference_mode()
def test_a_hook_on_a_layer_that_comes_later_is_called(calls) -> None:
    model = model_of("llama")
    forest = LanguageForest(
        model, num_trees=1, num_rows=2, prefix_capacity=4, branch_capacity=2, backend=None
    )
    forest.prefill(0, [1, 2, 3])
    tree = torch.zeros(2, dtype=torch.int64)
    expected = forest.forward_rows(torch.tensor([4, 5]), start=0, tree=tree)
    before, seen = len(calls), []
    handle = model.model.layers[1].register_forward_hook(lambda *_: seen.append(1))
    result = forest.forward_rows(torch.tensor([4, 5]), start=0, tree=tree)
    assert seen and len(calls) == before
    torch.testing.assert_close(result, expected)
    handle.remove()
    forest.forward_rows(torch.tensor([4, 5]), start=0, tree=tree)
    assert len(calls) == before + 1


@torch.inference_mode()
def test_a_hook_on_the_last_norm_that_comes_later_is_called_after_the_one_call(calls) -> None:
    model = model_of("llama")
    nn.init.normal_(model.model.norm.weight)
    forest = LanguageForest(
        model, num_trees=1, num_rows=2, prefix_capacity=4, branch_capacity=2, backend=None
    )
    forest.prefill(0, [1, 2, 3])
    tree = torch.zeros(2, dtype=torch.int64)
    expected = forest.forward_rows(torch.tensor([4, 5]), start=0, tree=tree)
    before = len(calls)
    handle = model.model.norm.register_forward_hook(lambda module, inputs, output: 2.0 * output)
    result = forest.forward_rows(torch.tensor([4, 5]), start=0, tree=tree)
    torch.testing.assert_close(result, 2.0 * expected)
    handle.remove()
    again = forest.forward_rows(torch.tensor([4, 5]), start=0, tree=tree)
    assert torch.equal(again, expected)
    assert len(calls) == before + 2


@torch.inference_mode()
def test_a_last_norm_of_another_dtype_gives_states_of_that_dtype(calls) -> None:
    model = model_of("llama", torch.bfloat16)
    model.model.norm.float()

    def states(**options: object) -> torch.Tensor:
        forest = state_forest(model, num_trees=1, **options)
        forest.prefill(0, [3, 1, 4])
        tree = torch.zeros(2, dtype=torch.int64)
        return forest.forward_rows(torch.tensor([[4, 7], [5, 6]]), start=0, tree=tree)

    expected = states(cpu_layers=False)
    result = states()
    # The trial, and the pass.
    assert len(calls) == 2
    assert result.dtype is expected.dtype is torch.float32
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


class _Scaled(LlamaModel):
    """Scales its embeddings, as some models do."""

    def forward(self, input_ids=None, inputs_embeds=None, **kwargs):
        hidden = self.embed_tokens(input_ids) * 2.0
        return super().forward(inputs_embeds=hidden, **kwargs)


class _Twice(LlamaModel):
    """Runs its layers and then its norm twice."""

    def forward(self, **kwargs):
        output = super().forward(**kwargs)
        output.last_hidden_state = self.norm(output.last_hidden_state * 0.5 + 1)
        return output


@pytest.mark.parametrize("impostor", [_Scaled, _Twice])
@torch.inference_mode()
def test_a_backbone_that_does_more_than_its_layers_goes_layer_by_layer(impostor, calls) -> None:
    model = scrambled(model_of("llama"))
    model.model.__class__ = impostor
    expected = rolled_out(model, cpu_layers=False)
    assert describe_layers(model) == "2 of 2 decoder layers run fused"
    tried = len(calls)
    torch.testing.assert_close(rolled_out(model), expected, rtol=1e-4, atol=1e-4)
    assert len(calls) == tried


@pytest.mark.filterwarnings("ignore:.*decoder layers run fused")
@torch.inference_mode()
def test_one_layer_that_runs_as_it_is_keeps_all_from_one_call(calls) -> None:
    model = model_of("llama")
    model.model.layers[0].mlp.act_fn = nn.GELU()
    expected = rolled_out(model, cpu_layers=False)
    torch.testing.assert_close(rolled_out(model), expected, rtol=1e-4, atol=1e-4)
    assert not calls


def test_lists_of_other_lengths_and_small_buffers_are_refused() -> None:
    x = torch.zeros(1, 1, 4)
    one = torch.zeros(1, dtype=torch.int64)
    angles = torch.zeros(1, 1, 4)
    kv = torch.zeros(1, 1, 2, 4)
    square = [torch.zeros(4), *[torch.zeros(4, 4)] * 4, torch.zeros(4), *[torch.zeros(4, 4)] * 3]
    run = torch.ops.tq_fast.run_decoder_layers.default

    def call(
        weights: list[torch.Tensor],
        start: int,
        biases: list[torch.Tensor | None] | None = None,
        norm: torch.Tensor | None = None,
    ) -> torch.Tensor:
        biases = [] if biases is None else biases
        return run(
            *(x, weights, biases, [], [1e-5] * 2, norm, 1e-5, angles, angles),
            *([kv], [kv], [kv.clone()], [kv.clone()], one, one + start + 1, one),
            *(start, [1.0], [0]),
        )

    assert call(square, 1).shape == x.shape
    with pytest.raises(RuntimeError, match="the parts of as many layers"):
        call(square[:8], 0)
    with pytest.raises(RuntimeError, match="the parts of as many layers"):
        call(square, 0, biases=[None] * 6)
    with pytest.raises(RuntimeError, match="last_norm must have a number for each column"):
        call(square, 0, norm=torch.zeros(3))
    with pytest.raises(RuntimeError, match="does not hold the new tokens"):
        call(square, 2)
