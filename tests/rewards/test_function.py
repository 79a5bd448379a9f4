"""Functions as rewards: how they are called, what they may change, and which are refused."""

from __future__ import annotations

import asyncio
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

import tq_fast
from tests import zoo
from tests.rewards.texts import CHATS, PROMPTS
from tq_fast.errors import InvalidArgument, RewardError
from tq_fast.prompts import read_prompts
from tq_fast.rewards.base import Texts
from tq_fast.rewards.function import FunctionReward, load_function, names_a_function

Tokenizers = dict[str, PreTrainedTokenizerFast]
SHORT = {"k": 3, "horizon": 2, "max_new_tokens": 2, "eos_token_id": ()}


def ask(function: Any, tokenizer: PreTrainedTokenizerFast, prompts: list, *answers: str) -> list:
    read = read_prompts(prompts, tokenizer, vocab_size=len(tokenizer))
    reward = FunctionReward(function, Texts(tokenizer))
    return reward.ask(read, [tokenizer(answer)["input_ids"] for answer in answers])


def test_a_function_of_trl_is_called_by_keyword(tokenizers: Tokenizers) -> None:
    seen = {}

    def reward(completions: list, **kwargs: Any) -> list[float]:
        seen.update(kwargs, completions=completions)
        return [float(len(text)) for text in completions]

    ours = tokenizers["bytes"]
    assert ask(reward, ours, PROMPTS[:2], "yes", "no") == [3.0, 2.0]
    assert seen["prompts"] == PROMPTS[:2] and seen["completions"] == ["yes", "no"]
    assert seen["completion_ids"] == [ours("yes")["input_ids"], ours("no")["input_ids"]]


def test_a_function_of_trl_gets_the_answers_to_chats_as_messages(tokenizers: Tokenizers) -> None:
    calls = []

    def reward(prompts: list, completions: list, **kwargs: Any) -> list[float]:
        calls.append((prompts, completions))
        return [10.0 * len(calls) + i for i in range(len(prompts))]

    mixed = [CHATS[0], PROMPTS[0], CHATS[1]]
    scores = ask(reward, tokenizers["bytes-chat"], mixed, "a", "b", "c")
    (texts, chats) = calls
    assert texts == ([PROMPTS[0]], ["b"])
    assert chats[0] == CHATS
    assert chats[1] == [[{"role": "assistant", "content": text}] for text in "ac"]
    assert scores == [20.0, 10.0, 21.0]


def test_only_keywords_that_a_function_takes_are_passed(tokenizers: Tokenizers) -> None:
    def reward(*, completions: list) -> list[float]:
        return [1.0] * len(completions)

    assert ask(reward, tokenizers["bytes"], PROMPTS[:1], "yes") == [1.0]


def test_what_a_reward_changes_changes_nothing(tokenizers: Tokenizers) -> None:
    ours = tokenizers["bytes-chat"]
    chat = [{"role": "user", "content": "What is the fastest way?"}]
    prompts = [chat, chat]
    read = read_prompts(prompts, ours, vocab_size=len(ours))
    seen = []

    def reward(given: list, responses: list) -> list[float]:
        seen.append([[dict(message) for message in one] for one in given])
        for one in given:
            one[0]["content"] = "changed"
            one.append({"role": "user", "content": "more"})
        given.clear()
        responses.clear()
        return [0.0, 1.0]

    whole = FunctionReward(reward, Texts(ours))
    for _ in range(2):
        assert whole.ask(read, [[5], [6]]) == [0.0, 1.0]
    assert seen == [prompts, prompts]
    assert chat == [{"role": "user", "content": "What is the fastest way?"}]


async def _awaited(prompts: list, responses: list) -> list[float]:
    await asyncio.sleep(0)
    return [0.0] * len(responses)


class _AwaitedObject:
    async def __call__(self, prompts: list, responses: list) -> list[float]:
        return [0.0]


