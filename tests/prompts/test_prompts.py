"""Prompts are read in every form in which users have them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BatchEncoding, PreTrainedTokenizerFast

from tq_fast.errors import InvalidArgument
from tq_fast.prompts import read_prompts, repeat_prompts

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


class Column:
    """A column as a data set gives it: a sequence in all but name."""

    def __init__(self, rows: list) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, idx: int) -> object:
        return self.rows[idx]


class Table:
    """A data frame or a data set: rows under several names."""

    column_names = ("prompt", "answer")


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
        (np.array([1, 2]), [(1, 2)]),
        (np.array([[1, 2], [3, 4]], dtype=np.int32), [(1, 2), (3, 4)]),
        ([np.int64(1), np.int32(2)], [(1, 2)]),
        ([np.array([1, 2]), [np.uint8(3)]], [(1, 2), (3,)]),
        (np.array(["the soup", "good"]), [(1, 2), (4,)]),
        (np.array([CHAT, CHAT], dtype=object), [(5, 1, 2, 6)] * 2),
        (("the soup" for _ in range(2)), [(1, 2)] * 2),
        ([torch.tensor([[1, 2]]), torch.tensor([[3]])], [(1, 2), (3,)]),
        (Column(["the soup", CHAT]), [(1, 2), (5, 1, 2, 6)]),
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
        (b"good", "got bytes"),
        ({"good", "soup"}, "got set"),
        ({"text": ["good"]}, "a mapping must have 'input_ids', its keys are 'text'"),
        (CHAT[0], "A chat is a list of messages"),
        (Table(), "a whole table .Table."),
        (np.array([1.0]), r"prompts\[0\] must be text, chat messages"),
        ({"input_ids": [1, 2], "attention_mask": [0, 0]}, r"prompts\[0\] is empty"),
        ({"input_ids": [1, 2], "attention_mask": [1]}, r"prompts\[0\] has 2 'input_ids'"),
        ({"input_ids": [[1, 2]], "attention_mask": []}, "1 rows of 'input_ids' and 0"),
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


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_mask_takes_the_padding_out(tokenizer, side: str) -> None:
    tokenizer.pad_token, tokenizer.padding_side = "<unk>", side
    batch = tokenizer(["good", "the soup was"], padding=True, return_tensors="pt")
    assert isinstance(batch, BatchEncoding) and batch["attention_mask"].min() == 0
    expected = [(4,), (1, 2, 3)]
    lists = {name: value.tolist() for name, value in batch.items()}
    rows = [{name: value[row] for name, value in batch.items()} for row in range(2)]
    alone = [tokenizer(text, return_tensors="np") for text in ("good", "the soup was")]
    ragged = tokenizer(["good", "the soup was"])
    for given in (batch, lists, rows, alone, ragged):
        read = read_prompts(given, tokenizer, vocab_size=7)
        assert [prompt.token_ids for prompt in read] == expected
    assert read_prompts(rows[0], tokenizer, vocab_size=7)[0].token_ids == (4,)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_without_its_mask_is_said(tokenizer, side: str) -> None:
    tokenizer.pad_token, tokenizer.padding_side = "<unk>", side
    batch = tokenizer(["good", "the soup was"], padding=True, return_tensors="pt")
    with pytest.warns(UserWarning, match=r"^prompts\[0\]: the padding token 0 stands at an end"):
        read_prompts(batch["input_ids"], tokenizer, vocab_size=7)


def with_ends(bos: str, eos: str) -> PreTrainedTokenizerFast:
    """A tokenizer that puts `bos` before a text and `eos` behind it."""
    tokenizer = make_tokenizer(chat=True)
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    pairs = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A {eos}".strip(), special_tokens=pairs
    )
    return tokenizer


def test_text_that_was_rendered_already_gets_no_second_bos() -> None:
    tokenizer = with_ends("<s>", "")
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    rendered = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    texts = read_prompts([rendered, "the soup", CHAT], tokenizer, vocab_size=9)
    assert [prompt.token_ids for prompt in texts] == [
        (7, 5, 1, 2, 6),
        (7, 1, 2),
        (7, 5, 1, 2, 6),
    ]


def test_token_ids_with_two_bos_are_named() -> None:
    tokenizer = with_ends("<s>", "")
    with pytest.warns(UserWarning, match=r"prompts\[1\] begins with the token '<s>' twice"):
        read_prompts([[7, 1], [7, 7, 1]], tokenizer, vocab_size=9)


def test_an_eos_that_the_tokenizer_appends_is_taken_off_and_said_once() -> None:
    tokenizer = with_ends("<s>", "</s>")
    with pytest.warns(UserWarning, match="appends its end-of-sequence token '</s>'") as said:
        read = read_prompts(["the soup", "good"], tokenizer, vocab_size=9)
    assert [prompt.token_ids for prompt in read] == [(7, 1, 2), (7, 4)]
    assert len(said) == 1
    # One that the text has itself stays.
    own = with_ends("<s>", "")
    assert read_prompts("good</s>", own, vocab_size=9)[0].token_ids == (7, 4, 8)


def test_repeated_prompts_have_streams_of_their_own(tokenizer) -> None:
    read = read_prompts(["good", "good", "soup"], tokenizer, vocab_size=7)
    repeated = repeat_prompts(read, 3)
    assert [prompt.token_ids for prompt in repeated] == [(4,)] * 6 + [(2,)] * 3
    assert repeated[::3] == read
    assert len({prompt.key for prompt in repeated}) == 9
    assert repeat_prompts(read, 1) == read


def test_columns_of_pandas_and_arrow_are_read(tokenizer) -> None:
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    for given, expected in (
        (pandas.Series(["the soup", "good"]), [(1, 2), (4,)]),
        (pandas.Series([np.array([1, 2]), [3]]), [(1, 2), (3,)]),
        (pandas.Series([np.array(CHAT, dtype=object)]), [(5, 1, 2, 6)]),
        (arrow.array(["the soup", "good"]), [(1, 2), (4,)]),
        (arrow.chunked_array([[CHAT], [CHAT]]), [(5, 1, 2, 6)] * 2),
    ):
        read = read_prompts(given, tokenizer, vocab_size=7)
        assert [prompt.token_ids for prompt in read] == expected
    with pytest.raises(InvalidArgument, match="a whole table"):
        read_prompts(pandas.DataFrame({"prompt": ["good"]}), tokenizer, vocab_size=7)
