"""Features that a forest cannot honour are refused by name, before a prompt is read."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BambaConfig,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    BertModel,
    BloomConfig,
    DeepseekV3Config,
    DiffLlamaConfig,
    FalconConfig,
    FalconH1Config,
    FalconMambaConfig,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    GPTJConfig,
    JambaConfig,
    JetMoeConfig,
    Lfm2Config,
    LlamaConfig,
    LlamaModel,
    Mamba2Config,
    MambaConfig,
    MptConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
    XGLMConfig,
)
from transformers.models.llama4.configuration_llama4 import Llama4TextConfig

import tq_fast
from tests import zoo
from tq_fast import ops
from tq_fast.errors import InvalidArgument, UnsupportedModel
from tq_fast.forest.support import check_runs

SIZE = {
    "vocab_size": 150,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
MAMBA = {"mamba_d_state": 8, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "num_experts": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "layer_types": ["linear_attention", "full_attention"],
}
NO_INTERFACE = "does not use the attention interface of transformers"
HAS_STATE = r"(does not use the attention interface|has layers of kind)"


def causal(config_class: type[PreTrainedConfig], **fields: object) -> Callable[[], PreTrainedModel]:
    return lambda: AutoModelForCausalLM.from_config(config_class(**fields))


def sized(config_class: type[PreTrainedConfig], **fields: object) -> Callable[[], PreTrainedModel]:
    return causal(config_class, **{**SIZE, **fields})


BERT = {**SIZE, "num_key_value_heads": None}
BART = {
    "vocab_size": 150,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
}

# Architectures whose configuration says it: refused without a forward pass.
BY_CONFIGURATION: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    "bloom": (causal(BloomConfig, vocab_size=150, hidden_size=32, n_head=4), NO_INTERFACE),
    "mpt": (causal(MptConfig, vocab_size=150, d_model=32, n_heads=4, n_layers=2), NO_INTERFACE),
    "falcon": (sized(FalconConfig, num_kv_heads=2), NO_INTERFACE),
    "gptj": (
        causal(GPTJConfig, vocab_size=150, n_embd=32, n_layer=2, n_head=4, rotary_dim=4),
        NO_INTERFACE,
    ),
    "xglm": (
        causal(XGLMConfig, vocab_size=150, d_model=32, num_layers=2, attention_heads=4, ffn_dim=32),
        NO_INTERFACE,
    ),
    "mamba": (causal(MambaConfig, vocab_size=150, hidden_size=32, state_size=8), NO_INTERFACE),
    "mamba2": (
        causal(Mamba2Config, vocab_size=150, hidden_size=32, num_heads=4, head_dim=16, n_groups=1),
        NO_INTERFACE,
    ),
    "falcon_mamba": (
        causal(FalconMambaConfig, vocab_size=150, hidden_size=32, state_size=8),
        NO_INTERFACE,
    ),
    "jamba": (
        sized(JambaConfig, attn_layer_period=2, attn_layer_offset=1, num_experts=2),
        HAS_STATE,
    ),
    "bamba": (sized(BambaConfig, attn_layer_indices=[1], **MAMBA), HAS_STATE),
    "falcon_h1": (sized(FalconH1Config, mamba_d_ssm=64, **MAMBA), HAS_STATE),
    "qwen3_next": (sized(Qwen3NextConfig, head_dim=16, **LINEAR), HAS_STATE),
    "lfm2": (sized(Lfm2Config, layer_types=["conv", "full_attention"]), HAS_STATE),
    "recurrent_gemma": (
        sized(RecurrentGemmaConfig, lru_width=32, block_types=["recurrent", "attention"]),
        HAS_STATE,
    ),
    "llama4_text": (
        sized(
            Llama4TextConfig,
            head_dim=16,
            attention_chunk_size=6,
            num_local_experts=2,
            intermediate_size_mlp=32,
        ),
        "has layers of kind chunked_attention",
    ),
    "gemma3_text": (
        sized(Gemma3TextConfig, head_dim=16, use_bidirectional_attention=True),
        "attends in both directions",
    ),
    "t5": (
        lambda: T5ForConditionalGeneration(
            T5Config(vocab_size=150, d_model=32, d_ff=32, d_kv=8, num_layers=1, num_heads=4)
        ),
        "is an encoder-decoder",
    ),
    "bart": (
        lambda: BartForConditionalGeneration(BartConfig(**BART)),
        "is an encoder-decoder",
    ),
    "bert": (lambda: BertForMaskedLM(BertConfig(**BERT)), "is an encoder"),
}

# Those that only their own code shows: refused by the trial run.
BY_TRIAL: dict[str, tuple[Callable[[], PreTrainedModel], str]] = {
    # Value heads of another size than the key heads.
    "deepseek_v3": (
        lambda: AutoModelForCausalLM.from_config(
            DeepseekV3Config(
                **{**SIZE, "num_key_value_heads": 4},
                head_dim=8,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=12,
                moe_intermediate_size=16,
                n_routed_experts=4,
                num_experts_per_tok=2,
                n_group=1,
                topk_group=1,
            )
        ),
        "does not run over the shared-prefix cache",
    ),
    # Two attentions a layer over one stored pair of keys and values.
    "diffllama": (sized(DiffLlamaConfig, head_dim=8), "has not just stored"),
    # Later layers read the keys of earlier ones.
    "gemma3n_text": (
        sized(
            Gemma3nTextConfig,
            head_dim=16,
            num_hidden_layers=4,
            layer_types=["sliding_attention", "full_attention"] * 2,
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=8,
            vocab_size_per_layer_input=150,
            activation_sparsity_pattern=[0.0] * 4,
            altup_num_inputs=2,
            laurel_rank=8,
        ),
        "has not just stored",
    ),
    # Keys repeated for every expert, after they were stored.
    "jetmoe": (
        sized(JetMoeConfig, num_experts_per_tok=2, num_local_experts=4, kv_channels=8),
        "key-value heads, but stores",
    ),
}


SHORT = {"k": 3, "horizon": 2, "max_new_tokens": 2}


def unused_reward(prompts: list, responses: list) -> list[float]:
    raise AssertionError("work began")


def decode(model: PreTrainedModel) -> None:
    tq_fast.decode([[5, 6, 7], [8, 9]], model.eval(), unused_reward, eos_token_id=(), **SHORT)


def listen(model: PreTrainedModel) -> list[int]:
    """The tokens of every forward pass that the model or a view of it will run."""
    lengths: list[int] = []
    model.register_forward_pre_hook(
        lambda module, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]),
        with_kwargs=True,
    )
    return lengths


@torch.no_grad()
def assert_runs_as_generate(model: PreTrainedModel) -> None:
    prompt = torch.tensor([[5, 6, 7, 8, 9]])
    truth = model.eval().generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        max_new_tokens=8,
        eos_token_id=None,
    )
    options = {"strategy": "greedy", "max_new_tokens": 8, "eos_token_id": ()}
    result = tq_fast.presets.baseline([prompt[0]], model, **options)
    assert result.sequences[0].tolist() == truth[0, 5:].tolist()


@pytest.mark.parametrize("name", BY_CONFIGURATION)
def test_architectures_are_refused_without_a_forward_pass(name: str) -> None:
    build, message = BY_CONFIGURATION[name]
    model = build()
    if message is NO_INTERFACE and model._supports_attention_backend:
        # A later release of transformers gave the architecture its attention interface.
        assert_runs_as_generate(model)
        return
    lengths = listen(model)
    with pytest.raises(UnsupportedModel, match=f"model type '{name}'") as caught:
        decode(model)
    if Version(transformers.__version__) < Version("5.23"):
        # The configurations of earlier releases say less: the trial's three tokens say the rest.
        assert sum(lengths) <= 3
    else:
        assert lengths == []
        assert re.search(f"baseline: model type '{name}' {message}", str(caught.value))


@pytest.mark.parametrize("name", BY_TRIAL)
def test_architectures_that_bypass_the_cache_are_refused_by_the_trial_run(name: str) -> None:
    build, message = BY_TRIAL[name]
    model = build()
    lengths = listen(model)
    before = model.config._attn_implementation
    with pytest.raises(UnsupportedModel, match=message) as caught:
        decode(model)
    assert f"model type '{name}'" in str(caught.value)
    # The trial's three tokens at most, never a prompt.
    assert sum(lengths) <= 3
    assert model.config._attn_implementation == before


def test_a_refused_architecture_is_refused_as_sft_and_as_reward_too() -> None:
    baseline = zoo.language_model("llama")
    bloom = BY_CONFIGURATION["bloom"][0]().eval()
    with pytest.raises(UnsupportedModel, match="sft: model type 'bloom'"):
        tq_fast.decode([[5, 6]], baseline, unused_reward, sft=bloom)
    config = BloomConfig(vocab_size=150, hidden_size=32, n_head=4, num_labels=1)
    judge = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match="reward: model type 'bloom'"):
        tq_fast.decode([[5, 6]], baseline, judge)
    config = JetMoeConfig(
        **SIZE, num_experts_per_tok=2, num_local_experts=4, kv_channels=8, num_labels=1
    )
    judge = AutoModelForSequenceClassification.from_config(config).eval()
    with pytest.raises(UnsupportedModel, match=r"model type 'jetmoe'.*key-value heads"):
        tq_fast.decode([[5, 6]], baseline, judge, **SHORT)


@pytest.mark.parametrize(
    "build",
    [
        lambda: BertModel(BertConfig(**BERT)),
        lambda: LlamaModel(LlamaConfig(**SIZE)),
        lambda: BertForSequenceClassification(BertConfig(**BERT)),
    ],
    ids=["sentence-encoder", "backbone", "classifier"],
)
def test_a_model_without_a_language_head_is_no_baseline(build) -> None:
    with pytest.raises(InvalidArgument, match="baseline must be a causal language model, got "):
        decode(build())


def test_a_bert_that_is_a_decoder_is_a_language_model() -> None:
    config = BertConfig(**BERT, is_decoder=True, attn_implementation="eager")
    model = zoo.spread_weights(AutoModelForCausalLM.from_config(config), 0).eval()
    ids = [5, 6, 7]
    result = tq_fast.decode(
        ids,
        model,
        lambda prompts, responses: [0.0] * len(responses),
        eos_token_id=(),
        **SHORT,
    )
    with torch.no_grad():
        logprobs = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    step = result.traces[0][0]
    torch.testing.assert_close(step.prior_logprobs, logprobs[step.candidates], rtol=0, atol=1e-5)


def test_longrope_is_refused_beyond_the_length_where_its_angles_change() -> None:
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    }
    build = sized(Phi3Config, rope_parameters=rope, original_max_position_embeddings=16)
    model = build().eval()
    options = {"k": 3, "horizon": 4, "eos_token_id": ()}

    def reward(prompts: list, responses: list) -> list[float]:
        return [0.0] * len(responses)

    with pytest.raises(InvalidArgument, match="makes 17, but the baseline model allows 16"):
        tq_fast.decode([1] * 10, model, reward, max_new_tokens=3, **options)
    tq_fast.decode([1] * 10, model, reward, max_new_tokens=2, **options)


def of_triton() -> Exception:
    """An error such as Triton raises, whether or not it is installed."""
    kind = type("CompilationError", (Exception,), {"__module__": "triton.compiler.errors"})
    return kind("at 12:8: cannot convert")


@pytest.mark.parametrize(
    "error",
    [
        of_triton(),
        ImportError("libcudart.so.13: cannot open shared object file"),
        OSError("libtq_fast.so: undefined symbol"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED when calling cublasSgemm"),
        RuntimeError("Triton Error [CUDA]: invalid argument"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_kernel_is_not_laid_on_the_model(
    monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise error

    monkeypatch.setattr(ops, "shared_prefix_attention", broken)
    with pytest.raises(type(error)) as caught:
        check_runs(zoo.language_model("llama"))
    assert caught.value is error


def test_what_goes_wrong_in_a_models_own_code_is_laid_on_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("The size of tensor a (3) must match the size of tensor b (2)")

    monkeypatch.setattr(ops, "shared_prefix_attention", broken)
    with pytest.raises(UnsupportedModel, match="does not run over the shared-prefix cache"):
        check_runs(zoo.language_model("llama"))
