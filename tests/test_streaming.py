"""Tokens one by one, as they are chosen: streams, their text, and what an early end leaves."""

from __future__ import annotations

import contextlib
import gc
import weakref
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import tq_fast
from tq_fast.forest.language import LanguageForest
from tq_fast.models.tiny import load_tiny_world
from tq_fast.presets import open_method
from tq_fast.rollouts.stopping import StopStrings
from tq_fast.streaming import TextPieces

WORLD = load_tiny_world()
SHORT = {"k": 4, "horizon": 4, "max_new_tokens": 12}
PROMPT = WORLD.prompts[0]


@pytest.fixture(scope="module")
def decoder() -> tq_fast.TransferDecoder:
    return tq_fast.TransferDecoder(WORLD.baseline, WORLD.reward, sft=WORLD.sft)


def bytes_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte is a token, so that most characters of most languages take several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<s>": 0, **{letter: idx for idx, letter in enumerate(alphabet, start=1)}}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def pieces_of(text: str, stop: tuple[str, ...] = ()) -> list[str]:
    tokenizer = bytes_tokenizer()
    pieces = TextPieces(StopStrings(stop, tokenizer), skip_special_tokens=True)
    ids = tokenizer(text)["input_ids"]
    return [pieces.add(token, is_last=idx + 1 == len(ids)) for idx, token in enumerate(ids)]


def test_a_stream_has_the_tokens_the_traces_and_the_result_of_decode(decoder: Any) -> None:
    stream = decoder.stream(PROMPT, **SHORT)
    tokens = list(stream)
    expected = decoder.decode(PROMPT, **SHORT)
    assert [token.token_id for token in tokens] == expected.sequences[0].tolist()
    assert [token.step for token in tokens] == expected.traces[0]
    assert stream.result == expected
    assert "".join(token.text for token in tokens) == expected.texts[0]


def test_a_token_comes_before_the_next_one_is_decoded(decoder: Any, monkeypatch: Any) -> None:
    rolled: list[int] = []
    roll_out = LanguageForest.encode
    monkeypatch.setattr(
        LanguageForest,
        "encode",
        lambda *given, **options: rolled.append(1) or roll_out(*given, **options),
    )
    stream = decoder.stream(PROMPT, **SHORT)
    assert not rolled, "nothing is decoded before the first token is asked for"
    first = next(stream)
    assert first.step.token_id == first.token_id
    with pytest.raises(tq_fast.InvalidArgument, match="tokens so far: 1"):
        _ = stream.result
    stream.close()


def test_a_stream_that_is_left_early_frees_its_forests(decoder: Any, monkeypatch: Any) -> None:
    opened: list[weakref.ReferenceType[LanguageForest]] = []
    init = LanguageForest.__init__

    def remember(forest: LanguageForest, *given: Any, **options: Any) -> None:
        init(forest, *given, **options)
        opened.append(weakref.ref(forest))

    monkeypatch.setattr(LanguageForest, "__init__", remember)
    with decoder.stream(PROMPT, **SHORT) as stream:
        for _ in zip(range(2), stream, strict=False):
            assert all(forest() is not None for forest in opened)
    gc.collect()
    assert len(opened) == 2, "the baseline's and the SFT model's"
    assert [forest() for forest in opened] == [None, None]
    assert list(stream) == [], "a closed stream has no more tokens"
    with pytest.raises(tq_fast.InvalidArgument, match="which it was not"):
        _ = stream.result
    # A stream that nobody holds any more is closed, too.
    opened.clear()
    next(decoder.stream(PROMPT, **SHORT))
    gc.collect()
    assert opened and [forest() for forest in opened] == [None] * len(opened)


def test_between_two_tokens_torch_is_as_the_caller_has_it(decoder: Any) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in decoder.stream(PROMPT, **SHORT):
            assert torch.is_grad_enabled()
            assert torch.is_autocast_enabled("cpu")
    with torch.inference_mode():
        tokens = list(decoder.stream(PROMPT, **SHORT))
    assert [t.token_id for t in tokens] == decoder.decode(PROMPT, **SHORT).sequences[0].tolist()


