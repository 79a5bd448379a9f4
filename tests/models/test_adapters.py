"""Adapters: folders, PeftModels, what they share and what they change."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from tests.models.makers import (
    FAST,
    config,
    decoder_of,
    logits_of,
    lora,
    make_model,
)
from tq_fast.errors import InvalidArgument, UnsupportedModel
from tq_fast.forest.view import view_of
from tq_fast.models.fingerprint import fingerprint_model


def save_adapter(base: Path, name: str, seed: int = 3) -> Path:
    torch.manual_seed(seed)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora())
    model.save_pretrained(base.parent / name)
    return base.parent / name


def test_an_adapter_is_off_in_one_view_and_on_in_another() -> None:
    model = make_model()
    plain = logits_of(model)
    adapted = get_peft_model(model, lora()).eval()
    on, off = view_of(model), view_of(model, adapters=False)
    assert torch.equal(logits_of(off), plain)
    assert torch.equal(logits_of(on), logits_of(adapted))
    assert not torch.allclose(logits_of(on), plain)


@pytest.mark.parametrize("sft", ["the base", "the base, saved before"])
def test_the_base_of_a_peft_model_is_the_base_without_adapters(sft: str) -> None:
    model = make_model()
    plain = logits_of(model)
    adapted = get_peft_model(model, lora()).eval()
    decoder = decoder_of(adapted, sft=adapted.get_base_model() if sft == "the base" else model)
    assert torch.equal(logits_of(decoder.sft), plain)
    assert torch.equal(logits_of(decoder.baseline), logits_of(adapted))
    assert decoder.sft.lm_head.weight is decoder.baseline.lm_head.weight
    result = decoder.decode("abc", **FAST)
    separate = decoder_of(adapted, sft=make_model()).decode("abc", **FAST)
    assert result.texts == separate.texts
    assert torch.allclose(
        result.traces[0][0].prior_logprobs, separate.traces[0][0].prior_logprobs, atol=1e-5
    )
    assert not torch.allclose(logits_of(adapted), plain), "the caller's model keeps its adapter"


def test_a_merged_adapter_cannot_be_switched_off() -> None:
    adapted = get_peft_model(make_model(), lora())
    adapted.merge_adapter()
    with pytest.raises(InvalidArgument, match=r"sft is the base of a PeftModel.*merged"):
        decoder_of(adapted, sft=adapted.get_base_model())


def test_a_learnt_prompt_is_refused() -> None:
    settings = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UnsupportedModel, match=r"baseline.*learnt prompt"):
        decoder_of(get_peft_model(make_model(), settings))


def test_an_adapter_folder_and_its_base_are_one_set_of_weights(base: Path) -> None:
    decoder = decoder_of(save_adapter(base, "adapter"), sft=base, tokenizer=None)
    assert torch.equal(logits_of(decoder.sft), logits_of(make_model()))
    assert not torch.allclose(logits_of(decoder.baseline), logits_of(decoder.sft))
    first, second = decoder.sft.model.layers[0], decoder.baseline.model.layers[0]
    assert first.self_attn.k_proj.weight is second.self_attn.k_proj.weight
    assert decoder.tokenizer is not None, "an adapter without a tokenizer reads its base's"


def test_two_adapters_of_one_base_run_side_by_side(base: Path) -> None:
    folders = [save_adapter(base, f"adapter{seed}", seed) for seed in (3, 4)]
    decoder = decoder_of(folders[0], sft=folders[1], tokenizer=None)
    for folder, model in zip(folders, (decoder.baseline, decoder.sft), strict=True):
        alone = AutoModelForCausalLM.from_pretrained(folder).eval()
        assert torch.allclose(logits_of(model), logits_of(alone), atol=1e-5)
    assert decoder.sft.lm_head.weight is decoder.baseline.lm_head.weight


def test_a_reward_adapter_brings_its_head(base: Path) -> None:
    torch.manual_seed(5)
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    adapted = get_peft_model(model, lora(task_type="SEQ_CLS", modules_to_save=["score"])).eval()
    folder = base.parent / "reward"
    adapted.save_pretrained(folder)
    decoder = decoder_of(base, reward=folder)
    assert torch.allclose(logits_of(decoder.reward.model), logits_of(adapted), atol=1e-5)


def test_an_adapter_of_another_model_is_refused_by_name(base: Path) -> None:
    adapter = save_adapter(base, "adapter")
    settings = json.loads((adapter / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = str(base.parent / "nowhere")
    (adapter / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(InvalidArgument, match=r"base_model_name_or_path.*no such folder"):
        decoder_of(adapter)


def test_fingerprints_tell_adapters_apart_and_take_any_tensor() -> None:
    model = make_model()
    adapted = get_peft_model(model, lora()).get_base_model()
    on, off = (fingerprint_model(view_of(adapted, adapters=a), None) for a in (None, False))
    assert on != off
    assert fingerprint_model(make_model().to("meta"), None)


def trained_biases(base: Path) -> Any:
    """A PeftModel whose adapter has trained biases of its base."""
    torch.manual_seed(0)
    LlamaForCausalLM(config(attention_bias=True)).save_pretrained(base)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora(bias="all"))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("bias"):
                weight += 1.0
    return model.eval()


def test_an_adapter_that_changes_its_base_has_a_base_of_its_own(base: Path) -> None:
    adapted = trained_biases(base)
    adapted.save_pretrained(base.parent / "adapter")
    decoder = decoder_of(base.parent / "adapter", sft=base)
    assert torch.equal(logits_of(decoder.sft), logits_of(LlamaForCausalLM.from_pretrained(base)))
    assert torch.allclose(logits_of(decoder.baseline), logits_of(adapted), atol=1e-5)


def test_an_adapter_that_brings_embeddings_has_a_base_of_its_own(base: Path) -> None:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora()).eval()
    with torch.no_grad():
        adapted.get_input_embeddings().weight += 1.0
    adapted.save_pretrained(base.parent / "adapter", save_embedding_layers=True)
    decoder = decoder_of(base.parent / "adapter", sft=base)
    assert torch.equal(logits_of(decoder.sft), logits_of(make_model()))
    assert torch.allclose(logits_of(decoder.baseline), logits_of(adapted), atol=1e-5)


def test_a_base_that_its_adapter_changed_is_no_sft_model(base: Path) -> None:
    adapted = trained_biases(base)
    with pytest.raises(InvalidArgument, match=r"sft is the base of a PeftModel.*changes weights"):
        decoder_of(adapted, sft=adapted.get_base_model())
    decoder = decoder_of(adapted, sft=base)
    assert torch.equal(logits_of(decoder.sft), logits_of(LlamaForCausalLM.from_pretrained(base)))


def test_the_folder_of_a_peft_models_base_is_not_loaded_again(base: Path) -> None:
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora()).eval()
    decoder = decoder_of(adapted, sft=base)
    assert decoder.sft.lm_head.weight is decoder.baseline.lm_head.weight
    assert torch.equal(logits_of(decoder.sft), logits_of(make_model()))
    # Weights that were changed in memory are not those of the folder.
    with torch.no_grad():
        adapted.get_base_model().lm_head.weight[0] += 1.0
    decoder = decoder_of(adapted, sft=base)
    assert decoder.sft.lm_head.weight is not decoder.baseline.lm_head.weight
    assert torch.equal(logits_of(decoder.sft), logits_of(make_model()))


def save_reward_adapter(base: Path) -> tuple[Path, torch.Tensor]:
    """An adapter of a reward on the language model's base, and what it computes."""
    model = LlamaForSequenceClassification.from_pretrained(base, num_labels=1)
    torch.manual_seed(5)
    adapted = get_peft_model(model, lora(task_type="SEQ_CLS")).eval()
    adapted.save_pretrained(base.parent / "reward")
    return base.parent / "reward", logits_of(adapted)


@pytest.mark.parametrize("policy", ["base", "adapter"])
def test_a_reward_adapter_shares_the_base_of_the_language_models(base: Path, policy: str) -> None:
    folder, scores = save_reward_adapter(base)
    baseline = save_adapter(base, "adapter") if policy == "adapter" else base
    decoder = decoder_of(baseline, sft=base, reward=folder)
    assert torch.allclose(logits_of(decoder.reward.model), scores, atol=1e-5)
    assert torch.equal(logits_of(decoder.sft), logits_of(make_model()))
    shared = decoder.sft.model.layers[1].mlp.up_proj.weight
    assert decoder.reward.model.model.layers[1].mlp.up_proj.weight is shared
    assert (
        decoder.reward.model.model.embed_tokens.weight is decoder.baseline.model.embed_tokens.weight
    )
