"""Every kind of reward gives what its own forward gives, or is refused."""

from __future__ import annotations

import math
import warnings
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import LlamaForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

import tq_fast
from tests import zoo
from tests.rewards.texts import ATOL, encoder, scorer
from tq_fast.errors import InvalidArgument
from tq_fast.rewards.causal import CausalReward
from tq_fast.rewards.encoder import EncoderReward
from tq_fast.rewards.objects import PipelineReward, PredictorReward

Tokenizers = dict[str, PreTrainedTokenizerFast]
ONE_STEP = {"k": 4, "horizon": 0, "max_new_tokens": 1, "eos_token_id": ()}


class Centred(LlamaForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = -3.0 * (out.logits - 0.5)
        return out


class Clipped(LlamaForSequenceClassification):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits.clamp(-50.0, 50.0)
        return out


class MeanPooled(LlamaForSequenceClassification):
    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None]
        pooled = (states * mask).sum(1) / mask.sum(1)
        return SimpleNamespace(end_scores=self.score(pooled)[:, 0])


class ValueHead(LlamaForSequenceClassification):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.v_head = self.score
        del self.score

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None) -> torch.Tensor:
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        return self.v_head(states[:, -1])


class Hand(torch.nn.Module):
    """A value head of one's own, over a backbone."""

    def __init__(self, backbone: PreTrainedModel) -> None:
        super().__init__()
        self.backbone = backbone
        self.v_head = torch.nn.Linear(backbone.config.hidden_size, 1)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.v_head(self.backbone(input_ids=input_ids).last_hidden_state[:, -1])


def spread(model: PreTrainedModel) -> PreTrainedModel:
    return zoo.spread_weights(model, 4).eval()


def with_hook(hook: Any, *, on: str = "") -> PreTrainedModel:
    model = zoo.classifier("llama")
    model.get_submodule(on).register_forward_hook(hook)
    return model


def negate(module: Any, args: Any, out: Any) -> Any:
    out.logits = -out.logits
    return out


def own_forwards() -> dict[str, PreTrainedModel]:
    config = zoo.classifier("llama").config
    replaced = zoo.classifier("llama")
    inner = replaced.forward
    replaced.forward = lambda *a, **k: SimpleNamespace(logits=inner(*a, **k).logits + 1.0)
    return {
        "subclass": spread(Centred(config)),
        "clipped": spread(Clipped(config)),
        "mean-pooled": spread(MeanPooled(config)),
        "value-head": spread(ValueHead(config)),
        "hook": with_hook(negate),
        "replaced": replaced,
    }


def own_score(model: torch.nn.Module, ids: list[int]) -> float:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        try:
            out = model(input_ids=tokens, attention_mask=torch.ones_like(tokens))
        except TypeError:
            out = model(input_ids=tokens)
    for name in ("end_scores", "logits"):
        out = getattr(out, name, out)
    return float(out.reshape(-1)[0])


def check_scores(model: torch.nn.Module, **options: Any) -> tq_fast.TransferDecoder:
    """One step of Q is what the model says of each text."""
    prompt = [5, 6, 7]
    decoder = tq_fast.TransferDecoder(zoo.language_model("llama"), model, **options)
    step = decoder.decode(prompt, **ONE_STEP).traces[0][0]
    expected = [own_score(model, [*prompt, token]) for token in step.candidates.tolist()]
    assert step.q.tolist() == pytest.approx(expected, abs=ATOL)
    return decoder


@pytest.mark.parametrize("kind", own_forwards())
def test_a_forward_of_its_own_is_what_scores_and_that_is_said(kind: str) -> None:
    model = own_forwards()[kind]
    with pytest.warns(UserWarning, match=f"reward: whole texts go through {type(model).__name__}"):
        decoder = check_scores(model)
    assert isinstance(decoder.reward, EncoderReward)


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen3", "gemma2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backbone_and_head_stay_fast(architecture: str, dtype: torch.dtype) -> None:
    model = zoo.classifier(architecture, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decoder = tq_fast.TransferDecoder(zoo.language_model("llama"), model)
    assert isinstance(decoder.reward, CausalReward)


def test_a_hook_on_the_head_is_part_of_it() -> None:
    model = with_hook(lambda module, args, out: 2 * out, on="score")
    assert isinstance(check_scores(model).reward, CausalReward)


def test_the_probe_leaves_a_model_as_it_was() -> None:
    model = zoo.classifier("llama").train()
    head = model.score
    tq_fast.TransferDecoder(zoo.language_model("llama"), model)
    assert model.score is head and model.training and model.model.training


def test_wrapped_classifiers_are_unwrapped() -> None:
    model = zoo.classifier("llama")
    for wrapped in (torch.compile(model, backend="eager"), torch.nn.DataParallel(model)):
        decoder = check_scores(wrapped)
        assert decoder.reward.model is model


def test_an_adapter_scores_with_its_base_model() -> None:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], r=2)
    adapted = peft.get_peft_model(zoo.classifier("llama"), config).eval()
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    assert isinstance(check_scores(adapted).reward, CausalReward)


def test_a_module_that_reads_token_ids_needs_a_tokenizer_and_then_scores(
    tokenizers: Tokenizers,
) -> None:
    ours = tokenizers["bytes"]
    hand = Hand(scorer(ours).model).eval()
    models = {"baseline": zoo.language_model("llama", vocab_size=len(ours)), "reward": hand}
    with pytest.raises(InvalidArgument, match="pass reward_tokenizer="):
        tq_fast.decode("Who?", **models, tokenizer=ours, **ONE_STEP)
    loaded = tq_fast.TransferDecoder(**models, tokenizer=ours, reward_tokenizer=ours)
    step = loaded.decode("Who?", **ONE_STEP).traces[0][0]
    prompt = ours("Who?")["input_ids"]
    expected = [own_score(hand, [*prompt, token]) for token in step.candidates.tolist()]
    assert step.q.tolist() == pytest.approx(expected, abs=ATOL)


