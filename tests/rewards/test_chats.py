"""Chats that were rendered before they came are read back exactly, or not at all."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.rewards.templates import TEMPLATES, marked
from tq_fast.prompts import read_prompts
from tq_fast.rewards.chats import ChatParser, ChatReader

USER = [{"role": "user", "content": "What is 2 + 2?"}]
TURNS = [
    *USER,
    {"role": "assistant", "content": "Four.\n\nOr 4."},
    {"role": "user", "content": " And <3 + 3>? "},
]
SYSTEM = [{"role": "system", "content": "Be short."}, *USER]


def rendered(tokenizer: PreTrainedTokenizerFast, chat: list, *, opened: bool = True) -> str:
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=opened)


@pytest.mark.parametrize(
    ("name", "chat"),
    [(n, c) for n in TEMPLATES for c in (USER, TURNS, SYSTEM) if (n, c) != ("strict", SYSTEM)],
)
def test_a_rendered_chat_gives_its_messages(name: str, chat: list) -> None:
    tokenizer = marked(TEMPLATES[name])
    parsed = ChatParser(tokenizer).parse(rendered(tokenizer, chat))
    # Some templates trim: what they render is the same.
    assert rendered(tokenizer, parsed) == rendered(tokenizer, chat)
    assert [message["role"] for message in parsed] == [message["role"] for message in chat]
    if name != "trims":
        assert parsed == chat


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_no_rendered_chat_gives_nothing(name: str) -> None:
    tokenizer = marked(TEMPLATES[name])
    parser = ChatParser(tokenizer)
    whole = rendered(tokenizer, TURNS)
    closed = rendered(tokenizer, TURNS, opened=False)
    for text in (
        "",
        "What is 2 + 2?",
        "user: hi",
        closed,
        f"Please: {whole}",
        whole + "Sure",
        whole[4:],
    ):
        assert parser.parse(text) is None


def test_a_default_system_message_of_the_template_is_not_read_as_given() -> None:
    tokenizer = marked(TEMPLATES["default-system"])
    assert ChatParser(tokenizer).parse(rendered(tokenizer, USER)) == USER


def test_a_template_that_marks_nothing_recognises_nothing() -> None:
    tokenizer = marked("{% for m in messages %}{{ m['content'] }} {% endfor %}")
    parser = ChatParser(tokenizer)
    assert parser.parse(rendered(tokenizer, USER)) is None
    assert parser.markers == ()


@pytest.mark.parametrize("form", ["text", "ids", "doubled", "ended"])
def test_a_prompt_is_the_chat_that_it_was_rendered_from(form: str) -> None:
    tokenizer = marked(TEMPLATES["chatml"], adds_start=True)
    text = rendered(tokenizer, TURNS)
    prompt = {
        "text": text,
        "ids": tokenizer.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"],
        "doubled": tokenizer(text)["input_ids"],
        "ended": [*tokenizer(text)["input_ids"], tokenizer.eos_token_id],
    }[form]
    (read,) = read_prompts(prompt, tokenizer, vocab_size=len(tokenizer))
    reader = ChatReader(tokenizer, None)
    assert reader.messages(read) == TURNS
    assert reader.markers(read) == ()


def test_markers_show_a_chat_that_cannot_be_read() -> None:
    tokenizer = marked(TEMPLATES["chatml"])
    reader = ChatReader(tokenizer, None)
    broken = rendered(tokenizer, TURNS) + "It is"
    ids = tokenizer(broken)["input_ids"]
    for prompt in (broken, ids):
        (read,) = read_prompts(prompt, tokenizer, vocab_size=len(tokenizer))
        assert reader.messages(read) is None
        assert reader.markers(read) == ("<|im_start|>", "<|im_end|>")
    (plain,) = read_prompts("What is it?", tokenizer, vocab_size=len(tokenizer))
    assert reader.markers(plain) == ()
