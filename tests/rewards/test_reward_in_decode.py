"""Rewards of every kind at work in `tq_fast.decode`, against the naive loop; and their errors."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import tq_fast
from tests import zoo
from tests.naive import NaiveSettings, decode_naively
from tests.rewards.texts import ATOL, CHATS, PROMPTS, encoder, plain_score, scorer, whole_text
from tq_fast.errors import InvalidArgument, RewardError
from tq_fast.prompts import Prompt, read_prompts

Tokenizers = dict[str, PreTrainedTokenizerFast]


def language_of(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return zoo.language_model("llama", vocab_size=len(tokenizer))


GREEDY = {"strategy": "greedy", "rollout": "greedy", "k": 4, "horizon": 4, "max_new_tokens": 6}


@pytest.mark.parametrize("other", ["bytes-large", "words", "words-ends"])
@pytest.mark.parametrize("kind", ["causal", "encoder"])
def test_decode_with_another_tokenizer_gives_the_tokens_of_the_naive_loop(
    tokenizers: Tokenizers, other: str, kind: str
) -> None:
    ours, theirs = tokenizers["words"], tokenizers[other]
    if kind == "causal" and other == "words":
        ours = tokenizers["bytes"]
    baseline = language_of(ours)
    reward = scorer(theirs) if kind == "causal" else encoder(len(theirs))
    ends = tuple(range(5, len(ours), 12))
    result = tq_fast.decode(
        PROMPTS,
        baseline,
        reward,
        tokenizer=ours,
        reward_tokenizer=theirs,
        eos_token_id=ends,
        **GREEDY,
    )
    settings = NaiveSettings(
        k=GREEDY["k"], horizon=GREEDY["horizon"], max_new_tokens=6, eos_token_id=ends
    )
    prompts = read_prompts(PROMPTS, ours, vocab_size=len(ours))
    for prompt, ids, trace in zip(prompts, result.sequences, result.traces, strict=True):

        def score(sequences: list[list[int]], prompt: Prompt = prompt) -> list[float]:
            start = len(prompt.token_ids)
            texts = [whole_text(ours, prompt, sequence[start:]) for sequence in sequences]
            same = theirs is ours
            rows = [
                sequence if same else theirs(text)["input_ids"]
                for sequence, text in zip(sequences, texts, strict=True)
            ]
            return [plain_score(reward, row) for row in rows]

        naive = decode_naively(prompt.token_ids, baseline, score, settings=settings)
        assert min(step.margin for step in naive.steps) > 10 * ATOL
        assert ids.tolist() == naive.token_ids
        for mine, step in zip(trace, naive.steps, strict=True):
            assert mine.q.tolist() == pytest.approx(step.q.tolist(), abs=ATOL)


def test_decode_of_chats_with_a_reward_of_another_template(tokenizers: Tokenizers) -> None:
    ours, theirs = tokenizers["bytes-chat"], tokenizers["words-chat"]
    baseline, reward = language_of(ours), scorer(theirs)
    result = tq_fast.decode(
        CHATS,
        baseline,
        reward,
        tokenizer=ours,
        reward_tokenizer=theirs,
        eos_token_id=(),
        **GREEDY,
    )
    settings = NaiveSettings(k=GREEDY["k"], horizon=GREEDY["horizon"], max_new_tokens=6)
    for chat, ids, text in zip(CHATS, result.sequences, result.texts, strict=True):
        prompt = ours.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
        prompt_ids = prompt["input_ids"]

        def score(
            sequences: list[list[int]], chat: list = chat, start: int = len(prompt_ids)
        ) -> list[float]:
            scores = []
            for sequence in sequences:
                content = ours.decode(sequence[start:], skip_special_tokens=True)
                whole = [*chat, {"role": "assistant", "content": content}]
                row = theirs.apply_chat_template(whole, return_dict=True)["input_ids"]
                scores.append(plain_score(reward, row))
            return scores

        naive = decode_naively(prompt_ids, baseline, score, settings=settings)
        assert ids.tolist() == naive.token_ids
        assert text == ours.decode(naive.token_ids, skip_special_tokens=True)


def test_a_classifier_that_says_nan_is_an_error_that_names_prompt_and_step() -> None:
    baseline, reward = zoo.language_model("llama"), zoo.classifier("llama")
    prompts = [[5, 6], [7, 8, 9]]
    greedy = {**GREEDY, "eos_token_id": ()}
    first = tq_fast.decode([prompts[0]], baseline, reward, **greedy)
    calls = 0

    def poison(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return output * math.nan if calls > 20 else output

    # The backbone's last norm. The first prompt takes 7 passes; loading tries 9 before it.
    reward.model.norm.register_forward_hook(poison)
    with pytest.raises(RewardError, match=r"prompt 1, step \d: the reward returned nan") as caught:
        tq_fast.decode(prompts, baseline, reward, batch_size=1, **greedy)
    assert caught.value.prompt_idx == 1
    assert caught.value.step > 0
    assert list(caught.value.finished) == [0]
    assert torch.equal(caught.value.finished[0], first.sequences[0])


def test_a_response_that_ended_before_an_error_is_kept(tokenizers: Tokenizers) -> None:
    """Both prompts in one forest: the first ends by its end token, then the second fails."""
    baseline = zoo.language_model("llama")
    prompts = [[5, 6], [7, 8, 9]]
    plain = tq_fast.decode(
        prompts, baseline, lambda p, r: [0.0] * len(r), eos_token_id=(), **GREEDY
    )
    tokens = [ids.tolist() for ids in plain.sequences]
    end = next(token for token in tokens[0][:3] if token not in tokens[1])
    step_of_end = tokens[0].index(end)

    def reward(given: list, responses: list) -> list[float]:
        late = any(len(ids) > 5 for ids in responses if given[0] == [7, 8, 9])
        if late and [5, 6] not in given:
            raise ValueError("out of patience")
        return [0.0] * len(responses)

    with pytest.raises(RewardError, match=r"prompt 1, step .*out of patience") as caught:
        tq_fast.decode(prompts, baseline, reward, eos_token_id=end, **GREEDY)
    assert caught.value.step > step_of_end
    assert list(caught.value.finished) == [0]


def test_a_text_too_long_for_the_reward_is_an_error(tokenizers: Tokenizers) -> None:
    ours, theirs = tokenizers["bytes"], tokenizers["words"]
    # The same ids: known before any work.
    reward = scorer(ours, max_position_embeddings=20)
    baseline = language_of(ours)
    baseline.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was run"))
    with pytest.raises(
        InvalidArgument, match=r"prompts\[0\] has 18 tokens.* 28, but the reward model allows 20"
    ):
        tq_fast.decode(
            PROMPTS[:1], baseline, reward, tokenizer=ours, reward_tokenizer=ours, **GREEDY
        )
    # Another tokenizer: of the prompt known before any work, of the response when it is there.
    baseline = language_of(ours)
    options = {**GREEDY, "max_new_tokens": 30, "tokenizer": ours, "reward_tokenizer": theirs}
    with pytest.raises(
        InvalidArgument, match=r"prompts\[0\] has 37 tokens for the reward model, which allows 20"
    ):
        reward = scorer(theirs, max_position_embeddings=20)
        tq_fast.decode(PROMPTS[2:], baseline, reward, **options)
    with pytest.raises(RewardError, match=r"prompt 0, step 0: .*which allows 38"):
        reward = scorer(theirs, max_position_embeddings=38)
        tq_fast.decode(PROMPTS[2:], baseline, reward, **options)