class PerToken(torch.nn.Module):
    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return input_ids.float()


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (PerToken(), r"must be a sequence classifier, got PerToken: .*\[1, 2\]"),
        (zoo.language_model("llama"), "must be a sequence classifier, got LlamaForCausalLM"),
        (type("Judge", (), {}), "must be a hub id, a folder"),
        (SimpleNamespace(score=1), "must be a hub id, a folder"),
    ],
)
def test_what_scores_nothing_is_refused_before_any_forward_pass_of_the_policy(
    reward: Any, message: str
) -> None:
    baseline = zoo.language_model("llama", seed=9)
    baseline.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was run"))
    with pytest.raises(InvalidArgument, match=message):
        tq_fast.decode([5, 6], baseline, reward, **ONE_STEP)


class Pairs:
    """As a CrossEncoder: pairs of texts in, an array out."""

    def __init__(self, num_labels: int = 1) -> None:
        self.num_labels = num_labels
        self.seen: list[tuple[str, str]] = []

    def predict(self, sentences: list, batch_size: int = 32) -> np.ndarray:
        self.seen += sentences
        scores = np.array([[len(a) + i for i in range(self.num_labels)] for _, a in sentences])
        return scores[:, 0] if self.num_labels == 1 else scores


def test_an_object_that_predicts_pairs_is_a_reward(tokenizers: Tokenizers) -> None:
    ours = tokenizers["bytes-chat"]
    baseline = zoo.language_model("llama", vocab_size=len(ours))
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Who?"}]
    for num_labels, label in ((1, None), (3, 2)):
        judge = Pairs(num_labels)
        decoder = tq_fast.TransferDecoder(baseline, judge, tokenizer=ours, reward_index=label)
        assert isinstance(decoder.reward, PredictorReward)
        result = decoder.decode(["Who?", chat], **ONE_STEP)
        assert {question for question, _ in judge.seen} == {"Who?", "Be short.\n\nWho?"}
        for step in (trace[0] for trace in result.traces):
            answers = [ours.decode([token]) for token in step.candidates.tolist()]
            assert step.q.tolist() == [len(answer) + (label or 0) for answer in answers]
    with pytest.raises(tq_fast.RewardError, match="3 scores a pair; reward_index must say"):
        tq_fast.decode("Who?", baseline, Pairs(3), tokenizer=ours, **ONE_STEP)


@pytest.mark.parametrize("num_labels", [1, 2])
def test_a_pipeline_scores_as_it_does_by_itself(tokenizers: Tokenizers, num_labels: int) -> None:
    transformers = pytest.importorskip("transformers")
    ours, theirs = tokenizers["bytes"], tokenizers["words-ends"]
    judge = transformers.pipeline(
        "text-classification",
        model=encoder(len(theirs), num_labels=num_labels),
        tokenizer=theirs,
        device="cpu",
    )
    label = None if num_labels == 1 else 1
    baseline = zoo.language_model("llama", vocab_size=len(ours))
    decoder = tq_fast.TransferDecoder(baseline, judge, tokenizer=ours, reward_index=label)
    assert isinstance(decoder.reward, PipelineReward)
    step = decoder.decode("Who is", **ONE_STEP).traces[0][0]
    for token, q in zip(step.candidates.tolist(), step.q.tolist(), strict=True):
        (labels,) = judge(["Who is" + ours.decode([token])], top_k=None)
        wanted = judge.model.config.id2label[label or 0]
        (score,) = (one["score"] for one in labels if one["label"] == wanted)
        assert q == pytest.approx(score, abs=ATOL)
    if num_labels == 2:
        with pytest.raises(InvalidArgument, match="2 labels; reward_index must say"):
            tq_fast.TransferDecoder(baseline, judge, tokenizer=ours)


def test_a_reward_whose_tokenizer_is_not_known_is_refused(
    tokenizers: Tokenizers, tmp_path: Any
) -> None:
    ours = tokenizers["bytes"]
    baseline, reward = zoo.language_model("llama", vocab_size=len(ours)), scorer(ours)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tq_fast.TransferDecoder(baseline, reward, tokenizer=ours)
    reward.config.name_or_path = reward.name_or_path = "someone/some-reward"
    with pytest.raises(InvalidArgument, match=r"someone/some-reward.*pass reward_tokenizer="):
        tq_fast.TransferDecoder(baseline, reward, tokenizer=ours)
    tq_fast.TransferDecoder(baseline, reward, tokenizer=ours, reward_tokenizer=ours)
    # A folder that holds one, and the same ids where nobody has a tokenizer.
    ours.save_pretrained(tmp_path)
    reward.config.name_or_path = reward.name_or_path = str(tmp_path)
    found = tq_fast.TransferDecoder(baseline, reward, tokenizer=ours).reward.tokenizer
    assert found is not None and found.get_vocab() == ours.get_vocab()


def test_a_padded_text_scores_as_it_does_alone(tokenizers: Tokenizers) -> None:
    """The value head reads the last position: texts of several lengths go through one by one."""
    model = spread(ValueHead(zoo.classifier("llama").config))
    decoder = tq_fast.TransferDecoder(zoo.language_model("llama"), model)
    options = {"k": 4, "horizon": 5, "max_new_tokens": 2, "eos_token_id": tuple(range(0, 150, 4))}
    trace = decoder.decode([5, 6, 7], **options).traces[0]
    assert all(math.isfinite(q) for step in trace for q in step.q.tolist())
    assert decoder.reward.batches is False
    assert EncoderReward(encoder(50), None, decoder.reward.texts, None).batches is True
