"""The synthetic shift: what `sparsify_reward` changes, and what it leaves."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaForSequenceClassification,
)

import tq_fast
from tests import zoo
from tq_fast.errors import InvalidArgument
from tq_fast.evaluation.shift import sparsify_reward

SIZE = {
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def encoder(kind: type, config: type, num_labels: int) -> PreTrainedModel:
    torch.manual_seed(0)
    return kind(config(num_labels=num_labels, **SIZE)).eval()


MODELS = {
    "causal": (lambda: zoo.classifier("llama"), "score.weight"),
    "three labels": (lambda: zoo.classifier("gpt2", num_labels=3), "score.weight"),
    "encoder": (
        lambda: encoder(BertForSequenceClassification, BertConfig, 2),
        "classifier.weight",
    ),
    # The head of RoBERTa has two layers, of which the last one is made sparse.
    "deep head": (
        lambda: encoder(RobertaForSequenceClassification, RobertaConfig, 1),
        "classifier.out_proj.weight",
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("keep", "num_kept"), [(0.5, 16), (0.1, 3), (0.001, 1), (1.0, 32)])
def test_only_the_last_layer_loses_weights_and_the_model_given_keeps_all(
    name: str, keep: float, num_kept: int
) -> None:
    make, changed = MODELS[name]
    model = make()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    sparse = sparsify_reward(model, keep, seed=3)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
        found = sparse.state_dict()[key]
        assert found.data_ptr() != value.data_ptr()
        if key == changed:
            kept = found != 0
            assert (kept.sum(1) == num_kept).all()
            assert torch.equal(found[kept], value[kept])
        else:
            assert torch.equal(found, value)
    assert type(sparse) is type(model) and not sparse.training


def test_the_seed_decides_which_weights_stay() -> None:
    model = zoo.classifier("llama")
    heads = [sparsify_reward(model, seed=seed).score.weight for seed in (0, 0, 1)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])


def test_the_shifted_reward_is_another_reward_that_partly_agrees() -> None:
    model = zoo.classifier("llama")
    ids = torch.randint(zoo.VOCAB_SIZE, (400, 6), generator=torch.Generator().manual_seed(0))
    model.config.pad_token_id = -1
    with torch.no_grad():
        scores = [
            reward(input_ids=ids).logits[:, 0]
            for reward in (model, sparsify_reward(model, 0.75), sparsify_reward(model, 0.1))
        ]
    much, little = (float(torch.corrcoef(torch.stack([scores[0], s]))[0, 1]) for s in scores[1:])
    assert little < much < 0.999
    assert much > 0.5


def test_a_shifted_reward_steers_decode() -> None:
    reward = sparsify_reward(zoo.classifier("llama"))
    result = tq_fast.decode(
        [5, 6], zoo.language_model("llama"), reward, k=3, horizon=1, max_new_tokens=2
    )
    assert len(result.sequences) == 1


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (lambda: zoo.language_model("llama"), "LlamaForCausalLM"),
        (lambda: encoder(BertModel, BertConfig, 2), "BertModel"),
        (lambda: torch.nn.Linear(3, 1), "Linear"),
        (lambda: lambda prompts, responses: [0.0], "function"),
    ],
)
def test_what_has_no_last_linear_layer_is_refused(model, name: str) -> None:
    with pytest.raises(InvalidArgument, match=f"model must be a sequence classifier .* got {name}"):
        sparsify_reward(model())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0.0}, r"keep must be in \(0, 1\], got 0.0"),
        ({"keep": 1.5}, "keep must be"),
        ({"keep": True}, "keep must be"),
        ({"seed": 0.5}, "seed must be an integer, got 0.5"),
    ],
)
def test_bad_options_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        sparsify_reward(zoo.classifier("llama"), **options)