def test_two_streams_of_one_decoder_take_turns(decoder: Any) -> None:
    both = [decoder.stream(prompt, **SHORT) for prompt in WORLD.prompts[:2]]
    tokens: list[list[int]] = [[], []]
    for pair in zip(*both, strict=False):
        for mine, token in zip(tokens, pair, strict=True):
            mine.append(token.token_id)
        # The decoder serves others meanwhile.
        decoder.decode(PROMPT, **{**SHORT, "max_new_tokens": 1})
    for mine, prompt in zip(tokens, WORLD.prompts, strict=False):
        whole = decoder.decode(prompt, **SHORT).sequences[0].tolist()
        assert mine == whole[: len(mine)] and len(mine) > 3


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("baseline", {}),
        ("best_of_n", {"n": 3}),
        ("refine", {"first": 2, "branches": 2, "stages": 1}),
        ("blocks", {"branches": 2, "block_len": 5}),
        ("collab", {"baselines": [WORLD.baseline, WORLD.sft], **SHORT, "max_new_tokens": 4}),
        ("transfer_q", SHORT),
    ],
)
def test_every_method_streams_the_tokens_of_its_result(method: str, options: Any) -> None:
    models = {"baseline": WORLD.baseline, "reward": WORLD.reward}
    if method == "collab":
        models.pop("baseline")
    opened = open_method(method, **models, **{"max_new_tokens": 12, **options})
    stream = opened.stream(PROMPT)
    tokens = list(stream)
    assert stream.result == opened.decode(PROMPT)
    assert [token.token_id for token in tokens] == stream.result.sequences[0].tolist()
    assert "".join(token.text for token in tokens) == stream.result.texts[0]


def test_no_piece_ends_within_a_character() -> None:
    text = "né 猫🐈 fin"
    pieces = pieces_of(text)
    assert len(pieces) == len(text.encode())
    assert "".join(pieces) == text
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces[:-1])
    assert pieces[1:3] == ["", "é"]


def test_the_text_of_a_stream_ends_before_its_stop_string() -> None:
    pieces = pieces_of("a\nb\n\nQ:", stop=("\n\nQ:",))
    assert pieces == ["a", "", "\nb", "", "", "", ""]
    # What only looked like a beginning of the stop string comes when it has proved to be none.
    assert pieces_of("x\n\nZ.", stop=("\n\nQ:",)) == ["x", "", "", "\n\nZ", "."]


def test_bytes_that_are_no_text_come_with_the_last_token() -> None:
    tokenizer = bytes_tokenizer()
    pieces = TextPieces(StopStrings((), tokenizer), skip_special_tokens=True)
    ids = tokenizer("a猫")["input_ids"][:-1]
    said = [pieces.add(token, is_last=idx + 1 == len(ids)) for idx, token in enumerate(ids)]
    assert "".join(said) == tokenizer.decode(ids)


def test_a_stop_string_ends_a_stream_as_it_ends_a_decode(decoder: Any) -> None:
    stream = decoder.stream(PROMPT, **SHORT, stop=" was")
    tokens = list(stream)
    text = "".join(token.text for token in tokens)
    assert text == stream.result.texts[0]
    said = decoder.tokenizer.decode([token.token_id for token in tokens])
    assert said.endswith(" was") and text == said.removesuffix(" was")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([PROMPT, PROMPT], {}, "prompt must be one prompt in a stream, got 2"),
        (PROMPT, {"num_return_sequences": 2}, "num_return_sequences must be 1 in a stream"),
        (PROMPT, {"kk": 3}, "unknown option 'kk'; did you mean 'k'"),
        (PROMPT, {"max_new_tokens": 10_000}, "allows"),
        (PROMPT, {"memory_budget": 0}, "memory_budget"),
        ("", {}, "is empty"),
    ],
)
def test_what_is_wrong_is_refused_before_the_first_token(
    decoder: Any, prompt: Any, options: Any, message: str
) -> None:
    with pytest.raises(tq_fast.InvalidArgument, match=message):
        decoder.stream(prompt, **options)


def test_a_failing_reward_ends_the_stream_with_its_error() -> None:
    calls: list[int] = []

    def fail_later(prompts: Any, responses: Any) -> list[float]:
        calls.append(1)
        if len(calls) > 3:
            raise RuntimeError("no more scores")
        return [0.0] * len(prompts)

    decoder = tq_fast.TransferDecoder(WORLD.baseline, fail_later)
    stream = decoder.stream(PROMPT, **SHORT)
    with pytest.raises(tq_fast.RewardError, match="no more scores"):
        list(stream)
    with contextlib.suppress(StopIteration):
        next(stream)
    with pytest.raises(tq_fast.InvalidArgument, match="which it was not"):
        _ = stream.result


def test_without_a_tokenizer_tokens_have_no_text() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=20, num_attention_heads=2, num_key_value_heads=2, **sizes)
    model = LlamaForCausalLM(config).eval()
    decoder = tq_fast.TransferDecoder(model, lambda prompts, responses: [0.0] * len(prompts))
    tokens = list(decoder.stream([3, 4], k=3, max_new_tokens=4, horizon=1, eos_token_id=()))
    assert [token.text for token in tokens] == [""] * 4
