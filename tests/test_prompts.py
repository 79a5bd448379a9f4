"""Prompts are read in every form in which users have them."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tq_fast.errors import InvalidArgument
from tq_fast.prompts import read_prompts

WORDS = ["<unk>", "the", "soup", "was", "good", "user:", "assistant:"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


def make_tokenizer(chat: bool) -> PreTrainedTokenizerFast:
    vocabulary = {word: idx for idx, word in enumerate(WORDS)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=True)


CHAT = [{"role": "user", "content": "the soup"}]


@pytest.mark.parametrize(
    ("prompts", "expected"),
    [
        ("the soup", [(1, 2)]),
        (["the soup", "good"], [(1, 2), (4,)]),
        (CHAT, [(5, 1, 2, 6)]),
        ([CHAT, CHAT], [(5, 1, 2, 6)] * 2),
        ([1, 2], [(1, 2)]),
        ([[1, 2], [3]], [(1, 2), (3,)]),
        (torch.tensor([1, 2]), [(1, 2)]),
        (torch.tensor([[1, 2], [3, 4]]), [(1, 2), (3, 4)]),
        ([torch.tensor([1, 2]), torch.tensor([3], dtype=torch.int32)], [(1, 2), (3,)]),
        (["good", [1, 2], CHAT], [(4,), (1, 2), (5, 1, 2, 6)]),
        ([], []),
    ],
)
def test_every_form_of_prompt_is_read(tokenizer, prompts, expected) -> None:
    read = read_prompts(prompts, tokenizer, vocab_size=7)
    assert [prompt.token_ids for prompt in read] == expected


def test_rewards_see_what_was_given(tokenizer) -> None:
    read = read_prompts(["the soup", CHAT, [1, 2]], tokenizer, vocab_size=7)
    assert read[0].given == "the soup"
    assert read[1].given == CHAT
    assert read[2].given == "the soup"
    assert read_prompts([1, 2], None, vocab_size=7)[0].given == [1, 2]


def test_a_stream_depends_on_the_ids_and_on_equals_before_it_alone(tokenizer) -> None:
    alone = read_prompts("the soup", tokenizer, vocab_size=7)
    among = read_prompts(["good", "the soup", [1, 2]], tokenizer, vocab_size=7)
    assert among[1].key == alone[0].key
    assert len({prompt.key for prompt in among}) == 3


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("", r"prompts\[0\] is empty"),
        (["good", ""], r"prompts\[1\] is empty"),
        ([1, 99], r"prompts\[0\] has token id 99.*\[0, 7\)"),
        ([1, -1], r"token id -1"),
        (torch.tensor([1.0, 2.0]), r"prompts\[0\] must be a 1-D integer tensor"),
        (torch.zeros(1, 1, 1, dtype=torch.int64), r"shape \(1, 1, 1\)"),
        (7, "got int"),
        ([{"text": "good"}], r"prompts\[0\] must be text, chat messages"),
    ],
)
def test_a_bad_prompt_is_named(tokenizer, prompts, message) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read_prompts(prompts, tokenizer, vocab_size=7)


def test_text_needs_a_tokenizer() -> None:
    with pytest.raises(InvalidArgument, match="without a tokenizer"):
        read_prompts("the soup", None, vocab_size=7)


def test_messages_need_a_chat_template() -> None:
    with pytest.raises(InvalidArgument, match="no chat template"):
        read_prompts(CHAT, make_tokenizer(chat=False), vocab_size=7)