def _of_a_data_set(completions: list, answer: list, **kwargs: Any) -> list[float]:
    return [0.0]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (_awaited, "coroutine function"),
        (functools.partial(_awaited), "coroutine function"),
        (_AwaitedObject(), "coroutine function"),
        (lambda response: 0.0, r"has the signature \(response\)"),
        (lambda a, b, c: 0.0, r"has the signature \(a, b, c\)"),
        (_of_a_data_set, "missing a required argument: 'answer'"),
        (torch.nn.Linear(2, 2), r"has the signature \(input"),
    ],
)
def test_what_cannot_be_called_is_refused_with_the_signature_before_any_forward_pass(
    function: Any, reason: str
) -> None:
    baseline = zoo.language_model("llama")
    baseline.register_forward_pre_hook(lambda *_: pytest.fail("a forward pass was run"))
    with pytest.raises(InvalidArgument, match=reason) as caught:
        tq_fast.decode([5, 6], baseline, function, **SHORT)
    assert "(prompts, responses) -> floats" in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (None, "the reward returned None"),
        ("good", "the reward returned 'good'"),
        ([None, 1.0, 2.0], "the reward returned None as score 0"),
        ([1.0, 2.0], "the reward returned 2 scores for 3 responses"),
        (torch.zeros(3, 2), r"an array of shape \(3, 2\)"),
    ],
)
def test_a_wrong_return_is_an_error_that_says_what_came(returned: Any, message: str) -> None:
    baseline = zoo.language_model("llama")
    with pytest.raises(RewardError, match=f"prompt 0, step 0: .*{message}"):
        tq_fast.decode([5, 6], baseline, lambda prompts, responses: returned, **SHORT)


def test_a_default_dtype_of_sixteen_bits_changes_no_value() -> None:
    baseline = zoo.language_model("llama")

    def reward(prompts: list, responses: list) -> list[float]:
        return [1.0 + sum(ids) / 1024 for ids in responses]

    expected = tq_fast.decode([5, 6], baseline, reward, **SHORT)
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = tq_fast.decode([5, 6], baseline, reward, **SHORT)
    finally:
        torch.set_default_dtype(torch.float32)
    for ours, theirs in zip(found.traces[0], expected.traces[0], strict=True):
        assert torch.equal(ours.rewards, theirs.rewards)
        assert ours.rewards.dtype == torch.float32


def test_a_function_is_found_by_the_name_of_its_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_rewards.py").write_text(
        "class Kind:\n    @staticmethod\n    def score(prompts, responses):\n"
        "        return [1.0] * len(responses)\n"
    )
    (tmp_path / "broken_rewards.py").write_text("1 / 0\n")
    (tmp_path / "incomplete_rewards.py").write_text("import no_such_module_at_all\n")
    monkeypatch.chdir(tmp_path)
    assert load_function("my_rewards:Kind.score", "reward")([], [1, 2]) == [1.0, 1.0]
    for name, message in {
        "my_reward:score": "there is no module 'my_reward'",
        "my_rewards:score": "'my_rewards' has no 'score'",
        "broken_rewards:score": "importing 'broken_rewards' raised ZeroDivisionError",
        "incomplete_rewards:score": "raised ModuleNotFoundError.*no_such_module_at_all",
    }.items():
        with pytest.raises(InvalidArgument, match=f"reward='{name}': .*{message}"):
            load_function(name, "reward")


def test_a_decoder_takes_the_name_of_a_function(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "named_rewards.py").write_text(
        "def evens(prompts, responses):\n"
        "    return [float(sum(t % 2 == 0 for t in ids)) for ids in responses]\n"
    )
    monkeypatch.chdir(tmp_path)
    baseline = zoo.language_model("llama")
    named = tq_fast.TransferDecoder(baseline, "named_rewards:evens")
    assert named.reward.name == "evens"
    assert named.decode([5, 6], **SHORT).sequences[0].shape == (2,)


def test_folders_and_hub_ids_are_no_functions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert names_a_function("pkg.module:name") and names_a_function("module:Class.method")
    (tmp_path / "a:b").mkdir()
    for name in ("a:b", "org/model", "C:\\models", "module", "tiny:", ":name", "a:b:c", "1a:b"):
        assert not names_a_function(name)
