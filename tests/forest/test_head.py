"""The head of every architecture as one matrix, and what happens where it is none."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from tests import zoo
from tq_fast.forest import logprobs
from tq_fast.forest.language import LanguageForest
from tq_fast.forest.logprobs import linear_head, score_rows

SIZES = {"num_trees": 1, "num_rows": 3, "prefix_capacity": 9, "branch_capacity": 1}
ROWS = [[1, 2, 3, 4, 5, 6], [7, 8], [9, 1, 2]]


@pytest.mark.parametrize("name", zoo.LANGUAGE_MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@torch.no_grad()
def test_the_head_of_every_architecture_is_a_matrix(name: str, dtype: torch.dtype) -> None:
    model = zoo.language_model(name, dtype=dtype)
    assert linear_head(LanguageForest(model, **SIZES, backend=None)) is not None
    head = logprobs._head_by_config(model)
    tokens = torch.randint(0, zoo.VOCAB_SIZE, (2, 11))
    truth = model(input_ids=tokens).logits.float()
    hidden = head.backbone(input_ids=tokens).last_hidden_state
    error = (head.logits(hidden) - truth).abs().max()
    assert error <= 8 * torch.finfo(dtype).eps * truth.abs().max()


class _Warped(LlamaForCausalLM):
    """Does to its logits what no configuration says."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.5
        return output


@torch.no_grad()
def test_another_formula_is_noticed_and_its_logits_are_used() -> None:
    model = zoo.language_model("llama")
    warped = _Warped(model.config).eval()
    warped.load_state_dict(model.state_dict())
    forest = LanguageForest(warped, **SIZES, backend=None)
    assert linear_head(forest) is None
    forest.prefill(0, [3, 4])
    sums = score_rows(forest, ROWS, [0, 0, 0], vocab_size=zoo.VOCAB_SIZE)
    for row, got in zip(ROWS, sums, strict=True):
        truth = warped(input_ids=torch.tensor([[3, 4, *row]])).logits[0].double().log_softmax(-1)
        expected = sum(truth[1 + at, token] for at, token in enumerate(row) if at > 0)
        assert got == pytest.approx(float(expected), abs=1e-4)


@torch.no_grad()
def test_scored_rows_have_no_logits_of_the_dtype_of_the_model() -> None:
    """Logits in bf16 put up to 0.46 nats of error on a long roll-out; the op works in fp32."""
    model = zoo.language_model("llama", dtype=torch.bfloat16)
    forest = LanguageForest(model, **SIZES, backend=None)
    forest.prefill(0, [3, 4])
    assert linear_head(forest) is not None
    calls = []
    forest.model.get_output_embeddings().register_forward_hook(lambda *args: calls.append(args))
    score_rows(forest, ROWS, [0, 0, 0], vocab_size=zoo.VOCAB_SIZE)
    assert not calls
    forest.prefill(0, [5])
    assert calls
