"""Models as people have them: wrappers, names, missing weights and vocabularies."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from packaging.version import Version
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaForCausalLM,
)
from transformers.integrations.peft import MIN_PEFT_VERSION

from tests.models.makers import (
    FAST,
    config,
    decoder_of,
    logits_of,
    lora,
    make_model,
    make_reward,
    make_tokenizer,
    next_logits,
)
from tq_fast import presets
from tq_fast.errors import InvalidArgument
from tq_fast.models.fingerprint import fingerprint_model

# transformers 5.24 asks for peft 0.22 where it puts an adapter in by itself.
ADDS_ADAPTERS = Version(peft.__version__) >= Version(MIN_PEFT_VERSION)


WAYS = [
    "peft",
    "compiled",
    "compiled peft",
    "in place",
    *(["add_adapter"] if ADDS_ADAPTERS else []),
]


@pytest.mark.parametrize("way", WAYS)
def test_a_model_in_a_wrapper_decodes_as_the_model(way: str) -> None:
    torch.manual_seed(2)
    model: Any = make_model()
    if "peft" in way:
        model = get_peft_model(model, lora())
    if way == "add_adapter":
        model.add_adapter(lora())
    if "compiled" in way:
        model = torch.compile(model, backend="eager")
    if way == "in place":
        model.compile(backend="eager")
    model.eval()
    found = next_logits(decoder_of(model))
    truth = make_tokenizer()("abc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = model(input_ids=truth).logits[0, -1].log_softmax(-1)
    assert torch.allclose(found["prior"], logprobs.topk(3).values, atol=1e-4)


def test_a_compiled_forward_is_left_out_of_a_view() -> None:
    model = make_model()
    truth = decoder_of(model).decode("abc", **FAST).texts
    model.forward = torch.compile(model.forward, backend="eager")
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    assert decoder_of(model).decode("abc", **FAST).texts == truth


def test_the_same_name_is_loaded_once(base: Path) -> None:
    decoder = decoder_of(base, sft=base)
    assert decoder.sft is decoder.baseline


@pytest.mark.parametrize(
    "options", [{}, {"rollout": "greedy"}, {"transfer": "indirect", "beta": 0.1}]
)
def test_one_model_in_two_roles_runs_once(options: dict[str, Any]) -> None:
    model, reward = make_model(), make_reward()
    options = {**FAST, **options, "max_new_tokens": 6}
    once = decoder_of(model, sft=model, reward=reward).decode(["abc", "de"], **options)
    twice = decoder_of(model, sft=make_model(), reward=reward).decode(["abc", "de"], **options)
    assert "sft" not in once.stats.token_forwards
    assert "sft" not in once.stats.peak_kv_bytes
    assert once.texts == twice.texts
    for one, two in zip(once.traces, twice.traces, strict=True):
        for step, other in zip(one, two, strict=True):
            assert torch.equal(step.candidates, other.candidates)
            assert torch.allclose(step.q, other.q, atol=1e-4)


def test_one_model_in_two_roles_is_mixed_with_itself() -> None:
    model = make_model()
    once, twice = (
        presets.dera(
            "abc",
            baseline=model,
            sft=sft,
            mix=0.5,
            tokenizer=make_tokenizer(),
            max_new_tokens=4,
            strategy="greedy",
        )
        for sft in (model, make_model())
    )
    assert once.texts == twice.texts
    assert list(once.stats.token_forwards) == ["baseline"]


def test_model_kwargs_reach_from_pretrained_and_the_tokenizer(base: Path) -> None:
    part = base / "part"
    make_model(7).save_pretrained(part)
    make_tokenizer("<new>").save_pretrained(part)
    decoder = decoder_of(base, tokenizer=None, model_kwargs={"baseline": {"subfolder": "part"}})
    assert torch.equal(logits_of(decoder.baseline), logits_of(make_model(7)))
    assert "<new>" in decoder.tokenizer.get_vocab()
    other = decoder_of(base, sft=base, model_kwargs={"sft": {"dtype": torch.bfloat16}})
    assert (other.baseline.dtype, other.sft.dtype) == (torch.float32, torch.bfloat16)


def test_a_device_map_places_the_model(base: Path) -> None:
    options = {"baseline": {"device_map": {"": "cpu"}}}
    decoder = decoder_of(base, device="meta", model_kwargs=options)
    assert decoder.baseline.device.type == "cpu"
    assert decoder.decode("abc", **FAST).texts == decoder_of(base).decode("abc", **FAST).texts


def test_devices_are_by_role(base: Path) -> None:
    decoder = decoder_of(base, sft=base, device={"sft": "meta", "baseline": "cpu"})
    assert decoder.sft.device.type == "meta" and decoder.baseline.device.type == "cpu"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model_kwargs": {"policy": {}}}, "model_kwargs must be by role.*'policy'"),
        ({"model_kwargs": {"baseline": 3}}, "model_kwargs of baseline.*int"),
        ({"model_kwargs": [1]}, "model_kwargs must be a dict.*list"),
        ({"device": {"policy": "cpu"}}, "device must be by role.*'policy'"),
        ({"device": {"sft": "nowhere"}}, "device 'nowhere' cannot be used"),
        ({"model_kwargs": {"sft": {"revision": "a"}}}, "sft is loaded already"),
        ({"model_kwargs": {"baseline": {"nonsense": 1}}}, "baseline=.*model_kwargs.*nonsense"),
        ({"model_kwargs": {"baseline": {"state_dict": 1}}}, "cannot have 'state_dict'"),
    ],
)
def test_wrong_arguments_of_loading_are_refused(
    base: Path, arguments: dict[str, Any], words: str
) -> None:
    with pytest.raises(InvalidArgument, match=words) as caught:
        decoder_of(base, sft=make_model(), **arguments)
    assert len(str(caught.value)) < 400


def rename_weight(folder: Path, old: str, new: str | None) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    weight = weights.pop(old)
    if new is not None:
        weights[new] = weight
    save_file(weights, path, {"format": "pt"})


def test_missing_weights_are_named(base: Path) -> None:
    rename_weight(base, "model.layers.0.mlp.up_proj.weight", None)
    with pytest.raises(InvalidArgument, match=r"baseline=.*1 weights are missing.*up_proj.weight"):
        decoder_of(base)


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(config(tie_word_embeddings=True)).eval()
    model.save_pretrained(tmp_path)
    assert torch.equal(logits_of(decoder_of(tmp_path).baseline), logits_of(model))


def test_a_head_that_was_never_trained_is_refused(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"reward=.*base.*never trained.*score\.weight"):
        decoder_of(base, reward=base)
    make_reward().save_pretrained(tmp_path / "value")
    rename_weight(tmp_path / "value", "score.weight", "v_head.weight")
    with pytest.raises(InvalidArgument, match=r"score\.weight.*holds v_head\.weight"):
        decoder_of(base, reward=tmp_path / "value", reward_tokenizer=make_tokenizer())


def test_weights_that_are_not_used_are_said_once(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["v_head.weight"] = torch.zeros(1, 32)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        decoder_of(base, sft=base)
    assert [str(w.message) for w in said if "v_head.weight" in str(w.message)][1:] == []
    assert any("1 weights that LlamaForCausalLM does not use" in str(w.message) for w in said)


@pytest.mark.parametrize("role", ["baseline", "sft"])
def test_no_message_prints_a_model(role: str) -> None:
    models: dict[str, Any] = {"baseline": make_model(), "sft": make_model()}
    models[role] = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(30)))
    with pytest.raises(InvalidArgument, match=rf"{role} must be .*Sequential") as caught:
        decoder_of(models.pop("baseline"), **models)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("longer", ["baseline", "sft"])
def test_one_of_two_models_may_know_more_tokens(tmp_path: Path, longer: str) -> None:
    for role in ("baseline", "sft"):
        extra = ["<pad>"] if role == longer else []
        make_model(0, 272 if role == longer else 264).save_pretrained(tmp_path / role)
        make_tokenizer(*extra).save_pretrained(tmp_path / role)
    decoder = decoder_of(tmp_path / "baseline", sft=tmp_path / "sft", tokenizer=None)
    assert (decoder.session.vocab_size, decoder.session.num_tokens) == (264, 258)
    assert decoder.decode("abc", **FAST).texts


def test_two_tokens_of_one_id_do_not_pair(tmp_path: Path) -> None:
    for role, extra in {"baseline": "<pad>", "sft": "<mask>"}.items():
        make_model(vocab_size=264).save_pretrained(tmp_path / role)
        make_tokenizer(extra).save_pretrained(tmp_path / role)
    with pytest.raises(InvalidArgument, match=r"same tokenizer vocabulary.*<pad>"):
        decoder_of(tmp_path / "baseline", sft=tmp_path / "sft", tokenizer=None)


def padded_model() -> LlamaForCausalLM:
    """A model that likes the ids above its tokenizer best."""
    model = make_model(vocab_size=300)
    with torch.no_grad():
        model.lm_head.weight[258:] = 1.5 * model.lm_head.weight[100]
    return model


def test_ids_without_a_token_are_never_chosen() -> None:
    model = padded_model()
    options: dict[str, Any] = {"k": 5, "horizon": 4, "max_new_tokens": 12, "num_rollouts": 3}
    result = decoder_of(model).decode(["abc", "de"], **options)
    assert all(int(token) < 258 for sequence in result.sequences for token in sequence)
    assert all(int(c) < 258 for step in result.traces[0] for c in step.candidates)
    drawn = presets.baseline(
        ["abc", "de"], baseline=model, tokenizer=make_tokenizer(), max_new_tokens=30
    )
    assert all(int(token) < 258 for sequence in drawn.sequences for token in sequence)
    with pytest.raises(InvalidArgument, match="at most the vocabulary, 258"):
        decoder_of(model).decode("abc", k=259)


def test_the_log_probs_of_candidates_are_the_models_own() -> None:
    model = padded_model()
    found = next_logits(decoder_of(model))
    ids = make_tokenizer()("abc", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logprobs = model(input_ids=ids).logits[0, -1].log_softmax(-1)
    assert torch.allclose(found["prior"], logprobs[found["ids"]], atol=1e-4)


def test_a_model_object_finds_the_tokenizer_of_its_folder(base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    assert decoder_of(model, tokenizer=None).tokenizer is not None
    assert decoder_of(get_peft_model(model, lora()), tokenizer=None).tokenizer is not None
    model.config._name_or_path = "nobody/nothing-of-this-name"
    model.name_or_path = "nobody/nothing-of-this-name"
    assert decoder_of(model, tokenizer=None).tokenizer is None


def test_the_fingerprint_of_an_offloaded_model_follows_its_weights(base: Path) -> None:
    from accelerate import cpu_offload

    first, second = (cpu_offload(make_model(seed), "cpu") for seed in (0, 1))
    assert fingerprint_model(first, None) != fingerprint_model(second, None)
    assert fingerprint_model(first, None) == fingerprint_model(make_model(), None)


def test_weights_of_another_shape_are_named(base: Path) -> None:
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(16)
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    words = r"baseline=.*another shape: model\.norm\.weight is \[16\] there and \[32\]"
    with pytest.raises(InvalidArgument, match=words):
        decoder_of(base)


def test_a_tokenizer_that_cannot_be_read_is_refused_by_name(base: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidArgument, match=r"no tokenizer in .*base"):
        decoder_of(base, tokenizer=None)


@pytest.mark.parametrize("way", ["object", "folder"])
def test_one_reward_in_two_roles_scores_once(base: Path, tmp_path: Path, way: str) -> None:
    reward: Any = make_reward()
    reward.save_pretrained(tmp_path / "reward")
    make_tokenizer().save_pretrained(tmp_path / "reward")
    reward = reward if way == "object" else tmp_path / "reward"
    options = {**FAST, "transfer": "indirect", "weights": "reward_gap", "beta": 0.1}
    options |= {"num_rollouts": 2, "max_new_tokens": 5}
    arguments: dict[str, Any] = {"sft": make_model(3), "tokenizer": make_tokenizer()}
    decoder = decoder_of(make_model(), reward=reward, baseline_reward=reward, **arguments)
    assert decoder.reward is decoder.baseline_reward
    once = decoder.decode(["abc", "de"], **options)
    assert "baseline_reward" not in once.stats.token_forwards
    other = decoder_of(
        make_model(), reward=make_reward(), baseline_reward=make_reward(), **arguments
    )
    twice = other.decode(["abc", "de"], **options)
    assert twice.stats.token_forwards["baseline_reward"] > 0
    assert once.texts == twice.texts
    assert torch.allclose(once.traces[1][2].q, twice.traces[1][2].q, atol=1e-5)


def test_an_sft_model_without_a_tokenizer_needs_one(base: Path, tmp_path: Path) -> None:
    make_model(4).save_pretrained(tmp_path / "sft")
    for sft in (tmp_path / "sft", AutoModelForCausalLM.from_pretrained(tmp_path / "sft")):
        with pytest.raises(InvalidArgument, match=r"sft comes from .*sft.*pass tokenizer="):
            decoder_of(base, sft=sft, tokenizer=None)
        assert decoder_of(base, sft=sft).sft is not None
    assert decoder_of(base, sft=make_model(4), tokenizer=None).sft is not None
