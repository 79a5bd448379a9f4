"""Prompts from files: every form that is read, and every wrong line by its number."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from tq_fast.errors import InvalidArgument
from tq_fast.jobs.prompt_file import digest_prompts, read_prompt_file


def write(tmp_path: Path, text: str | bytes) -> str:
    path = tmp_path / "prompts"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def test_json_lines_may_hold_text_messages_or_token_ids(tmp_path: Path) -> None:
    source = write(
        tmp_path,
        '{"prompt": "a b", "id": "first", "source": "kept out"}\n\n'
        '{"messages": [{"role": "user", "content": "c"}], "id": 7}\n'
        '{"token_ids": [3, 4]}',
    )
    entries = read_prompt_file(source)
    assert [(entry.index, entry.id, entry.prompt) for entry in entries] == [
        (0, "first", "a b"),
        (1, 7, [{"role": "user", "content": "c"}]),
        (2, None, [3, 4]),
    ]


CHAT = [{"role": "user", "content": "c"}]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_holds_objects_texts_chats_or_token_ids(
    tmp_path: Path, indent: int | None
) -> None:
    rows = [{"prompt": "a", "id": 1}, "b", CHAT, [3, 4], {"messages": CHAT}, {"prompt": CHAT}]
    entries = read_prompt_file(write(tmp_path, json.dumps(rows, indent=indent)))
    assert [entry.prompt for entry in entries] == ["a", "b", CHAT, [3, 4], CHAT, CHAT]
    assert [entry.id for entry in entries] == [1, None, None, None, None, None]
    (entry,) = read_prompt_file(write(tmp_path, json.dumps(rows[0], indent=indent)))
    assert (entry.prompt, entry.id) == ("a", 1)


def test_what_else_a_line_holds_is_kept(tmp_path: Path) -> None:
    rows = [{"prompt": "a", "messages": CHAT, "gold": float("nan")}, {"token_ids": [1], "x": {}}]
    source = write(tmp_path, "\n".join(map(json.dumps, rows)))
    first, second = read_prompt_file(source)
    assert first.prompt == "a" and first.extra == {"messages": CHAT, "gold": None}
    assert second.extra == {"x": {}}


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_a_file_that_is_called_json_is_json(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"prompts{suffix}"
    path.write_text("Name a fruit.\n")
    with pytest.raises(InvalidArgument, match="line 1 is not JSON"):
        read_prompt_file(str(path))


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a b\nc\n", ["a b", "c"]),
        ("a b\r\n\r\n  c\r\n", ["a b", "  c"]),
        ("\ufeffa\nb", ["a", "b"]),
        # A line separator of Unicode is part of a prompt.
        ("a\u2028b\n", ["a\u2028b"]),
        # Text may look a little like JSON.
        ("5\nnull\n", ["5", "null"]),
        ("[1] See there.\n", ["[1] See there."]),
        ("[INST] hi [/INST]\n{{ x }}", ["[INST] hi [/INST]", "{{ x }}"]),
        ('"Hello," she said.\n', ['"Hello," she said.']),
    ],
)
def test_other_files_hold_one_text_a_line(tmp_path: Path, text: str, prompts: list[str]) -> None:
    entries = read_prompt_file(write(tmp_path, text))
    assert [entry.prompt for entry in entries] == prompts
    assert [entry.index for entry in entries] == list(range(len(prompts)))


def test_a_dash_is_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b'{"prompt": "a"}\n')))
    assert [entry.prompt for entry in read_prompt_file("-")] == ["a"]


GOOD = '{"prompt": "a"}\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        (" \n\n", "holds no prompt"),
        (b"\xff\xfe a", "must be UTF-8 text; byte 0 is not"),
        (GOOD + "\nb", "line 3 is not JSON"),
        (GOOD + "[1]", "line 2 must be a JSON object, got '\\[1\\]'"),
        (GOOD + '{"promt": "a"}', "line 2 must have one of the keys .* its keys are 'promt'"),
        (GOOD + '{"prompt": "a", "token_ids": [1]}', "line 2 must have one of the keys"),
        (GOOD + "{}", "its keys are none"),
        (GOOD + '{"prompt": 5}', "'prompt' must be text or a list of messages .* got 5"),
        (GOOD + '{"prompt": ["a"]}', "'prompt' must be text or a list of messages"),
        (GOOD + '{"prompt": [1, 2]}', "'prompt' must be text or a list of messages"),
        ('{"prompt": "a",}\n' + GOOD, "line 1 is not JSON"),
        ("{'prompt': 'a'}\n", "line 1 is not JSON"),
        ("# mine\n" + GOOD, "line 1 is not JSON, but line 2 is"),
        ('"a"\n"b"\n', "line 1 must be a JSON object"),
        ("[1, 2]\n5\n", "line 1 must be a JSON object"),
        ('[\n  {"prompt": "a"},\n  {"prompt": b}\n]', "line 3 is not JSON"),
        ('[{"prompt": "a"}, 7]', "item 1 must be a JSON object, got '7'"),
        ('[{"prompt": "a"}, {"x": 7}]', "item 1 must have one of the keys"),
        ("[]", "holds no prompt"),
        ("[[1, true]]", "item 0: 'token_ids' must be a list of integers"),
        (GOOD + '{"token_ids": "a"}', "'token_ids' must be a list, got 'a'"),
        (GOOD + '{"token_ids": [1.5]}', "'token_ids' must be a list of integers"),
        (GOOD + '{"token_ids": [true]}', "'token_ids' must be a list of integers"),
        (GOOD + '{"messages": [1, 2]}', "'messages' must be a list of messages"),
        (GOOD + '{"prompt": "a", "id": [1]}', "'id' must be text or an integer"),
        (GOOD + '{"prompt": "\\ud800"}', "line 2 cannot be written as UTF-8 JSON"),
    ],
)
def test_a_wrong_file_is_refused_and_the_line_named(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    with pytest.raises(InvalidArgument, match=message):
        read_prompt_file(write(tmp_path, text))


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"'.*/nothing' cannot be read: No such file"):
        read_prompt_file(str(tmp_path / "nothing"))


def test_the_digest_tells_prompts_ids_and_order_apart(tmp_path: Path) -> None:
    texts = [
        '{"prompt": "a"}\n{"prompt": "b"}',
        '{"prompt": "b"}\n{"prompt": "a"}',
        '{"prompt": "a"}\n{"prompt": "b", "id": 1}',
        '{"prompt": "a"}\n{"token_ids": [1]}',
    ]
    digests = {digest_prompts(read_prompt_file(write(tmp_path, text))) for text in texts}
    assert len(digests) == len(texts)
    # Other keys and white space do not enter the digest.
    same = '{"x": 1, "prompt": "a"}\n\n{"prompt":"b"}\n'
    assert digest_prompts(read_prompt_file(write(tmp_path, same))) == digest_prompts(
        read_prompt_file(write(tmp_path, texts[0]))
    )
