"""Quantised models: layers without weights, weights of other kinds, GGUF files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaForCausalLM

import tq_fast
from tests.models.conftest import base
from tests.models.makers import (
    FAST,
    config,
    decoder_of,
    logits_of,
    make_model,
    make_reward,
    make_tokenizer,
)
from tq_fast import presets
from tq_fast.forest import cpu_layers
from tq_fast.forest.cpu_layers import describe_layers
from tq_fast.forest.linears import operands_of
from tq_fast.models.fingerprint import fingerprint_model
from tq_fast.ops import few_rows_linear

__all__ = ["base"]


class PackedLinear(nn.Module):
    """A linear layer as GPTQ, AWQ, HQQ and packed checkpoints have it: without a weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.data
        self.register_buffer("scales", weight.abs().amax(1, keepdim=True) / 127)
        self.register_buffer("packed", (weight / self.scales).round().to(torch.int8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(x, self.packed.to(x.dtype) * self.scales.to(x.dtype))


class PackedEmbedding(PackedLinear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.packed[x].to(self.scales.dtype) * self.scales[x]


def packed(model: nn.Module) -> nn.Module:
    """Pack every linear layer and embedding of `model`, head included."""
    kinds: dict[type, type[PackedLinear]] = {
        nn.Linear: PackedLinear,
        nn.Embedding: PackedEmbedding,
    }
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) in kinds:
                setattr(module, name, kinds[type(child)](child))
    return model


def dynamic(model: nn.Module) -> nn.Module:
    return torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)


def torchao(model: nn.Module) -> nn.Module:
    """Give every linear layer of `model` an int8 weight, head included: a subclass of tensors."""
    from torchao import quantization

    quantization.quantize_(
        model,
        quantization.Int8WeightOnlyConfig(),
        filter_fn=lambda module, _: isinstance(module, nn.Linear),
    )
    return model


WAYS: list[Callable[[nn.Module], nn.Module]] = [packed, dynamic, torchao]
every_way = pytest.mark.parametrize("quantise", WAYS, ids=lambda way: way.__name__)


@torch.no_grad()
def greedy(model: nn.Module, num: int) -> list[int]:
    ids = make_tokenizer()("abc", return_tensors="pt")["input_ids"]
    start = ids.shape[1]
    for _ in range(num):
        best = model(input_ids=ids).logits[:, -1:].argmax(-1)
        ids = torch.cat([ids, best], 1)
    return ids[0, start:].tolist()


@every_way
@pytest.mark.parametrize("tied", [False, True])
def test_a_quantised_model_decodes_as_it_does_by_itself(
    quantise: Callable[[nn.Module], nn.Module], tied: bool
) -> None:
    torch.manual_seed(0)
    model: Any = quantise(LlamaForCausalLM(config(tie_word_embeddings=tied)).eval())
    result = presets.baseline(
        "abc", baseline=model, tokenizer=make_tokenizer(), max_new_tokens=6, strategy="greedy"
    )
    assert result.sequences[0].tolist() == greedy(model, 6)


@every_way
@pytest.mark.parametrize("transfer", ["direct", "indirect"])
def test_quantised_models_play_every_role(
    quantise: Callable[[nn.Module], nn.Module], transfer: str
) -> None:
    sft: Any = make_model(3)
    decoder = decoder_of(quantise(make_model()), sft=quantise(sft), reward=quantise(make_reward()))
    options = {**FAST, "num_rollouts": 2, "transfer": transfer, "beta": 0.5}
    result = decoder.decode(["abc", "de"], **options)
    assert all(step.q.isfinite().all() for trace in result.traces for step in trace)
    alone = decoder.decode(["abc"], **options)
    assert alone.texts == result.texts[:1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("granularity", ["PerRow", "PerTensor"])
@torch.no_grad()
def test_int8_weights_of_torchao_run_in_our_kernels(
    dtype: torch.dtype, granularity: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torchao import quantization

    monkeypatch.setattr(cpu_layers, "most_rows", lambda dtype: 1000)
    model: Any = make_model().to(dtype)
    quantization.quantize_(
        model, quantization.Int8WeightOnlyConfig(granularity=getattr(quantization, granularity)())
    )
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert describe_layers(model).endswith(
        f"{len(layers)} of {len(layers)} linear layers with int8 weights run in the kernel for few "
        "rows"
    )
    for layer in layers:
        numbers, bias, scale = operands_of(layer)()
        assert numbers.dtype is torch.int8 and scale is not None
        assert numbers.data_ptr() == layer.weight.qdata.data_ptr(), "the numbers were copied"
        x = torch.randn(10, numbers.shape[1]).to(dtype)
        ours = few_rows_linear(x, numbers, bias, scale)
        dequantised = layer.weight.dequantize(torch.float32).double()
        # Half a spacing of bf16: torchao's own product, below, is rounded three times.
        torch.testing.assert_close(ours.double(), x.double() @ dequantised.T, rtol=4e-3, atol=1e-5)
        torch.testing.assert_close(ours, layer(x), rtol=1.6e-2, atol=1e-3)


@torch.no_grad()
def test_other_forms_of_torchao_run_as_they_are() -> None:
    from torchao import quantization

    for settings, words in (
        (
            quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(8)),
            "have weights that are no plain linear layer on the CPU (Int8Tensor)",
        ),
        (
            quantization.Int8DynamicActivationInt8WeightConfig(),
            "have int8 weights whose product is another, by a trial on a few rows",
        ),
    ):
        model: Any = make_model()
        quantization.quantize_(model, settings)
        with pytest.warns(UserWarning, match="0 of . decoder layers run fused"):
            description = describe_layers(model)
        assert words in description
        logits = logits_of(model)
        assert logits.isfinite().all()


@every_way
def test_the_fingerprint_of_a_quantised_model_follows_its_weights(
    quantise: Callable[[nn.Module], nn.Module],
) -> None:
    first, again, other = (quantise(make_model(seed)) for seed in (0, 0, 1))
    assert fingerprint_model(first, None) == fingerprint_model(again, None)
    assert fingerprint_model(first, None) != fingerprint_model(other, None)


@pytest.mark.parametrize("form", ["object", "json"])
def test_a_quantization_config_reaches_its_role_alone(base: Path, form: str) -> None:
    from torchao import quantization
    from transformers import TorchAoConfig

    settings: Any = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    if form == "json":
        settings = json.loads(json.dumps(settings.to_dict()))
    options = {"baseline": {"quantization_config": settings}}
    # The device is not applied: moving some quantised models is an error.
    decoder = decoder_of(base, sft=base, device={"baseline": "meta"}, model_kwargs=options)
    kind = type(decoder.baseline.model.layers[0].mlp.up_proj.weight.data)
    assert kind is not torch.Tensor and decoder.baseline.device.type == "cpu"
    assert torch.equal(logits_of(decoder.sft), logits_of(make_model()))
    assert decoder.decode("abc", **FAST).texts
    twice = decoder_of(base, sft=base, model_kwargs={**options, "sft": options["baseline"]})
    assert twice.sft is twice.baseline


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write `model` as llama.cpp would, with a tokenizer of bytes and one merged token."""
    import gguf

    sizes = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(sizes.max_position_embeddings)
    writer.add_embedding_length(sizes.hidden_size)
    writer.add_block_count(sizes.num_hidden_layers)
    writer.add_feed_forward_length(sizes.intermediate_size)
    writer.add_head_count(sizes.num_attention_heads)
    writer.add_head_count_kv(sizes.num_key_value_heads)
    writer.add_layer_norm_rms_eps(sizes.rms_norm_eps)
    writer.add_rope_dimension_count(sizes.head_dim)
    writer.add_vocab_size(sizes.vocab_size)
    tokenizer = make_tokenizer()
    tokens = [*tokenizer.convert_ids_to_tokens(range(len(tokenizer))), "ab"]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in ("<s>", "</s>") else 1 for token in tokens])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, sizes.num_hidden_layers)
    for name, weight in model.state_dict().items():
        heads = {"q_proj": sizes.num_attention_heads, "k_proj": sizes.num_key_value_heads}
        num = next((num for part, num in heads.items() if part in name), None)
        if num is not None:
            # llama.cpp rotates neighbours, transformers halves.
            halves = weight.reshape(num, 2, -1, weight.shape[1])
            weight = halves.transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_brings_model_and_tokenizer(tmp_path: Path) -> None:
    model = make_model(vocab_size=259)
    write_gguf(model, tmp_path / "model.gguf")
    options = {"baseline": {"gguf_file": "model.gguf"}}
    decoder = tq_fast.TransferDecoder(
        tmp_path,
        lambda prompts, responses: [float(len(text)) for text in responses],
        device="cpu",
        model_kwargs=options,
    )
    assert torch.allclose(logits_of(decoder.baseline), logits_of(model), atol=1e-5)
    assert decoder.tokenizer is not None
    assert decoder.tokenizer.convert_tokens_to_ids("ab") == 258
    assert decoder.decode("abc", **FAST).texts
