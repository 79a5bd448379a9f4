"""Chats: one form of message, the template's options, and what a template refuses."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.prompts.test_prompts import make_tokenizer
from tq_fast.errors import InvalidArgument
from tq_fast.prompts import PromptReader, read_prompts
from tq_fast.prompts.chats import chat_token_ids, check_template_options, read_messages

USER = {"role": "user", "content": "the soup"}
CALL = [{"type": "function", "function": {"name": "rain", "arguments": {"city": "Rome"}}}]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer(chat=True)


@pytest.mark.parametrize(
    ("message", "content"),
    [
        (USER, "the soup"),
        ({"role": "user", "content": [{"type": "text", "text": "the"}]}, "the"),
        ({"role": "user", "content": [{"type": "text", "text": "a "}, "b"]}, "a b"),
        ({"role": "assistant", "tool_calls": CALL}, ""),
        ({"role": "assistant", "content": None, "tool_calls": CALL}, ""),
        ({"role": "tool", "content": "no"}, "no"),
        ({"role": "tool", "content": {"rain": False}}, {"rain": False}),
        ({"role": "tool", "content": [{"type": "text", "text": "no"}]}, "no"),
    ],
)
def test_every_content_becomes_text(message: dict[str, Any], content: Any) -> None:
    before = repr(message)
    (read,) = read_messages([message])
    assert read["content"] == content
    assert repr(message) == before, "the caller's message was changed"
    assert None not in read.values()


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": [{"type": "image_url"}]}, "got one of type 'image_url'"),
        ({"role": "user", "content": [{"type": "text"}]}, "got one of type 'text'"),
        ({"role": "user", "content": [{"text": "a"}]}, "got one {'text': 'a'}"),
        ({"role": "tool", "content": [{"type": "image"}]}, "got one of type 'image'"),
        ({"role": "user", "content": 5}, "list of text parts, got 5"),
        ({"role": "user"}, "list of text parts, got None"),
        ({"role": "system", "content": None}, "got None"),
    ],
)
def test_other_contents_are_refused_by_name(
    tokenizer, message: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InvalidArgument, match=rf"prompts\[1\]: message 1 .*{reason}"):
        read_prompts([[USER], [USER, message]], tokenizer, vocab_size=7)


def test_an_assistant_turn_at_the_end_is_continued(tokenizer) -> None:
    chat = [USER, {"role": "assistant", "content": "was good"}]
    (prompt,) = read_prompts(chat, tokenizer, vocab_size=7)
    assert prompt.token_ids == (5, 1, 2, 6, 3, 4)
    assert prompt.is_continued and prompt.given == chat


def test_a_new_turn_may_follow_that_of_the_assistant(tokenizer) -> None:
    chat = [USER, {"role": "assistant", "content": "was"}]
    (prompt,) = read_prompts(
        chat, tokenizer, vocab_size=7, template_options={"continue_final_message": False}
    )
    assert prompt.token_ids == (5, 1, 2, 6, 3, 6)
    assert not prompt.is_continued
    assert prompt.template_options == {}


def test_an_empty_turn_of_the_assistant_is_an_open_one(tokenizer) -> None:
    for content in ("", None):
        chat = [USER, {"role": "assistant", "content": content}]
        (prompt,) = read_prompts(chat, tokenizer, vocab_size=7)
        assert prompt.token_ids == (5, 1, 2, 6) and not prompt.is_continued
        assert prompt.given == [USER]


def test_a_tool_call_at_the_end_waits_for_the_tool(tokenizer) -> None:
    with pytest.raises(InvalidArgument, match=r"prompts\[0\].*tool's answer must follow"):
        read_prompts([USER, {"role": "assistant", "tool_calls": CALL}], tokenizer, vocab_size=7)


THINKS = "{% if enable_thinking %}good {% endif %}{{ messages[0]['content'] }}"


def test_template_options_reach_the_template(tokenizer) -> None:
    tokenizer.chat_template = THINKS
    for on, expected in ((True, (4, 1, 2)), (False, (1, 2))):
        (prompt,) = read_prompts(
            [USER], tokenizer, vocab_size=7, template_options={"enable_thinking": on}
        )
        assert prompt.token_ids == expected
        assert prompt.template_options == {"enable_thinking": on}


def test_another_template_is_not_handed_on_to_rewards(tokenizer) -> None:
    options = {"chat_template": THINKS, "enable_thinking": True}
    (prompt,) = read_prompts([USER], tokenizer, vocab_size=7, template_options=options)
    assert prompt.token_ids == (4, 1, 2)
    assert prompt.template_options == {"enable_thinking": True}
    (prompt,) = read_prompts(
        [USER], make_tokenizer(chat=False), vocab_size=7, template_options=options
    )
    assert prompt.token_ids == (4, 1, 2)


def test_an_option_that_the_template_does_not_read_is_said_once(tokenizer) -> None:
    with pytest.warns(UserWarning, match="does not read 'enable_thinking'") as said:
        reader = PromptReader(tokenizer, vocab_size=7, template_options={"enable_thinking": False})
        for idx in range(3):
            reader.read(idx, [USER])
    assert len(said) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([1], "template_options must be a mapping of names"),
        ({1: 2}, "template_options must be a mapping of names"),
        ({"tokenize": False}, "template_options cannot hold 'tokenize'"),
        ({"add_generation_prompt": False}, "cannot hold 'add_generation_prompt'"),
    ],
)
def test_wrong_template_options_are_refused(options: Any, message: str) -> None:
    with pytest.raises(InvalidArgument, match=message):
        check_template_options(options)


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ 'a' + 1 }}", "can only concatenate"),
        ("{% for %}", "Expected an expression|expected"),
        ("{{ messages[9].content.x }}", "undefined|no element"),
    ],
)
def test_what_a_template_refuses_names_the_prompt(tokenizer, template: str, reason: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(InvalidArgument, match=rf"prompts\[1\]: the chat template.*({reason})"):
        read_prompts(["the soup", [USER]], tokenizer, vocab_size=7)
    with pytest.raises(InvalidArgument, match="the chat template cannot render the chat"):
        chat_token_ids(tokenizer, [USER])
